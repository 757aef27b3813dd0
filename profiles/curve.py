"""A curve that never falls, fitted to noisy points: isotonic on the grid, linear between, a fitted line beyond."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["MARGIN_PER_SPAN", "Curve", "isotonic"]

MARGIN_PER_SPAN = 0.1
"""Added per grid length beyond the grid: 10 % at twice the largest batch measured, 30 % at four times."""


def isotonic(values: Sequence[float], weights: Sequence[float]) -> tuple[float, ...]:
    """Return the never-falling sequence with the least weighted squared distance to ``values``.

    Pool adjacent violators (Ayer et al. 1955, "An empirical distribution function for sampling with incomplete
    information"), linear time. A sequence that does not fall comes back unchanged.
    """
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        mean, total, count = value, weight, 1
        while pools and pools[-1][0] > mean:
            other, other_weight, other_count = pools.pop()
            # Rounding may carry the mean of two numbers past either.
            pooled = (other * other_weight + mean * total) / (other_weight + total)
            mean, total, count = min(max(pooled, mean), other), total + other_weight, count + other_count
        pools.append((mean, total, count))
    return tuple(mean for mean, _, count in pools for _ in range(count))


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A quantity of the batch that never falls with it.

    Attributes:
        batches: The grid, strictly rising, at least one point.
        values: The isotonic fit at each grid point, positive.
        observed: What was measured at each grid point.
        slope: Of the line by which the curve goes on beyond the grid, per item; never negative.
    """

    batches: tuple[int, ...]
    values: tuple[float, ...]
    observed: tuple[float, ...]
    slope: float

    @classmethod
    def fit(cls, batches: Sequence[int], observed: Sequence[float], weights: Sequence[float]) -> Curve:
        """Fit a curve. ``weights`` are those of the isotonic fit, such as numbers of samples.

        Beyond the grid it goes on with the steeper of two slopes: that of the least-squares line
        ``alpha + beta * batch`` through the whole grid, and that of the last segment. From a single point it goes on
        in proportion to the batch, as if batching gained nothing.
        """
        values = isotonic(observed, weights)
        if len(batches) == 1:
            slope = values[0] / batches[0]
        else:
            last = (values[-1] - values[-2]) / (batches[-1] - batches[-2])
            slope = max(last, _least_squares_slope(batches, values))
        return cls(batches=tuple(batches), values=values, observed=tuple(observed), slope=slope)

    def at(self, batch: float) -> float:
        """Return the value at ``batch``.

        Below the grid that is the value of the smallest batch measured: a smaller batch can always be padded, so this
        is a bound from above. Beyond the grid it is the line plus a margin of `margin_ratio`.
        """
        if batch <= self.batches[0]:
            return self.values[0]
        if batch > self.batches[-1]:
            line = self.values[-1] + self.slope * (batch - self.batches[-1])
            return line * (1 + self.margin_ratio(batch))
        right = bisect_left(self.batches, batch)
        if self.batches[right] == batch:
            return self.values[right]
        return _on_line(self._point(right - 1), self._point(right), batch)

    def margin_ratio(self, batch: float) -> float:
        """Return the share that is added beyond the grid, growing with the distance; 0 on the grid."""
        return MARGIN_PER_SPAN * max(0.0, batch / self.batches[-1] - 1)

    def error_ratio(self, batch: float) -> float:
        """Return how far the truth may be from `at`, as a share of it.

        On a grid point: the distance of the isotonic fit from the measurement. Between grid points: the truth does not
        fall, so it lies between its neighbours' values; and if the curve bends one way only, it lies between the chord
        and the neighbouring segments drawn on. The distance to the nearer of those two bounds is the error. Below the
        grid: up to what a latency proportional to the batch would save, or what the first segment drawn on would.
        Beyond the grid: the margin, plus the distance between the two slopes that could have been taken.
        """
        if batch < self.batches[0]:
            return self._error_below(batch) + self._fit_error(0)
        if batch > self.batches[-1]:
            other = _least_squares_slope(self.batches, self.values)
            spread = abs(self.slope - other) * (batch - self.batches[-1]) / self.at(batch)
            return self.margin_ratio(batch) + spread + self._fit_error(-1)
        right = bisect_left(self.batches, batch)
        if self.batches[right] == batch:
            return self._fit_error(right)
        return self._error_between(right, batch) + max(self._fit_error(right - 1), self._fit_error(right))

    def gap_error_ratio(self, batch: float) -> float:
        """Return the part of `error_ratio` that a measurement there would end; 0 on the grid and outside of it."""
        if not self.batches[0] < batch < self.batches[-1]:
            return 0.0
        right = bisect_left(self.batches, batch)
        return 0.0 if self.batches[right] == batch else self._error_between(right, batch)

    def _point(self, index: int) -> tuple[float, float]:
        return self.batches[index], self.values[index]

    def _fit_error(self, index: int) -> float:
        return abs(self.values[index] - self.observed[index]) / self.values[index]

    def _error_below(self, batch: float) -> float:
        if len(self.batches) == 1:
            return 1 - batch / self.batches[0]
        drawn_on = _on_line(self._point(0), self._point(1), batch)
        return min(1 - batch / self.batches[0], (self.values[0] - drawn_on) / self.values[0])

    def _error_between(self, right: int, batch: float) -> float:
        chord = self.at(batch)
        by_monotony = max(self.values[right] - chord, chord - self.values[right - 1])
        drawn_on = []
        if right >= 2:
            drawn_on.append(_on_line(self._point(right - 2), self._point(right - 1), batch))
        if right + 1 < len(self.batches):
            drawn_on.append(_on_line(self._point(right), self._point(right + 1), batch))
        by_curvature = max((abs(chord - value) for value in drawn_on), default=by_monotony)
        return min(by_monotony, by_curvature) / chord


def _on_line(left: tuple[float, float], right: tuple[float, float], batch: float) -> float:
    share = (batch - left[0]) / (right[0] - left[0])
    value = left[1] + share * (right[1] - left[1])
    # Rounding must not carry a point between two others beyond either: the curve never falls.
    return min(max(value, left[1]), right[1]) if 0 <= share <= 1 else value


def _least_squares_slope(batches: Sequence[int], values: Sequence[float]) -> float:
    """Slope of the least-squares line; 0 for a single point. Not negative where ``values`` never fall."""
    batch_mean = sum(batches) / len(batches)
    value_mean = sum(values) / len(values)
    spread = sum((batch - batch_mean) ** 2 for batch in batches)
    if spread == 0:
        return 0.0
    products = sum((b - batch_mean) * (v - value_mean) for b, v in zip(batches, values, strict=True))
    return max(0.0, products / spread)
