"""Solving through OR-Tools MathOpt: HiGHS or SCIP.

The messages of MathOpt go straight to its native solver. Its Python model would be made from the same message and its
result parsed into dictionaries, basis included, which costs as much as the short solves of a local search themselves,
and a tenth of a second to import.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from ortools.math_opt import callback_pb2, model_parameters_pb2, model_pb2, parameters_pb2, result_pb2, solution_pb2
from ortools.math_opt.core.python import solver as native
from pybind11_abseil.status import StatusCode, StatusNotOk  # type: ignore[import-untyped]

from planner.backend import BackendResult, Budget, InfeasibleModel, NothingFound, Solution, constant_answer
from planner.linear import Floats, LinearModel
from planner.quiet import native_output_discarded
from planner.settings import Backend

__all__ = ["MathOptSolver", "to_proto"]

_TYPES = {
    "highs": parameters_pb2.SOLVER_TYPE_HIGHS,
    "scip": parameters_pb2.SOLVER_TYPE_GSCIP,
}
_INFEASIBLE = (
    result_pb2.TERMINATION_REASON_INFEASIBLE,
    result_pb2.TERMINATION_REASON_INFEASIBLE_OR_UNBOUNDED,
)
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
        try:
            with native_output_discarded():
                result = native.solve(
                    to_proto(model),
                    _TYPES[self.name],
                    parameters_pb2.SolverInitializerProto(),
                    self._parameters(budget),
                    _wanted(hint, prices=not model.integer.any()),
                    None,
                    callback_pb2.CallbackRegistrationProto(),
                    None,
                    None,
                )
        except StatusNotOk as error:
            if error.status.code() != StatusCode.INTERNAL:
                raise  # a model that is none is a bug of ours
            return NothingFound(bound=None, detail=f"{self.name} gave up: {error}")
        reason = result.termination.reason
        values = _values(model, result)
        if values is not None:
            return self._solution(model, values, result)
        if reason in _INFEASIBLE:
            return InfeasibleModel()  # every variable of ours is bounded or pushed towards its bound
        bound = result.termination.objective_bounds.dual_bound
        name = result_pb2.TerminationReasonProto.Name(reason).removeprefix("TERMINATION_REASON_")
        return NothingFound(bound=bound if math.isfinite(bound) else None, detail=f"{self.name} stopped: {name}")

    def _parameters(self, budget: Budget) -> parameters_pb2.SolveParametersProto:
        parameters = parameters_pb2.SolveParametersProto(
            relative_gap_tolerance=budget.gap,
            absolute_gap_tolerance=0.0,
            random_seed=budget.seed,
        )
        parameters.time_limit.FromNanoseconds(max(int(budget.time_limit_s * 1e9), 1_000_000))
        if not self._presolve:
            parameters.presolve = parameters_pb2.EMPHASIS_OFF
        if not self._cuts:
            parameters.cuts = parameters_pb2.EMPHASIS_OFF
        if budget.node_limit is not None:
            parameters.node_limit = budget.node_limit
        if self.name == "highs":
            parameters.highs.int_options["threads"] = 1
        else:
            parameters.threads = 1
        return parameters

    def _solution(self, model: LinearModel, values: Floats, result: result_pb2.SolveResultProto) -> Solution:
        objective = model.objective_of(values)
        bound = result.termination.objective_bounds.dual_bound
        if not math.isfinite(bound):
            bound = math.inf if model.maximise else -math.inf
        bound = max(bound, objective) if model.maximise else min(bound, objective)
        optimal = result.termination.reason == result_pb2.TERMINATION_REASON_OPTIMAL
        near = abs(bound - objective) <= _OPTIMAL_GAP * max(1.0, abs(objective))
        return Solution(
            values=values,
            objective=objective,
            bound=bound,
            stopped="limit" if not optimal else "optimal" if near else "gap",
            prices=_prices(model, result) if optimal else None,
        )


def _wanted(hint: Floats | None, *, prices: bool) -> model_parameters_pb2.ModelSolveParametersProto:
    """Return what to start from, and that of the answer only values are read, and ``prices`` of rows."""
    wanted = model_parameters_pb2.ModelSolveParametersProto()
    wanted.dual_values_filter.filter_by_ids = not prices
    wanted.reduced_costs_filter.filter_by_ids = True
    if hint is not None:
        values = wanted.solution_hints.add().variable_values
        values.ids.extend(range(len(hint)))
        values.values.extend(hint.tolist())
    return wanted


def _values(model: LinearModel, result: result_pb2.SolveResultProto) -> Floats | None:
    """Return the best feasible values of ``result``, which come first, with integers made whole; None without any."""
    if not result.solutions:
        return None
    primal = result.solutions[0].primal_solution
    if primal.feasibility_status != solution_pb2.SOLUTION_STATUS_FEASIBLE:
        return None
    values = np.zeros(len(model.variables))
    values[np.array(primal.variable_values.ids, dtype=np.int64)] = np.array(primal.variable_values.values)
    values[model.integer] = np.round(values[model.integer])
    return values


def _prices(model: LinearModel, result: result_pb2.SolveResultProto) -> Floats | None:
    """Return the price of every row; None where the model has integers or the solver tells none."""
    if model.integer.any() or not result.solutions[0].HasField("dual_solution"):
        return None
    duals = result.solutions[0].dual_solution.dual_values
    prices = np.zeros(len(model.rows))
    prices[np.array(duals.ids, dtype=np.int64)] = np.array(duals.values)
    return prices


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
