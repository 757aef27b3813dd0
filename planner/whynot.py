"""Why not otherwise, by solving again: what a plan loses that has to do it, and what one more of a budget gains."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from planner.backend import Budget, InfeasibleModel, Solution, Solver, solver_for
from planner.formulation import Formulation
from planner.objective import GOODPUT, GPU_COST, Kept, tiers, with_kept
from planner.space import Placement, PlanningSpace

__all__ = ["Price", "budget_price", "price_of"]

_LARGEST_MODEL = 40_000
"""Pairs of group and option up to which solving again is worth the wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What the plan would lose if it had to place a service as asked.

    Attributes:
        objective: Name of the first objective.
        planned: Its value in the plan.
        forced: Its value in the best plan that places the service so; None when no plan can.
        bound: What no such plan can beat.
        cost_per_hour: By how much the GPUs in use would cost more per hour at the same objective; None when unknown.
    """

    objective: str
    planned: float
    forced: float | None
    bound: float
    cost_per_hour: float | None

    def __str__(self) -> str:
        if self.forced is None:
            return "no plan that keeps every limit does"
        if abs(self.forced - self.planned) > 1e-5 * max(1.0, abs(self.planned)):
            loss = f"{self.objective} would be {self.forced:.6g} instead of {self.planned:.6g}"
            return (
                loss
                if abs(self.bound - self.forced) <= 1e-4 * abs(self.forced)
                else f"{loss} (at best {self.bound:.6g})"
            )
        if self.cost_per_hour is None:
            return f"{self.objective} would be the same"
        if self.cost_per_hour > 1e-6:
            return f"{self.objective} would be the same, at {self.cost_per_hour:.4g} more per hour"
        return f"{self.objective} and GPU cost would be the same: it would only move replicas"


def price_of(
    space: PlanningSpace,
    placement: Placement,
    service: int,
    *,
    node: str | None = None,
    parallelism: tuple[int, int] | None = None,
    time_limit_s: float,
) -> Price | None:
    """Return what it would cost to run ``service`` at least once on ``node``, or at least once as (tp, pp).

    None when the problem is too large to solve again, or no answer was found in ``time_limit_s``.
    """
    if sum(len(group.options) for group in space.groups) > _LARGEST_MODEL:
        return None
    first = tiers(space)[0]
    formulation = Formulation(space, space.singles, ordered=False)
    wanted = np.array(
        [
            (node is None or space.groups[formulation.classes[place].members[0]].node == node)
            and (parallelism is None or (formulation.classes[place].tp, formulation.classes[place].pp) == parallelism)
            and space.service_of[option] == service
            for place, option in zip(formulation.pair_class, formulation.pair_option, strict=True)
        ],
        dtype=bool,
    )
    forced_row = np.zeros(len(formulation.model.variables))
    forced_row[formulation.run[wanted]] = 1.0
    planned = first.value(space, placement)
    if not wanted.any():
        return Price(objective=first.name, planned=planned, forced=None, bound=planned, cost_per_hour=None)
    settings = space.problem.settings
    linear = solver_for(settings)
    budget = Budget(time_limit_s=max(0.2, time_limit_s / 2), gap=1e-6, seed=settings.seed)
    model = with_kept(formulation, first, ()).with_row("forced", forced_row, lower=1.0)
    answer = linear.solve(model, budget)
    if isinstance(answer, InfeasibleModel):
        return Price(objective=first.name, planned=planned, forced=None, bound=planned, cost_per_hour=None)
    if not isinstance(answer, Solution):
        return None
    kept = Kept(objective=first, limit=first.limit(planned, max(settings.tolerance, 1e-6)))
    cost = None
    if kept.holds(answer.objective) and first.name != GPU_COST.name:
        dearer = with_kept(formulation, GPU_COST, (kept,)).with_row("forced", forced_row, lower=1.0)
        again = linear.solve(dearer, budget)
        if isinstance(again, Solution):
            cost = again.objective - GPU_COST.value(space, placement)
    return Price(objective=first.name, planned=planned, forced=answer.objective, bound=answer.bound, cost_per_hour=cost)


def budget_price(space: PlanningSpace, service: int, linear: Solver, budget: Budget) -> float | None:
    """Return the weighted rate that one more GPU of ``max_gpus`` adds to the relaxation over classes.

    Solved again, like the prices of GPUs. None without a budget, or without an answer in time.
    """
    if not np.isfinite(space.max_gpus[service]):
        return None
    more = space.max_gpus.copy()
    more[service] += 1.0
    values = []
    for each in (space, replace(space, max_gpus=more)):
        formulation = Formulation(each, each.classes)
        answer = linear.solve(with_kept(formulation, GOODPUT, ()).relaxed(), budget)
        if not isinstance(answer, Solution):
            return None
        values.append(answer.objective)
    return max(0.0, values[1] - values[0])
