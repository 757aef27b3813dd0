from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.curve import Curve, isotonic
from tests.profiles.documents import GRIDS, LATENCIES

WEIGHTED = st.lists(st.tuples(LATENCIES, st.floats(0.1, 1000)), min_size=1, max_size=12)


def fit(means: dict[int, float]) -> Curve:
    batches = sorted(means)
    return Curve.fit(batches, [means[batch] for batch in batches], [1.0] * len(batches))


@given(WEIGHTED)
def test_isotonic_never_falls_and_keeps_the_weighted_sum(points: list[tuple[float, float]]) -> None:
    values, weights = zip(*points, strict=True)
    fitted = isotonic(values, weights)
    assert list(fitted) == sorted(fitted)
    total = sum(value * weight for value, weight in points)
    assert sum(f * w for f, w in zip(fitted, weights, strict=True)) == pytest.approx(total)


@given(WEIGHTED)
def test_isotonic_is_idempotent(points: list[tuple[float, float]]) -> None:
    values, weights = zip(*points, strict=True)
    once = isotonic(values, weights)
    assert isotonic(once, weights) == once


@given(st.lists(LATENCIES, min_size=1, max_size=6), st.data())
def test_isotonic_is_no_farther_than_any_other_rising_sequence(values: list[float], data: st.DataObject) -> None:
    """Least squares: no never-falling sequence is nearer to the values."""
    other = sorted(data.draw(st.lists(LATENCIES, min_size=len(values), max_size=len(values))))
    fitted = isotonic(values, [1.0] * len(values))

    def distance(sequence: list[float]) -> float:
        return sum((a - b) ** 2 for a, b in zip(sequence, values, strict=True))

    assert distance(list(fitted)) <= distance(other) * (1 + 1e-9) + 1e-12


def test_heavier_points_pull_a_pool_to_themselves() -> None:
    assert isotonic([2.0, 1.0], [1.0, 3.0]) == (1.25, 1.25)


@given(GRIDS, st.integers(1, 500), st.integers(1, 500))
def test_a_curve_never_falls_however_noisy_its_points(means: dict[int, float], one: int, other: int) -> None:
    curve = fit(means)
    assert curve.at(min(one, other)) <= curve.at(max(one, other))


def test_between_points_the_curve_is_the_chord() -> None:
    assert fit({1: 1.0, 5: 3.0}).at(2) == 1.5


def test_beyond_the_grid_the_steeper_slope_and_a_growing_margin_are_taken() -> None:
    bending_up = fit({1: 1.0, 2: 1.0, 4: 3.0})  # the last segment rises by 1 per item
    assert bending_up.at(8) == pytest.approx((3.0 + 4 * 1.0) * 1.1)
    flattening = fit({1: 1.0, 2: 3.0, 4: 3.0})  # the last segment is flat, the line through all is not
    assert flattening.at(8) > 3.0 * 1.1


def test_a_single_point_goes_on_in_proportion() -> None:
    assert fit({4: 2.0}).at(8) == pytest.approx(4.0 * 1.1)


def test_below_the_grid_stands_the_smallest_batch_with_an_error_that_grows() -> None:
    curve = fit({8: 1.0, 16: 1.5})
    assert curve.at(2) == 1.0
    assert 0 < curve.error_ratio(7) < curve.error_ratio(2)


@given(GRIDS, st.integers(1, 500))
def test_the_error_is_never_negative(means: dict[int, float], batch: int) -> None:
    assert fit(means).error_ratio(batch) >= 0


@given(st.integers(2, 60), st.sampled_from(["sqrt", "linear", "square"]))
def test_the_error_covers_the_truth_between_points_of_a_curve_that_bends_one_way(batch: int, kind: str) -> None:
    """A convex or concave curve lies between the chord and the neighbouring segments drawn on."""
    exponent = {"sqrt": 0.5, "linear": 1.0, "square": 2.0}[kind]

    def truth(b: float) -> float:
        return 1.0 + b**exponent

    curve = fit({b: truth(b) for b in (1, 2, 4, 8, 16, 32, 64)})
    assert abs(curve.at(batch) - truth(batch)) <= curve.error_ratio(batch) * curve.at(batch) + 1e-9


@given(GRIDS)
def test_the_error_beyond_the_grid_grows_with_the_distance(means: dict[int, float]) -> None:
    curve = fit(means)
    last = curve.batches[-1]
    errors = [curve.error_ratio(last * factor) for factor in (2, 4, 8)]
    assert errors == sorted(errors)


def test_a_pooled_point_owns_up_to_its_distance_from_the_measurement() -> None:
    curve = fit({1: 2.0, 2: 1.0})
    assert curve.error_ratio(1) == pytest.approx(0.5 / 1.5)


def test_the_error_between_two_points_alone_is_the_distance_to_the_farther_of_them() -> None:
    curve = fit({1: 1.0, 5: 3.0})
    assert curve.error_ratio(2) == pytest.approx((3.0 - 1.5) / 1.5)


def test_the_error_beyond_the_grid_counts_the_slope_that_was_not_taken() -> None:
    straight, bent = fit({1: 1.0, 2: 2.0, 4: 4.0}), fit({1: 3.0, 2: 3.0, 4: 4.0})
    assert straight.error_ratio(8) == pytest.approx(straight.margin_ratio(8))
    assert bent.error_ratio(8) > bent.margin_ratio(8) + 0.05
