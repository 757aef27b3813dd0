"""Solving through PuLP and CBC: the independent second opinion."""

from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pulp

from planner.backend import BackendResult, Budget, InfeasibleModel, NothingFound, Solution, WhyStopped, constant_answer
from planner.linear import Floats, LinearModel
from planner.settings import Backend

__all__ = ["CbcSolver", "translated"]

_BOUND = re.compile(r"^Lower bound:\s+(\S+)", re.MULTILINE)
_RELAXATION = re.compile(r"^Continuous objective value is (\S+)", re.MULTILINE)


class CbcSolver:
    """CBC, the binary that PuLP ships, on one thread. Temporary files only."""

    name: Backend = "cbc"

    def solve(self, model: LinearModel, budget: Budget, hint: Floats | None = None) -> BackendResult:
        """Solve ``model``; see `planner.backend.Solver`."""
        if not model.variables:
            return constant_answer(model)
        problem, variables = translated(model, hint)
        with tempfile.TemporaryDirectory(prefix="foreplan-cbc-") as folder:
            log = Path(folder) / "log"
            command = pulp.COIN_CMD(
                path=pulp.PULP_CBC_CMD.pulp_cbc_path,
                msg=False,
                threads=1,
                timeLimit=max(budget.time_limit_s, 0.01),
                gapRel=budget.gap,
                gapAbs=0.0,
                maxNodes=budget.node_limit,
                warmStart=hint is not None,
                keepFiles=False,
                logPath=str(log),
                options=[f"randomC {budget.seed % 2**31}"],
            )
            command.tmpDir = folder
            try:
                problem.solve(command)
            except pulp.PulpSolverError as error:  # CBC died, as it does now and then
                return NothingFound(bound=None, detail=f"cbc failed: {error}")
            text = log.read_text(encoding="utf-8", errors="replace")
        if problem.status == pulp.LpStatusInfeasible:
            return InfeasibleModel()
        if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
            bound = _bound(model, text)
            return NothingFound(bound=bound, detail=f"cbc stopped: {pulp.LpStatus[problem.status]}")
        return _solution(model, variables, problem, text, budget)


def translated(model: LinearModel, hint: Floats | None = None) -> tuple[Any, list[Any]]:
    """Return the model as CBC gets it: always minimised, so that the bounds in its log have one sign."""
    problem = pulp.LpProblem("foreplan", pulp.LpMinimize)
    variables = [
        problem.add_variable(
            f"v{column}",
            float(model.lower[column]),
            float(model.upper[column]) if math.isfinite(model.upper[column]) else None,
            pulp.LpInteger if model.integer[column] else pulp.LpContinuous,
        )
        for column in range(len(model.variables))
    ]
    if hint is not None:
        for variable, value in zip(variables, hint, strict=True):
            variable.setInitialValue(float(value), check=False)
    sign = -1.0 if model.maximise else 1.0
    used = np.flatnonzero(model.objective)
    # A constant 0 * v0 stands for an empty objective, which the file format does not know.
    terms = [(variables[column], sign * float(model.objective[column])) for column in used]
    problem += pulp.LpAffineExpression(terms or [(variables[0], 0.0)])
    starts = np.searchsorted(model.row_of, np.arange(len(model.rows) + 1))
    for row in range(len(model.rows)):
        entries = slice(starts[row], starts[row + 1])
        pairs = zip(model.column_of[entries], model.value_of[entries], strict=True)
        terms_of_row = pulp.LpAffineExpression([(variables[column], float(value)) for column, value in pairs])
        lower, upper = float(model.row_lower[row]), float(model.row_upper[row])
        if lower == upper:
            problem += terms_of_row == upper
            continue
        if math.isfinite(upper):
            problem += terms_of_row <= upper
        if math.isfinite(lower):
            problem += terms_of_row >= lower
    return problem, variables


def _solution(model: LinearModel, variables: list[Any], problem: Any, text: str, budget: Budget) -> Solution:
    values = np.array([variable.value() or 0.0 for variable in variables])
    values[model.integer] = np.round(values[model.integer])
    objective = model.objective_of(values)
    stopped: WhyStopped = "limit"
    bound = _bound(model, text)
    if problem.sol_status == pulp.LpSolutionOptimal:
        # Optimal within the gap asked for; the log states the bound only when CBC stops early.
        spread = budget.gap * abs(objective)
        bound = objective + spread if model.maximise else objective - spread
        stopped = "optimal" if budget.gap == 0 else "gap"
    if bound is None:
        bound = math.inf if model.maximise else -math.inf
    bound = max(bound, objective) if model.maximise else min(bound, objective)
    return Solution(values=values, objective=objective, bound=bound, stopped=stopped)


def _bound(model: LinearModel, text: str) -> float | None:
    """Read the proven bound from CBC's log: that of the search, else that of the root relaxation."""
    found = _BOUND.findall(text) or _RELAXATION.findall(text)
    if not found:
        return None
    return -float(found[-1]) if model.maximise else float(found[-1])
