from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.latency_histogram import LatencyHistogram

DURATIONS = st.lists(st.floats(1e-6, 10_000), min_size=1, max_size=200)


def counted(values: list[float]) -> LatencyHistogram:
    histogram = LatencyHistogram()
    for value in values:
        histogram.add(value)
    return histogram


@given(DURATIONS, st.floats(0, 1))
def test_law_a_quantile_is_never_too_low_and_at_most_a_hundredth_too_high(values: list[float], share: float) -> None:
    exact = float(np.quantile(values, share, method="inverted_cdf"))
    found = counted(values).quantile_s(share)
    assert found is not None
    assert exact <= found * (1 + 1e-9)
    assert found <= exact * 1.0101


@given(DURATIONS, DURATIONS)
def test_law_merged_is_counted_together(one: list[float], other: list[float]) -> None:
    merged = counted(one)
    merged.merge(counted(other))
    assert (merged.counts == counted(one + other).counts).all()
    assert merged.count == len(one) + len(other)


def test_without_a_duration_there_is_no_quantile_and_extremes_are_counted() -> None:
    assert LatencyHistogram().quantile_s(0.5) is None
    histogram = counted([-1.0, 0.0, 1e9])
    assert histogram.count == 3
    assert histogram.quantile_s(0.5) == pytest.approx(1e-6, rel=0.02)
