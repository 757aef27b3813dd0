"""The Azure LLM inference traces of 2023 and 2024 (``TIMESTAMP,ContextTokens,GeneratedTokens``), CC-BY.

Timestamps have six or seven decimals and may carry an offset; `datetime.fromisoformat` reads them, cutting the seventh
decimal.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd

from plans.errors import Fault, InvalidInput
from traces.csv_rows import CsvRows, read_csv_rows
from traces.reading import MAX_REJECTED_RATIO, Read, Rejections
from traces.table import RequestTrace

__all__ = ["COLUMNS", "read_azure_llm"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def read_azure_llm(
    path: Path, *, service: str = "chat", max_rejected_ratio: float = MAX_REJECTED_RATIO
) -> Read[RequestTrace]:
    """Read an Azure LLM trace as the requests of ``service``; the first one arrives at 0.

    Raises:
        InvalidInput: The file has other columns, is damaged, or has too many bad rows.
    """
    rows = read_csv_rows(path)
    missing = [name for name in COLUMNS if name not in rows.columns]
    if missing:
        found = "columns " + ", ".join(map(repr, rows.columns[:8]))
        raise InvalidInput(
            [Fault(where=str(path), field=name, found=found, expected="this column") for name in missing]
        )
    rejections = Rejections()
    for fault in rows.malformed:
        rejections.add(fault)
    time_us, tokens = _parsed(rows, str(path), rejections)
    rejections.check(where=str(path), rows=rows.rows, max_rejected_ratio=max_rejected_ratio)
    origin_us = min(time_us, default=0)
    frame = pd.DataFrame(
        {
            "arrival_s": (np.array(time_us, dtype=np.int64) - origin_us) / 1e6,
            "service": pd.Series([service] * len(time_us), dtype="str"),
            "input_tokens": [pair[0] for pair in tokens],
            "output_tokens": [pair[1] for pair in tokens],
        }
    )
    return rejections.read(
        RequestTrace.sorting(frame),
        where=str(path),
        rows=rows.rows,
        max_rejected_ratio=max_rejected_ratio,
        notes=(*rows.notes, f"time 0 is {(_EPOCH + timedelta(microseconds=origin_us)).isoformat()}"),
    )


def _parsed(rows: CsvRows, where: str, rejections: Rejections) -> tuple[list[int], list[tuple[int, int]]]:
    cells = [rows.cells.column(rows.columns.index(name)).to_pylist() for name in COLUMNS]
    time_us: list[int] = []
    tokens: list[tuple[int, int]] = []
    for line, stamp, context, generated in zip(rows.lines, *cells, strict=True):
        moment = _moment_us(stamp)
        if moment is None:
            fault = Fault(where=where, line=int(line), field=COLUMNS[0], found=repr(stamp), expected="an ISO 8601 time")
            rejections.add(fault)
        elif not (context.isascii() and context.isdigit() and generated.isascii() and generated.isdigit()):
            found = f"{context!r} and {generated!r}"
            rejections.add(
                Fault(where=where, line=int(line), field="tokens", found=found, expected="whole numbers, not negative")
            )
        else:
            time_us.append(moment)
            tokens.append((int(context), int(generated)))
    return time_us, tokens


def _moment_us(stamp: str) -> int | None:
    """Return the microseconds since 1970 of a time; one without offset is taken as UTC."""
    try:
        moment = datetime.fromisoformat(stamp)
    except ValueError:
        return None
    return ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH) // timedelta(microseconds=1)
