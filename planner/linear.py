"""A sparse mixed-integer linear model that knows no solver: named variables and rows over numpy arrays."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "Integers", "LinearModel", "ModelBuilder"]

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearModel:
    """Maximise or minimise ``objective @ v`` over ``lower <= v <= upper`` and ``row_lower <= A v <= row_upper``.

    Attributes:
        variables: Names, shape (variable,).
        lower: Shape (variable,).
        upper: Shape (variable,); infinite where there is no bound.
        integer: Shape (variable,): which variables are integers.
        rows: Names, shape (row,).
        row_lower: Shape (row,), minus infinity where there is no bound.
        row_upper: Shape (row,), infinity where there is no bound.
        row_of: Shape (entry,): the row of each non-zero of A, not falling.
        column_of: Shape (entry,): its variable.
        value_of: Shape (entry,): its value.
        objective: Shape (variable,).
        maximise: The sense.
    """

    variables: tuple[str, ...]
    lower: Floats
    upper: Floats
    integer: NDArray[np.bool_]
    rows: tuple[str, ...]
    row_lower: Floats
    row_upper: Floats
    row_of: Integers
    column_of: Integers
    value_of: Floats
    objective: Floats
    maximise: bool = True

    def with_objective(self, objective: Floats, *, maximise: bool) -> LinearModel:
        """Return the model with another objective, shape (variable,)."""
        return replace(self, objective=objective, maximise=maximise)

    def with_bounds(self, lower: Floats, upper: Floats) -> LinearModel:
        """Return the model with other bounds on its variables, each of shape (variable,)."""
        return replace(self, lower=lower, upper=upper)

    def with_row(
        self, name: str, coefficients: Floats, *, lower: float = -np.inf, upper: float = np.inf
    ) -> LinearModel:
        """Return the model with one more row; ``coefficients`` has shape (variable,)."""
        columns = np.flatnonzero(coefficients)
        return replace(
            self,
            rows=(*self.rows, name),
            row_lower=np.append(self.row_lower, lower),
            row_upper=np.append(self.row_upper, upper),
            row_of=np.concatenate([self.row_of, np.full(len(columns), len(self.rows), dtype=np.int64)]),
            column_of=np.concatenate([self.column_of, columns]),
            value_of=np.concatenate([self.value_of, coefficients[columns]]),
        )

    def relaxed(self, *, but: Integers | None = None) -> LinearModel:
        """Return the linear relaxation; the columns ``but`` stay integer."""
        integer = np.zeros(len(self.variables), dtype=bool)
        integer[[] if but is None else but] = True
        return replace(self, integer=integer)

    def objective_of(self, values: Floats) -> float:
        """Return the objective at ``values``, shape (variable,)."""
        return float(self.objective @ values)

    def violation(self, values: Floats) -> float:
        """Return by how much ``values`` break the worst bound, row or integrality; 0 when they are feasible."""
        activity = np.bincount(self.row_of, self.value_of * values[self.column_of], minlength=len(self.rows))
        parts = (
            self.lower - values,
            values - self.upper,
            self.row_lower - activity,
            activity - self.row_upper,
            np.abs(values - np.round(values))[self.integer],
        )
        return max(0.0, *(float(part.max(initial=0.0)) for part in parts))

    def lp_text(self) -> str:
        """Return the model in the LP format of CPLEX, which every solver reads. Numbers have 12 digits."""
        lines = ["Maximize" if self.maximise else "Minimize"]
        lines.append(f" objective: {self._terms(np.flatnonzero(self.objective), self.objective)}")
        lines.append("Subject To")
        starts = np.searchsorted(self.row_of, np.arange(len(self.rows) + 1))
        for row, name in enumerate(self.rows):
            entries = slice(starts[row], starts[row + 1])
            dense = np.zeros(len(self.variables))
            np.add.at(dense, self.column_of[entries], self.value_of[entries])
            lines.extend(self._row_lines(name, self._terms(np.flatnonzero(dense), dense), row))
        lines.append("Bounds")
        for name, lower, upper in zip(self.variables, self.lower, self.upper, strict=True):
            end = f" <= {_number(upper)}" if np.isfinite(upper) else ""
            lines.append(f" {_number(lower)} <= {_name(name)}{end}")
        if self.integer.any():
            lines.append("Generals")
            lines.extend(f" {_name(self.variables[column])}" for column in np.flatnonzero(self.integer))
        return "\n".join([*lines, "End", ""])

    def _terms(self, columns: Integers, values: Floats) -> str:
        text = " ".join(
            f"{'-' if values[column] < 0 else '+'} {_number(abs(values[column]))} {_name(self.variables[column])}"
            for column in columns
        )
        return _wrapped(text.removeprefix("+ ")) or (f"0 {_name(self.variables[0])}" if self.variables else "0")

    def _row_lines(self, name: str, terms: str, row: int) -> list[str]:
        lower, upper = self.row_lower[row], self.row_upper[row]
        if lower == upper:
            return [f" {_name(name)}: {terms} = {_number(upper)}"]
        lines = []
        if np.isfinite(upper):
            lines.append(f" {_name(name)}: {terms} <= {_number(upper)}")
        if np.isfinite(lower):
            lines.append(f" {_name(name)}{'_at_least' if lines else ''}: {terms} >= {_number(lower)}")
        return lines


class ModelBuilder:
    """Collects variables and rows, then makes the `LinearModel`."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._lower: list[Floats] = []
        self._upper: list[Floats] = []
        self._integer: list[NDArray[np.bool_]] = []
        self._rows: list[str] = []
        self._row_lower: list[float] = []
        self._row_upper: list[float] = []
        self._columns: list[Integers] = []
        self._values: list[Floats] = []

    def add_variables(self, names: Sequence[str], *, upper: Floats, integer: bool) -> Integers:
        """Add variables from 0 up to ``upper``, shape (len(names),), and return their columns."""
        first = len(self._names)
        self._names.extend(names)
        self._lower.append(np.zeros(len(names)))
        self._upper.append(np.asarray(upper, dtype=np.float64))
        self._integer.append(np.full(len(names), integer))
        return np.arange(first, first + len(names), dtype=np.int64)

    def add_row(
        self,
        name: str,
        columns: Sequence[int] | Integers,
        values: Sequence[float] | Floats,
        *,
        lower: float = -np.inf,
        upper: float = np.inf,
    ) -> None:
        """Add ``lower <= sum of values * variables <= upper``."""
        coefficients = np.asarray(values, dtype=np.float64)
        used = np.flatnonzero(coefficients)
        self._rows.append(name)
        self._columns.append(np.asarray(columns, dtype=np.int64)[used])
        self._values.append(coefficients[used])
        self._row_lower.append(lower)
        self._row_upper.append(upper)

    def build(self) -> LinearModel:
        """Return the model, with an objective of 0."""
        lengths = [len(columns) for columns in self._columns]
        return LinearModel(
            variables=tuple(self._names),
            lower=_joined(self._lower),
            upper=_joined(self._upper),
            integer=np.concatenate(self._integer) if self._integer else np.zeros(0, dtype=bool),
            rows=tuple(self._rows),
            row_lower=np.array(self._row_lower),
            row_upper=np.array(self._row_upper),
            row_of=np.repeat(np.arange(len(lengths), dtype=np.int64), lengths),
            column_of=np.concatenate(self._columns) if self._columns else np.zeros(0, dtype=np.int64),
            value_of=_joined(self._values),
            objective=np.zeros(len(self._names)),
        )


def _joined(parts: list[Floats]) -> Floats:
    return np.concatenate(parts) if parts else np.zeros(0)


def _number(value: float) -> str:
    return f"{value:.12g}"


_ALLOWED = str.maketrans({"-": "~", "/": "#", "[": "(", "]": ")", "=": "!", "+": "&", " ": "_"})


def _name(name: str) -> str:
    """Return ``name`` with the characters that the LP format reserves replaced, each by one that names do not hold."""
    return name.translate(_ALLOWED)


def _wrapped(text: str) -> str:
    """Break ``text`` between terms: readers of the format refuse lines of more than 255 characters."""
    return "\n   ".join(textwrap.wrap(text, 200, break_long_words=False, break_on_hyphens=False))
