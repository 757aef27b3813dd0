"""The account of an import: every row read is either taken into a profile or rejected with its place and reason."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from plans.catalogue import catalogue
from plans.errors import InvalidInput
from profiles.document import Accuracy, LatencyStatistics, Origin, Profile, ProfileMeta, Row, Source
from profiles.roofline import REACHED_BANDWIDTH

__all__ = ["ImportOptions", "Imported", "Ledger", "Rejected", "csv_rows", "json_value", "number"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """What a file may leave unsaid.

    Attributes:
        model: Name of the model.
        gpu_type: Name of the GPU type, as in ``cluster.yaml``.
        weight_bytes: Bytes of weights per GPU.
        peak_bytes: Highest bytes in use per GPU, weights included.
        batch: Items per request, where the tool does not record them.
        tp: Tensor parallelism, where the tool does not record it.
        pp: Pipeline parallelism, where the tool does not record it.
        layers: Layers of the model, for tables of one layer.
        input_buckets: Tokens of prompts that the rows of a table stand for.
        output_buckets: Tokens of answers that its columns stand for.
    """

    model: str | None = None
    gpu_type: str | None = None
    weight_bytes: int | None = None
    peak_bytes: int | None = None
    batch: int = 1
    tp: int = 1
    pp: int = 1
    layers: int | None = None
    input_buckets: tuple[int, ...] = ()
    output_buckets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """One row that was left out: where it stands, such as ``line 7``, and why."""

    place: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What an import yielded.

    Attributes:
        profiles: One for each model and GPU type in the file.
        rows: Rows of the file that were read.
        taken: How many of them are in ``profiles``.
        rejected: The others.
        notes: What was assumed.
    """

    profiles: tuple[Profile, ...]
    rows: int
    taken: int
    rejected: tuple[Rejected, ...]
    notes: tuple[str, ...]

    @property
    def reasons(self) -> Mapping[str, int]:
        """How often each reason occurs, most frequent first."""
        return dict(Counter(each.reason for each in self.rejected).most_common())


def number(value: object, field_name: str, *, scale: float = 1.0, least: float = 0.0) -> float:
    """Return ``value``, a number or its text, times ``scale``.

    Raises:
        ValueError: It is no finite number, or is not above ``least``.
    """
    text = str(value).strip() if value is not None else ""
    if not text or text.lower() in ("nan", "n/a", "none", "-"):
        raise ValueError(f"{field_name} is missing")
    try:
        parsed = float(text.replace(",", ""))
    except ValueError:
        raise ValueError(f"{field_name} is no number") from None
    if not math.isfinite(parsed) or parsed <= least:
        raise ValueError(f"{field_name} is not above {least:g}")
    return parsed * scale


def csv_rows(path: Path, *needed: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield line number and cells of each row of a CSV file; names of columns are stripped.

    Raises:
        InvalidInput: The file cannot be read, or lacks one of the columns ``needed``.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            columns = [name.strip() for name in next(reader, [])]
            _check_columns(path, columns, needed)
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    yield reader.line_num, dict(zip(columns, (cell.strip() for cell in cells), strict=False))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInput.of("a readable CSV file", where=path, found=error) from error


def _check_columns(path: Path, columns: list[str], needed: tuple[str, ...]) -> None:
    missing = [name for name in needed if name not in columns]
    if missing:
        found = ", ".join(columns[:12]) or "no header"
        raise InvalidInput.of(f"the columns {', '.join(missing)}", where=path, field="header", found=found)


def json_value(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        InvalidInput: The file cannot be read or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput.of("a JSON file", where=path, found=error) from error


@dataclass(slots=True, kw_only=True)
class Ledger:
    """Collects the rows of one file.

    Attributes:
        path: The file.
        tool: The tool that wrote it.
        unit: Unit of time in the file.
        options: What the file leaves unsaid.
        source: ``imported``, or ``modelled`` where the tool computes its numbers.
        tool_version: Version of the tool, once the file has said it.
        dtype: Type of number, once the file has said it.
        statistic: What the file's latency is.
    """

    path: Path
    tool: str
    unit: str
    options: ImportOptions
    source: Source = "imported"
    tool_version: str = ""
    dtype: str = ""
    statistic: str = "mean"
    read: int = 0
    taken: int = 0
    _rows: dict[tuple[str, str], dict[object, Row]] = field(default_factory=dict)
    _pending: dict[tuple[tuple[str, str], object], Row] = field(default_factory=dict)
    _rejected: list[Rejected] = field(default_factory=list)
    _accuracy: dict[tuple[str, str], Accuracy] = field(default_factory=dict)
    _notes: list[str] = field(default_factory=list)

    @contextmanager
    def row(self, place: str) -> Iterator[None]:
        """Count one row of the file: taken if the block ends well, rejected with the reason of its ValueError if not.

        Values of another shape than the format has (KeyError, TypeError, ...) reject it as well. What the block took
        before it failed stays out.
        """
        self.read += 1
        self._pending = {}
        try:
            yield
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            reason = f"{where}: {first['msg'].removeprefix('Value error, ')}"
            self._rejected.append(Rejected(place=place, reason=reason))
        except ValueError as error:
            self._rejected.append(Rejected(place=place, reason=str(error)))
        except KeyError as error:
            self._rejected.append(Rejected(place=place, reason=f"{error.args[0]} is missing"))
        except (TypeError, AttributeError, IndexError) as error:
            self._rejected.append(Rejected(place=place, reason=f"it is malformed ({type(error).__name__}: {error})"))
        else:
            self.taken += 1
            for (name, row_key), row in self._pending.items():
                self._rows.setdefault(name, {})[row_key] = row

    def note(self, text: str) -> None:
        """Say once what was assumed."""
        if text not in self._notes:
            self._notes.append(text)

    def add(
        self,
        mean_s: float,
        *,
        model: str | None = None,
        gpu_type: str | None = None,
        p50_s: float | None = None,
        p95_s: float | None = None,
        p99_s: float | None = None,
        stage_s: tuple[float, ...] = (),
        weight_bytes: tuple[int, ...] | None = None,
        peak_bytes: tuple[int, ...] | None = None,
        accuracy: Accuracy | None = None,
        **fields: Any,
    ) -> None:
        """Add one row to the profile of its model and GPU type; ``fields`` are those of `profiles.document.Row`.

        Raises:
            ValueError: Something is missing or impossible, or the row repeats one that was taken.
        """
        key = self._named(model, gpu_type)
        pp = fields.setdefault("pp", self.options.pp)
        fields.setdefault("tp", self.options.tp)
        weights, peaks = self._memory(weight_bytes, peak_bytes, pp)
        fields.setdefault("load_s", self._load_s(key[1], max(weights)))
        row = Row(
            latency_s=_statistics(mean_s, p50_s, p95_s, p99_s),
            stage_latency_s=stage_s or (mean_s / pp,) * pp,
            weight_bytes=weights,
            peak_bytes=peaks,
            origin=0,
            **fields,
        )
        if row.key in self._rows.get(key, {}) or (key, row.key) in self._pending:
            raise ValueError("it repeats an earlier row")
        self._pending[key, row.key] = row
        if accuracy is not None:
            self._accuracy[key] = accuracy

    def _named(self, model: str | None, gpu_type: str | None) -> tuple[str, str]:
        name, kind = self.options.model or model, self.options.gpu_type or gpu_type
        if not name:
            raise ValueError("the model is not named: pass --model")
        if not kind:
            raise ValueError("the GPU type is not named: pass --gpu-type")
        return _as_name(name), _as_name(kind)

    def _load_s(self, gpu_type: str, weight_bytes: int) -> float:
        """Return the seconds that the weights of a GPU take from the host, as the roofline counts them, or 0."""
        entry = catalogue().get(gpu_type)
        if entry is None:
            self.note(f"loads count as 0 s: no file states them, and the catalogue has no GPU type {gpu_type}")
            return 0.0
        self.note("loads are weights over the bandwidth between host and GPU: no file states them")
        return weight_bytes / (REACHED_BANDWIDTH * entry.host_bandwidth)

    def _memory(
        self, weights: tuple[int, ...] | None, peaks: tuple[int, ...] | None, pp: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return bytes per stage; what the user states goes before the file, and the peak bounds unknown weights."""
        if self.options.weight_bytes is not None:
            weights = (self.options.weight_bytes,) * pp
        if self.options.peak_bytes is not None:
            peaks = (self.options.peak_bytes,) * pp
        if peaks is None and weights is None:
            raise ValueError("memory is not stated: pass --weights or --peak")
        if weights is None:
            self.note("weights are not stated: the peak stands for them")
        if peaks is None:
            self.note("peak memory is not stated: the weights stand for it, which is too little")
        known = weights or peaks or ()
        return known, peaks or known

    def close(self) -> Imported:
        """Return the account.

        Raises:
            InvalidInput: No row was taken.
        """
        if not self._rows:
            reasons = Counter(each.reason for each in self._rejected).most_common(3)
            found = "; ".join(f"{count} x {reason}" for reason, count in reasons) or "no row"
            raise InvalidInput.of(f"rows that a profile can be made of ({self.tool})", where=self.path, found=found)
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        origin = Origin(
            file=self.path.name,
            sha256=digest,
            tool=self.tool,
            tool_version=self.tool_version,
            unit=self.unit,
            statistic=self.statistic,
        )
        profiles = tuple(
            Profile(
                model=model,
                gpu_type=gpu_type,
                source=self.source,
                meta=ProfileMeta(dtype=self.dtype),
                rows=tuple(rows.values()),
                origins=(origin,),
                accuracy=self._accuracy.get((model, gpu_type)),
            )
            for (model, gpu_type), rows in self._rows.items()
        )
        return Imported(
            profiles=profiles,
            rows=self.read,
            taken=self.taken,
            rejected=tuple(self._rejected),
            notes=tuple(self._notes),
        )


def _as_name(text: str) -> str:
    """Return ``text`` as a name: the last part of a path, and ``-`` for what a name cannot hold."""
    last = text.strip().rstrip("/").rpartition("/")[2]
    kept = "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in last)
    return kept.strip("._-")


def _statistics(mean: float, p50: float | None, p95: float | None, p99: float | None) -> LatencyStatistics:
    """Percentiles that fall, as averages over runs may, are held at the one before."""
    held: list[float | None] = []
    highest = 0.0
    for value in (p50, p95, p99):
        highest = max(highest, value or 0.0)
        held.append(highest if value is not None else None)
    return LatencyStatistics(mean=mean, p50=held[0], p95=held[1], p99=held[2])
