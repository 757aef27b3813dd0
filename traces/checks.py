"""Checks that both trace tables make, and what a failed one says."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from plans.errors import Fault, InvalidInput
from traces.columns import Column, check_names, clean

__all__ = [
    "check_dense",
    "check_factor",
    "check_known",
    "check_window",
    "check_window_length",
    "checked",
    "row_faults",
    "stacked",
]

_SHOWN_ROWS = 5
_MAX_DENSE_CELLS = 200_000_000


def checked(frame: pd.DataFrame, columns: tuple[Column, ...]) -> pd.DataFrame:
    """Return the typed columns of ``frame``.

    Raises:
        InvalidInput: Columns or cells are wrong; all faults at once.
    """
    faults = check_names([str(name) for name in frame.columns], columns)
    if faults:
        raise InvalidInput(faults)
    cleaned = clean(frame, columns)
    for column in columns:
        if column.name in cleaned.bad:
            faults += row_faults(cleaned.bad[column.name], frame, column.expected, field=column.name)
    if faults:
        raise InvalidInput(faults)
    return cleaned.frame


def row_faults(bad: npt.NDArray[np.bool_], frame: pd.DataFrame, expected: str, *, field: str = "") -> list[Fault]:
    """Return a fault for each of the first bad rows, and one that counts the rest."""
    rows = np.flatnonzero(bad)
    shown = [
        Fault(field=f"{field or 'row'}[{row}]", found=_shown(frame, row, field), expected=expected)
        for row in rows[:_SHOWN_ROWS]
    ]
    if len(rows) > _SHOWN_ROWS:
        shown.append(Fault(field=field, found=f"{len(rows) - _SHOWN_ROWS} more such rows", expected=expected))
    return shown


def _shown(frame: pd.DataFrame, row: Any, field: str) -> str:
    if field:
        return repr(frame[field].iloc[row])
    return ", ".join(f"{name}={value}" for name, value in frame.iloc[row].items())


def check_window(start_s: float, end_s: float) -> None:
    """Raise InvalidInput unless the times make a window."""
    if not (0 <= start_s < end_s < math.inf):
        raise InvalidInput.of("0 <= start_s < end_s", field="window", found=f"{start_s} to {end_s}")


def check_window_length(window_s: float) -> None:
    """Raise InvalidInput unless ``window_s`` can be the length of a window."""
    if not (0 < window_s < math.inf):
        raise InvalidInput.of("a positive, finite number of seconds", field="window_s", found=window_s)


def check_factor(rate_factor: float) -> None:
    """Raise InvalidInput unless ``rate_factor`` can scale a rate."""
    if not (0 <= rate_factor < math.inf):
        raise InvalidInput.of("a finite factor, not negative", field="rate_factor", found=rate_factor)


def check_known(names: Iterable[str], services: tuple[str, ...]) -> None:
    """Raise InvalidInput if one of ``names`` is none of ``services``."""
    unknown = [name for name in names if name not in services]
    if unknown:
        expected = f"services of the trace ({', '.join(services[:10])})" if services else "no name: the trace is empty"
        raise InvalidInput([Fault(field="service", found=repr(name), expected=expected) for name in unknown])


def check_dense(windows: int, services: int) -> None:
    """Raise InvalidInput if a dense matrix of this shape would not fit in memory (2e8 cells)."""
    if windows * services > _MAX_DENSE_CELLS:
        raise InvalidInput.of(
            f"at most {_MAX_DENSE_CELLS} windows x services",
            field="window_s",
            found=f"{windows} windows x {services} services",
            remedy="use longer windows or a shorter part of the trace",
        )


def stacked(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of ``frames`` in one table; the empty ones do not disturb its types."""
    filled = [frame for frame in frames if len(frame)] or frames[:1]
    return pd.concat(filled, ignore_index=True)
