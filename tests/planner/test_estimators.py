from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.estimators import erlang_c, estimate_latency_s, mdc_latency_s, relaxed_mdc_latency_s, upper_bound_s


def test_the_upper_bound_is_rate_times_time_over_replicas() -> None:
    assert upper_bound_s(40.0, 0.18, 6) == pytest.approx(1.2)


@pytest.mark.parametrize(("load", "servers", "expected"), [(0.5, 1, 0.5), (1.0, 2, 1 / 3), (8.0, 10, 0.40918)])
def test_erlang_c_has_its_textbook_values(load: float, servers: int, expected: float) -> None:
    assert erlang_c(load, servers) == pytest.approx(expected, rel=1e-4)


def test_the_percentile_is_that_of_half_the_exponential_wait() -> None:
    # One server at 50 %: C = 0.5, E[W] = 0.1 s, so W_99 = 0.2 ln(50) and L = 0.1 + W_99 / 2.
    assert mdc_latency_s(5.0, 0.1, 1, 99.0) == pytest.approx(0.1 + 0.1 * math.log(50.0))


def test_a_percentile_below_the_share_that_does_not_wait_is_the_time_alone() -> None:
    assert mdc_latency_s(1.0, 0.1, 4, 50.0) == 0.1


def test_saturation_has_no_percentile_but_a_relaxed_one_in_proportion_to_the_rate() -> None:
    assert mdc_latency_s(10.0, 0.1, 1, 99.0) == math.inf
    edge = relaxed_mdc_latency_s(9.5, 0.1, 1, 99.0)
    assert edge == pytest.approx(mdc_latency_s(9.5, 0.1, 1, 99.0))
    assert relaxed_mdc_latency_s(19.0, 0.1, 1, 99.0) == pytest.approx(2 * edge)


@given(
    estimator=st.sampled_from(["upper-bound", "relaxed-mdc"]),
    rate=st.floats(0.1, 100.0),
    request_s=st.floats(0.01, 1.0),
    replicas=st.integers(1, 30),
)
def test_more_replicas_are_never_slower(estimator: str, rate: float, request_s: float, replicas: int) -> None:
    fewer, more = (estimate_latency_s(estimator, rate, request_s, count) for count in (replicas, replicas + 1))  # type: ignore[arg-type]
    assert more <= fewer * (1 + 1e-9)
