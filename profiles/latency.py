"""The latency model: what a batch takes and needs, from the rows of a profile, and how far to trust it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from plans.errors import InvalidInput
from plans.plan import Confidence
from profiles.curve import Curve
from profiles.document import Profile, Row

__all__ = ["MEASUREMENT_ERROR_RATIO", "UNMEASURED_ERROR_RATIO", "Estimate", "LatencyModel", "worst"]

MEASUREMENT_ERROR_RATIO = 0.02
"""Least error of a measured latency: the profiler stops once its median is known to 2 %."""

UNMEASURED_ERROR_RATIO = 0.2
"""Least error of a latency that nobody measured on this device. A convention, not a measurement."""

_UNSTATED_SPREAD_RATIO = 0.1
"""Coefficient of variation taken for a row that states no p95. A convention, not a measurement."""

_ORDER: tuple[Confidence, ...] = ("measured", "interpolated", "extrapolated", "modelled")


def worst(*confidences: Confidence) -> Confidence:
    """Return the least trustworthy of ``confidences``."""
    return max(confidences, key=_ORDER.index)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What one batch takes.

    Attributes:
        mean_s: Mean latency from start to end, seconds.
        p99_s: 99th percentile, seconds; at least the mean.
        stage_s: Seconds that the batch holds each pipeline stage, shape (pp,); they sum to ``mean_s``.
        confidence: What the numbers rest on.
        error_ratio: How far the mean may be off, as a share of it.
    """

    mean_s: float
    p99_s: float
    stage_s: tuple[float, ...]
    confidence: Confidence
    error_ratio: float


class LatencyModel:
    """One profile at one parallelism and one number of tokens, as functions of the batch.

    Latency never falls with the batch, however noisy the rows (`profiles.curve`). A batch on the grid of a measured
    profile is ``measured``, one between grid points ``interpolated``, one outside ``extrapolated`` with a margin that
    grows with the distance. A profile that was modelled, or imported without percentiles, makes everything
    ``modelled``. Where a row states no p99, the ratio of the highest percentile to the mean is carried over from the
    nearest row that states one, and without any the mean stands for it; either way the estimate is at best
    ``interpolated``.

    Of several concurrencies the lowest is taken. Of several numbers of tokens, the nearest rows that are not smaller
    in either direction (``interpolated`` unless equal); beyond the largest, the largest rows scaled in proportion
    (``extrapolated``). Without a stated number of tokens the largest rows are taken.
    """

    def __init__(
        self,
        profile: Profile,
        tp: int,
        pp: int,
        input_tokens: float | None = None,
        output_tokens: float | None = None,
    ) -> None:
        rows = [row for row in profile.rows if (row.tp, row.pp, row.phase) == (tp, pp, "whole")]
        if not rows:
            raise InvalidInput.of(
                "rows for this parallelism",
                where=f"profile of {profile.model} on {profile.gpu_type}",
                field="rows",
                found=f"none for tp = {tp}, pp = {pp}",
                remedy="profile the model at this parallelism",
            )
        concurrency = min(row.concurrency for row in rows)
        rows = [row for row in rows if row.concurrency == concurrency]
        rows, self._token_scale, token_confidence = _for_tokens(rows, input_tokens, output_tokens)
        rows.sort(key=lambda row: row.batch)
        self._rows = tuple(rows)
        self._pp = pp
        self._batches = tuple(row.batch for row in rows)
        weights = [max(1, row.samples) for row in rows]
        means = [row.latency_s.mean * self._token_scale for row in rows]
        self._mean = Curve.fit(self._batches, means, weights)
        tails = [mean * ratio for mean, ratio in zip(means, _tail_ratios(rows), strict=True)]
        self._p99 = Curve.fit(self._batches, tails, weights)
        self._weight_bytes = tuple(max(row.weight_bytes[stage] for row in rows) for stage in range(pp))
        self._working = tuple(self._working_curve(stage) for stage in range(pp))
        self._source_confidence = worst(_source_confidence(profile, rows), token_confidence)
        self._rests_on_a_model = self._source_confidence == "modelled"

    @property
    def batches(self) -> tuple[int, ...]:
        """The batches of the grid, rising."""
        return self._batches

    @property
    def weight_bytes(self) -> tuple[int, ...]:
        """Bytes of weights per GPU of each stage, shape (pp,)."""
        return self._weight_bytes

    @property
    def load_s(self) -> float:
        """Seconds that a load takes: the longest that any row states."""
        return max(row.load_s for row in self._rows)

    @property
    def first_inference_s(self) -> float:
        """Seconds of the first inference after a load: the longest that any row states."""
        return max(row.first_inference_s for row in self._rows)

    def at(self, batch: int) -> Estimate:
        """Return what a batch of ``batch`` items takes; ``mean_s`` and ``p99_s`` never fall with it.

        Raises:
            ValueError: ``batch`` is below 1.
        """
        if batch < 1:
            raise ValueError(f"a batch has at least 1 item, not {batch}")
        mean_s = self._mean.at(batch)
        return Estimate(
            mean_s=mean_s,
            p99_s=max(mean_s, self._p99.at(batch)),
            stage_s=self._stages(batch, mean_s),
            confidence=worst(self._grid_confidence(batch), self._source_confidence),
            error_ratio=self._error_ratio(batch),
        )

    def peak_bytes(self, batch: int) -> tuple[int, ...]:
        """Return the highest bytes in use per GPU of each stage, weights included, shape (pp,).

        What is used beside the weights is linear between grid points and goes on linearly beyond them, with the same
        growing margin as latency; below the grid it is that of the smallest batch measured. It never falls with the
        batch.

        Raises:
            ValueError: ``batch`` is below 1.
        """
        if batch < 1:
            raise ValueError(f"a batch has at least 1 item, not {batch}")
        used = (curve.at(batch) if curve else 0.0 for curve in self._working)
        return tuple(weight + math.ceil(round(more, 3)) for weight, more in zip(self._weight_bytes, used, strict=True))

    def stage_latency_table(self, max_batch: int) -> tuple[tuple[float, ...], ...]:
        """Return the seconds that a batch of b holds each stage, in row b - 1; shape (max_batch, pp)."""
        return tuple(self.at(batch).stage_s for batch in range(1, max_batch + 1))

    def _grid_confidence(self, batch: int) -> Confidence:
        if batch in self._batches:
            row = self._rows[self._batches.index(batch)]
            return "interpolated" if row.latency_s.p99 is None else "measured"
        return "interpolated" if self._batches[0] < batch < self._batches[-1] else "extrapolated"

    def _error_ratio(self, batch: int) -> float:
        floor = UNMEASURED_ERROR_RATIO if self._rests_on_a_model else MEASUREMENT_ERROR_RATIO
        nearest = min(self._rows, key=lambda row: (abs(row.batch - batch), row.batch))
        scaled = self._token_scale - 1
        return max(floor, _sampling_error_ratio(nearest)) + self._mean.error_ratio(batch) + scaled

    def _stages(self, batch: int, mean_s: float) -> tuple[float, ...]:
        """Split ``mean_s`` over the stages as the neighbouring rows do."""
        left, right, share = _neighbours(self._batches, batch)
        before, after = (_shares(self._rows[index].stage_latency_s) for index in (left, right))
        return tuple(mean_s * (a + share * (b - a)) for a, b in zip(before, after, strict=True))

    def _working_curve(self, stage: int) -> Curve | None:
        """Bytes beside the weights; never falling by taking the running maximum, so never below a measurement."""
        highest = 0.0
        used = []
        for row in self._rows:
            highest = max(highest, (row.peak_bytes[stage] - row.weight_bytes[stage]) * self._token_scale)
            used.append(highest)
        return Curve.fit(self._batches, used, [1.0] * len(used)) if highest > 0 else None


def _for_tokens(
    rows: list[Row], input_tokens: float | None, output_tokens: float | None
) -> tuple[list[Row], float, Confidence]:
    """Pick the rows for a number of tokens; with them the factor to scale them by, and the confidence that is left."""
    kinds = sorted({(row.input_tokens or 0, row.output_tokens or 0) for row in rows})
    wanted = (input_tokens or 0.0, output_tokens or 0.0)
    scale = 1.0
    confidence: Confidence = "measured"
    if kinds == [(0, 0)]:
        chosen = (0, 0)
        confidence = "measured" if wanted == (0, 0) else "interpolated"
    elif wanted == (0, 0):
        chosen = max(kinds, key=sum)
        confidence = "measured" if len(kinds) == 1 else "interpolated"
    else:
        covering = [kind for kind in kinds if kind[0] >= wanted[0] and kind[1] >= wanted[1]]
        if covering:
            chosen = min(covering, key=sum)
            confidence = "measured" if chosen == wanted else "interpolated"
        else:
            chosen = max(kinds, key=sum)
            ratios = [want / have for want, have in zip(wanted, chosen, strict=True) if have]
            scale = max(1.0, *ratios)
            confidence = "extrapolated"
    picked = [row for row in rows if (row.input_tokens or 0, row.output_tokens or 0) == chosen]
    return picked, scale, confidence


def _source_confidence(profile: Profile, rows: Sequence[Row]) -> Confidence:
    if profile.source == "modelled":
        return "modelled"
    if profile.source == "imported" and not any(row.latency_s.has_percentiles for row in rows):
        return "modelled"
    return "measured"


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


def _sampling_error_ratio(row: Row) -> float:
    """Half width of the mean's 95 % confidence interval, as a share of it.

    With the standard deviation read off two quantiles of a normal distribution, (p95 - p50) / 1.645, or taken as 10 %
    of the mean where the row does not state them.
    """
    statistics = row.latency_s
    spread_ratio = _UNSTATED_SPREAD_RATIO
    if statistics.p50 is not None and statistics.p95 is not None:
        spread_ratio = (statistics.p95 - statistics.p50) / 1.645 / statistics.mean
    return 1.96 * spread_ratio / math.sqrt(max(1, row.samples))


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
