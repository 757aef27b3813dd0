"""CSV as text cells with their line numbers: what every reader of a text trace starts from.

A file may be gzipped (``.gz``). Lines that start with ``#`` before the header are comments; ``key=value`` pairs in them
are metadata. Rows with another number of fields than the header are counted, never padded.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv

from plans.errors import Fault, InvalidInput

__all__ = ["CsvRows", "read_bytes", "read_csv_rows", "read_header"]

_BOM = b"\xef\xbb\xbf"
_MAX_HEADER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CsvRows:
    """The rows of a CSV file.

    Attributes:
        metadata: ``key=value`` pairs of the comments above the header.
        columns: The header.
        cells: One text column per header entry, named ``0``, ``1``, …; only rows with the right number of fields.
        lines: For each row of ``cells`` its line in the file, from 1.
        malformed: A fault for each row with another number of fields.
        notes: What a reader should pass on.
    """

    metadata: Mapping[str, str]
    columns: tuple[str, ...]
    cells: pa.Table
    lines: npt.NDArray[np.int64]
    malformed: tuple[Fault, ...]
    notes: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Number of rows, malformed ones included."""
        return len(self.lines) + len(self.malformed)


def read_bytes(path: Path) -> bytes:
    """Return the content of ``path``, unpacked when its name ends in ``.gz``.

    Raises:
        InvalidInput: The file cannot be read, or its compressed stream is damaged or cut short.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidInput.of("a readable file", where=path, found=error.strerror or error) from error
    return _unpacked(data, path)


def _unpacked(data: bytes, path: Path) -> bytes:
    if path.suffix != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged_gzip(path, error) from error


def _damaged_gzip(path: Path, error: Exception) -> InvalidInput:
    return InvalidInput.of(
        "a whole gzip file", where=path, found=str(error), remedy="the file is cut short or damaged: fetch it again"
    )


def read_header(path: Path) -> tuple[str, ...]:
    """Return the column names of a CSV file, reading no further than needed.

    Raises:
        InvalidInput: The file cannot be read, is empty, or is no text.
    """
    try:
        with path.open("rb") as raw:
            stream = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            data = stream.read(_MAX_HEADER_BYTES)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged_gzip(path, error) from error
    except OSError as error:
        raise InvalidInput.of("a readable file", where=path, found=error.strerror or error) from error
    return _header(data, path)[1]


def read_csv_rows(path: Path) -> CsvRows:
    """Read ``path`` as text cells.

    Raises:
        InvalidInput: The file cannot be read, is empty, is no UTF-8 text, is damaged, or its last row is cut short.
    """
    data = read_bytes(path)
    _check_text(data, path)
    metadata, columns, header_line = _header(data, path)
    names = [str(index) for index in range(len(columns))]
    malformed: list[Fault] = []
    skipped: list[int] = []

    def skip(row: pa_csv.InvalidRow) -> str:
        skipped.append(row.number)
        malformed.append(
            Fault(
                where=str(path),
                line=row.number,
                found=f"{row.actual_columns} fields in {row.text[:80]!r}",
                expected=f"{row.expected_columns} fields",
            )
        )
        return "skip"

    try:
        cells = pa_csv.read_csv(
            io.BytesIO(data),
            read_options=pa_csv.ReadOptions(column_names=names, skip_rows=header_line, use_threads=False),
            parse_options=pa_csv.ParseOptions(ignore_empty_lines=False, invalid_row_handler=skip),
            convert_options=pa_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
        )
    except pa.ArrowInvalid as error:
        if "Empty CSV" not in str(error):
            raise InvalidInput.of("a CSV file", where=path, found=str(error).splitlines()[0]) from error
        cells = pa.table({name: pa.array([], pa.string()) for name in names})
    ends_cleanly = data.endswith((b"\n", b"\r"))
    if malformed and not ends_cleanly and skipped[-1] == header_line + cells.num_rows + len(skipped):
        raise InvalidInput([_cut_short(malformed[-1])])
    lines = np.setdiff1d(np.arange(header_line + 1, header_line + 1 + cells.num_rows + len(skipped)), skipped)
    cells, lines = _without_blank(cells, lines)
    notes = () if ends_cleanly else (f"{path.name} does not end with a line break: it may be cut short",)
    return CsvRows(
        metadata=metadata, columns=columns, cells=cells, lines=lines, malformed=tuple(malformed), notes=notes
    )


def _header(data: bytes, path: Path) -> tuple[dict[str, str], tuple[str, ...], int]:
    """Return the metadata, the column names and the header's line number."""
    metadata: dict[str, str] = {}
    for number, raw in enumerate(io.BytesIO(data.removeprefix(_BOM)), start=1):
        try:
            line = raw.decode().strip()
        except UnicodeDecodeError as error:
            fault = Fault(
                where=str(path), line=number, found="bytes that are no UTF-8 text", expected="a CSV header in UTF-8"
            )
            raise InvalidInput([fault]) from error
        if line.startswith("#"):
            metadata |= dict(re.findall(r"(\w+)\s*=\s*(\S+)", line))
        elif line:
            return metadata, tuple(name.strip() for name in next(csv.reader([line]))), number
    raise InvalidInput.of("a CSV file with a header", where=path, found="no header", remedy="the file may be cut short")


def _check_text(data: bytes, path: Path) -> None:
    """Refuse what is no UTF-8 before pyarrow sees it: its handler of bad rows cannot."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        fault = Fault(where=str(path), line=line, found="bytes that are no UTF-8 text", expected="CSV in UTF-8")
        raise InvalidInput([fault]) from error


def _cut_short(fault: Fault) -> Fault:
    return Fault(
        where=fault.where,
        line=fault.line,
        found=f"{fault.found}, without a line break",
        expected=fault.expected,
        remedy="the file is cut short: fetch or write it again",
    )


def _without_blank(cells: pa.Table, lines: npt.NDArray[np.int64]) -> tuple[pa.Table, npt.NDArray[np.int64]]:
    """Drop blank lines, which parse as rows of empty cells."""
    blank = np.asarray(cells.column(0).to_numpy() == "", dtype=bool)
    for index in range(1, cells.num_columns):
        if not blank.any():
            return cells, lines
        blank &= np.asarray(cells.column(index).to_numpy() == "", dtype=bool)
    return cells.filter(pa.array(~blank)), lines[~blank]
