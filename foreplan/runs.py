"""Request logs on disk: one row per request, as `evaluate --requests` and `load --requests` keep them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from evaluator import Timeline
from foreplan.report.content import Run
from plans.documents import atomic_writer, check_writable
from plans.errors import InvalidInput
from plans.plan import Plan
from plans.service import Services
from traces.outcomes import OUTCOMES, summarise

__all__ = ["check_table_name", "read_run", "write_requests", "write_timeline"]


def write_requests(path: Path, parts: Iterable[pd.DataFrame]) -> None:
    """Write a request log atomically, as Parquet or CSV by its suffix, part by part.

    Args:
        path: The file.
        parts: Tables of the same columns, at least one.

    Raises:
        InvalidInput: Another suffix, or the folder cannot be written.
    """
    _write_table(path, parts)


def write_timeline(path: Path, timeline: Timeline) -> None:
    """Write counts per bin and service: ``start_s, service``, then one column per outcome.

    Raises:
        InvalidInput: A suffix other than .parquet or .csv, or the folder cannot be written.
    """
    bins, services, _ = timeline.outcomes.shape
    table = pd.DataFrame(timeline.outcomes.reshape(bins * services, -1), columns=list(OUTCOMES))
    table.insert(0, "service", list(timeline.services) * bins)
    table.insert(0, "start_s", np.repeat(np.arange(bins) * timeline.bin_s, services))
    _write_table(path, [table])


def check_table_name(path: Path) -> None:
    """Check that a table can be written to ``path``, before it takes long to make one.

    Raises:
        InvalidInput: The suffix is neither .parquet nor .csv, or the folder cannot be written.
    """
    check_writable(path)
    if path.suffix not in (".parquet", ".csv"):
        raise InvalidInput.of("a file name that ends in .parquet or .csv", where=path, found=repr(path.name))


def _write_table(path: Path, parts: Iterable[pd.DataFrame]) -> None:
    check_table_name(path)
    with atomic_writer(path) as stream:
        if path.suffix == ".csv":
            for position, part in enumerate(parts):
                part.to_csv(stream, index=False, header=position == 0)
            return
        writer: pq.ParquetWriter | None = None
        for part in parts:
            # Columns that are empty in the first part are typed by the schema all the same.
            table = pa.Table.from_pandas(part, preserve_index=False, schema=writer.schema if writer else _schema(part))
            writer = writer or pq.ParquetWriter(stream, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()


def _schema(part: pd.DataFrame) -> pa.Schema:
    """Return the types of the columns; one without a value holds text."""
    inferred = pa.Schema.from_pandas(part, preserve_index=False)
    fields = [pa.field(each.name, pa.string()) if pa.types.is_null(each.type) else each for each in inferred]
    return pa.schema(fields)


def read_run(path: Path, plan: Plan, services: Services) -> Run:
    """Read a request log and count it.

    Raises:
        InvalidInput: The file is missing, damaged, no request log, or names services that ``services`` lacks.
    """
    try:
        requests = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except FileNotFoundError as error:
        raise InvalidInput.of("a request log", where=path, found="no such file") from error
    except (OSError, ValueError) as error:
        raise InvalidInput.of("a request log", where=path, found=str(error).splitlines()[0]) from error
    missing = {"scheduled_s", "service", "outcome", "latency_s"} - set(requests.columns)
    if missing or requests.empty:
        found = f"no column {', '.join(sorted(missing))}" if missing else "no row"
        raise InvalidInput.of("a request log of `evaluate` or `load`", where=path, found=found)
    ended_s = (requests["scheduled_s"] + requests["latency_s"].fillna(0.0)).max()
    seen = set(requests["service"].unique())
    names = [service.name for service in services.services]
    names += [workflow.name for workflow in services.workflows if workflow.name in seen]
    summary = summarise(requests, wall_s=max(float(ended_s), 1e-3), gpus=plan.gpus_used, services=names)
    return Run(summary=summary, requests=requests)
