"""Tables of whole batches: Proteus CSV, AlpaServe-style JSON, Melange JSON, Vidur CSV."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plans.errors import InvalidInput
from profiles.document import Accuracy
from profiles.importing.ledger import Imported, ImportOptions, Ledger, csv_rows, json_value, number

__all__ = ["read_alpaserve", "read_melange", "read_proteus", "read_vidur"]

_MS = 1e-3
_VIDUR_ONCE = ("emb",)
_VIDUR_PER_LAYER = (
    "input_layernorm",
    "attn_pre_proj",
    "attn_rope",
    "attn_post_proj",
    "post_attention_layernorm",
    "mlp_up_proj",
    "mlp_act",
    "mlp_down_proj",
    "add",
)


def read_proteus(path: Path, options: ImportOptions) -> Imported:
    """Read latency (ms) and accuracy (percent) by model, accelerator and batch; memory must be stated."""
    ledger = Ledger(path=path, tool="proteus", unit="ms", options=options)
    for line, cells in csv_rows(path, "Model", "Accel", "batchsize", "avg_latency(ms)"):
        with ledger.row(f"line {line}"):
            median = cells.get("50th_pct")
            stated = cells.get("Accuracy")
            ledger.add(
                number(cells["avg_latency(ms)"], "avg_latency(ms)", scale=_MS),
                model=cells["Model"],
                gpu_type=cells["Accel"],
                batch=int(number(cells["batchsize"], "batchsize")),
                p50_s=number(median, "50th_pct", scale=_MS) if median else None,
                samples=int(number(cells.get("Trials"), "Trials")) if cells.get("Trials") else 0,
                accuracy=Accuracy(value=number(stated, "Accuracy", scale=0.01), dataset="stated") if stated else None,
            )
    return ledger.close()


def read_alpaserve(path: Path, options: ImportOptions) -> Imported:
    """Read stage latencies (s) by batch for each parallel configuration of each model: ``op`` is TP."""
    ledger = Ledger(path=path, tool="alpaserve", unit="s", options=options, source="imported")
    tables = json_value(path)
    if not isinstance(tables, dict) or not isinstance(tables.get("models"), dict):
        raise InvalidInput.of("an object with models", where=path, field="models", found=type(tables).__name__)
    for model, table in tables["models"].items():
        configs = table.get("configs") if isinstance(table, dict) else None
        for position, config in enumerate(configs if isinstance(configs, list) else ()):
            for batch, stages in config.get("latency_s", {}).items():
                with ledger.row(f"models.{model}.configs[{position}].latency_s.{batch}"):
                    _add_alpaserve(ledger, model, config, batch, stages)
    return ledger.close()


def _add_alpaserve(ledger: Ledger, model: str, config: Mapping[str, Any], batch: str, stages: list[float]) -> None:
    if config.get("dp", 1) != 1:
        raise ValueError("data parallelism is no property of a profile")
    stage_s = tuple(number(stage, "latency_s") for stage in stages)
    weights = tuple(int(number(each, "weight_mem_bytes")) for each in config["weight_mem_bytes"])
    ledger.add(
        sum(stage_s),
        model=model,
        batch=int(batch),
        tp=int(config.get("op", 1)),
        pp=int(config.get("pp", 1)),
        stage_s=stage_s,
        weight_bytes=weights,
    )


def read_melange(path: Path, options: ImportOptions) -> Imported:
    """Read the largest throughput (requests/s) by GPU and bucket of prompt and answer lengths.

    A request then takes 1 / throughput of the device's time: a row of batch 1 with that latency is right about
    capacity, and says nothing about how long a request waits for its answer, so the profile counts as modelled.
    """
    if not options.input_buckets or not options.output_buckets:
        raise InvalidInput.of(
            "the tokens that the buckets stand for", where=path, remedy="pass --input-buckets and --output-buckets"
        )
    ledger = Ledger(path=path, tool="melange", unit="1/s", options=options, source="modelled", statistic="capacity")
    tables = json_value(path)
    if not isinstance(tables, dict) or not isinstance(tables.get("gpu_info"), dict):
        raise InvalidInput.of("an object with gpu_info", where=path, field="gpu_info", found=type(tables).__name__)
    for gpu_type, info in tables["gpu_info"].items():
        for line, rates in enumerate(info.get("tputs", ())):
            for column, rate in enumerate(rates):
                with ledger.row(f"gpu_info.{gpu_type}.tputs[{line}][{column}]"):
                    if line >= len(options.input_buckets) or column >= len(options.output_buckets):
                        raise ValueError("no bucket was named for it")
                    ledger.add(
                        1 / number(rate, "throughput"),
                        gpu_type=gpu_type,
                        batch=1,
                        input_tokens=options.input_buckets[line],
                        output_tokens=options.output_buckets[column],
                    )
    ledger.note("throughput is taken as capacity: latencies are the device's time per request")
    return ledger.close()


def read_vidur(path: Path, options: ImportOptions) -> Imported:
    """Read ``mlp.csv``: mean time (ms) of one layer's operations by number of tokens, as prefill of one prompt.

    Attention is in another file and left out, so this is a lower bound and counts as modelled.
    """
    if options.layers is None:
        raise InvalidInput.of("the number of layers", where=path, remedy="pass --layers: the table is of one layer")
    ledger = Ledger(path=path, tool="vidur", unit="ms", options=options, source="modelled")
    for line, cells in csv_rows(path, "num_tokens", "num_tensor_parallel_workers"):
        with ledger.row(f"line {line}"):
            once = sum(_vidur_ms(cells, name) for name in _VIDUR_ONCE if f"time_stats.{name}.mean" in cells)
            layer = sum(_vidur_ms(cells, name) for name in _VIDUR_PER_LAYER if f"time_stats.{name}.mean" in cells)
            ledger.add(
                (once + options.layers * layer) * _MS,
                batch=1,
                phase="prefill",
                input_tokens=int(number(cells["num_tokens"], "num_tokens")),
                tp=int(number(cells["num_tensor_parallel_workers"], "num_tensor_parallel_workers")),
            )
    ledger.note("attention is not in this table: prefill is a lower bound")
    return ledger.close()


def _vidur_ms(cells: Mapping[str, str], name: str) -> float:
    return number(cells[f"time_stats.{name}.mean"], f"time_stats.{name}.mean", least=-1.0)
