from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.tail import utilisation_limit

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
