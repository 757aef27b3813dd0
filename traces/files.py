"""Traces on disk: Parquet, CSV and gzipped CSV, told apart by the suffix.

The length of a rate trace's windows is metadata: the key ``foreplan.window_s`` of a Parquet file's schema, and a
comment ``# window_s=60`` above the header of a CSV file. The duration of a request trace that ends with silence is kept
in the same way as ``duration_s``. Rows that break a rule of the format are counted and left out; too many of them are
an error.
"""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from plans.documents import atomic_writer
from plans.errors import Fault, InvalidInput
from traces.columns import (
    RATE_COLUMNS,
    REQUEST_COLUMNS,
    Column,
    check_names,
    clean,
    duplicated_windows,
    off_grid,
)
from traces.csv_rows import read_csv_rows, read_header
from traces.reading import MAX_REJECTED_RATIO, Read, Rejections
from traces.table import RateTrace, RequestTrace

__all__ = ["TraceKind", "read_rate_trace", "read_request_trace", "trace_kind", "write_trace"]

TraceKind = Literal["requests", "rates", "azure-functions", "azure-llm"]

_METADATA_PREFIX = "foreplan."
_SUFFIXES = ".parquet, .csv or .csv.gz"


def read_request_trace(path: Path, *, max_rejected_ratio: float = MAX_REJECTED_RATIO) -> Read[RequestTrace]:
    """Read a request trace.

    Rows that are out of order are sorted, and a note says so.

    Raises:
        InvalidInput: The file is no request trace, is damaged or cut short, or has too many bad rows.
    """
    raw = _read(path, REQUEST_COLUMNS)
    frame, rejections = _accepted(raw, REQUEST_COLUMNS)
    rejections.check(where=str(path), rows=raw.rows, max_rejected_ratio=max_rejected_ratio)
    notes = raw.notes
    if not frame["arrival_s"].is_monotonic_increasing:
        notes += ("the rows were not in order of arrival: sorted",)
    duration_s = _seconds_of(raw, "duration_s")
    trace = RequestTrace.sorting(frame)
    if duration_s is not None and duration_s >= trace.duration_s:
        trace = RequestTrace(trace.frame, duration_s=duration_s)
    elif duration_s is not None:
        notes += (f"the last request arrives after the stated duration of {duration_s:g} s: ignored the latter",)
    return rejections.read(trace, where=str(path), rows=raw.rows, max_rejected_ratio=max_rejected_ratio, notes=notes)


def read_rate_trace(path: Path, *, max_rejected_ratio: float = MAX_REJECTED_RATIO) -> Read[RateTrace]:
    """Read a rate trace.

    Where the file does not say how long its windows are, the shortest distance between two of them is taken, and a note
    says so.

    Raises:
        InvalidInput: The file is no rate trace, is damaged or cut short, has too many bad rows, or neither says nor
            shows how long a window is.
    """
    raw = _read(path, RATE_COLUMNS)
    frame, rejections = _accepted(raw, RATE_COLUMNS)
    rejections.check(where=str(path), rows=raw.rows, max_rejected_ratio=max_rejected_ratio)
    notes = raw.notes
    window_s = _seconds_of(raw, "window_s")
    if window_s is None:
        window_s = _inferred_window_s(frame["window_start_s"].to_numpy(), path)
        notes += (f"the file does not say how long a window is: took {window_s:g} s, the shortest distance of two",)
    duplicated = duplicated_windows(frame)
    _reject(rejections, raw, frame.index[duplicated], "service", "every service once per window")
    frame = frame[~duplicated]
    strays = off_grid(frame["window_start_s"].to_numpy(), window_s)
    _reject(rejections, raw, frame.index[strays], "window_start_s", f"windows on the grid of {window_s:g} s")
    frame = frame[~strays]
    rejections.check(where=str(path), rows=raw.rows, max_rejected_ratio=max_rejected_ratio)
    return rejections.read(
        RateTrace(frame, window_s), where=str(path), rows=raw.rows, max_rejected_ratio=max_rejected_ratio, notes=notes
    )


def write_trace(path: Path, trace: RequestTrace | RateTrace) -> None:
    """Write ``trace`` atomically, in the format that the suffix names. Equal traces give equal bytes.

    Raises:
        InvalidInput: The suffix is unknown, or the folder cannot be written.
    """
    if isinstance(trace, RateTrace):
        metadata = {"window_s": repr(trace.window_s)}
    else:
        last_s = float(trace.arrival_s[-1]) if len(trace) else 0.0
        metadata = {} if trace.duration_s == last_s else {"duration_s": repr(trace.duration_s)}
    write = _parquet_writer if _format(path) == "parquet" else _csv_writer
    with atomic_writer(path) as stream:
        if path.suffix == ".gz":
            with gzip.GzipFile(filename="", fileobj=stream, mode="wb", compresslevel=6, mtime=0) as packed:
                write(cast(IO[bytes], packed), trace.frame, metadata)
        else:
            write(stream, trace.frame, metadata)


def trace_kind(path: Path) -> TraceKind:
    """Return which kind of trace ``path`` holds, told from its header alone.

    Raises:
        InvalidInput: The file cannot be read, or its columns are those of no known kind.
    """
    columns = _parquet_schema(path).names if _format(path) == "parquet" else list(read_header(path))
    if {"arrival_s", "service"} <= set(columns):
        return "requests"
    if {"window_start_s", "service", "count"} <= set(columns):
        return "rates"
    if columns[:4] == ["HashOwner", "HashApp", "HashFunction", "Trigger"]:
        return "azure-functions"
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= set(columns):
        return "azure-llm"
    raise InvalidInput.of(
        "the columns of a request trace (arrival_s, service), a rate trace (window_start_s, service, count), "
        "Azure Functions 2019 or Azure LLM 2023",
        where=path,
        found="columns " + ", ".join(map(repr, columns[:8])),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Raw:
    """A table as it lies in the file; ``lines`` is None where rows have numbers, not lines."""

    path: Path
    frame: pd.DataFrame
    rows: int
    metadata: Mapping[str, str]
    lines: npt.NDArray[np.int64] | None = None
    malformed: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()


def _format(path: Path) -> Literal["parquet", "csv"]:
    if path.suffix == ".parquet":
        return "parquet"
    if path.suffix == ".csv" or path.name.endswith(".csv.gz"):
        return "csv"
    raise InvalidInput.of(f"a file name that ends in {_SUFFIXES}", where=path, found=repr(path.name))


def _read(path: Path, columns: tuple[Column, ...]) -> _Raw:
    raw = _read_parquet(path) if _format(path) == "parquet" else _read_csv(path)
    faults = check_names([str(name) for name in raw.frame.columns], columns, where=str(path))
    if faults:
        raise InvalidInput([*faults, *_other_kind(raw.frame.columns, columns, path)])
    return raw


def _other_kind(found: pd.Index[str], columns: tuple[Column, ...], path: Path) -> list[Fault]:
    other, kind = (RATE_COLUMNS, "rate") if columns is REQUEST_COLUMNS else (REQUEST_COLUMNS, "request")
    if not {column.name for column in other if column.required} <= set(found):
        return []
    mine = "request" if kind == "rate" else "rate"
    return [Fault(where=str(path), found=f"a {kind} trace", expected=f"a {mine} trace")]


def _read_csv(path: Path) -> _Raw:
    rows = read_csv_rows(path)
    frame = rows.cells.to_pandas()
    frame.columns = pd.Index(rows.columns)
    return _Raw(
        path=path,
        frame=frame,
        rows=rows.rows,
        metadata=rows.metadata,
        lines=rows.lines,
        malformed=rows.malformed,
        notes=rows.notes,
    )


def _read_parquet(path: Path) -> _Raw:
    schema = _parquet_schema(path)
    faults = [
        Fault(where=str(path), field=field.name, found=str(field.type), expected="a column of numbers or texts")
        for field in schema
        if not _is_scalar(field.type)
    ]
    if faults:
        raise InvalidInput(faults)
    try:
        table = pq.read_table(path)
        table.validate(full=True)
        frame = table.to_pandas()
    except (pa.ArrowException, OSError) as error:
        raise _damaged_parquet(path, error) from error
    pairs = {
        key.decode(errors="replace"): value.decode(errors="replace") for key, value in (schema.metadata or {}).items()
    }
    metadata = {
        key.removeprefix(_METADATA_PREFIX): value for key, value in pairs.items() if key.startswith(_METADATA_PREFIX)
    }
    return _Raw(path=path, frame=frame, rows=len(frame), metadata=metadata)


def _parquet_schema(path: Path) -> pa.Schema:
    try:
        schema = pq.read_schema(path)
        schema.names  # noqa: B018  # decodes the names, which may be no text
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged_parquet(path, error) from error
    return schema


def _damaged_parquet(path: Path, error: Exception) -> InvalidInput:
    if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError) and error.errno:
        return InvalidInput.of("a readable file", where=path, found=os.strerror(error.errno))
    found = (str(error).splitlines() or [type(error).__name__])[0]
    remedy = "the file is cut short or damaged: fetch or write it again"
    return InvalidInput.of("a whole Parquet file", where=path, found=found, remedy=remedy)


def _is_scalar(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_scalar(kind.value_type)
    tests: tuple[Callable[[pa.DataType], bool], ...] = (
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_decimal,
        pa.types.is_boolean,
        pa.types.is_null,
    )
    return any(test(kind) for test in tests)


def _accepted(raw: _Raw, columns: tuple[Column, ...]) -> tuple[pd.DataFrame, Rejections]:
    """Return the rows whose every cell is good, indexed by their position in ``raw``, and an account of the others."""
    rejections = Rejections()
    for fault in raw.malformed:
        rejections.add(fault)
    cleaned = clean(raw.frame, columns)
    rejected = np.zeros(len(raw.frame), dtype=bool)
    for column in columns:
        if column.name in cleaned.bad:
            bad = cleaned.bad[column.name] & ~rejected
            _reject(rejections, raw, np.flatnonzero(bad), column.name, column.expected)
            rejected |= bad
    return cleaned.frame[~rejected], rejections


def _reject(
    rejections: Rejections, raw: _Raw, positions: npt.NDArray[np.int64] | pd.Index[int], field: str, expected: str
) -> None:
    for done, position in enumerate(positions):
        if rejections.full:
            rejections.add(Fault(field=field, expected=expected), count=len(positions) - done)
            return
        row = int(position)
        line = None if raw.lines is None else int(raw.lines[row])
        name = field if raw.lines is not None else f"{field}[{row}]"
        found = repr(raw.frame[field].iloc[row])
        rejections.add(Fault(where=str(raw.path), line=line, field=name, found=found, expected=expected))


def _seconds_of(raw: _Raw, key: str) -> float | None:
    text = raw.metadata.get(key)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and (value > 0 or (value == 0 and key == "duration_s"))):
        raise InvalidInput.of("a positive, finite number of seconds", where=raw.path, field=key, found=repr(text))
    return value


def _inferred_window_s(window_start_s: npt.NDArray[np.float64], path: Path) -> float:
    distances_s = np.diff(np.unique(window_start_s))
    if not distances_s.size:
        raise InvalidInput.of(
            "the length of a window, or two windows that show it",
            where=path,
            field="window_s",
            found="neither",
            remedy="put a first line such as `# window_s=60` into a CSV file, "
            "or the key foreplan.window_s into a Parquet file's metadata",
        )
    return float(distances_s.min())


def _parquet_writer(stream: IO[bytes], frame: pd.DataFrame, metadata: Mapping[str, str]) -> None:
    table = pa.Table.from_pandas(frame, preserve_index=False)
    keyed = {f"{_METADATA_PREFIX}{key}": value for key, value in metadata.items()}
    pq.write_table(table.replace_schema_metadata(keyed or None), stream, compression="zstd")


def _csv_writer(stream: IO[bytes], frame: pd.DataFrame, metadata: Mapping[str, str]) -> None:
    for key, value in metadata.items():
        stream.write(f"# {key}={value}\n".encode())
    frame.to_csv(stream, index=False, lineterminator="\n", encoding="utf-8")
