"""The single-pass mode of `evaluate`: the same tables as the event mode, wherever both apply."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from evaluator import Settings, evaluate
from evaluator.changes import Failure
from evaluator.single_pass import SINGLE_PASS_ROUTINGS
from plans import InvalidInput, Services
from tests.evaluator.comparison import settings_of, trace_of
from tests.evaluator.random_scenarios import random_case
from tests.plans.strategies import entry, group, plan
from traces.table import RequestTrace

AT_ARRIVAL = Settings(admission="arrival", order="fifo")


def in_both_modes(one, services, trace, settings, **options):
    return [
        evaluate(one, services, trace, settings=settings, mode=mode, **options) for mode in ("event", "single-pass")
    ]


def test_both_modes_say_the_same_of_every_request():
    """Law: outcome, reason, place, batch and, bit by bit, latency are the same; so is everything counted from them."""
    good = dropped = 0
    for seed in range(7000, 7060):
        told = random_case(seed, "admission").scenario
        settings = replace(settings_of(told), until_s=None, warmup_s=0.0)
        if settings.routing not in SINGLE_PASS_ROUTINGS:
            continue
        event, single = in_both_modes(told.plan, told.services, trace_of(told.rows), settings)
        assert (event.mode, single.mode) == ("event", "single-pass")
        pd.testing.assert_frame_equal(event.requests, single.requests, check_exact=True)
        assert event.summary.services == single.summary.services
        assert event.summary.wall_s == single.summary.wall_s
        assert event.summary.gpu_hours == single.summary.gpu_hours
        for mine, other in zip(event.summary.groups, single.summary.groups, strict=True):
            assert mine.utilisation == pytest.approx(other.utilisation)
        good += event.summary.good
        dropped += sum(service.dropped for service in event.summary.services)
    assert good > 300
    assert dropped > 100


def detecting(**fields):
    latency = {"name": "detect", "slo": {"deadline": 1}, "variants": [{"model": "detect-model"}]}
    other = {"name": "video", "class": "frequency", "slo": {"fps": 10}, "variants": [{"model": "video-model"}]}
    return Services.model_validate({"services": [latency, other], **fields})


def trace(service="detect"):
    return RequestTrace(pd.DataFrame({"arrival_s": [0.0, 1.0], "service": service}))


ONE = plan([group("node-0", (0,), [entry("detect"), entry("video")])])


def test_the_single_pass_is_taken_where_it_applies_and_the_events_elsewhere():
    assert evaluate(ONE, detecting(), trace(), settings=AT_ARRIVAL).mode == "single-pass"
    assert evaluate(ONE, detecting(), trace()).mode == "event"
    assert evaluate(ONE, detecting(), trace("video"), settings=AT_ARRIVAL).mode == "event"
    assert evaluate(ONE, detecting(), trace(), settings=AT_ARRIVAL, timeline_s=1.0).mode == "event"
    late = replace(AT_ARRIVAL, warmup_s=0.5)
    assert evaluate(ONE, detecting(), trace(), settings=late).mode == "event"


def test_requests_are_kept_or_not():
    kept, counted = (
        evaluate(ONE, detecting(), trace(), settings=AT_ARRIVAL, keep_requests=keep) for keep in (True, False)
    )
    assert kept.summary == counted.summary
    assert counted.log is None


def test_every_reason_against_a_single_pass_is_named():
    with pytest.raises(InvalidInput) as caught:
        evaluate(
            ONE,
            detecting(),
            trace("video"),
            settings=Settings(routing="shortest-queue", warmup_s=0.5, until_s=9.0),
            changes=[Failure(at_s=1.0, node="node-0")],
            timeline_s=1.0,
            mode="single-pass",
        )
    fields = ["admission", "routing", "warmup_s", "until_s", "service", "timeline_s", "changes"]
    assert [fault.field for fault in caught.value.faults] == fields
    with pytest.raises(InvalidInput, match="'batch'"):
        evaluate(ONE, detecting(), trace(), mode="batch")  # type: ignore[arg-type]
