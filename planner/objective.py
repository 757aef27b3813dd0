"""The objectives, in their lexicographic order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from planner.fairness import curves, fair_levels, fair_sum, sum_of_least, wanted_services
from planner.formulation import Formulation
from planner.linear import Floats, LinearModel
from planner.recourse import scenario_goodput
from planner.space import Placement, PlanningSpace

__all__ = [
    "ACCURACY",
    "BYTES_CROSSING",
    "BYTES_MOVED",
    "FAIR_SUM",
    "GOODPUT",
    "GPUS",
    "GPU_COST",
    "SCENARIO_GOODPUT",
    "UTILITY",
    "Kept",
    "Objective",
    "gap_of",
    "served_shares",
    "tiers",
    "with_kept",
]


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
    """Return the objectives of ``space``, first things first; docs/formulation.md, section 5, states the order."""
    settings = space.problem.settings
    first: tuple[Objective, ...] = ()
    if settings.minimize is not None:
        first = (GPUS,) if settings.minimize == "gpus" else (GPU_COST,)
    elif settings.objective == "max-min":
        first = tuple(_least_served(level) for level in fair_levels(len(wanted_services(space))))
    elif settings.objective == "fair-sum":
        first = (FAIR_SUM,)
    elif settings.objective == "utility":
        first = (UTILITY,)
    elif space.requirements.scenarios:
        first = (SCENARIO_GOODPUT,)
    rest = [each for each in (GOODPUT, ACCURACY, GPU_COST) if each not in first]
    if any(call.payload_bytes for call in space.requirements.calls):
        rest.append(BYTES_CROSSING)
    if space.problem.current is not None:
        rest.append(BYTES_MOVED)
    return (*first, *rest)


def served_shares(space: PlanningSpace, placement: Placement) -> Floats:
    """Return the served share of every service that is asked for, in [0, 1]."""
    wanted = wanted_services(space)
    return np.minimum(1.0, space.served_rps(placement)[wanted] / space.offered_rps[wanted])


def _goodput(space: PlanningSpace, placement: Placement) -> float:
    return float(space.weight @ np.minimum(space.served_rps(placement), space.offered_rps))


def _accuracy(space: PlanningSpace, placement: Placement) -> float:
    return sum(
        float(space.accuracy[placed.option] * space.sustained_rps[placed.option]) * placed.share for placed in placement
    )


def _gpus(space: PlanningSpace, placement: Placement) -> float:
    return float(sum(len(space.groups[group].gpus) for group in {placed.group for placed in placement}))


def _gpu_cost(space: PlanningSpace, placement: Placement) -> float:
    return sum(float(space.cost[group]) for group in sorted({placed.group for placed in placement}))


def _bytes_moved(space: PlanningSpace, placement: Placement) -> float:
    moved = [each.option for each in placement if (each.group, each.option) not in space.kept]
    return sum(float(space.moved_bytes[option]) / 2**30 for option in moved)


def _bytes_crossing(space: PlanningSpace, placement: Placement) -> float:
    calls = space.requirements.calls
    rates: dict[tuple[str, int], float] = {}
    for placed in placement:
        key = (space.groups[placed.group].node, int(space.service_of[placed.option]))
        rates[key] = rates.get(key, 0.0) + placed.share * float(space.sustained_rps[placed.option])
    served = space.served_rps(placement)
    crossing: float = sum(call.payload_bytes * call.fanout * float(served[call.source]) for call in calls)
    taken = dict(rates)
    for node in sorted({node for node, _ in rates}):
        # Per node, the heaviest calls first: whoever arrives takes from one capacity, so that is optimal.
        for call in sorted(calls, key=lambda call: -call.payload_bytes):
            left = taken.get((node, call.target), 0.0)
            flow = min(call.fanout * rates.get((node, call.source), 0.0), left)
            taken[node, call.target] = left - flow
            crossing -= call.payload_bytes * flow
    return max(0.0, crossing) / 2**30


def _whole_demand(space: PlanningSpace) -> float:
    return float(space.weight @ space.offered_rps)


def _perfect(space: PlanningSpace) -> float:
    return float(space.offered_rps.sum() * space.accuracy.max(initial=0.0))


def _nothing(space: PlanningSpace) -> float:
    return 0.0


def _all_scenarios(space: PlanningSpace) -> float:
    scenarios = space.requirements.scenarios
    total: float = sum(float(space.weight @ each.offered_rps) for each in scenarios)
    return total / max(1, len(scenarios))


def _utilities(space: PlanningSpace, placement: Placement) -> float:
    shapes = curves(space)
    shares = served_shares(space, placement)
    utilities = [
        shapes[service].at(float(share)) for service, share in zip(wanted_services(space), shares, strict=True)
    ]
    return float(space.weight[wanted_services(space)] @ np.array(utilities))


def _most_utility(space: PlanningSpace) -> float:
    shapes = curves(space)
    wanted = wanted_services(space)
    return float(space.weight[wanted] @ np.array([shapes[service].at(1.0) for service in wanted]))


def _least_served(level: int) -> Objective:
    """Return level ``level`` of max-min fairness: (5.7), to maximise."""
    return Objective(
        name=f"least-served-{level}",
        maximise=True,
        coefficients=lambda formulation: formulation.fair.ordered(level, len(formulation.model.variables)),
        value=lambda space, placement: sum_of_least(served_shares(space, placement), level),
        trivial_bound=lambda space: float(level),
    )


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

GPUS = Objective(
    name="gpus",
    maximise=False,
    coefficients=Formulation.gpus_in_use,
    value=_gpus,
    trivial_bound=_nothing,
)
"""GPUs in use."""

BYTES_CROSSING = Objective(
    name="bytes-crossing",
    maximise=False,
    coefficients=Formulation.bytes_crossing,
    value=_bytes_crossing,
    trivial_bound=_nothing,
)
"""GiB per second that workflows hand from node to node."""

FAIR_SUM = Objective(
    name="fair-sum",
    maximise=True,
    coefficients=lambda formulation: formulation.fair.fair_sum(len(formulation.model.variables)),
    value=lambda space, placement: fair_sum(served_shares(space, placement)),
    trivial_bound=lambda space: 2.0 * len(wanted_services(space)),
)
"""Sum of the served shares, and a bonus for equal ones: (5.8)."""

UTILITY = Objective(
    name="utility",
    maximise=True,
    coefficients=lambda formulation: formulation.fair.utility(len(formulation.model.variables)),
    value=_utilities,
    trivial_bound=_most_utility,
)
"""Weighted utilities of the served shares: (5.9)."""

SCENARIO_GOODPUT = Objective(
    name="scenario-goodput",
    maximise=True,
    coefficients=Formulation.scenario_goodput,
    value=scenario_goodput,
    trivial_bound=_all_scenarios,
)
"""Weighted goodput averaged over the demand scenarios: (5.10)."""
