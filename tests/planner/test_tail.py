from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.tail import slotted_tail, slotted_utilisation_limit, utilisation_limit

positive = st.floats(1e-4, 10.0)
ratios = st.floats(0.01, 0.99)


def late_ratio(slack: float, request: float, variability: float, utilisation: float) -> float:
    """Kingman's tail, written from the document: P(W > t) ~ exp(-2 (1 - rho) t / (u V))."""
    return math.exp(-2 * (1 - utilisation) * slack / (request * variability))


def test_no_slack_allows_no_utilisation() -> None:
    assert utilisation_limit(0.0, 0.01, 1.0, 0.01) == -math.inf


def test_without_variability_the_whole_group_may_be_used() -> None:
    assert utilisation_limit(0.0, 0.01, 0.0, 0.01) == 1.0


@given(slack=positive, request=positive, variability=positive, miss=ratios)
def test_at_the_limit_exactly_the_allowed_share_is_late(
    slack: float, request: float, variability: float, miss: float
) -> None:
    limit = utilisation_limit(slack, request, variability, miss)
    assert limit < 1
    assert late_ratio(slack, request, variability, limit) == pytest.approx(miss, rel=1e-6)


@given(slack=positive, request=positive, variability=positive, one=ratios, other=ratios)
def test_a_looser_slo_never_allows_less(
    slack: float, request: float, variability: float, one: float, other: float
) -> None:
    strict, loose = sorted((one, other))
    assert utilisation_limit(slack, request, variability, strict) <= utilisation_limit(
        slack, request, variability, loose
    )


@given(slack=positive, request=positive, variability=positive, miss=ratios, slots=st.integers(1, 64))
def test_at_the_limit_the_allowed_share_waits_longer_for_a_slot(
    slack: float, request: float, variability: float, miss: float, slots: int
) -> None:
    limit = slotted_utilisation_limit(slack, request, variability, miss, slots)
    assert slotted_tail(slack, request, variability, limit, slots) <= miss + 1e-9
    assert limit > 0.999 or slotted_tail(slack, request, variability, limit + 1e-6, slots) >= miss - 1e-4


@given(slack=positive, request=positive, miss=ratios, slots=st.integers(1, 63))
def test_more_slots_and_smoother_arrivals_never_allow_less(
    slack: float, request: float, miss: float, slots: int
) -> None:
    few = slotted_utilisation_limit(slack, request, 1.0, miss, slots)
    assert few <= slotted_utilisation_limit(slack, request, 1.0, miss, slots + 1) + 1e-9
    assert slotted_utilisation_limit(slack, request, 4.0, miss, slots) <= few + 1e-9


@given(slack=positive, request=positive, variability=positive, miss=ratios)
def test_one_slot_allows_at_least_what_kingman_does(
    slack: float, request: float, variability: float, miss: float
) -> None:
    """rho exp(-x) <= exp(-x) while no burst takes more than the slot; beyond, the peakedness is charged as well."""
    if variability <= 1:
        limit = slotted_utilisation_limit(slack, request, variability, miss, 1)
        assert limit >= utilisation_limit(slack, request, variability, miss) - 1e-9


def test_nobody_waits_where_everything_is_even_and_everybody_where_too_much_comes() -> None:
    assert slotted_tail(0.1, 0.01, 0.0, 0.9, 4) == 0.0
    assert slotted_tail(0.1, 0.01, 1.0, 1.0, 4) == 1.0
    assert slotted_tail(-0.1, 0.01, 1.0, 0.5, 4) == 1.0
