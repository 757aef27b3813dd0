"""The columns of a request trace and of a rate trace, and the rules that each cell keeps.

One set of rules serves the tables made in memory (where a bad cell is a fault) and the files read from disk (where a
bad row is counted and left out, up to a limit). Cells may arrive typed (Parquet, numpy) or as text (CSV).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from plans.errors import Fault

__all__ = [
    "RATE_COLUMNS",
    "REQUEST_COLUMNS",
    "Cleaned",
    "Column",
    "check_names",
    "clean",
    "duplicated_windows",
    "off_grid",
]

Mask = npt.NDArray[np.bool_]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_MAX_WHOLE = 2.0**53  # the largest range in which every whole number is a float64
_GRID_TOLERANCE = 1e-6  # of a window: how far a window's start may lie from the grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of a trace.

    Attributes:
        name: Its name in files and frames.
        expected: What a good cell holds, for messages.
        required: Whether a trace without this column is refused.
        parse: From cells to (typed cells, mask of the bad ones), each with one entry per row.
    """

    name: str
    expected: str
    required: bool
    parse: Callable[[pd.Series[Any]], tuple[pd.Series[Any], Mask]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleaned:
    """A table after parsing.

    Attributes:
        frame: Typed columns in schema order, all rows; the cells that ``bad`` names are meaningless.
        bad: Per column with bad cells, the mask of the rows that hold them.
    """

    frame: pd.DataFrame
    bad: Mapping[str, Mask]


def check_names(found: Sequence[str], columns: Sequence[Column], *, where: str = "") -> list[Fault]:
    """Return the faults of a header: missing, unknown and repeated columns."""
    known = [column.name for column in columns]
    shown = ", ".join(map(repr, found[:12])) + (", …" if len(found) > 12 else "")
    faults = [
        Fault(
            where=where,
            field=column.name,
            found=f"columns {shown}" if found else "no columns",
            expected="this column",
            remedy="`foreplan trace import` reads the formats of others",
        )
        for column in columns
        if column.required and column.name not in found
    ]
    faults += [
        Fault(
            where=where,
            field=name,
            found="an unknown column",
            expected=f"one of {', '.join(known)}",
            remedy="rename or remove it",
        )
        for name in dict.fromkeys(found)
        if name not in known
    ]
    faults += [
        Fault(where=where, field=name, found="this column twice", expected="every column once")
        for name in known
        if list(found).count(name) > 1
    ]
    return faults


def clean(frame: pd.DataFrame, columns: Iterable[Column]) -> Cleaned:
    """Parse the columns of ``frame`` that ``columns`` names; those that it lacks are left out."""
    typed: dict[str, pd.Series[Any]] = {}
    bad: dict[str, Mask] = {}
    for column in columns:
        if column.name not in frame:
            continue
        typed[column.name], mask = column.parse(frame[column.name].reset_index(drop=True))
        if mask.any():
            bad[column.name] = mask
    return Cleaned(frame=pd.DataFrame(typed), bad=bad)


def duplicated_windows(frame: pd.DataFrame) -> Mask:
    """Return which rows of a rate table name a (window, service) pair that an earlier row names already."""
    return frame.duplicated(["window_start_s", "service"]).to_numpy(dtype=bool)


def off_grid(window_start_s: npt.NDArray[np.float64], window_s: float) -> Mask:
    """Return which windows do not start a whole number of windows after the first one, to 1e-6 of a window."""
    if not window_start_s.size:
        return np.zeros(0, dtype=bool)
    steps = (window_start_s - window_start_s.min()) / window_s
    return np.asarray(np.abs(steps - np.round(steps)) > _GRID_TOLERANCE)


def _missing(cells: pd.Series[Any]) -> Mask:
    missing = cells.isna().to_numpy(dtype=bool)
    if not pd.api.types.is_numeric_dtype(cells.dtype):
        missing = missing | (cells == "").fillna(False).to_numpy(dtype=bool)
    return missing


def _numbers(cells: pd.Series[Any]) -> npt.NDArray[np.float64]:
    """Return the cells as numbers, NaN where they are none. Text is read exactly (shortest form round-trips)."""
    if pd.api.types.is_bool_dtype(cells.dtype):
        return np.full(len(cells), np.nan)
    if pd.api.types.is_numeric_dtype(cells.dtype):
        return cells.to_numpy(dtype=np.float64, na_value=np.nan)
    try:
        text = pa.array(cells, type=pa.string(), from_pandas=True)
        return np.asarray(pc.cast(text, pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return np.fromiter((_number(cell) for cell in cells), dtype=np.float64, count=len(cells))


def _number(cell: object) -> float:
    if isinstance(cell, bool) or (isinstance(cell, str) and "_" in cell):
        return np.nan
    try:
        return float(cell)  # type: ignore[arg-type]  # any object: what float() refuses is not a number
    except (TypeError, ValueError):
        return np.nan


def _seconds(cells: pd.Series[Any]) -> tuple[pd.Series[Any], Mask]:
    values = _numbers(cells)
    with np.errstate(invalid="ignore"):
        bad = ~(np.isfinite(values) & (values >= 0))
    return pd.Series(values), bad


def _whole(cells: pd.Series[Any], *, optional: bool) -> tuple[pd.Series[Any], Mask]:
    values = _numbers(cells)
    with np.errstate(invalid="ignore"):
        good = (values >= 0) & (values <= _MAX_WHOLE) & (values == np.floor(values))
    whole = np.where(good, values, 0.0).astype(np.int64)
    if not optional:
        return pd.Series(whole), ~good
    missing = _missing(cells)
    return pd.Series(pd.arrays.IntegerArray(whole, ~good)), ~(good | missing)


def _count(cells: pd.Series[Any]) -> tuple[pd.Series[Any], Mask]:
    return _whole(cells, optional=False)


def _optional_count(cells: pd.Series[Any]) -> tuple[pd.Series[Any], Mask]:
    return _whole(cells, optional=True)


def _name(cells: pd.Series[Any]) -> tuple[pd.Series[Any], Mask]:
    codes, uniques = pd.factorize(cells)
    good = np.array([isinstance(name, str) and _NAME.fullmatch(name) is not None for name in uniques] + [False])
    return cells.astype("str"), ~good[codes]  # code -1 (missing) reads the last entry


def _label(cells: pd.Series[Any]) -> tuple[pd.Series[Any], Mask]:
    missing = _missing(cells)
    return cells.astype("str").mask(missing), np.zeros(len(cells), dtype=bool)


_SECONDS = "a number of seconds, finite and not negative"
_WHOLE = "a whole number, not negative"
_NAMED = "a service name of letters, digits, '.', '_' and '-', at most 200 long"

REQUEST_COLUMNS = (
    Column(name="arrival_s", expected=_SECONDS, required=True, parse=_seconds),
    Column(name="service", expected=_NAMED, required=True, parse=_name),
    Column(name="stream", expected="a text", required=False, parse=_label),
    Column(name="size_bytes", expected=f"nothing or {_WHOLE}", required=False, parse=_optional_count),
    Column(name="input_tokens", expected=f"nothing or {_WHOLE}", required=False, parse=_optional_count),
    Column(name="output_tokens", expected=f"nothing or {_WHOLE}", required=False, parse=_optional_count),
)
"""Columns of a request trace, in the order in which they are written."""

RATE_COLUMNS = (
    Column(name="window_start_s", expected=_SECONDS, required=True, parse=_seconds),
    Column(name="service", expected=_NAMED, required=True, parse=_name),
    Column(name="count", expected=_WHOLE, required=True, parse=_count),
)
"""Columns of a rate trace, in the order in which they are written."""
