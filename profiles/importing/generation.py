"""Results of serving language models: AIConfigurator CSV, vLLM bench JSON, GenAI-Perf and AIPerf."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plans.errors import InvalidInput
from profiles.importing.ledger import Imported, ImportOptions, Ledger, csv_rows, json_value, number

__all__ = ["read_aiconfigurator", "read_genai_perf", "read_vllm"]

_MS = 1e-3


def read_aiconfigurator(path: Path, options: ImportOptions) -> Imported:
    """Read AIConfigurator's result CSV (ms; computed, hence modelled).

    A row gives the whole request and a decode step at its batch; the time to first token is a prefill only at batch 1,
    where it holds no waiting. Disaggregated rows, with ``(p)`` and ``(d)`` columns, give their two pools. Memory is GB
    per GPU.
    """
    ledger = Ledger(path=path, tool="aiconfigurator", unit="ms", options=options, source="modelled")
    for line, cells in csv_rows(path, "model", "isl", "osl", "ttft", "tpot"):
        with ledger.row(f"line {line}"):
            ledger.tool_version = ledger.tool_version or cells.get("version", "")
            ledger.dtype = ledger.dtype or cells.get("gemm", "")
            tokens = int(number(cells["isl"], "isl")), int(number(cells["osl"], "osl"))
            if "(p)tp" in cells:
                _add_pool(ledger, cells, "(p)", tokens, first=True)
                _add_pool(ledger, cells, "(d)", tokens, first=False)
            else:
                _add_aggregated(ledger, cells, tokens)
    return ledger.close()


def _add_aggregated(ledger: Ledger, cells: Mapping[str, str], tokens: tuple[int, int]) -> None:
    shared = _shared(cells, "")
    batch = int(number(cells.get("bs"), "bs"))
    power = cells.get("power_w")
    if power:
        shared["power_w"] = number(power, "power_w")
    step_s = number(cells["tpot"], "tpot", scale=_MS)
    context = tokens[0] + tokens[1] // 2
    if cells.get("request_latency"):
        whole_s = number(cells["request_latency"], "request_latency", scale=_MS)
        ledger.add(whole_s, batch=batch, input_tokens=tokens[0], output_tokens=tokens[1], **shared)
    ledger.add(step_s, batch=batch, phase="decode", input_tokens=context, **shared)
    if batch == 1:
        first_s = number(cells["ttft"], "ttft", scale=_MS)
        ledger.add(first_s, batch=1, phase="prefill", input_tokens=tokens[0], **shared)


def _add_pool(ledger: Ledger, cells: Mapping[str, str], prefix: str, tokens: tuple[int, int], *, first: bool) -> None:
    batch = int(number(cells.get(f"{prefix}bs"), f"{prefix}bs"))
    field = "ttft" if first else "tpot"
    context = tokens[0] if first else tokens[0] + tokens[1] // 2
    taken_s = number(cells[field], field, scale=_MS)
    phase = "prefill" if first else "decode"
    ledger.add(taken_s, batch=batch, phase=phase, input_tokens=context, **_shared(cells, prefix))


def _shared(cells: Mapping[str, str], prefix: str) -> dict[str, Any]:
    pp = int(number(cells.get(f"{prefix}pp"), f"{prefix}pp"))
    memory = cells.get(f"{prefix}memory")
    return {
        "model": cells["model"],
        "gpu_type": cells.get(f"{prefix}system") or cells.get("system"),
        "tp": int(number(cells.get(f"{prefix}tp"), f"{prefix}tp")),
        "pp": pp,
        "peak_bytes": (int(number(memory, "memory", scale=1e9)),) * pp if memory else None,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Serving:
    """What one run of a load generator against a server tells, in seconds and tokens."""

    model: str | None
    step_s: Mapping[str, float]
    first_s: Mapping[str, float]
    input_tokens: float
    output_tokens: float
    tokens_per_s: float
    concurrency: float | None


def _add_serving(ledger: Ledger, run: _Serving) -> None:
    """Add a decode step, and the prefill where no request waited.

    A server that gives T tokens a second, a step of t seconds per sequence, runs T t sequences at once (Little's law).
    """
    running = max(1, round(run.tokens_per_s * run.step_s["mean"]))
    context = max(1, round(run.input_tokens + run.output_tokens / 2))
    ledger.add(batch=running, phase="decode", input_tokens=context, model=run.model, **_statistics(run.step_s))
    if run.concurrency == 1 and run.first_s:
        prompt = max(1, round(run.input_tokens))
        ledger.add(batch=1, phase="prefill", input_tokens=prompt, model=run.model, **_statistics(run.first_s))
    else:
        ledger.note("times to first token above a concurrency of 1 hold waiting: left out")
    ledger.note("running sequences are output tokens per second times time per token (Little's law)")


def _statistics(found: Mapping[str, float]) -> dict[str, Any]:
    percentiles = {f"{name}_s": found[name] for name in ("p50", "p95", "p99") if name in found}
    return {"mean_s": found["mean"], **percentiles}


def read_vllm(path: Path, options: ImportOptions) -> Imported:
    """Read what ``vllm bench serve`` saves (ms): one result, or a list of them."""
    ledger = Ledger(path=path, tool="vllm bench", unit="ms", options=options)
    value = json_value(path)
    for position, result in enumerate(value if isinstance(value, list) else [value]):
        with ledger.row(f"result {position + 1}"):
            if not isinstance(result, dict):
                raise ValueError("it is no object")
            completed = number(result.get("completed"), "completed")
            if result.get("failed"):
                ledger.note(f"{result['failed']} requests failed in result {position + 1}")
            limit = result.get("max_concurrency") or result.get("max_concurrent_requests")
            _add_serving(
                ledger,
                _Serving(
                    model=result.get("model_id"),
                    step_s=_vllm_times(result, "tpot"),
                    first_s=_vllm_times(result, "ttft"),
                    input_tokens=number(result.get("total_input_tokens"), "total_input_tokens") / completed,
                    output_tokens=number(result.get("total_output_tokens"), "total_output_tokens") / completed,
                    tokens_per_s=number(result.get("output_throughput"), "output_throughput"),
                    concurrency=float(limit) if limit else None,
                ),
            )
    return ledger.close()


def _vllm_times(result: Mapping[str, Any], what: str) -> dict[str, float]:
    names = {"mean": "mean", "p50": "median", "p95": "p95", "p99": "p99"}
    return {
        ours: number(result[f"{theirs}_{what}_ms"], f"{theirs}_{what}_ms", scale=_MS)
        for ours, theirs in names.items()
        if ours == "mean" or result.get(f"{theirs}_{what}_ms") is not None
    }


_GENAI_CSV = {
    "time_to_first_token": "Time To First Token (ms)",
    "inter_token_latency": "Inter Token Latency (ms)",
    "input_sequence_length": "Input Sequence Length (tokens)",
    "output_sequence_length": "Output Sequence Length (tokens)",
    "output_token_throughput": "Output Token Throughput (per sec)",
}


def read_genai_perf(path: Path, options: ImportOptions) -> Imported:
    """Read GenAI-Perf's CSV or JSON, or AIPerf's JSON (ms): one run."""
    ledger = Ledger(path=path, tool="genai-perf", unit="ms", options=options)
    metrics, config = _genai_csv(path) if path.suffix == ".csv" else _genai_json(path)
    with ledger.row("the run"):
        _add_serving(
            ledger,
            _Serving(
                model=_model_of(config),
                step_s=_genai_times(metrics, "inter_token_latency"),
                first_s=_genai_times(metrics, "time_to_first_token"),
                input_tokens=_genai(metrics, "input_sequence_length"),
                output_tokens=_genai(metrics, "output_sequence_length"),
                tokens_per_s=_genai(metrics, "output_token_throughput"),
                concurrency=_concurrency_of(config),
            ),
        )
    return ledger.close()


def _genai_csv(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Read the two blocks: statistics by metric, then one value by metric."""
    names = {text: name for name, text in _GENAI_CSV.items()}
    metrics: dict[str, dict[str, Any]] = {}
    header: list[str] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            for cells in csv.reader(stream):
                if cells and cells[0] == "Metric":
                    header = ["avg" if name == "Value" else name for name in cells[1:]]
                elif cells and cells[0] in names:
                    metrics[names[cells[0]]] = dict(zip(header, cells[1:], strict=False))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInput.of("a readable CSV file", where=path, found=error) from error
    return metrics, {}


def _genai_json(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    value = json_value(path)
    if not isinstance(value, dict):
        raise InvalidInput.of("an object of metrics", where=path, found=type(value).__name__)
    inside = value.get("records", value)  # AIPerf may hold its metrics one level down
    metrics = {name: inside[name] for name in _GENAI_CSV if isinstance(inside.get(name), dict)}
    return metrics, value.get("input_config") or {}


def _genai(metrics: Mapping[str, Mapping[str, Any]], name: str) -> float:
    return number(metrics.get(name, {}).get("avg"), name)


def _genai_times(metrics: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, float]:
    found = metrics.get(name, {})
    unit = {"ms": _MS, "us": 1e-6, "ns": 1e-9, "s": 1.0}.get(found.get("unit", "ms"), _MS)
    times = {"mean": number(found.get("avg"), name, scale=unit)}
    for ours in ("p50", "p95", "p99"):
        if found.get(ours) not in (None, ""):
            times[ours] = number(found[ours], f"{name}.{ours}", scale=unit)
    return times


def _model_of(config: Mapping[str, Any]) -> str | None:
    names = config.get("model_names") or config.get("model") or (config.get("endpoint") or {}).get("model_names")
    first = names[0] if isinstance(names, list) and names else names
    return first if isinstance(first, str) else None


def _concurrency_of(config: Mapping[str, Any]) -> float | None:
    stimulus = (config.get("perf_analyzer") or {}).get("stimulus") or {}
    stated = (
        config.get("concurrency") or stimulus.get("concurrency") or (config.get("loadgen") or {}).get("concurrency")
    )
    return float(stated) if isinstance(stated, int | float) else None
