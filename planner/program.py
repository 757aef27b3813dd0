"""A linear program that grows by columns and keeps its basis from one solve to the next, with the prices of its rows.

GLOP solves it; HiGHS takes over where rounding gets in GLOP's way. Rows, columns and the objective are scaled to about
1, because both solvers work with absolute tolerances.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from ortools.math_opt import model_pb2
from ortools.math_opt.python import mathopt
from pybind11_abseil.status import StatusNotOk  # type: ignore[import-untyped]

from planner.linear import Floats, Integers
from planner.quiet import native_output_discarded

__all__ = ["LinearProgram", "Optimum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimum:
    """An optimum: values per column, the objective, and the price of every row (positive: a higher limit gains)."""

    values: Floats
    objective: float
    duals: Floats


class LinearProgram:
    """Maximise ``objective @ v`` over ``lower <= v <= upper`` and ``row_lower <= A v <= row_upper``.

    Args:
        row_lower: Shape (row,).
        row_upper: Shape (row,).
        lower: Shape (column,).
        upper: Shape (column,).
        objective: Shape (column,).
        row_of: Shape (entry,): non-zeros of A.
        column_of: Shape (entry,); entries of one place add up.
        value_of: Shape (entry,).
        row_scale: Shape (row,), above 0: about the largest activity of one column in each row.
        objective_scale: About the largest objective of one column, above 0.
    """

    def __init__(
        self,
        row_lower: Floats,
        row_upper: Floats,
        lower: Floats,
        upper: Floats,
        objective: Floats,
        row_of: Integers,
        column_of: Integers,
        value_of: Floats,
        *,
        row_scale: Floats,
        objective_scale: float,
    ) -> None:
        self._row_scale = row_scale
        self._objective_scale = objective_scale
        entry, position = np.unique(row_of * max(1, len(lower)) + column_of, return_inverse=True)
        values = np.bincount(position, value_of / row_scale[row_of], minlength=len(entry))
        row_of, column_of = np.divmod(entry, max(1, len(lower)))
        largest = np.zeros(len(lower))
        np.maximum.at(largest, column_of, np.abs(values))
        plain = np.divide(1.0, largest, out=np.ones_like(largest), where=largest > 0)
        self._column_scale = np.where(np.isfinite(upper) & (upper > 0), upper, plain)
        proto = model_pb2.ModelProto()
        proto.variables.ids.extend(range(len(lower)))
        proto.variables.lower_bounds.extend((lower / self._column_scale).tolist())
        proto.variables.upper_bounds.extend((upper / self._column_scale).tolist())
        proto.variables.integers.extend([False] * len(lower))
        proto.objective.maximize = True
        scaled = objective * self._column_scale / objective_scale
        used = np.flatnonzero(scaled)
        proto.objective.linear_coefficients.ids.extend(used.tolist())
        proto.objective.linear_coefficients.values.extend(scaled[used].tolist())
        proto.linear_constraints.ids.extend(range(len(row_lower)))
        proto.linear_constraints.lower_bounds.extend((row_lower / row_scale).tolist())
        proto.linear_constraints.upper_bounds.extend((row_upper / row_scale).tolist())
        proto.linear_constraint_matrix.row_ids.extend(row_of.tolist())
        proto.linear_constraint_matrix.column_ids.extend(column_of.tolist())
        proto.linear_constraint_matrix.coefficients.extend((values * self._column_scale[column_of]).tolist())
        self._model = mathopt.Model.from_model_proto(proto)
        self._rows = list(self._model.linear_constraints())
        self._columns = list(self._model.variables())
        self._solver: mathopt.IncrementalSolver | None = None
        # Nobody reads reduced costs, and taking them over costs as much as a short solve.
        self._wanted = mathopt.ModelSolveParameters(reduced_costs_filter=mathopt.VariableFilter(filtered_items=()))

    def add_column(self, objective: float, rows: Sequence[int], values: Sequence[float]) -> None:
        """Add a column from 0 up."""
        variable = self._model.add_variable(lb=0.0)
        self._model.objective.set_linear_coefficient(variable, objective / self._objective_scale)
        for row, value in zip(rows, values, strict=True):
            self._rows[row].set_coefficient(variable, value / float(self._row_scale[row]))
        self._columns.append(variable)

    def set_rows(self, lower: Floats, upper: Floats) -> None:
        """Set the limits of every row, shape (row,)."""
        scaled = zip(self._rows, (lower / self._row_scale).tolist(), (upper / self._row_scale).tolist(), strict=True)
        for row, low, high in scaled:
            row.lower_bound, row.upper_bound = low, high

    def solve(self, time_limit_s: float) -> Optimum | None:
        """Return the optimum; None when there is none, or none in time."""
        limit = datetime.timedelta(seconds=max(0.01, time_limit_s))
        if self._solver is None:
            self._solver = mathopt.IncrementalSolver(self._model, mathopt.SolverType.GLOP)
        incremental = self._solver
        found = _optimal(
            lambda: incremental.solve(params=mathopt.SolveParameters(time_limit=limit), model_params=self._wanted)
        )
        if found is None:
            incremental.close()
            self._solver = None
            params = mathopt.SolveParameters(time_limit=limit)
            params.highs.int_options["threads"] = 1
            found = _optimal(lambda: mathopt.solve(self._model, mathopt.SolverType.HIGHS, params=params))
        if found is None:
            return None
        scale = np.ones(len(self._columns))
        scale[: len(self._column_scale)] = self._column_scale
        return Optimum(
            values=np.array(found.variable_values(self._columns)) * scale,
            objective=found.objective_value() * self._objective_scale,
            duals=np.array(found.dual_values(self._rows)) * self._objective_scale / self._row_scale,
        )


def _optimal(solve: Callable[[], mathopt.SolveResult]) -> mathopt.SolveResult | None:
    """Return the result of ``solve`` when it is optimal; None too when the solver gave up over numbers."""
    with native_output_discarded():
        try:
            result = solve()
        except (StatusNotOk, AttributeError):
            # AttributeError: OR-Tools 9.15 stumbles over the status that it means to raise.
            return None
    return result if result.termination.reason == mathopt.TerminationReason.OPTIMAL else None
