"""How well a profile predicts what it did not see: points are held out, predicted from the rest, and compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from plans.errors import InvalidInput
from profiles.document import Profile, Row
from profiles.latency import LatencyModel
from profiles.sampling import nearest_rank

__all__ = ["ErrorSummary", "HeldOut", "Scheme", "hold_out", "predict", "summarise_errors"]

Scheme = Literal["every-second", "each"]
"""``every-second``: every second batch of a series is held out at once. ``each``: one at a time, ends excluded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """One point that was predicted without having been seen.

    Attributes:
        model: The model.
        gpu_type: The device.
        row: What was measured.
        predicted_s: Mean latency predicted from the other points.
        stated_error_ratio: The error that the prediction stated.
        inside: Whether it lies between points that were seen.
    """

    model: str
    gpu_type: str
    row: Row
    predicted_s: float
    stated_error_ratio: float
    inside: bool

    @property
    def error_ratio(self) -> float:
        """Distance of the prediction from the measurement, as a share of the measurement."""
        return abs(self.predicted_s / self.row.latency_s.mean - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorSummary:
    """Errors of several points, as shares.

    Attributes:
        points: How many.
        median: Median error.
        p95: 95th percentile by nearest rank; the largest below 20 points.
        worst: The point with the largest error.
        covered_ratio: Share of points whose error is within what the prediction stated.
    """

    points: int
    median: float
    p95: float
    worst: HeldOut
    covered_ratio: float


def hold_out(profile: Profile, scheme: Scheme = "every-second") -> tuple[HeldOut, ...]:
    """Hold out points of every series of ``profile``: rows that differ in nothing but the batch.

    A series of fewer than three batches has nothing to hold out.
    """
    series: dict[tuple[object, ...], list[Row]] = {}
    for row in profile.rows:
        series.setdefault(row.key[:-1], []).append(row)
    held: list[HeldOut] = []
    for rows in series.values():
        rows.sort(key=lambda row: row.batch)
        for left_out in _left_out(len(rows), scheme):
            seen = [row for position, row in enumerate(rows) if position not in left_out]
            held.extend(predict(profile, seen, [rows[position] for position in sorted(left_out)]))
    return tuple(held)


def _left_out(points: int, scheme: Scheme) -> Iterable[set[int]]:
    if points < 3:
        return []
    if scheme == "every-second":
        return [set(range(1, points, 2))]
    return [{position} for position in range(1, points - 1)]


def predict(profile: Profile, seen: Sequence[Row], held: Sequence[Row]) -> tuple[HeldOut, ...]:
    """Predict ``held`` from ``seen``: rows of one series of ``profile``, in any order, at least one of each."""
    first = seen[0]
    model = LatencyModel(
        profile.model_copy(update={"rows": tuple(seen), "origins": ()}),
        first.tp,
        first.pp,
        first.input_tokens,
        first.output_tokens,
        first.phase,
    )
    batches = [row.batch for row in seen]
    estimates = [(row, model.at(row.batch)) for row in held]
    return tuple(
        HeldOut(
            model=profile.model,
            gpu_type=profile.gpu_type,
            row=row,
            predicted_s=estimate.mean_s,
            stated_error_ratio=estimate.error_ratio,
            inside=min(batches) < row.batch < max(batches),
        )
        for row, estimate in estimates
    )


def summarise_errors(held: Sequence[HeldOut]) -> ErrorSummary:
    """Return median, 95th percentile and worst of the errors.

    Raises:
        InvalidInput: Nothing was held out.
    """
    if not held:
        raise InvalidInput.of(
            "a series of at least three batches", field="rows", found="none", remedy="profile more batches"
        )
    errors = sorted(each.error_ratio for each in held)
    half = len(errors) // 2
    median = errors[half] if len(errors) % 2 else (errors[half - 1] + errors[half]) / 2
    covered = sum(each.error_ratio <= each.stated_error_ratio for each in held)
    return ErrorSummary(
        points=len(held),
        median=median,
        p95=nearest_rank(errors, 0.95),
        worst=max(held, key=lambda each: each.error_ratio),
        covered_ratio=covered / len(held),
    )
