"""CP-SAT through MathOpt: whole numbers by CP-SAT, the rest by a linear program, every answer checked.

CP-SAT knows integers only. MathOpt's own scaling of continuous variables made it refuse valid models and call feasible
ones infeasible, so here the scaling is ours and errs on one side. A continuous v in [l, u] becomes l + (u - l) k / N
with whole k in [0, N]; rows get whole coefficients of at most 2^38 in all, and are loosened by what rounding v down to
its grid and rounding coefficients can change. Whatever satisfies the model satisfies that one too, so its infeasibility
and its bound, widened by what the grid takes from the objective, are proofs. Its solution need not be one of the model:
the integers are fixed and HiGHS finds the rest, and what breaks a row of the model is no answer.
"""

from __future__ import annotations

import datetime
import math
import time

import numpy as np
from ortools.math_opt.python import mathopt

from planner.backend import BackendResult, Budget, InfeasibleModel, NothingFound, Solution, constant_answer
from planner.linear import Floats, LinearModel
from planner.mathopt_backend import MathOptSolver, to_proto
from planner.quiet import native_output_discarded
from planner.settings import Backend

__all__ = ["CpSatSolver", "on_a_grid"]

_STEPS = 2.0**13
"""Steps of the grid of a continuous variable: the bound is that much too wide, more steps take much longer."""

_ACTIVITY = 2.0**38
"""Largest activity of a row in whole numbers; with 2^18 steps and 2^50, a quarter of the problems of
tests/planner/test_cp_sat_backend.py found nothing in the time in which these settings solve all."""

_VIOLATION = 1e-6
"""What a row of the model may be missed by, as for hints."""


class CpSatSolver:
    """CP-SAT on one thread; HiGHS for what is continuous."""

    def __init__(self, *, presolve: bool = True) -> None:
        """Prepare; ``presolve`` is that of HiGHS."""
        self.name: Backend = "cp-sat"
        self._linear = MathOptSolver("highs", presolve=presolve)

    def solve(self, model: LinearModel, budget: Budget, hint: Floats | None = None) -> BackendResult:
        """Solve ``model``; see `planner.backend.Solver`. A model without integers goes to HiGHS as a whole."""
        if not model.variables:
            return constant_answer(model)
        if not model.integer.any():
            return self._linear.solve(model, budget, hint)
        if not (np.isfinite(model.lower).all() and np.isfinite(model.upper).all()):
            return NothingFound(bound=None, detail="CP-SAT needs a bound on every variable")
        started_s = time.monotonic()
        gridded, step, widened = on_a_grid(model)
        translated = mathopt.Model.from_model_proto(to_proto(gridded))
        variables = list(translated.variables())
        hints = []
        if hint is not None:
            on_grid = np.clip(np.floor((hint - model.lower) / step + 1e-9), gridded.lower, gridded.upper)
            hints.append(mathopt.SolutionHint(variable_values=dict(zip(variables, on_grid.tolist(), strict=True))))
        parameters = mathopt.SolveParameters(
            time_limit=datetime.timedelta(seconds=max(budget.time_limit_s, 1e-3)),
            relative_gap_tolerance=budget.gap,
            random_seed=budget.seed,
            threads=1,
        )
        with native_output_discarded():
            result = mathopt.solve(
                translated,
                mathopt.SolverType.CP_SAT,
                params=parameters,
                model_params=mathopt.ModelSolveParameters(solution_hints=hints),
            )
        reason = result.termination.reason
        if reason in (mathopt.TerminationReason.INFEASIBLE, mathopt.TerminationReason.INFEASIBLE_OR_UNBOUNDED):
            return InfeasibleModel()
        bound = _bound_of(model, result.termination.objective_bounds.dual_bound, widened)
        if not result.has_primal_feasible_solution():
            return NothingFound(bound=bound, detail=f"cp-sat stopped: {reason.name}")
        whole = np.round(np.array(result.variable_values(variables))) * step + model.lower
        lower, upper = (np.where(model.integer, whole, each) for each in (model.lower, model.upper))
        left_s = max(0.1, budget.time_limit_s - (time.monotonic() - started_s))
        rest = self._linear.solve(
            model.with_bounds(lower, upper).relaxed(), Budget(time_limit_s=left_s, seed=budget.seed)
        )
        if not isinstance(rest, Solution) or model.violation(rest.values) > _VIOLATION:
            return NothingFound(bound=bound, detail="cp-sat found no answer that keeps every row")
        return _solution(model, rest, bound, optimal=reason == mathopt.TerminationReason.OPTIMAL, gap=budget.gap)


def _bound_of(model: LinearModel, known: float, widened: float) -> float | None:
    """Return the bound on ``model`` that follows from that of the grid, and from its variables' bounds alone."""
    if not math.isfinite(known):
        return None
    known += float(model.objective @ model.lower)
    up = (model.objective > 0) == model.maximise
    trivial = float(model.objective @ np.where(up, model.upper, model.lower))
    return min(known + widened, trivial) if model.maximise else max(known - widened, trivial)


def _solution(model: LinearModel, rest: Solution, bound: float | None, *, optimal: bool, gap: float) -> Solution:
    values = rest.values.copy()
    values[model.integer] = np.round(values[model.integer])
    objective = model.objective_of(values)
    proven = bound if bound is not None else (math.inf if model.maximise else -math.inf)
    proven = max(proven, objective) if model.maximise else min(proven, objective)
    closed = abs(proven - objective) <= 1e-6 * max(1.0, abs(objective))
    stopped = "limit" if not optimal else "optimal" if closed else "gap"
    return Solution(values=values, objective=objective, bound=proven, stopped=stopped)  # type: ignore[arg-type]


def on_a_grid(model: LinearModel) -> tuple[LinearModel, Floats, float]:
    """Return ``model`` in whole numbers, loosened, the step per variable, and what the grid may cost the objective.

    Variable j of the model is lower[j] + step[j] times that of the result; rounding it down to the grid keeps every
    row of the result. Every variable must be bounded.
    """
    span = model.upper - model.lower
    step = np.where(model.integer, 1.0, np.where(span > 0, span, 1.0) / _STEPS)
    most = np.where(model.integer, np.floor(span + 1e-9), np.where(span > 0, _STEPS, 0.0))
    rows = len(model.rows)
    amount = model.value_of * step[model.column_of]
    activity = np.bincount(model.row_of, np.abs(amount) * most[model.column_of], minlength=rows)
    scale = _ACTIVITY / np.where(activity > 0, activity, 1.0)
    coefficients = np.round(amount * scale[model.row_of])
    rounding = np.bincount(model.row_of, 0.5 * most[model.column_of], minlength=rows) + 1.0
    # Rounding a continuous variable down takes less than one step from it: that lowers terms above 0, raises others.
    of_grid = np.where(model.integer[model.column_of], 0.0, np.abs(coefficients))
    fallen = np.bincount(model.row_of, of_grid * (coefficients > 0), minlength=rows)
    risen = np.bincount(model.row_of, of_grid * (coefficients < 0), minlength=rows)
    base = np.bincount(model.row_of, model.value_of * model.lower[model.column_of], minlength=rows)
    slack = 1e-9 * np.abs(scale) * np.maximum(1.0, activity)
    objective = model.objective * step
    gridded = LinearModel(
        variables=model.variables,
        lower=np.zeros(len(span)),
        upper=most,
        integer=np.ones(len(span), dtype=bool),
        rows=model.rows,
        row_lower=np.floor((model.row_lower - base) * scale - fallen - rounding - slack),
        row_upper=np.ceil((model.row_upper - base) * scale + risen + rounding + slack),
        row_of=model.row_of,
        column_of=model.column_of,
        value_of=coefficients,
        objective=objective,
        maximise=model.maximise,
    )
    widened = float(np.abs(objective[~model.integer]).sum()) + 1e-9 * float(np.abs(objective) @ most)
    return gridded, step, widened
