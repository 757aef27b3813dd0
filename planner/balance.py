"""Spreading rates evenly once the placement is decided: full groups are late groups."""

from __future__ import annotations

import numpy as np

from planner.backend import Budget, Solution, Solver
from planner.linear import ModelBuilder
from planner.space import Placed, Placement, PlanningSpace

__all__ = ["balance"]

_EDGES = np.concatenate([[0.0], np.geomspace(1e-4, 1.0, 41)])
"""Ends of the segments of utilisation, each a quarter longer than the one before, so that idle groups are told apart
as well as busy ones. A unit of a segment costs its upper end: rising, so that peaks are levelled first."""


def balance(space: PlanningSpace, placement: Placement, solver: Solver, budget: Budget) -> Placement:
    """Return ``placement`` with the same replicas, rates per service and variant, and more even utilisations.

    Minimises the sum over groups of a convex, piecewise linear price of utilisation (section 6 of
    docs/formulation.md), so wherever two groups can trade load, the fuller one gives.
    """
    if not placement:
        return placement
    builder = ModelBuilder()
    options = [placed.option for placed in placement]
    cap = space.share_cap[options]
    share = builder.add_variables([f"share[{index}]" for index in range(len(placement))], upper=cap, integer=False)
    for index, option in enumerate(options):
        # No less than a replica must have; where the placement gives less, no less than that.
        least = min(float(space.requirements.least_share[option]), placement[index].share)
        builder.add_row(f"least[{index}]", [int(share[index])], [1.0], lower=least)
    groups = np.array([placed.group for placed in placement])
    utilisation = np.array([space.options[option].utilisation for option in options])
    widths = np.diff(_EDGES)
    prices: list[float] = []
    for group in np.unique(groups):
        segments = builder.add_variables(
            [f"load[{group},{i}]" for i in range(len(widths))], upper=widths, integer=False
        )
        mine = np.flatnonzero(groups == group)
        builder.add_row(f"compute[{group}]", share[mine], np.ones(len(mine)), upper=1.0)
        builder.add_row(
            f"load[{group}]",
            np.concatenate([share[mine], segments]),
            np.concatenate([utilisation[mine], -np.ones(len(segments))]),
            lower=0.0,
            upper=0.0,
        )
        prices.extend(_EDGES[1:])
    # Where bytes should stay on a node, rates stay there too.
    nodes = [space.groups[placed.group].node if space.requirements.calls else "" for placed in placement]
    kinds = [
        (int(space.service_of[option]), float(space.accuracy[option]), node)
        for option, node in zip(options, nodes, strict=True)
    ]
    rates = space.sustained_rps[options]
    for kind in sorted(set(kinds)):
        mine = np.array([index for index, each in enumerate(kinds) if each == kind])
        total = float(sum(rates[index] * placement[index].share for index in mine))
        scale = max(total, 1e-9)
        builder.add_row(f"rate{kind}", share[mine], rates[mine] / scale, lower=total / scale, upper=total / scale)
    model = builder.build()
    model = model.with_objective(np.concatenate([np.zeros(len(placement)), np.array(prices)]), maximise=False)
    answer = solver.solve(model, budget)
    if not isinstance(answer, Solution):
        return placement
    values = np.clip(answer.values[share], 0.0, 1.0)
    return tuple(
        # A solver's zero may be negative; adding zero makes it plain.
        Placed(placed.group, placed.option, float(value) + 0.0)
        for placed, value in zip(placement, values, strict=True)
    )
