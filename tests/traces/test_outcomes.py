from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans.errors import InvalidInput
from traces.outcomes import COLUMNS, OUTCOMES, ServiceSummary, nearest_rank, summarise, supported_percentile
from traces.outcomes import LatencySummary as Latency

SERVICES = ("chat", "detect")


def frame(*rows: tuple[Any, ...]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=list(COLUMNS))


@st.composite
def outcome_frames(draw: st.DrawFn) -> pd.DataFrame:
    def row(outcome: str) -> tuple[Any, ...]:
        finished = outcome in ("good", "late")
        return (
            draw(st.sampled_from(SERVICES)),
            outcome,
            draw(st.floats(0, 10)) if finished else math.nan,
            float(draw(st.integers(1, 32))) if finished else math.nan,
            draw(st.floats(0, 1)) if finished else math.nan,
            draw(st.sampled_from(["node-a/0", "node-a/1"])) if finished else None,
        )

    return frame(*(row(draw(st.sampled_from(OUTCOMES))) for _ in range(draw(st.integers(0, 30)))))


class TestLaws:
    @given(outcome_frames(), st.floats(0.1, 1000))
    def test_offered_is_good_late_dropped_failed_and_in_flight(self, requests: pd.DataFrame, wall_s: float) -> None:
        summary = summarise(requests, wall_s=wall_s, gpus=2, services=SERVICES)
        assert summary.requests == len(requests)
        for part in summary.services:
            assert part.offered == part.good + part.late + part.dropped + part.failed + part.in_flight
            assert part.offered == (requests["service"] == part.service).sum()

    @given(outcome_frames())
    def test_counts_agree_with_a_naive_loop(self, requests: pd.DataFrame) -> None:
        summary = summarise(requests, wall_s=10.0, gpus=1, services=SERVICES)
        for part in summary.services:
            own = [row for row in requests.itertuples() if row.service == part.service]
            finished = [row for row in own if row.outcome in ("good", "late")]
            assert part.good == sum(row.outcome == "good" for row in own)
            assert part.dropped == sum(row.outcome == "dropped" for row in own)
            if finished:
                assert part.accuracy == pytest.approx(sum(row.accuracy for row in finished) / len(finished))
                assert part.mean_batch == pytest.approx(len(finished) / sum(1 / row.batch_size for row in finished))

    @given(outcome_frames(), st.randoms(use_true_random=False))
    def test_the_order_of_rows_does_not_matter(self, requests: pd.DataFrame, random: Any) -> None:
        order = list(range(len(requests)))
        random.shuffle(order)
        left = summarise(requests, wall_s=1.0, gpus=1, services=SERVICES)
        right = summarise(requests.iloc[order], wall_s=1.0, gpus=1, services=SERVICES)
        for ours, theirs in zip(left.services, right.services, strict=True):
            assert (ours.offered, ours.good, ours.latency_s) == (theirs.offered, theirs.good, theirs.latency_s)
            assert (ours.mean_batch is None) == (theirs.mean_batch is None)

    @given(st.lists(st.floats(0, 100), min_size=1, max_size=50), st.floats(0.1, 100))
    def test_a_percentile_is_a_value_that_at_least_that_share_does_not_exceed(
        self, values: list[float], percent: float
    ) -> None:
        ordered = np.sort(np.array(values))
        found = nearest_rank(ordered, percent)
        assert found is not None
        assert found in values
        assert (ordered <= found).mean() * 100 >= percent - 1e-6
        assert (ordered < found).mean() * 100 < percent + 1e-6


@pytest.mark.parametrize(("percent", "rank"), [(50, 10), (95, 19), (99, 20), (100, 20), (1, 1)])
def test_nearest_rank_of_twenty_values(percent: float, rank: int) -> None:
    assert nearest_rank(np.arange(1.0, 21.0), percent) == rank


@pytest.mark.parametrize(("percent", "least"), [(50, 2), (95, 20), (99, 100)])
def test_a_percentile_is_given_only_where_a_value_lies_beyond_it(percent: float, least: int) -> None:
    values = np.arange(1.0, least + 1)
    assert supported_percentile(values[:-1], percent) is None
    found = supported_percentile(values, percent)
    assert found is not None
    assert found < values[-1]
    assert found == nearest_rank(values, percent)


def test_no_percentile_is_that_of_the_largest_value() -> None:
    rows = [("chat", "good", float(n), 1, 1.0, "g") for n in range(1, 100)]
    assert summarise(frame(*rows), wall_s=1, gpus=1, services=["chat"]).services[0].latency_s == Latency(
        p50=50.0, p95=95.0, p99=None
    )


def test_a_batch_counts_once_however_many_requests_it_served() -> None:
    rows = [("chat", "good", 0.1, 4, 1.0, "g")] * 4 + [("chat", "good", 0.1, 1, 1.0, "g")]
    assert summarise(frame(*rows), wall_s=1, gpus=1, services=["chat"]).services[0].mean_batch == pytest.approx(2.5)


def test_where_nothing_finished_there_is_no_percentile_and_no_made_up_number() -> None:
    summary = summarise(
        frame(("chat", "failed", math.nan, math.nan, math.nan, None)), wall_s=2.0, gpus=1, services=SERVICES
    )
    chat, detect = summary.services
    assert chat.latency_s == Latency(p50=None, p95=None, p99=None)
    assert chat.mean_batch is None
    assert chat.accuracy is None
    assert chat.attainment == 0.0
    assert detect.offered == 0
    assert detect.attainment is None


def test_json_has_the_documented_shape() -> None:
    rows = frame(("chat", "good", 0.1, 2, 0.9, "node-a/0"), ("chat", "dropped", math.nan, math.nan, math.nan, None))
    found = summarise(rows, wall_s=2.0, gpus=3, services=["chat"], utilisation={"node-a/0": 0.5}).to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == {
        "requests": 2,
        "wall_s": 2.0,
        "offered_rps": 1.0,
        "goodput_rps": 0.5,
        "attainment": 0.5,
        "gpu_hours": pytest.approx(6 / 3600),
        "services": [
            {
                "service": "chat",
                "offered": 2,
                "good": 1,
                "late": 0,
                "dropped": 1,
                "failed": 0,
                "in_flight": 0,
                "attainment": 0.5,
                "latency_s": {"p50": None, "p95": None, "p99": None},
                "mean_batch": 2.0,
                "accuracy": 0.9,
            }
        ],
        "groups": [{"group": "node-a/0", "utilisation": 0.5}],
    }


def test_groups_without_utilisation_are_listed_unmeasured() -> None:
    rows = frame(("chat", "good", 0.1, 2, 0.9, "b/0"), ("chat", "good", 0.1, 2, 0.9, "a/0"))
    groups = summarise(rows, wall_s=1.0, gpus=1, services=["chat"]).groups
    assert [(group.group, group.utilisation) for group in groups] == [("a/0", None), ("b/0", None)]


def test_every_fault_of_a_frame_is_named_at_once() -> None:
    rows = frame(("other", "good", math.nan, 1, 1.0, "g"), ("chat", "lost", 0.1, 1, 1.0, "g"))
    with pytest.raises(InvalidInput) as caught:
        summarise(rows, wall_s=1.0, gpus=1, services=["chat"])
    assert {fault.field for fault in caught.value.faults} == {"service", "outcome", "latency_s"}


def test_missing_columns_and_an_empty_run_are_refused() -> None:
    with pytest.raises(InvalidInput) as caught:
        summarise(pd.DataFrame({"service": ["chat"]}), wall_s=0.0, gpus=1, services=["chat"])
    assert {fault.field for fault in caught.value.faults} == {*COLUMNS, "wall_s"} - {"service"}


def test_a_summary_whose_counts_do_not_add_up_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="offered = good"):
        ServiceSummary(
            service="chat",
            offered=2,
            good=1,
            late=0,
            dropped=0,
            failed=0,
            in_flight=0,
            latency_s=Latency(p50=None, p95=None, p99=None),
            mean_batch=None,
            accuracy=None,
        )
