"""What the replicas of a placement can serve under another demand, or without one node: a linear program each."""

from __future__ import annotations

import numpy as np

from planner.backend import Budget, Solution, Solver, solver
from planner.linear import Floats, ModelBuilder
from planner.requirements import Block
from planner.space import Placed, Placement, PlanningSpace

__all__ = ["routed_in", "scenario_goodput", "served_in"]

_TIME_LIMIT_S = 10.0
"""For one linear program over the replicas that stand; it takes milliseconds."""


def scenario_goodput(space: PlanningSpace, placement: Placement) -> float:
    """Return the weighted goodput of ``placement`` averaged over the demand scenarios: (5.10)."""
    settings = space.problem.settings
    linear, budget = solver(settings.backend), Budget(time_limit_s=_TIME_LIMIT_S, seed=settings.seed)
    scenarios = space.requirements.scenarios
    total = sum(float(space.weight @ served_in(space, placement, each, linear, budget)) for each in scenarios)
    return total / max(1, len(scenarios))


def served_in(space: PlanningSpace, placement: Placement, block: Block, solver: Solver, budget: Budget) -> Floats:
    """Return the rates that the replicas of ``placement`` serve in ``block``, shape (service,), at the best routing.

    Zeros when the solver has no answer in time.
    """
    return space.served_rps(routed_in(space, placement, block, solver, budget))


def routed_in(space: PlanningSpace, placement: Placement, block: Block, solver: Solver, budget: Budget) -> Placement:
    """Return the replicas of ``placement`` that stand in ``block``, with the shares of the best routing there.

    Maximises the weighted goodput of the block: (4.18) and (4.19) of docs/formulation.md with the replicas fixed.
    Nothing when the solver has no answer in time, or when a lost node leaves less than has to be kept.
    """
    alive = [each for each in placement if space.groups[each.group].node != block.lost_node]
    options = [each.option for each in alive]
    rates = space.sustained_rps[options] if options else np.zeros(0)
    services = space.service_of[options] if options else np.zeros(0, dtype=np.int64)
    builder = ModelBuilder()
    cap = np.minimum(1.0, block.offered_rps[services] / rates) if options else np.zeros(0)
    share = builder.add_variables([f"share[{index}]" for index in range(len(alive))], upper=cap, integer=False)
    served = builder.add_variables([f"served[{name}]" for name in space.names], upper=block.offered_rps, integer=False)
    groups = np.array([each.group for each in alive], dtype=np.int64)
    for group in np.unique(groups):
        mine = share[groups == group]
        builder.add_row(f"compute[{group}]", mine, np.ones(len(mine)), upper=1.0)
    for service, name in enumerate(space.names):
        mine = np.flatnonzero(services == service)
        columns, values = np.append(share[mine], served[service]), np.append(rates[mine], -1.0)
        builder.add_row(f"demand[{name}]", columns, values, lower=0.0, upper=0.0)
    for coupling in space.requirements.couplings:
        columns = np.array([served[coupling.child], *(served[caller] for caller, _ in coupling.callers)])
        values = np.array([1.0, *(-fanout for _, fanout in coupling.callers)])
        builder.add_row(f"calls[{space.names[coupling.child]}]", columns, values, lower=0.0, upper=0.0)
    if block.lost_node is not None:
        keep = space.requirements.keep_after_loss * (1.0 - 1e-6) * space.served_rps(placement)
        for service, name in enumerate(space.names):
            builder.add_row(f"survive[{name}]", [int(served[service])], [1.0], lower=float(keep[service]))
    model = builder.build()
    objective = np.zeros(len(model.variables))
    objective[served] = space.weight
    answer = solver.solve(model.with_objective(objective, maximise=True), budget)
    if not isinstance(answer, Solution):
        return ()
    shares = np.clip(answer.values[share], 0.0, 1.0)
    return tuple(Placed(each.group, each.option, float(a)) for each, a in zip(alive, shares, strict=True) if a > 0)
