"""Solving through OR-Tools MathOpt: HiGHS or SCIP."""

from __future__ import annotations

import datetime
import math
from typing import Literal

import numpy as np
from ortools.math_opt import model_pb2
from ortools.math_opt.python import mathopt

from planner.backend import BackendResult, Budget, InfeasibleModel, NothingFound, Solution, constant_answer
from planner.linear import Floats, LinearModel
from planner.quiet import native_output_discarded
from planner.settings import Backend

__all__ = ["MathOptSolver", "to_proto"]

_TYPES = {
    "highs": mathopt.SolverType.HIGHS,
    "scip": mathopt.SolverType.GSCIP,
}
_OPTIMAL_GAP = 1e-6
"""Relative gap below which objective and bound count as equal, given floating point."""


class MathOptSolver:
    """One of the solvers that MathOpt reaches, on one thread."""

    def __init__(self, name: Literal["highs", "scip"], *, cuts: bool = True, presolve: bool = True) -> None:
        self.name: Backend = name
        self._cuts = cuts
        self._presolve = presolve

    def solve(self, model: LinearModel, budget: Budget, hint: Floats | None = None) -> BackendResult:
        """Solve ``model``; see `planner.backend.Solver`."""
        if not model.variables:
            return constant_answer(model)
        translated = mathopt.Model.from_model_proto(to_proto(model))
        variables = list(translated.variables())
        hints = []
        if hint is not None:
            hints.append(mathopt.SolutionHint(variable_values=dict(zip(variables, hint.tolist(), strict=True))))
        with native_output_discarded():
            result = mathopt.solve(
                translated,
                _TYPES[self.name],
                params=self._parameters(budget),
                model_params=mathopt.ModelSolveParameters(solution_hints=hints),
                remove_names=True,
            )
        reason = result.termination.reason
        if result.has_primal_feasible_solution():
            values = np.array(result.variable_values(variables), dtype=np.float64)
            values[model.integer] = np.round(values[model.integer])
            return self._solution(model, values, result)
        if reason in (mathopt.TerminationReason.INFEASIBLE, mathopt.TerminationReason.INFEASIBLE_OR_UNBOUNDED):
            return InfeasibleModel()  # every variable of ours is bounded or pushed towards its bound
        bound = result.termination.objective_bounds.dual_bound
        return NothingFound(bound=bound if math.isfinite(bound) else None, detail=f"{self.name} stopped: {reason.name}")

    def _parameters(self, budget: Budget) -> mathopt.SolveParameters:
        parameters = mathopt.SolveParameters(
            time_limit=datetime.timedelta(seconds=max(budget.time_limit_s, 1e-3)),
            relative_gap_tolerance=budget.gap,
            absolute_gap_tolerance=0.0,
            random_seed=budget.seed,
        )
        if not self._presolve:
            parameters.presolve = mathopt.Emphasis.OFF
        if not self._cuts:
            parameters.cuts = mathopt.Emphasis.OFF
        if budget.node_limit is not None:
            parameters.node_limit = budget.node_limit
        if self.name == "highs":
            parameters.highs.int_options["threads"] = 1
        else:
            parameters.threads = 1
        return parameters

    def _solution(self, model: LinearModel, values: Floats, result: mathopt.SolveResult) -> Solution:
        objective = model.objective_of(values)
        bound = result.termination.objective_bounds.dual_bound
        if not math.isfinite(bound):
            bound = math.inf if model.maximise else -math.inf
        bound = max(bound, objective) if model.maximise else min(bound, objective)
        optimal = result.termination.reason == mathopt.TerminationReason.OPTIMAL
        near = abs(bound - objective) <= _OPTIMAL_GAP * max(1.0, abs(objective))
        return Solution(
            values=values,
            objective=objective,
            bound=bound,
            stopped="limit" if not optimal else "optimal" if near else "gap",
        )


def to_proto(model: LinearModel) -> model_pb2.ModelProto:
    """Return ``model`` as MathOpt takes it, without names."""
    proto = model_pb2.ModelProto()
    columns = np.arange(len(model.variables))
    proto.variables.ids.extend(columns.tolist())
    proto.variables.lower_bounds.extend(model.lower.tolist())
    proto.variables.upper_bounds.extend(model.upper.tolist())
    proto.variables.integers.extend(model.integer.tolist())
    proto.objective.maximize = model.maximise
    used = np.flatnonzero(model.objective)
    proto.objective.linear_coefficients.ids.extend(used.tolist())
    proto.objective.linear_coefficients.values.extend(model.objective[used].tolist())
    proto.linear_constraints.ids.extend(range(len(model.rows)))
    proto.linear_constraints.lower_bounds.extend(model.row_lower.tolist())
    proto.linear_constraints.upper_bounds.extend(model.row_upper.tolist())
    order = np.lexsort((model.column_of, model.row_of))
    proto.linear_constraint_matrix.row_ids.extend(model.row_of[order].tolist())
    proto.linear_constraint_matrix.column_ids.extend(model.column_of[order].tolist())
    proto.linear_constraint_matrix.coefficients.extend(model.value_of[order].tolist())
    return proto
