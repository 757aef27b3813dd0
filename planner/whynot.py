"""Why not otherwise, by solving again: what a plan loses that has to do it, and what one more of a budget gains."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from planner.backend import Budget, InfeasibleModel, Solution, Solver, solver_for
from planner.formulation import Formulation
from planner.objective import BYTES_CROSSING, BYTES_MOVED, GOODPUT, GPU_COST, Kept, Objective, tiers, with_kept
from planner.space import Placement, PlanningSpace

__all__ = ["Price", "Valued", "budget_price", "price_of"]

_LARGEST_MODEL = 40_000
"""Pairs of group and option up to which solving again is worth the wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Valued:
    """An objective's name, its value in the plan and in the best plan that places a service so, and what none beats."""

    name: str
    planned: float
    forced: float
    bound: float
    same: bool
    better: bool

    def __str__(self) -> str:
        if self.name == GPU_COST.name:
            change = self.forced - self.planned
            return f"GPU cost would be {abs(change):.4g} per hour {'more' if change > 0 else 'less'}"
        text = f"{_worded(self.name)} would be {self.forced:.6g} instead of {self.planned:.6g}"
        open_ = abs(self.bound - self.forced) > 1e-4 * abs(self.forced)
        return f"{text} (at best {self.bound:.6g})" if open_ else text


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What the plan would lose if it had to place a service as asked.

    Attributes:
        values: The objectives up to GPU cost in their order, each with those before it kept, up to the first that is
            not the same as in the plan; empty when no plan can.
        unknown: The objective about which there was no answer in time; None when there was one about each.
    """

    values: tuple[Valued, ...]
    unknown: str | None = None

    @property
    def forced(self) -> float | None:
        """Value of the first objective in the best plan that places the service so; None when no plan can."""
        return self.values[0].forced if self.values else None

    def __str__(self) -> str:
        if not self.values:
            return "no plan that keeps every limit does"
        same = [_worded(each.name) for each in self.values if each.same]
        listed = " and ".join([*([", ".join(same[:-1])] if same[1:] else []), *same[-1:]])
        kept = f"{listed} would be the same"
        if self.unknown is not None:
            return f"{kept}; no answer in time about {_worded(self.unknown)}"
        last = self.values[-1]
        if last.same:
            return f"{kept}: it would only move replicas"
        change = f"{kept}, but {last}" if same else str(last)
        return f"{change}, which the plan has not found" if last.better else change


def _worded(name: str) -> str:
    return {"gpu-cost": "GPU cost", "accuracy": "accuracy (times rate)", "gpus": "GPUs in use"}.get(name, name)


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

    Every objective down to GPU cost is solved again, with those before it kept as the plan has them. None when the
    problem is too large to solve again, or no answer was found in ``time_limit_s``.
    """
    if sum(len(group.options) for group in space.groups) > _LARGEST_MODEL:
        return None
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
    if not wanted.any():
        return Price(values=())
    forced_row = np.zeros(len(formulation.model.variables))
    forced_row[formulation.run[wanted]] = 1.0
    settings = space.problem.settings
    linear, tolerance = solver_for(settings), max(settings.tolerance, 1e-6)
    asked = [each for each in tiers(space) if each.name not in (BYTES_CROSSING.name, BYTES_MOVED.name)]
    budget = Budget(time_limit_s=max(0.2, time_limit_s / len(asked)), gap=1e-6, seed=settings.seed)
    found: list[Valued] = []
    kept: tuple[Kept, ...] = ()
    for objective in asked:
        model = with_kept(formulation, objective, kept).with_row("forced", forced_row, lower=1.0)
        answer = linear.solve(model, budget)
        if isinstance(answer, InfeasibleModel) and not found:
            return Price(values=())
        if not isinstance(answer, Solution):
            return Price(values=tuple(found), unknown=objective.name) if found else None
        found.append(_valued(objective, objective.value(space, placement), answer, tolerance))
        if not found[-1].same:
            break
        kept = (*kept, Kept(objective=objective, limit=objective.limit(found[-1].planned, tolerance)))
    return Price(values=tuple(found))


def _valued(objective: Objective, planned: float, answer: Solution, tolerance: float) -> Valued:
    margin = tolerance * abs(planned) + 1e-6
    change = (answer.objective - planned) * (1.0 if objective.maximise else -1.0)
    return Valued(
        name=objective.name,
        planned=planned,
        forced=answer.objective,
        bound=answer.bound,
        same=abs(change) <= margin,
        better=change > margin,
    )


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
