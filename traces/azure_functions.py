"""The Azure Functions 2019 data set: invocations per function and minute, one wide file per day (CC-BY).

``invocations_per_function_md.anon.dNN.csv`` has the columns ``HashOwner,HashApp,HashFunction,Trigger,1,…,1440``: a row
per function that was invoked that day, a column per minute. A function that a day's file does not list was not invoked.

**How functions become services.** The functions are ranked by their invocations over all days read (most first; equal
ones by owner, app, function and trigger), and the first ``top`` are kept. When the caller names n services, the kept
functions are permuted by ``numpy.random.default_rng(seed).permutation(top)``, and the function at place i of the
permutation goes to service i modulo n; a service's counts are the sum of its functions'. Without names, each function
becomes a service of its own, ``function-01``, ``function-02``, … by rank. `AzureFunctions.assignments` records the
outcome.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from plans.errors import Fault, InvalidInput
from traces.csv_rows import CsvRows, read_csv_rows
from traces.reading import MAX_REJECTED_RATIO, Read, Rejections
from traces.table import RateTrace

__all__ = ["Assignment", "AzureFunctions", "read_azure_functions"]

WINDOW_S = 60.0
MINUTES = 1440

_KEYS = ("HashOwner", "HashApp", "HashFunction", "Trigger")
_HEADER = (*_KEYS, *(str(minute) for minute in range(1, MINUTES + 1)))
_DAY_S = 86400.0
_DAY_OF_NAME = re.compile(r"\.d(\d{1,3})\.csv(?:\.gz)?$")
_CELL = r"^[0-9]{1,9}$"

Key = tuple[str, ...]
Counts = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Which service a function stands for, with the function's invocations over all days read."""

    service: str
    owner: str
    app: str
    function: str
    trigger: str
    invocations: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AzureFunctions:
    """Some days of the data set as the load of services.

    Attributes:
        rates: Counts per service and minute; time 0 is the start of the first day.
        days: Numbers of the days read, in order.
        assignments: The functions kept, most invoked first.
        seed: Seed of the mapping.
        factors: By what each service's counts were scaled to keep below ``peak_rps``; 1 where nothing was.
    """

    rates: RateTrace
    days: tuple[int, ...]
    assignments: tuple[Assignment, ...]
    seed: int
    factors: dict[str, float]


def read_azure_functions(
    source: Path | Sequence[Path],
    *,
    services: Sequence[str] | None = None,
    top: int | None = None,
    seed: int = 0,
    peak_rps: float | None = None,
    max_rejected_ratio: float = MAX_REJECTED_RATIO,
) -> Read[AzureFunctions]:
    """Read days of the data set. Rows and rejections of the result count cells; a bad cell stands as zero.

    All days are held in memory, 6 kB per function and day (a whole day of the data set: 270 MB).

    Args:
        source: A file; a folder, for every ``*.dNN.csv`` (or ``.csv.gz``) in it; a pattern with ``*`` or ``?`` in its
            last part; or several of these. Days are put in the order of their numbers.
        services: Services to map functions to (see the module); one per function when left out.
        top: Functions to keep; as many as there are services, or all, when left out.
        seed: Seed of the mapping.
        peak_rps: Scale each service down until its busiest minute has at most this rate, requests per second.
        max_rejected_ratio: Share of bad cells above which the files are refused.

    Raises:
        InvalidInput: There is no file, a day is there twice, a file has another header, is damaged or has too many bad
            cells, there are fewer functions than asked for, or an argument is out of range.
    """
    files, notes = _days(source)
    rejections = Rejections("cells")
    cells = 0
    parsed: dict[int, tuple[list[Key], Counts]] = {}
    for day, path in files.items():
        rows = read_csv_rows(path)
        _check_header(rows, path)
        parsed[day] = _parse(rows, path, rejections)
        cells += rows.rows * MINUTES
        notes += rows.notes
    where = str(next(iter(files.values()))) if len(files) == 1 else f"{len(files)} files"
    rejections.check(where=where, rows=cells, max_rejected_ratio=max_rejected_ratio)
    ranked = _ranked(parsed)
    kept = _kept(ranked, services, top, where)
    names = _service_names(len(kept), services, seed)
    rates = _rates(parsed, kept, names)
    factors = dict.fromkeys(rates.services, 1.0)
    if peak_rps is not None:
        factors, rates = rates.cap_factors(peak_rps), rates.capped(peak_rps)
    value = AzureFunctions(
        rates=rates,
        days=tuple(parsed),
        assignments=tuple(
            Assignment(
                service=name,
                owner=key[0],
                app=key[1],
                function=key[2],
                trigger=key[3],
                invocations=ranked[key],
            )
            for key, name in zip(kept, names, strict=True)
        ),
        seed=seed,
        factors=factors,
    )
    return rejections.read(value, where=where, rows=cells, max_rejected_ratio=max_rejected_ratio, notes=notes)


def _days(source: Path | Sequence[Path]) -> tuple[dict[int, Path], tuple[str, ...]]:
    """Return the files by day, in order, and what had to be decided."""
    sources = [source] if isinstance(source, Path) else list(source)
    paths = [path for given in sources for path in _found(given)]
    numbered = [(_DAY_OF_NAME.search(path.name), path) for path in paths]
    if len(paths) == 1 and numbered[0][0] is None:
        return {1: paths[0]}, (f"{paths[0].name} does not name its day: taken as day 1",)
    faults = [
        Fault(where=str(path), found="a name without a day", expected="a name that ends in .dNN.csv or .dNN.csv.gz")
        for match, path in numbered
        if match is None
    ]
    days: dict[int, Path] = {}
    for match, path in numbered:
        day = int(match.group(1)) if match else 0
        if match and days.setdefault(day, path) != path:
            faults.append(
                Fault(where=str(path), found=f"day {day} again", expected=f"one file per day, besides {days[day]}")
            )
    if faults:
        raise InvalidInput(faults)
    ordered = dict(sorted(days.items()))
    first, last = min(ordered), max(ordered)
    missing = [day for day in range(first, last + 1) if day not in ordered]
    notes = (f"no file for day {', '.join(map(str, missing))}: a gap in the trace",) if missing else ()
    return ordered, notes


def _found(given: Path) -> list[Path]:
    if given.is_dir():
        found = [path for path in sorted(given.iterdir()) if _DAY_OF_NAME.search(path.name)]
        expected = "files whose names end in .dNN.csv or .dNN.csv.gz"
    elif any(sign in given.name for sign in "*?["):
        found = sorted(given.parent.glob(given.name))
        expected = "files that match"
    else:
        return [given]
    if not found:
        raise InvalidInput.of(expected, where=given, found="none")
    return found


def _check_header(rows: CsvRows, path: Path) -> None:
    if rows.columns == _HEADER:
        return
    place = next((i for i, pair in enumerate(zip(rows.columns, _HEADER, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        found, expected = f"{len(rows.columns)} columns", f"{len(_HEADER)} columns: {', '.join(_KEYS)}, 1, …, {MINUTES}"
    else:
        found, expected = f"column {place + 1} named {rows.columns[place]!r}", repr(_HEADER[place])
    raise InvalidInput.of(expected, where=path, field="header", found=found, remedy="give Azure Functions 2019 files")


def _parse(rows: CsvRows, path: Path, rejections: Rejections) -> tuple[list[Key], Counts]:
    """Return the functions of a day and their counts, shape (function, minute)."""
    for fault in rows.malformed:
        rejections.add(fault, count=MINUTES)
    keys = list(zip(*(rows.cells.column(index).to_pylist() for index in range(len(_KEYS))), strict=True))
    counts = np.zeros((len(keys), MINUTES), dtype=np.int32)
    for minute in range(MINUTES):
        cells = rows.cells.column(len(_KEYS) + minute)
        good = pc.match_substring_regex(cells, _CELL)
        if not pc.all(good, min_count=0).as_py():
            for row in np.flatnonzero(~np.asarray(good.to_numpy(), dtype=bool)):
                _reject_cell(rejections, path, int(rows.lines[row]), minute, cells[int(row)].as_py())
            cells = pc.if_else(good, cells, "0")
        counts[:, minute] = pc.cast(cells, pa.int32()).to_numpy()
    return _without_repeats(keys, counts, rows, path, rejections)


def _reject_cell(rejections: Rejections, path: Path, line: int, minute: int, found: str) -> None:
    expected = "a whole number, not negative"
    where = "" if rejections.full else str(path)
    rejections.add(Fault(where=where, line=line, field=f"minute[{minute + 1}]", found=repr(found), expected=expected))


def _without_repeats(
    keys: list[Key], counts: Counts, rows: CsvRows, path: Path, rejections: Rejections
) -> tuple[list[Key], Counts]:
    first: dict[Key, int] = {}
    for row, key in enumerate(keys):
        if first.setdefault(key, row) != row:
            expected = f"every function once a day, besides line {rows.lines[first[key]]}"
            fault = Fault(
                where=str(path), line=int(rows.lines[row]), field="HashFunction", found=key[2], expected=expected
            )
            rejections.add(fault, count=MINUTES)
    return list(first), counts[list(first.values())]


def _ranked(parsed: dict[int, tuple[list[Key], Counts]]) -> dict[Key, int]:
    """Return every function's invocations, most first."""
    total: dict[Key, int] = {}
    for keys, counts in parsed.values():
        for key, invocations in zip(keys, counts.sum(axis=1, dtype=np.int64), strict=True):
            total[key] = total.get(key, 0) + int(invocations)
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def _kept(ranked: dict[Key, int], services: Sequence[str] | None, top: int | None, where: str) -> list[Key]:
    if services is not None and (not services or len(set(services)) < len(services)):
        raise InvalidInput.of("at least one service, each once", field="services", found=list(services))
    needed = len(services) if services is not None else 1
    wanted = top if top is not None else needed if services is not None else len(ranked)
    if wanted < needed:
        raise InvalidInput.of(f"at least {needed}, one function per service", field="top", found=wanted)
    if len(ranked) < max(wanted, 1):
        raise InvalidInput.of(
            f"at least {max(wanted, 1)} functions",
            where=where,
            found=len(ranked),
            remedy="ask for fewer functions or services, or read more days",
        )
    return list(ranked)[:wanted]


def _service_names(functions: int, services: Sequence[str] | None, seed: int) -> list[str]:
    """Return the service of each function, by rank."""
    if services is None:
        width = max(2, len(str(functions)))
        return [f"function-{rank:0{width}d}" for rank in range(1, functions + 1)]
    names = [""] * functions
    for place, rank in enumerate(np.random.default_rng(seed).permutation(functions)):
        names[rank] = services[place % len(services)]
    return names


def _rates(parsed: dict[int, tuple[list[Key], Counts]], kept: list[Key], names: list[str]) -> RateTrace:
    services = sorted(set(names))
    service_of = {key: services.index(name) for key, name in zip(kept, names, strict=True)}
    origin = min(parsed)
    frames = []
    for day, (keys, counts) in parsed.items():
        matrix = np.zeros((len(services), MINUTES), dtype=np.int64)
        for row, key in enumerate(keys):
            if key in service_of:
                matrix[service_of[key]] += counts[row]
        starts_s = (day - origin) * _DAY_S + np.arange(MINUTES) * WINDOW_S
        frames.append(RateTrace.from_counts(starts_s, services, matrix, window_s=WINDOW_S).frame)
    return RateTrace(pd.concat(frames, ignore_index=True), WINDOW_S)
