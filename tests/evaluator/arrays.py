"""Runs made of arrays, without documents: what tests of the engine itself are built from."""

from __future__ import annotations

from typing import Any

import numpy as np

from evaluator import Arrivals, Deadlines, Replicas, Run, Settings
from evaluator.state import GOOD, LATE


def replicas(stage_s: Any, *, group_of=(0,), service_of=(0,), weight=None, **changes: Any) -> Replicas:
    """Return replicas from stage latencies of shape (replica, batch, stage)."""
    table = np.asarray(stage_s, dtype=np.float64)
    count = len(group_of)
    fields = {
        "group_of": np.array(group_of, dtype=np.int32),
        "service_of": np.array(service_of, dtype=np.int32),
        "max_batch": np.full(count, table.shape[1], dtype=np.int32),
        "frames": np.ones(count, dtype=np.int32),
        "stage_s": table,
        "weight": np.ones(count) if weight is None else np.asarray(weight, dtype=np.float64),
        "stages": np.full(max(group_of) + 1, table.shape[2], dtype=np.int32),
    }
    return Replicas(**fields | changes)


def arrivals(arrival_s: Any, service: Any = None, **changes: Any) -> Arrivals:
    """Return arrivals of services by position (all of service 0 when left out)."""
    times = np.asarray(arrival_s, dtype=np.float64)
    code = np.zeros(len(times), dtype=np.int64) if service is None else np.asarray(service, dtype=np.int64)
    names = np.arange(int(code.max(initial=0)) + 1, dtype=np.int32)
    fields = {"arrival_s": times, "code": code, "service_of_code": names, "duration_s": float(times[-1])}
    return Arrivals(**fields | changes)


def deadlines(*allowed_s: float, sticky: bool = False) -> Deadlines:
    """Return what services of class latency (or frequency) allow."""
    allowed = np.array(allowed_s, dtype=np.float64)
    return Deadlines(allowed_s=allowed, per_token_s=np.zeros(len(allowed)), sticky=np.full(len(allowed), sticky))


def finished(settings: Settings, *parts: Any, **options: Any) -> Run:
    """Return a run of (replicas, arrivals, deadlines) that is over, with its log."""
    run = Run(*parts, settings, **{"keep_requests": True} | options)
    run.finish()
    return run


def latencies_s(run: Run) -> np.ndarray:
    """Return the latency of every request; all must have finished."""
    code = run.world.array("log_code")
    assert np.isin(code, (GOOD, LATE)).all()
    return run.world.array("log_end_s") - run.arrivals.arrival_s
