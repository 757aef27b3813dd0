"""Local search for large placements: a few groups at a time are freed and decided anew while the rest stays as it is.

Unlike `planner.neighbourhood` the model holds the freed groups alone: the rates of all others are fixed, so its size
does not grow with the cluster. Source: P. Shaw, CP 1998.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from planner.backend import Budget, Solution, Solver
from planner.formulation import Formulation
from planner.linear import Floats
from planner.objective import Kept, Objective, with_kept
from planner.space import Placed, Placement, PlanningSpace

__all__ = ["decided_anew", "left_to"]


def left_to(space: PlanningSpace, stays: Iterable[Placed]) -> PlanningSpace:
    """Return ``space`` with the demand, budgets and minimum replicas that ``stays`` leave to other groups."""
    stays = tuple(stays)
    offered = np.maximum(space.offered_rps - space.served_rps(stays), 0.0)
    offered[offered < 1e-9 * space.offered_rps] = 0.0
    services = space.service_of[[placed.option for placed in stays]] if stays else np.zeros(0, dtype=np.int64)
    gpus = np.array([float(len(space.groups[placed.group].gpus)) for placed in stays])
    replicas = np.bincount(services, minlength=len(space.names))
    used = np.bincount(services, gpus, minlength=len(space.names))
    return replace(
        space,
        offered_rps=offered,
        share_cap=np.minimum(1.0, offered[space.service_of] / space.sustained_rps),
        min_replicas=np.maximum(space.min_replicas - replicas, 0),
        max_gpus=np.maximum(space.max_gpus - used, 0.0),
    )


def decided_anew(
    space: PlanningSpace,
    placement: Placement,
    objective: Objective,
    kept: tuple[Kept, ...],
    freed: Sequence[int],
    options: Mapping[int, Sequence[int]],
    solver: Solver,
    budget: Budget,
) -> Placement | None:
    """Return ``placement`` with the groups ``freed`` decided anew; None when nothing was found.

    Args:
        space: The planning space.
        placement: What stands.
        objective: What to optimise.
        kept: What earlier objectives must keep, for the placement as a whole.
        freed: Groups (positions), closed under sharing GPUs.
        options: Per freed group, what to consider beside what stands there.
        solver: Solves the model of the freed groups.
        budget: Its limits.
    """
    free = set(freed)
    stays = tuple(placed for placed in placement if placed.group not in free)
    moves = tuple(placed for placed in placement if placed.group in free)
    rest = left_to(space, stays)
    chosen = [space.singles[group] for group in freed]
    position = {group: index for index, group in enumerate(freed)}
    pairs = {(position[group], option) for group in freed for option in options[group]}
    pairs |= {(position[placed.group], placed.option) for placed in moves}
    formulation = Formulation(rest, chosen, sorted(pairs), ordered=False)
    limits = tuple(
        Kept(objective=each.objective, limit=each.limit - each.objective.value(space, stays)) for each in kept
    )
    model = with_kept(formulation, objective, limits)
    hint = _hint(formulation, rest, moves)
    answer = solver.solve(model, budget, hint if model.violation(hint) <= 1e-6 else None)
    if not isinstance(answer, Solution):
        return None
    return tuple(sorted((*stays, *formulation.decode(answer.values))))


def _hint(formulation: Formulation, rest: PlanningSpace, moves: Placement) -> Floats:
    """Return what stands on the freed groups, cut to what rounding left of the demand."""
    capped = tuple(
        Placed(placed.group, placed.option, min(placed.share, float(rest.share_cap[placed.option]))) for placed in moves
    )
    return formulation.encode(capped)
