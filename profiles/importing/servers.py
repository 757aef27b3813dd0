"""Results of load generators against one model: Triton perf_analyzer CSV and JSON, MLPerf summaries and CSV."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plans.errors import InvalidInput
from profiles.importing.ledger import Imported, ImportOptions, Ledger, csv_rows, json_value, number
from profiles.sampling import summarise

__all__ = ["read_mlperf", "read_perf_analyzer"]

_US, _NS, _MS = 1e-6, 1e-9, 1e-3


def read_perf_analyzer(path: Path, options: ImportOptions) -> Imported:
    """Read perf_analyzer's CSV (microseconds) or JSON export (nanoseconds).

    Its batch is not in the file: state it. With c requests in flight, a request takes c batch / throughput on average;
    a row of an open-loop run, at a request rate, holds waiting and is left out.
    """
    if path.suffix == ".json":
        return _read_export(path, options)
    ledger = Ledger(path=path, tool="perf_analyzer", unit="us", options=options)
    for line, cells in csv_rows(path, "Inferences/Second"):
        with ledger.row(f"line {line}"):
            if "Concurrency" not in cells:
                raise ValueError("an open-loop run: its latency holds waiting")
            concurrency = int(number(cells["Concurrency"], "Concurrency"))
            rate = number(cells["Inferences/Second"], "Inferences/Second")
            stated = cells.get("Avg latency")
            mean_s = number(stated, "Avg latency", scale=_US) if stated else concurrency * options.batch / rate
            ledger.add(
                mean_s,
                batch=options.batch,
                concurrency=concurrency,
                peak_bytes=_per_gpu(cells.get("Max GPU Memory Usage")),
                power_w=_total(cells.get("Avg GPU Power Usage")),
                p50_s=_percentile(cells, "p50"),
                p95_s=_percentile(cells, "p95"),
                p99_s=_percentile(cells, "p99"),
            )
    return ledger.close()


def _percentile(cells: Mapping[str, str], name: str) -> float | None:
    stated = cells.get(f"{name} latency")
    return number(stated, f"{name} latency", scale=_US) if stated else None


def _listed(text: str | None) -> list[float]:
    """Return the values of a ``uuid:value;`` list."""
    return [number(part.rpartition(":")[2], "value", least=-1) for part in (text or "").split(";") if part.strip()]


def _per_gpu(text: str | None) -> tuple[int] | None:
    values = [value for value in _listed(text) if value > 0]
    return (int(max(values)),) if values else None


def _total(text: str | None) -> float | None:
    return sum(_listed(text)) or None


def _read_export(path: Path, options: ImportOptions) -> Imported:
    ledger = Ledger(path=path, tool="perf_analyzer", unit="ns", options=options)
    value = json_value(path)
    experiments = value.get("experiments") if isinstance(value, dict) else None
    if not isinstance(experiments, list):
        raise InvalidInput.of("an object with experiments", where=path, field="experiments", found="none")
    ledger.tool_version = str(value.get("version", ""))
    for position, experiment in enumerate(experiments):
        with ledger.row(f"experiments[{position}]"):
            settings = experiment.get("experiment", {})
            if settings.get("mode") != "concurrency":
                raise ValueError("an open-loop run: its latency holds waiting")
            taken_s = [
                (request["response_timestamps"][-1] - request["timestamp"]) * _NS
                for request in experiment.get("requests", ())
                if request.get("response_timestamps")
            ]
            if not taken_s:
                raise ValueError("no request was answered")
            found = summarise(taken_s)
            ledger.add(
                found.mean,
                batch=options.batch,
                concurrency=int(number(settings.get("value"), "value")),
                p50_s=found.p50,
                p95_s=found.p95,
                p99_s=found.p99,
                samples=len(taken_s),
            )
    return ledger.close()


_SUMMARY_LINE = re.compile(r"\s*([^:]+?)\s*:\s*(.+?)\s*$")


def read_mlperf(path: Path, options: ImportOptions) -> Imported:
    """Read ``mlperf_log_summary.txt`` (ns), or a CSV of published results (ms where the unit says so).

    A latency of a known batch stands in SingleStream (1) and MultiStream (8 unless the summary says otherwise); Offline
    and Server state throughput, or latency with waiting, and are left out.
    """
    if path.suffix == ".csv":
        return _read_results(path, options)
    ledger = Ledger(path=path, tool="mlperf", unit="ns", options=options)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput.of("a readable text file", where=path, found=error) from error
    fields = {match[1]: match[2] for line in lines if (match := _SUMMARY_LINE.match(line))}
    with ledger.row("the summary"):
        if fields.get("Result is", "").upper() != "VALID":
            raise ValueError(f"the result is {fields.get('Result is', 'not stated')}, not VALID")
        batch = _stream_batch(fields.get("Scenario", ""), fields.get("samples_per_query"))
        ledger.add(
            _summary(fields, "Mean latency (ns)"),
            model=None,
            gpu_type=fields.get("SUT name"),
            batch=batch,
            p50_s=_summary(fields, "50.00 percentile latency (ns)"),
            p95_s=_summary(fields, "95.00 percentile latency (ns)"),
            p99_s=_summary(fields, "99.00 percentile latency (ns)"),
        )
    return ledger.close()


def _summary(fields: Mapping[str, str], name: str) -> float:
    return number(fields.get(name), name, scale=_NS)


def _stream_batch(scenario: str, samples: Any = None) -> int:
    batches = {"singlestream": 1, "multistream": int(samples) if samples else 8}
    name = scenario.replace(" ", "").replace("-", "").lower()
    if name not in batches:
        raise ValueError(f"scenario {scenario or 'not stated'}: no latency of a batch without waiting")
    return batches[name]


def _read_results(path: Path, options: ImportOptions) -> Imported:
    ledger = Ledger(path=path, tool="mlperf", unit="ms", options=options, statistic="p90")
    for line, cells in csv_rows(path, "Model", "Scenario", "Result", "accelerator_model_name"):
        with ledger.row(f"line {line}"):
            batch = _stream_batch(cells["Scenario"])
            if "ms" not in cells.get("Units", "").lower():
                raise ValueError(f"unit {cells.get('Units') or 'not stated'}: no latency")
            ledger.tool_version = ledger.tool_version or cells.get("version", "")
            ledger.add(
                number(cells["Result"], "Result", scale=_MS),
                model=cells["Model"],
                gpu_type=cells["accelerator_model_name"],
                batch=batch,
            )
    ledger.note("published latencies are 90th percentiles: they stand for the mean, which is lower")
    return ledger.close()
