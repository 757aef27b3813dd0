"""Request logs on disk: one row per request, as `evaluate --requests` and `load --requests` keep them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from foreplan.report.content import Run
from plans.documents import atomic_writer
from plans.errors import InvalidInput
from plans.plan import Plan
from plans.service import Services
from traces.outcomes import summarise

__all__ = ["read_run", "write_requests"]


def write_requests(path: Path, requests: pd.DataFrame) -> None:
    """Write a request log atomically, as Parquet or CSV by its suffix.

    Raises:
        InvalidInput: Another suffix, or the folder cannot be written.
    """
    if path.suffix not in (".parquet", ".csv"):
        raise InvalidInput.of("a file name that ends in .parquet or .csv", where=path, found=repr(path.name))
    with atomic_writer(path) as stream:
        if path.suffix == ".parquet":
            requests.to_parquet(stream, index=False)
        else:
            requests.to_csv(stream, index=False)


def read_run(path: Path, plan: Plan, services: Services) -> Run:
    """Read a request log and count it.

    Raises:
        InvalidInput: The file is missing, damaged, no request log, or names services that ``services`` lacks.
    """
    try:
        requests = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise InvalidInput.of("a request log", where=path, found=str(error).splitlines()[0]) from error
    missing = {"scheduled_s", "service", "outcome", "latency_s"} - set(requests.columns)
    if missing or requests.empty:
        found = f"no column {', '.join(sorted(missing))}" if missing else "no row"
        raise InvalidInput.of("a request log of `evaluate` or `load`", where=path, found=found)
    ended_s = (requests["scheduled_s"] + requests["latency_s"].fillna(0.0)).max()
    names = [service.name for service in services.services]
    summary = summarise(requests, wall_s=max(float(ended_s), 1e-3), gpus=plan.gpus_used, services=names)
    return Run(summary=summary, requests=requests)
