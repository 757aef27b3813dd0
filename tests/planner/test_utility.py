from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.utility import Curve, drop_penalty, latency_utility, utility_curve

UTILITIES = ("linear", "step", "power")
PENALTIES = ("none", "step", "linear")


@pytest.mark.parametrize(
    ("drop", "step", "linear"),
    [(0.0, 0.0, 0.0), (0.01, 0.0, 0.25), (0.02, 0.25, 0.3125), (0.05, 0.25, 0.5), (0.1, 0.5, 1.0), (0.2, 1.0, 1.0)],
)
def test_the_penalties_pass_through_their_knots(drop: float, step: float, linear: float) -> None:
    assert drop_penalty("step", drop) == pytest.approx(step)
    assert drop_penalty("linear", drop) == pytest.approx(linear)
    assert drop_penalty("none", drop) == 0.0


@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_curve_is_utility_less_penalty_at_every_knot(utility: str, penalty: str) -> None:
    curve = utility_curve(utility, penalty, attainment=0.95, exponent=2.0)  # type: ignore[arg-type]
    for share in (0.0, 0.5, 0.9, 0.95, 0.99, 1.0):
        bare = {"linear": share, "step": float(share >= 0.95), "power": min(1.0, share / 0.95) ** 2}[utility]
        expected = bare * (1 - drop_penalty(penalty, 1 - share))  # type: ignore[arg-type]
        assert curve.at(share) == pytest.approx(expected, abs=2e-3)


@given(
    utility=st.sampled_from(UTILITIES),
    penalty=st.sampled_from(PENALTIES),
    attainment=st.floats(0.5, 0.999),
    shares=st.lists(st.floats(0, 1), min_size=2, max_size=5),
)
def test_curves_never_fall_and_stay_in_range(
    utility: str, penalty: str, attainment: float, shares: list[float]
) -> None:
    curve = utility_curve(utility, penalty, attainment=attainment, exponent=4.0)  # type: ignore[arg-type]
    values = [curve.at(share) for share in sorted(shares)]
    assert all(0 <= value <= 1 for value in values)
    assert all(after >= before - 1e-9 for before, after in itertools.pairwise(values))
    assert sum(width for width, _, _ in curve.segments()) == pytest.approx(1.0)
    assert sum(width * slope + jump for width, slope, jump in curve.segments()) == pytest.approx(curve.at(1.0))


def test_points_that_fall_are_no_curve() -> None:
    with pytest.raises(ValueError, match="never fall"):
        Curve(((0.0, 0.5), (1.0, 0.2)))


def test_a_late_percentile_is_worth_nothing_or_its_ratio() -> None:
    assert latency_utility("step", 0.2, 0.1, 4.0) == 0.0
    assert latency_utility("power", 0.2, 0.1, 4.0) == pytest.approx(1 / 16)
    assert latency_utility("power", 0.05, 0.1, 4.0) == 1.0
