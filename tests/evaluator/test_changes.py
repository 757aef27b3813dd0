from __future__ import annotations

import math

import pytest

from evaluator.changes import Failure, PlanChange, Recovery, check_changes, random_failures, schedule
from plans import InvalidInput
from tests.plans.strategies import cluster, entry, group, plan


def one(service, node="node-0", gpu=0, **fields):
    return group(node, (gpu,), [entry(service, **fields)])


def test_a_node_loads_one_after_the_other_and_nodes_work_side_by_side():
    """detect stays; node-0 loads 2 + 3 s, node-1 loads 4 s; the flip comes when the slower of both is done."""
    stays = one("detect")
    target = plan(
        [
            stays,
            one("segment", gpu=1, load_s=2.0, weight_bytes=90),
            one("classify", gpu=2, load_s=3.0, weight_bytes=80),
            one("embed", node="node-1", load_s=4.0),
        ]
    )
    found = schedule(plan([stays]), target, cluster(), start_s=10.0)
    spans = {span.service: (span.start_s, span.end_s) for span in found.early_loads}
    assert spans == {"segment": (10, 12), "classify": (12, 15), "embed": (10, 14)}
    assert (found.flip_s, found.last_flip_s, found.end_s) == (15, 15, 15)
    assert found.drains == found.late_loads == ()


def test_what_leaves_is_unloaded_a_deadline_after_the_flip():
    found = schedule(
        plan([one("detect", deadline_s=0.7), one("segment", gpu=1)]),
        plan([one("segment", gpu=1)]),
        cluster(),
        start_s=1,
    )
    assert [(span.service, span.start_s, span.end_s) for span in found.drains] == [("detect", 1, 1.7)]
    assert (found.flip_s, found.end_s) == (1, 1.7)


def test_what_has_no_room_is_loaded_when_the_last_has_gone():
    """Memory 1000: 600 + 600 do not fit, so segment waits for detect's deadline after the flip at once."""
    before = plan([one("detect", memory_bytes=(600,), deadline_s=0.5)])
    after = plan([one("segment", memory_bytes=(600,), load_s=2.0)])
    found = schedule(before, after, cluster(), start_s=3.0)
    assert found.early_loads == ()
    assert found.flip_s == 3.0
    assert [(span.service, span.start_s, span.end_s) for span in found.late_loads] == [("segment", 3.5, 5.5)]
    assert (found.last_flip_s, found.end_s) == (5.5, 5.5)


def test_nothing_to_do_takes_no_time():
    same = plan([one("detect")])
    assert schedule(same, same, cluster(), start_s=2.0).end_s == 2.0


def test_random_failures_alternate_per_node_and_repeat_with_their_seed():
    """Law: the same seed gives the same events. A year of nodes has about the mean times asked for."""
    year_s = 365 * 86400.0
    events = random_failures(cluster(), mtbf_s=36_000, mttr_s=3_600, until_s=year_s, seed=4)
    assert events == random_failures(cluster(), mtbf_s=36_000, mttr_s=3_600, until_s=year_s, seed=4)
    assert events != random_failures(cluster(), mtbf_s=36_000, mttr_s=3_600, until_s=year_s, seed=5)
    assert [event.at_s for event in events] == sorted(event.at_s for event in events)
    for node in ("node-0", "node-1"):
        own = [event for event in events if event.node == node]
        assert [type(event) for event in own[:4]] == [Failure, Recovery, Failure, Recovery]
        down = [b.at_s - a.at_s for a, b in zip(own[::2], own[1::2], strict=False)]
        assert sum(down) / len(down) == pytest.approx(3_600, rel=0.15)
        assert len(down) == pytest.approx(year_s / 39_600, rel=0.15)


def test_no_time_has_no_failures():
    assert random_failures(cluster(), mtbf_s=1, mttr_s=1, until_s=0, seed=1) == ()


def test_changes_that_make_no_sense_are_refused_all_at_once():
    with pytest.raises(InvalidInput) as caught:
        check_changes(
            [
                Failure(at_s=-1.0, node="node-0"),
                Failure(at_s=1.0, node="node-9"),
                Recovery(at_s=math.inf, node="node-0", gpu=7),
                PlanChange(at_s=0.0, plan=plan([one("detect", node="node-7")])),
            ],
            cluster(),
        )
    assert len(caught.value.faults) == 5
    with pytest.raises(InvalidInput, match="no cluster"):
        check_changes([PlanChange(at_s=0.0, plan=plan([one("detect")]))], None)
    with pytest.raises(InvalidInput, match="mtbf_s"):
        random_failures(cluster(), mtbf_s=0, mttr_s=1, until_s=1, seed=1)
    check_changes([Failure(at_s=0.0, node="anything")], None)
