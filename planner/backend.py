"""What a solver answers: a solution, a proof that there is none, or nothing in the time it had."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from planner.linear import Floats, LinearModel
from planner.settings import Backend, Settings

__all__ = [
    "BackendResult",
    "Budget",
    "InfeasibleModel",
    "NothingFound",
    "Solution",
    "Solver",
    "WhyStopped",
    "constant_answer",
    "local_solver",
    "solver",
    "solver_for",
]

WhyStopped = Literal["optimal", "gap", "limit"]
"""Why a solver stopped: optimality proven, within the gap that was asked for, or out of time or nodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Limits of one solve.

    Attributes:
        time_limit_s: Seconds of wall time.
        gap: Relative gap at which to stop.
        seed: Seed of the solver.
        node_limit: Nodes of the search tree, None for no limit; unlike time, the same on every machine.
    """

    time_limit_s: float
    gap: float = 0.0
    seed: int = 1
    node_limit: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """Feasible values, shape (variable,), their objective, the proven bound on any, and why the solver stopped.

    ``prices``, shape (row,), are what one more of each row's limit is worth: of the optimum of a model without
    integers, from solvers that tell them.
    """

    values: Floats
    objective: float
    bound: float
    stopped: WhyStopped
    prices: Floats | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InfeasibleModel:
    """Proven: no values satisfy the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NothingFound:
    """Neither values nor a proof. ``bound`` is what is known about the objective, None for nothing."""

    bound: float | None
    detail: str


BackendResult = Solution | InfeasibleModel | NothingFound


class Solver(Protocol):
    """Solves linear models; deterministic for a seed as long as the time limit does not strike."""

    name: Backend

    def solve(self, model: LinearModel, budget: Budget, hint: Floats | None = None) -> BackendResult:
        """Solve ``model``; ``hint`` holds feasible values, shape (variable,), to start from."""
        ...


def solver(name: Backend, *, presolve: bool = True) -> Solver:
    """Return the solver called ``name``; its library is imported only now.

    Without ``presolve`` HiGHS does not reduce the model first: with rows that hold the least or the greatest of many
    sums, its presolve (OR-Tools 9.15) made it prove optima that were none (tests/planner/test_quota.py).
    """
    if name == "cbc":
        from planner.pulp_backend import CbcSolver

        return CbcSolver()
    if name == "cp-sat":
        from planner.cp_sat_backend import CpSatSolver

        return CpSatSolver(presolve=presolve)
    from planner.mathopt_backend import MathOptSolver

    return MathOptSolver(name, presolve=presolve)


def solver_for(settings: Settings) -> Solver:
    """Return the solver that ``settings`` name, without presolve where their objective has least or greatest sums."""
    return solver(settings.backend, presolve=settings.objective in ("goodput", "utility"))


def local_solver(name: Backend) -> Solver:
    """Return the solver for the many small models of a local search that ``name`` leads.

    SCIP without cuts closes those four times as fast as HiGHS (docs/benchmarks.md); CBC, which is there to depend on
    nothing else, searches for itself.
    """
    if name == "cbc":
        return solver(name)
    from planner.mathopt_backend import MathOptSolver

    return MathOptSolver("scip", cuts=False)


def constant_answer(model: LinearModel) -> BackendResult:
    """Answer for a model without variables: its rows hold or not, as they stand."""
    empty = np.zeros(0)
    if model.violation(empty) > 0:
        return InfeasibleModel()
    return Solution(values=empty, objective=0.0, bound=0.0, stopped="optimal")
