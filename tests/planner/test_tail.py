from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.tail import miss_ratio, utilisation_limit, wait_s

positive = st.floats(1e-4, 10.0)
ratios = st.floats(0.01, 0.99)


def test_no_slack_allows_no_utilisation() -> None:
    assert utilisation_limit(0.0, 0.01, 1.0, 0.01) == -math.inf


def test_without_variability_the_whole_group_may_be_used() -> None:
    assert utilisation_limit(0.0, 0.01, 0.0, 0.01) == 1.0
    assert miss_ratio(0.1, 0.01, 0.0, 0.99) == 0.0
    assert wait_s(0.99, 0.01, 0.0, 0.99) == 0.0


def test_a_saturated_group_misses_everything() -> None:
    assert miss_ratio(10.0, 0.01, 1.0, 1.0) == 1.0


def test_mm1_is_met_exactly() -> None:
    # M/M/1: P(W > t) = rho exp(-(mu - lambda) t), and ca^2 + cs^2 = 2.
    mu, arrivals = 100.0, 80.0
    assert miss_ratio(0.05, 1 / mu, 2.0, arrivals / mu) == pytest.approx(0.8 * math.exp(-(mu - arrivals) * 0.05))


@given(slack=positive, request=positive, variability=positive, miss=ratios)
def test_at_the_limit_of_utilisation_at_most_the_allowed_share_is_late(
    slack: float, request: float, variability: float, miss: float
) -> None:
    limit = utilisation_limit(slack, request, variability, miss)
    if limit > 0:
        assert miss_ratio(slack, request, variability, limit) <= miss * (1 + 1e-6)


@given(slack=positive, request=positive, variability=positive, low=ratios, high=ratios)
def test_more_load_never_means_fewer_late_requests(
    slack: float, request: float, variability: float, low: float, high: float
) -> None:
    low, high = sorted((low, high))
    assert miss_ratio(slack, request, variability, low) <= miss_ratio(slack, request, variability, high)


@given(quantile=ratios, request=positive, variability=positive, utilisation=ratios)
def test_the_wait_is_the_inverse_of_the_miss_ratio(
    quantile: float, request: float, variability: float, utilisation: float
) -> None:
    wait = wait_s(quantile, request, variability, utilisation)
    if wait > 0:
        assert miss_ratio(wait, request, variability, utilisation) == pytest.approx(1 - quantile, rel=1e-6)
    else:
        assert utilisation <= 1 - quantile
