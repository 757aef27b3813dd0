"""The rows of one profile at one number of tokens, as curves over the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from profiles.curve import Curve
from profiles.document import Row

__all__ = ["Column", "tokens_of"]

_UNSTATED_SPREAD_RATIO = 0.1
"""Coefficient of variation taken for a row that states no p95. A convention, not a measurement."""


def tokens_of(row: Row) -> tuple[int, int]:
    """Return the input and output tokens of ``row``, 0 where it has none."""
    return row.input_tokens or 0, row.output_tokens or 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """Curves over the batch at one number of tokens.

    Attributes:
        tokens: Where the column stands among its neighbours; 0 where tokens mean nothing.
        rows: The rows, batch rising.
        mean: Mean latency, seconds.
        p99: 99th percentile, seconds.
    """

    tokens: int
    rows: tuple[Row, ...]
    mean: Curve
    p99: Curve

    @classmethod
    def of(cls, rows: Sequence[Row], tokens: int) -> Column:
        """Fit the curves to ``rows``, at least one, each of another batch."""
        ordered = sorted(rows, key=lambda row: row.batch)
        batches = [row.batch for row in ordered]
        weights = [max(1, row.samples) for row in ordered]
        means = [row.latency_s.mean for row in ordered]
        tails = [mean * ratio for mean, ratio in zip(means, _tail_ratios(ordered), strict=True)]
        return cls(
            tokens=tokens,
            rows=tuple(ordered),
            mean=Curve.fit(batches, means, weights),
            p99=Curve.fit(batches, tails, weights),
        )

    def working_curve(self, stage: int, weight_bytes: int) -> Curve:
        """Return bytes beside the weights on each GPU of ``stage``, by batch.

        Never falls with the batch, by taking the running maximum, so it is never below a measurement.
        """
        used = accumulate((float(max(0, row.peak_bytes[stage] - weight_bytes)) for row in self.rows), max)
        return Curve.fit(self.mean.batches, list(used), [1.0] * len(self.rows))

    def stage_shares(self, batch: int) -> tuple[float, ...]:
        """Return the share of the latency that each stage is held, shape (pp,), between the neighbouring rows'."""
        left, right, share = _neighbours(self.mean.batches, batch)
        before, after = (_shares(self.rows[index].stage_latency_s) for index in (left, right))
        return tuple(a + share * (b - a) for a, b in zip(before, after, strict=True))

    def sampling_error_ratio(self, batch: int) -> float:
        """Half width of the 95 % confidence interval of the nearest row's mean, as a share of it.

        With the standard deviation read off two quantiles of a normal distribution, (p95 - p50) / 1.645, or taken as
        10 % of the mean where the row does not state them.
        """
        row = min(self.rows, key=lambda row: (abs(row.batch - batch), row.batch))
        statistics = row.latency_s
        spread_ratio = _UNSTATED_SPREAD_RATIO
        if statistics.p50 is not None and statistics.p95 is not None:
            spread_ratio = (statistics.p95 - statistics.p50) / 1.645 / statistics.mean
        return 1.96 * spread_ratio / math.sqrt(max(1, row.samples))


def _tail_ratios(rows: Sequence[Row]) -> list[float]:
    """Ratio of p99 to mean per row, at least 1; without a p99, from the nearest row by batch that states a tail."""
    known = [(row.batch, tail / row.latency_s.mean) for row in rows if (tail := _tail_s(row)) is not None]
    ratios = []
    for row in rows:
        _, carried = min(known, key=lambda pair: abs(pair[0] - row.batch), default=(0, 1.0))
        own = (row.latency_s.p50 or 0.0) / row.latency_s.mean
        ratios.append(max(1.0, own, carried))
    return ratios


def _tail_s(row: Row) -> float | None:
    return row.latency_s.p95 if row.latency_s.p99 is None else row.latency_s.p99


def _neighbours(batches: Sequence[int], batch: int) -> tuple[int, int, float]:
    """Return the grid points around ``batch`` and its position between them, from 0 to 1; the outermost at the ends."""
    if batch >= batches[-1]:
        return len(batches) - 1, len(batches) - 1, 0.0
    right = next(index for index, point in enumerate(batches) if point >= batch)
    if right == 0 or batches[right] == batch:
        return right, right, 0.0
    return right - 1, right, (batch - batches[right - 1]) / (batches[right] - batches[right - 1])


def _shares(stages: Sequence[float]) -> tuple[float, ...]:
    total = sum(stages)
    return tuple(stage / total for stage in stages)
