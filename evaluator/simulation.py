"""Simulate a plan on a trace."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from evaluator import kernel
from evaluator.scenario import compile_replicas, compile_requests
from plans.errors import InvalidInput
from plans.plan import Plan
from plans.service import Services
from traces.outcomes import RunSummary, summarise
from traces.table import RequestTrace

__all__ = ["Evaluation", "evaluate"]

_SHORTEST_RUN_S = 1e-3
"""A run without extent (all at time 0, nothing served) counts as this long, so that rates exist."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What happened.

    Attributes:
        summary: Counts, attainment and percentiles, per service and in total.
        requests: One row per request, in order of arrival: ``service, scheduled_s, latency_s`` (NaN unless finished),
            ``outcome`` (good, late, dropped, failed), ``reason`` (why dropped or failed), ``group, variant,
            batch_size, accuracy`` (missing unless finished).
    """

    summary: RunSummary
    requests: pd.DataFrame


def evaluate(plan: Plan, services: Services, trace: RequestTrace, *, overhead_s: float = 0.0) -> Evaluation:
    """Simulate ``plan`` serving ``trace``, open loop, until the last request has ended.

    Requests are routed by the plan's weights, queue per service and group by deadline, and are batched and dropped by
    the rules of `plans.dispatch`. Batches take exactly the plan's latency table; pipeline stages overlap successive
    batches. Repeatable bit by bit.

    Args:
        plan: What runs where.
        services: Deadlines and accuracies.
        trace: Arrivals.
        overhead_s: Seconds added to each request between its arrival and its queue (gateway, transport).

    Raises:
        InvalidInput: Plan or trace name services that ``services`` lacks, the trace holds no request, or the overhead
            is negative.
    """
    if not len(trace):
        raise InvalidInput.of("at least one request", where="trace", found="none")
    if not 0 <= overhead_s < float("inf"):
        raise InvalidInput.of("at least 0 seconds and finite", where="evaluate", field="overhead_s", found=overhead_s)
    replicas = compile_replicas(plan, services)
    requests = compile_requests(trace, services)
    state, finish_s, replica_of, batch, busy_s = kernel.simulate(
        requests.arrival_s,
        requests.service,
        requests.deadline_s,
        overhead_s,
        replicas.group_of,
        replicas.max_batch,
        replicas.stage_s,
        replicas.total_s,
        replicas.stages,
        replicas.first,
        replicas.weight,
        replicas.service_first,
        replicas.service_replicas,
    )
    finished = state == kernel.FINISHED
    good = finished & (finish_s <= requests.deadline_s)
    dropped = (state == kernel.DROPPED_HOPELESS) | (state == kernel.DROPPED_DISPLACED)
    outcome = np.select([good, finished, dropped], ["good", "late", "dropped"], "failed")
    reasons = {
        kernel.DROPPED_HOPELESS: "deadline cannot be met",
        kernel.DROPPED_DISPLACED: "gave way to a full batch",
        kernel.FAILED_UNROUTED: "no route",
    }
    entries = [(group.id, entry) for group in plan.groups for entry in group.loadout]
    accuracy = [services.service(entry.service).accuracy_of(entry.variant) for _, entry in entries]
    # The last label stands for "no replica": index -1.
    frame = pd.DataFrame(
        {
            "service": trace.frame["service"].to_numpy(),
            "scheduled_s": requests.arrival_s,
            "latency_s": np.where(finished, finish_s - requests.arrival_s, np.nan),
            "outcome": outcome,
            "reason": [reasons.get(int(code)) for code in state],
            "group": np.array([group for group, _ in entries] + [None], dtype=object)[replica_of],
            "variant": np.array([entry.variant for _, entry in entries] + [None], dtype=object)[replica_of],
            "batch_size": np.where(finished, batch, np.nan),
            "accuracy": np.where(finished, np.array([*accuracy, np.nan])[replica_of], np.nan),
        }
    )
    wall_s = max(trace.duration_s, float(np.max(finish_s)), _SHORTEST_RUN_S)
    utilisation = {
        group.id: float(busy_s[position, : group.pp].max() / wall_s) for position, group in enumerate(plan.groups)
    }
    summary = summarise(
        frame,
        wall_s=wall_s,
        gpus=plan.gpus_used,
        services=[service.name for service in services.services],
        utilisation=utilisation,
    )
    return Evaluation(summary=summary, requests=frame)
