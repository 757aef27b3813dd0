"""Shadow prices: what one more GPU of a type would be worth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from planner.backend import Budget, Solution, Solver
from planner.formulation import Formulation
from planner.linking import Linking
from planner.objective import GOODPUT, with_kept
from planner.space import PlanningSpace

__all__ = ["shadow_prices", "shadow_prices_of_loadouts"]


def shadow_prices(
    space: PlanningSpace, solver: Solver, clock: Callable[[], float], ends_at_s: float
) -> dict[str, float]:
    """Return, per GPU type, the weighted requests per second that one more GPU of it adds to the linear relaxation.

    The relaxation is solved again with one more GPU (and one more group of every class of that type), rather than
    read off the duals: those are not unique at a degenerate optimum, and a difference means the same everywhere. A
    type for which a solver has no answer in time is left out.
    """
    seed = space.problem.settings.seed

    def relaxation(extra_gpu_type: str | None) -> float | None:
        left_s = ends_at_s - clock()
        return (
            _relaxation(space, solver, Budget(time_limit_s=left_s, seed=seed), extra_gpu_type) if left_s > 0 else None
        )

    base = relaxation(None)
    if base is None:
        return {}
    prices = {}
    for gpu_type in sorted({each.gpu_type for each in space.classes}):
        more = relaxation(gpu_type)
        if more is not None:
            gain = max(0.0, more - base)
            prices[gpu_type] = gain if gain > 1e-7 * max(1.0, base) else 0.0
    return prices


def shadow_prices_of_loadouts(space: PlanningSpace, clock: Callable[[], float], ends_at_s: float) -> dict[str, float]:
    """Return the same from the relaxation of column generation (9.6), which stays small on large problems."""
    from planner.master import Master, Network  # numba and MathOpt load with it

    joined = Formulation(space, space.classes, loadouts=False)
    linking = Linking.of(joined, with_kept(joined, GOODPUT, ()))
    cap = space.share_cap[linking.pair_option] if len(linking.pair_option) else np.zeros(0)
    network = Network.of(space, linking)
    master = Master(space, linking, network, cap)
    base = master.relaxation(ends_at_s - clock())
    prices: dict[str, float] = {}
    if base is None:
        return prices
    for gpu_type in sorted({each.gpu_type for each in space.classes}):
        mine = np.array([each.gpu_type == gpu_type for each in space.classes])
        extra = np.array([float(each.coefficients[mine].any()) for each in network.capacities])
        more = master.relaxation(ends_at_s - clock(), extra=extra) if clock() < ends_at_s else None
        if more is not None:
            gain = max(0.0, more.objective - base.objective)
            prices[gpu_type] = gain if gain > 1e-7 * max(1.0, base.objective) else 0.0
    return prices


def _relaxation(space: PlanningSpace, solver: Solver, budget: Budget, extra_gpu_type: str | None) -> float | None:
    formulation = Formulation(space, space.classes, extra_gpu_type=extra_gpu_type)
    model = formulation.model.with_objective(formulation.goodput(), maximise=True).relaxed()
    answer = solver.solve(model, budget)
    return answer.objective if isinstance(answer, Solution) else None
