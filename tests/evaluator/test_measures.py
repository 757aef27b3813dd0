"""What is read from a run: exact and from histograms, over time, per stream, as tables."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from evaluator import Settings, evaluate
from evaluator.measures import cell_latency_s
from evaluator.recording import cell_of
from plans import InvalidInput, Services
from tests.plans.strategies import entry, group, plan
from traces.outcomes import OUTCOMES, summarise
from traces.table import RequestTrace

ROWS = tuple((0.01 * (1 + 0.4 * b),) for b in range(4))


def services_of(*names, deadline=0.08, **fields):
    variant = {"model": "m", "accuracy": 0.5}
    return Services.model_validate(
        {"services": [{"name": name, "slo": {"deadline": deadline}, "variants": [variant]} | fields for name in names]}
    )


def two_groups():
    """Detect on both groups, segment on the second alone, classify nowhere."""
    here = {"variant": "m", "max_batch": 4, "stage_latency_s": ROWS}
    return plan(
        [
            group("node-0", (0,), [entry("detect", **here)]),
            group("node-1", (0,), [entry("detect", **here), entry("segment", **here)]),
        ]
    )


def some_trace(count=4_000, rate_rps=400.0, seed=1):
    rng = np.random.default_rng(seed)
    names = np.array(["detect", "detect", "segment", "classify"])[rng.integers(0, 4, count)]
    times = np.cumsum(rng.exponential(1 / rate_rps, count))
    return RequestTrace(pd.DataFrame({"arrival_s": times, "service": names}), duration_s=float(times[-1]) + 1.0)


SERVICES = services_of("detect", "segment", "classify", "unused")


def test_the_summary_is_that_of_the_table_of_requests():
    result = evaluate(two_groups(), SERVICES, some_trace())
    frame = result.requests
    again = summarise(
        frame, wall_s=result.summary.wall_s, gpus=2, services=[service.name for service in SERVICES.services]
    )
    for ours, theirs in zip(result.summary.services, again.services, strict=True):
        assert (ours.offered, ours.good, ours.late, ours.dropped, ours.failed, ours.in_flight) == (
            theirs.offered,
            theirs.good,
            theirs.late,
            theirs.dropped,
            theirs.failed,
            theirs.in_flight,
        )
        assert ours.latency_s == theirs.latency_s
        assert ours.mean_batch == (None if theirs.mean_batch is None else pytest.approx(theirs.mean_batch))
        assert ours.accuracy == (None if theirs.accuracy is None else pytest.approx(theirs.accuracy))
    assert result.summary.gpu_hours == again.gpu_hours
    assert set(frame["reason"].dropna()) == {"no route", "deadline cannot be met", "gave way to a full batch"}


def test_without_requests_kept_counts_are_the_same_and_percentiles_within_a_cell():
    kept, counted = (evaluate(two_groups(), SERVICES, some_trace(), keep_requests=keep) for keep in (True, False))
    for exact, rough in zip(kept.summary.services, counted.summary.services, strict=True):
        assert (exact.offered, exact.good, exact.dropped, exact.failed) == (
            rough.offered,
            rough.good,
            rough.dropped,
            rough.failed,
        )
        assert exact.mean_batch == rough.mean_batch
        for name in ("p50", "p95", "p99"):
            value, near = getattr(exact.latency_s, name), getattr(rough.latency_s, name)
            assert near == (None if value is None else pytest.approx(value, rel=0.002))
    assert counted.log is None
    assert counted.streams == ()
    with pytest.raises(ValueError, match="keep_requests"):
        _ = counted.requests


@pytest.mark.parametrize("latency_s", [0.0, 1e-9, 2.0**-20, 0.00123, 0.5, 1.0, 7.3, 3600.0, 1e6, 1e12])
def test_a_cell_holds_its_latency_to_a_fifth_of_a_percent(latency_s):
    cell = cell_of.py_func(latency_s)
    if 2.0**-20 <= latency_s < 2.0**24:
        assert cell_latency_s(cell) == pytest.approx(latency_s, rel=0.002)
    else:
        assert cell in (0, 44 * 256 - 1)


def test_parts_of_the_log_are_the_log():
    result = evaluate(two_groups(), SERVICES, some_trace())
    parts = list(result.request_parts(rows=999))
    assert [len(part) for part in parts] == [999, 999, 999, 999, 4]
    joined = pd.concat(parts, ignore_index=True)
    pd.testing.assert_frame_equal(joined, result.requests)


def test_a_timeline_holds_every_request_in_the_bin_of_its_arrival():
    trace = some_trace()
    result = evaluate(two_groups(), SERVICES, trace, timeline_s=0.7)
    found, frame = result.timeline, result.requests
    assert found.services == ("detect", "segment", "classify", "unused")
    assert len(found.outcomes) == int(np.ceil(trace.duration_s / 0.7))
    for position, name in enumerate(found.services):
        own = frame[frame["service"] == name]
        for place, outcome in enumerate(OUTCOMES):
            windows = (own.loc[own["outcome"] == outcome, "scheduled_s"] / 0.7).astype(int)
            expected = np.bincount(windows, minlength=len(found.outcomes))
            assert found.outcomes[:, position, place].tolist() == expected.tolist()
    busy_s = found.busy_ratio.sum(axis=0) * 0.7
    utilisation = [one.utilisation * result.summary.wall_s for one in result.summary.groups]
    assert busy_s.tolist() == pytest.approx(utilisation)


def test_a_run_that_is_cut_says_what_is_still_in_flight():
    result = evaluate(two_groups(), SERVICES, some_trace(rate_rps=2_000), settings=Settings(until_s=1.0, warmup_s=0.5))
    frame = result.requests
    assert frame["scheduled_s"].between(0.5, 1.0).all()
    assert result.summary.wall_s == 0.5
    assert result.summary.requests == len(frame)
    left = sum(service.in_flight for service in result.summary.services)
    assert left == (frame["outcome"] == "in_flight").sum() > 0
    assert all(0 <= one.utilisation <= 1 + 1e-9 for one in result.summary.groups)


def test_a_trace_without_a_request_that_counts_is_refused():
    with pytest.raises(InvalidInput, match="between warm-up and end"):
        evaluate(two_groups(), SERVICES, some_trace(), settings=Settings(warmup_s=1e6))
    with pytest.raises(InvalidInput, match="cluster and profiles"):
        evaluate(two_groups(), SERVICES, some_trace(), settings=Settings(latency="profile"))
    with pytest.raises(InvalidInput, match="timeline_s"):
        evaluate(two_groups(), SERVICES, some_trace(), timeline_s=0.0)


def frames(*rows):
    return RequestTrace(pd.DataFrame(rows, columns=["arrival_s", "service", "stream"]))


VIDEO = services_of("detect", **{"class": "frequency", "slo": {"fps": 10.0, "jitter": 0.05}})


def test_frame_rate_and_jitter_of_a_stream_worked_out_by_hand():
    """Periods of 100 ms; at 0.1 s a frame of another stream comes first, and the second frame waits 20 ms for it."""
    one = plan([group("node-0", (0,), [entry("detect", variant="m", max_batch=1, stage_latency_s=((0.02,),))])])
    trace = frames((0.0, "detect", "a"), (0.1, "detect", "b"), (0.1, "detect", "a"), (0.2, "detect", "a"))
    a, b = evaluate(one, VIDEO, trace).streams
    assert (a.service, a.stream, a.offered, a.good) == ("detect", "a", 3, 3)
    assert a.fps == pytest.approx(3 / 0.3)
    assert (a.mean_jitter_s, a.largest_jitter_s) == (pytest.approx(0.02), pytest.approx(0.02))
    assert (b.offered, b.good, b.fps, b.mean_jitter_s) == (1, 1, pytest.approx(10.0), None)


def test_requests_without_a_stream_belong_to_none():
    one = plan([group("node-0", (0,), [entry("detect", variant="m", max_batch=1, stage_latency_s=((0.02,),))])])
    result = evaluate(one, VIDEO, frames((0.0, "detect", None), (0.1, "detect", "b"), (0.2, "detect", None)))
    assert [(stream.stream, stream.offered) for stream in result.streams] == [("b", 1)]
    assert result.summary.requests == 3


def test_bundles_enter_together_when_full_and_alone_when_waiting_would_be_late():
    """Three frames, two to a bundle: the third waits for its deadline (0.15 s) less the largest batch (0.03 s)."""
    rows = ((0.02,), (0.03,))
    hosted = entry("detect", variant="m", max_batch=2, multi_frame=2, stage_latency_s=rows)
    trace = frames((0.0, "detect", "a"), (0.01, "detect", "a"), (0.1, "detect", "a"))
    result = evaluate(plan([group("node-0", (0,), [hosted])]), VIDEO, trace).requests
    assert result["batch_size"].tolist() == [2, 2, 1]
    assert (result["scheduled_s"] + result["latency_s"]).tolist() == pytest.approx([0.04, 0.04, 0.1 + 0.12 + 0.02])
