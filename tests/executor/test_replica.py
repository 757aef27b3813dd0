from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.replica import TRANSITIONS, Event, Replica, advance
from executor.state import DesiredReplica, Phase, ReplicaKey


def settings(max_batch=1, memory=(1,)):
    return DesiredReplica(
        service="s",
        variant="v",
        max_batch=max_batch,
        deadline_s=1.0,
        batch_latency_s=(0.1,) * max_batch,
        memory_bytes=memory,
    )


def replica(**changed):
    key = ReplicaKey(group="n/0", service="s", variant="v")
    return Replica(**({"key": key, "gpus": (0,), "settings": settings()} | changed))


def after(start, *events):
    for event in events:
        start = advance(start, event)
    return start


def test_a_load_that_ends_before_the_commit_is_staged_and_then_serves():
    staged = after(replica(), Event.LOADED)
    assert (staged.phase, staged.committed) == (Phase.STAGED, False)
    assert after(staged, Event.COMMITTED).phase is Phase.SERVING


def test_a_load_that_ends_after_the_commit_serves_at_once():
    assert after(replica(), Event.COMMITTED, Event.LOADED).phase is Phase.SERVING


def test_a_replica_that_lost_its_worker_serves_again_after_a_retry():
    lost = advance(after(replica(), Event.LOADED, Event.COMMITTED), Event.WORKER_LOST, "killed")
    assert (lost.phase, lost.reason) == (Phase.FAILED, "killed")
    assert after(lost, Event.RETRIED, Event.LOADED).phase is Phase.SERVING


def test_a_commit_does_not_hide_why_a_replica_failed():
    failed = advance(replica(), Event.LOAD_FAILED, "no memory")
    assert advance(failed, Event.COMMITTED).reason == "no memory"


def test_staged_settings_apply_at_the_commit_and_not_before():
    changed = replica(phase=Phase.SERVING, committed=True, staged=settings(4, (9,)))
    assert changed.settings.max_batch == 1
    assert changed.max_batch_needed == 4
    assert changed.memory_bytes == (9,)
    committed = advance(changed, Event.COMMITTED)
    assert (committed.settings.max_batch, committed.staged) == (4, None)


@given(st.sampled_from(Phase), st.sampled_from(Event))
def test_an_event_that_cannot_happen_in_a_phase_is_refused(phase, event):
    if (phase, event) in TRANSITIONS:
        advance(replica(phase=phase), event)
    else:
        with pytest.raises(ValueError, match="cannot happen"):
            advance(replica(phase=phase), event)


@given(st.sampled_from(Phase))
def test_every_phase_can_be_retired_and_can_lose_its_worker(phase):
    assert advance(replica(phase=phase), Event.RETIRED).phase is Phase.DRAINING
    advance(replica(phase=phase), Event.WORKER_LOST)


def test_draining_never_ends_in_another_phase():
    assert {phase for (start, _), phase in TRANSITIONS.items() if start is Phase.DRAINING} == {Phase.DRAINING}
