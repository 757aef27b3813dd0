"""The objectives, in their lexicographic order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from planner.formulation import Formulation
from planner.linear import Floats, LinearModel
from planner.space import Placement, PlanningSpace

__all__ = ["ACCURACY", "BYTES_MOVED", "GOODPUT", "GPU_COST", "Kept", "Objective", "gap_of", "tiers", "with_kept"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """One objective: its name, its sense, its coefficients in a model, its value for a placement, and a bound on it.

    ``trivial_bound`` is what no placement can beat, whatever the solver may find out.
    """

    name: str
    maximise: bool
    coefficients: Callable[[Formulation], Floats]
    value: Callable[[PlanningSpace, Placement], float]
    trivial_bound: Callable[[PlanningSpace], float]

    def better(self, value: float, other: float) -> bool:
        """Say whether ``value`` is better than ``other`` by more than rounding."""
        margin = 1e-9 * max(1.0, abs(other))
        return value > other + margin if self.maximise else value < other - margin

    def limit(self, value: float, tolerance: float) -> float:
        """Return the worst value that keeps ``value`` within ``tolerance``."""
        slack = tolerance * abs(value)
        return value - slack if self.maximise else value + slack


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """An earlier objective and the worst value that is still allowed."""

    objective: Objective
    limit: float

    def holds(self, value: float) -> bool:
        """Say whether ``value`` keeps the limit, up to rounding."""
        margin = 1e-7 * max(1.0, abs(self.limit))
        return value >= self.limit - margin if self.objective.maximise else value <= self.limit + margin


def with_kept(formulation: Formulation, objective: Objective, kept: tuple[Kept, ...]) -> LinearModel:
    """Return the model that optimises ``objective`` while everything ``kept`` holds: (5.5)."""
    model = formulation.model
    for each in kept:
        coefficients = each.objective.coefficients(formulation)
        if each.objective.maximise:
            model = model.with_row(f"keep.{each.objective.name}", coefficients, lower=each.limit)
        else:
            model = model.with_row(f"keep.{each.objective.name}", coefficients, upper=each.limit)
    return model.with_objective(objective.coefficients(formulation), maximise=objective.maximise)


def gap_of(objective: float, bound: float) -> float:
    """Return ``|bound - objective| / max(|objective|, 1e-9)``; 0 when both are equal up to rounding."""
    difference = abs(bound - objective)
    return 0.0 if difference <= 1e-9 else difference / max(abs(objective), 1e-9)


def tiers(space: PlanningSpace) -> tuple[Objective, ...]:
    """Return the objectives of ``space``, first things first; bytes moved count only when something runs."""
    first = (GOODPUT, ACCURACY, GPU_COST)
    return first if space.problem.current is None else (*first, BYTES_MOVED)


def _goodput(space: PlanningSpace, placement: Placement) -> float:
    return float(space.weight @ np.minimum(space.served_rps(placement), space.offered_rps))


def _accuracy(space: PlanningSpace, placement: Placement) -> float:
    return sum(
        float(space.accuracy[placed.option] * space.sustained_rps[placed.option]) * placed.share for placed in placement
    )


def _gpu_cost(space: PlanningSpace, placement: Placement) -> float:
    return sum(float(space.cost[group]) for group in sorted({placed.group for placed in placement}))


def _bytes_moved(space: PlanningSpace, placement: Placement) -> float:
    moved = [each.option for each in placement if (each.group, each.option) not in space.kept]
    return sum(float(space.moved_bytes[option]) / 2**30 for option in moved)


def _whole_demand(space: PlanningSpace) -> float:
    return float(space.weight @ space.offered_rps)


def _perfect(space: PlanningSpace) -> float:
    return float(space.offered_rps.sum() * space.accuracy.max(initial=0.0))


def _nothing(space: PlanningSpace) -> float:
    return 0.0


GOODPUT = Objective(
    name="goodput",
    maximise=True,
    coefficients=Formulation.goodput,
    value=_goodput,
    trivial_bound=_whole_demand,
)
"""Weighted requests per second served within their SLO."""

ACCURACY = Objective(
    name="accuracy",
    maximise=True,
    coefficients=Formulation.accuracy,
    value=_accuracy,
    trivial_bound=_perfect,
)
"""Accuracy summed over the requests served per second."""

GPU_COST = Objective(
    name="gpu-cost",
    maximise=False,
    coefficients=Formulation.gpu_cost,
    value=_gpu_cost,
    trivial_bound=_nothing,
)
"""Cost per hour of the GPUs in use."""

BYTES_MOVED = Objective(
    name="bytes-moved",
    maximise=False,
    coefficients=Formulation.bytes_moved,
    value=_bytes_moved,
    trivial_bound=_nothing,
)
"""GiB of weights to load, compared with what runs."""
