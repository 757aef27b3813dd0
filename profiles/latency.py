"""The latency model: what a batch takes and needs, from the rows of a profile, and how far to trust it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from plans.errors import InvalidInput
from plans.plan import Confidence
from profiles.column import Column, tokens_of
from profiles.curve import Curve
from profiles.document import Phase, Profile, Row

__all__ = ["MEASUREMENT_ERROR_RATIO", "UNMEASURED_ERROR_RATIO", "Estimate", "LatencyModel", "Method", "worst"]

MEASUREMENT_ERROR_RATIO = 0.02
"""Least error of a measured latency: the profiler stops once its median is known to 2 %."""

UNMEASURED_ERROR_RATIO = 0.2
"""Least error of a latency that nobody measured on this device. A convention, not a measurement."""

Method = Literal["measured", "interpolation", "line", "roofline"]
"""How a latency came about: a point of the grid; between points of a grid; on the line alpha + beta * batch through
two points or beyond the grid; or from operations and bytes against the device's peak rates."""

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
        method: How the mean came about.
    """

    mean_s: float
    p99_s: float
    stage_s: tuple[float, ...]
    confidence: Confidence
    error_ratio: float
    method: Method = "interpolation"


class LatencyModel:
    """One profile at one parallelism, phase and number of tokens, as functions of the batch.

    Latency never falls with the batch, nor with the tokens, however noisy the rows (`profiles.curve`). A batch on the
    grid of a measured profile is ``measured``, one between grid points ``interpolated``, one outside ``extrapolated``
    with a margin that grows with the distance. A profile that was modelled, or imported without percentiles, makes
    everything ``modelled``. Where a row states no p99, the ratio of the highest percentile to the mean is carried over
    from the nearest row that states one, and without any the mean stands for it; either way the estimate is at best
    ``interpolated``.

    Of several concurrencies the lowest is taken. Where only one of the two numbers of tokens varies, it is interpolated
    (``interpolated``); where both do, the nearest rows are taken that are not smaller in either direction. Beyond the
    largest, the largest rows are scaled in proportion (``extrapolated``). Without a stated number of tokens the largest
    rows are taken.

    Raises:
        InvalidInput: The profile has no rows for this phase and parallelism.
    """

    def __init__(
        self,
        profile: Profile,
        tp: int,
        pp: int,
        input_tokens: float | None = None,
        output_tokens: float | None = None,
        phase: Phase = "whole",
    ) -> None:
        rows = [row for row in profile.rows if (row.tp, row.pp, row.phase) == (tp, pp, phase)]
        if not rows:
            raise InvalidInput.of(
                "rows for this parallelism",
                where=f"profile of {profile.model} on {profile.gpu_type}",
                field="rows",
                found=f"none for tp = {tp}, pp = {pp}" + ("" if phase == "whole" else f", phase = {phase}"),
                remedy="profile the model at this parallelism",
            )
        concurrency = min(row.concurrency for row in rows)
        rows = [row for row in rows if row.concurrency == concurrency]
        picked = _for_tokens(rows, input_tokens, output_tokens)
        self._tokens = picked.tokens
        self._scale = picked.scale
        self._columns = tuple(Column.of(rows, tokens) for tokens, rows in picked.columns)
        every = [row for column in self._columns for row in column.rows]
        self._rows = tuple(every)
        self._batches = _shared_batches(self._columns)
        self._weight_bytes = tuple(max(row.weight_bytes[stage] for row in every) for stage in range(pp))
        self._working = tuple(
            tuple(column.working_curve(stage, weight) for column in self._columns)
            for stage, weight in enumerate(self._weight_bytes)
        )
        self._stated_error_ratio = profile.error_ratio
        self._source_confidence = worst(_source_confidence(profile, every), picked.confidence)
        self._rests_on_a_model = self._source_confidence == "modelled"
        self._by_roofline = profile.source == "modelled"

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
        mean_s = self._across([column.mean.at(batch) for column in self._columns])
        tail_s = self._across([column.p99.at(batch) for column in self._columns])
        return Estimate(
            mean_s=mean_s,
            p99_s=max(mean_s, tail_s),
            stage_s=self._stages(batch, mean_s),
            confidence=worst(self._grid_confidence(batch), self._source_confidence),
            error_ratio=self._error_ratio(batch),
            method=self._method(batch),
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
        used = (self._across([curve.at(batch) for curve in curves]) for curves in self._working)
        return tuple(weight + math.ceil(round(more, 3)) for weight, more in zip(self._weight_bytes, used, strict=True))

    def stage_latency_table(self, max_batch: int) -> tuple[tuple[float, ...], ...]:
        """Return the seconds that a batch of b holds each stage, in row b - 1; shape (max_batch, pp)."""
        return tuple(self.at(batch).stage_s for batch in range(1, max_batch + 1))

    def _across(self, values: Sequence[float]) -> float:
        """Return the value at the wanted number of tokens, from one value per column.

        Isotonic regression with equal weights keeps the order of two sequences that are ordered point by point, and so
        does drawing lines between their points: what never falls with the batch in each column does not fall here.
        """
        if len(values) == 1:
            return values[0] * self._scale
        curve = Curve.fit([column.tokens for column in self._columns], values, [1.0] * len(values))
        return curve.at(self._tokens) * self._scale

    def _grid_confidence(self, batch: int) -> Confidence:
        if batch in self._batches:
            stated = all(row.latency_s.p99 is not None for row in self._rows if row.batch == batch)
            return "measured" if stated else "interpolated"
        return "interpolated" if self._batches[0] < batch < self._batches[-1] else "extrapolated"

    def _method(self, batch: int) -> Method:
        if self._by_roofline:
            return "roofline"
        if batch in self._batches:
            at_column = any(column.tokens == self._tokens for column in self._columns)
            return "measured" if at_column and self._scale == 1 else "interpolation"
        return "interpolation" if self._batches[0] < batch < self._batches[-1] and len(self._batches) > 2 else "line"

    def _error_ratio(self, batch: int) -> float:
        """Add up what is not known: the source or the sampling, the curve over the batch, and the tokens."""
        floor = MEASUREMENT_ERROR_RATIO
        if self._stated_error_ratio is not None:
            floor = max(floor, self._stated_error_ratio)
        elif self._rests_on_a_model:
            floor = UNMEASURED_ERROR_RATIO
        return (
            max(floor, *(column.sampling_error_ratio(batch) for column in self._columns))
            + max(column.mean.error_ratio(batch) for column in self._columns)
            + self._token_error_ratio(batch)
        )

    def _token_error_ratio(self, batch: int) -> float:
        if len(self._columns) == 1:
            return self._scale - 1
        values = [column.mean.at(batch) for column in self._columns]
        curve = Curve.fit([column.tokens for column in self._columns], values, [1.0] * len(values))
        return curve.error_ratio(self._tokens) + self._scale - 1

    def _stages(self, batch: int, mean_s: float) -> tuple[float, ...]:
        """Split ``mean_s`` over the stages as the neighbouring rows do."""
        nearest = min(
            self._columns, key=lambda column: (column.tokens < self._tokens, abs(column.tokens - self._tokens))
        )
        return tuple(mean_s * share for share in nearest.stage_shares(batch))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Picked:
    """Rows by number of tokens, rising; the number wanted; what to scale by beyond; and the confidence that is left."""

    columns: list[tuple[int, list[Row]]]
    tokens: float
    scale: float
    confidence: Confidence


def _for_tokens(rows: list[Row], input_tokens: float | None, output_tokens: float | None) -> _Picked:
    kinds = sorted({tokens_of(row) for row in rows})
    wanted = (input_tokens or 0.0, output_tokens or 0.0)
    if kinds == [(0, 0)]:
        return _one(rows, (0, 0), "measured" if wanted == (0, 0) else "interpolated")
    if wanted == (0, 0):
        return _one(rows, max(kinds, key=sum), "measured" if len(kinds) == 1 else "interpolated")
    for axis in (0, 1):
        if len(kinds) > 1 and len({kind[1 - axis] for kind in kinds}) == 1:
            return _along(rows, kinds, axis, wanted)
    if wanted in kinds:
        return _one(rows, (int(wanted[0]), int(wanted[1])), "measured")
    covering = [kind for kind in kinds if kind[0] >= wanted[0] and kind[1] >= wanted[1]]
    if covering:
        return _one(rows, min(covering, key=sum), "interpolated")
    largest = max(kinds, key=sum)
    return _one(rows, largest, "extrapolated", scale=_beyond(wanted, largest))


def _one(rows: list[Row], kind: tuple[int, int], confidence: Confidence, scale: float = 1.0) -> _Picked:
    chosen = [row for row in rows if tokens_of(row) == kind]
    return _Picked(columns=[(sum(kind), chosen)], tokens=sum(kind), scale=scale, confidence=confidence)


def _along(rows: list[Row], kinds: Sequence[tuple[int, int]], axis: int, wanted: tuple[float, float]) -> _Picked:
    """Take every kind as a column, when only the tokens along ``axis`` tell the kinds apart."""
    lengths = [kind[axis] for kind in kinds]
    scale = _beyond(wanted, kinds[-1])
    confidence: Confidence = "measured" if wanted in kinds else "interpolated"
    return _Picked(
        columns=[(length, [row for row in rows if tokens_of(row)[axis] == length]) for length in lengths],
        tokens=min(max(wanted[axis], lengths[0]), lengths[-1]),
        scale=scale,
        confidence="extrapolated" if scale > 1 else confidence,
    )


def _beyond(wanted: tuple[float, float], largest: tuple[int, int]) -> float:
    """Return by how much ``wanted`` exceeds ``largest`` in either direction, at least 1."""
    return max(1.0, *(want / have for want, have in zip(wanted, largest, strict=True) if have))


def _shared_batches(columns: Sequence[Column]) -> tuple[int, ...]:
    """Return the batches of all columns that lie on every column's grid range."""
    lowest = max(column.mean.batches[0] for column in columns)
    highest = min(column.mean.batches[-1] for column in columns)
    every = {batch for column in columns for batch in column.mean.batches}
    shared = tuple(sorted(batch for batch in every if lowest <= batch <= highest))
    return shared or columns[-1].mean.batches


def _source_confidence(profile: Profile, rows: Sequence[Row]) -> Confidence:
    if profile.source == "modelled":
        return "modelled"
    if profile.source == "imported" and not any(row.latency_s.has_percentiles for row in rows):
        return "modelled"
    return "measured"
