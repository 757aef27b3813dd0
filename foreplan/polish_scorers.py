"""The evaluator as the planner's `Scorer`: its single pass, and its event engine where batches matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

import evaluator
from evaluator.single_pass_local import Traffic
from foreplan.polish_arrivals import Sample
from foreplan.polish_walk import CompiledScorer
from planner import Scorer, ScoringTables
from planner.arranged import Arrangement
from planner.layout import Layout
from planner.simulated_scorer import SimulatedScorer
from plans.plan import Plan
from plans.service import Services
from traces.outcomes import nearest_rank
from traces.table import RequestTrace

__all__ = ["PolishRouting", "Served", "judge_for", "scorer_for", "served_by"]

PolishRouting = Literal["earliest-free", "least-finish"]
"""How requests find their group while scoring by single pass."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def scorer_for(tables: ScoringTables, blocks: Sample, routing: PolishRouting) -> CompiledScorer:
    """Return the scorer that guides the search: the single pass, with batches where they matter."""
    stage_s = tables.stage_s[:, None, :] if tables.batch_stage_s is None else tables.batch_stage_s
    traffic = Traffic(
        arrival_s=blocks.arrival_s,
        service=blocks.service,
        first=blocks.first,
        counted=blocks.counted,
        deadline_s=tables.deadline_s,
        stage_s=np.ascontiguousarray(stage_s),
        stages=_stages(tables),
        largest=np.minimum(tables.max_batch, stage_s.shape[1]).astype(np.int32),
        least_finish=np.array([routing == "least-finish"], dtype=np.int32),
    )
    return CompiledScorer(tables.worth, traffic, blocks.offered(len(tables.names)), _duration_s(blocks), tables.gpus)


def judge_for(tables: ScoringTables, blocks: Sample, routing: PolishRouting) -> Scorer:
    """Return the scorer that has the last word: the event engine where batches matter."""
    if tables.batch_stage_s is None:
        return scorer_for(tables, blocks, routing)
    engine = _EventEngine(tables, tables.batch_stage_s, blocks)
    return SimulatedScorer(
        _EventEngine.name, tables.worth, blocks.offered(len(tables.names)), _duration_s(blocks), engine.good
    )


def _stages(tables: ScoringTables) -> NDArray[np.int32]:
    stages: NDArray[np.int32] = np.maximum(1, (tables.stage_s > 0).sum(axis=1)).astype(np.int32)
    return stages


class _EventEngine:
    """Simulates by the event engine: earliest deadline first, dynamic batches, early drop, least expected finish.

    The engine counts per service; what a service is served is shared out among its replicas alike.
    """

    name = "event engine (earliest deadline first, dynamic batches)"

    def __init__(self, tables: ScoringTables, batch_stage_s: Floats, blocks: Sample) -> None:
        self._tables = tables
        self._batch_stage_s = batch_stage_s
        self._stages = _stages(tables)
        services = len(tables.names)
        self._deadlines = evaluator.Deadlines(
            allowed_s=tables.deadline_s, per_token_s=np.zeros(services), sticky=np.zeros(services, dtype=np.bool_)
        )
        self._settings = evaluator.Settings(routing="least-finish", warmup_s=blocks.warmup_s)
        self._arrivals = [
            evaluator.Arrivals(
                arrival_s=blocks.arrival_s[first:last],
                code=blocks.service[first:last].astype(np.int64),
                service_of_code=np.arange(services, dtype=np.int32),
                duration_s=float(blocks.arrival_s[last - 1]) if last > first else 0.0,
            )
            for first, last in zip(blocks.first[:-1], blocks.first[1:], strict=True)
        ]

    def good(self, arrangement: Arrangement, block: int) -> Integers:
        """Return the requests of ``block`` served in time, shape (service, replica)."""
        arrivals, now = self._arrivals[block], arrangement.now
        replicas = self._replicas(now)
        if replicas is None or not len(arrivals.arrival_s):
            return np.zeros(now.slot.shape, dtype=np.int64)
        return _shared_out(now, evaluator.simulate_counts(replicas, arrivals, self._deadlines, self._settings))

    def _replicas(self, deployment: Layout) -> evaluator.Replicas | None:
        """Return the engine's arrays, replicas by group; None without any."""
        taken = np.arange(deployment.slot.shape[1]) < deployment.replicas[:, None]
        if not taken.any():
            return None
        service = np.nonzero(taken)[0]
        slot, option = deployment.slot[taken], deployment.option[taken]
        order = np.lexsort((service, slot))
        service, slot, option = service[order], slot[order], option[order]
        _, first, group = np.unique(slot, return_index=True, return_inverse=True)
        largest = int(self._tables.max_batch[option].max())
        return evaluator.Replicas(
            group_of=group.astype(np.int32),
            service_of=service.astype(np.int32),
            max_batch=self._tables.max_batch[option].astype(np.int32),
            frames=np.ones(len(option), dtype=np.int32),
            stage_s=np.ascontiguousarray(self._batch_stage_s[option, :largest]),
            weight=np.ones(len(option)),
            stages=self._stages[option[first]],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a plan did on sampled traces.

    Attributes:
        good: Shape (block, service).
        offered: Shape (block, service).
        p50_s: Median latency of each service; None where nothing was served.
        p99_s: 99th percentile likewise.
    """

    good: Integers
    offered: Integers
    p50_s: tuple[float | None, ...]
    p99_s: tuple[float | None, ...]


def served_by(plan: Plan, services: Services, blocks: Sample) -> Served:
    """Return what ``plan`` does on ``blocks`` where nodes serve it and gateways route as they do by default."""
    names = np.array([service.name for service in services.services], dtype=object)
    settings = evaluator.Settings(routing=evaluator.GATEWAY_ROUTING, warmup_s=blocks.warmup_s)
    good: list[Integers] = []
    latencies, served = [np.zeros(0)], [np.zeros(0, dtype=np.int32)]
    for first, last in zip(blocks.first[:-1], blocks.first[1:], strict=True):
        service, counts = blocks.service[first:last], blocks.counts[first:last]
        if not counts.any():
            good.append(np.zeros(len(names), dtype=np.int64))
            continue
        frame = pd.DataFrame({"arrival_s": blocks.arrival_s[first:last], "service": names[service].astype(str)})
        requests = evaluator.evaluate(plan, services, RequestTrace(frame), settings=settings).requests
        counted = service[counts]  # what came in the warm-up is not told of
        good.append(np.bincount(counted[requests["outcome"] == "good"], minlength=len(names)))
        finished = requests["latency_s"].notna().to_numpy()
        latencies.append(requests["latency_s"].to_numpy()[finished])
        served.append(counted[finished])
    latency_s, of = np.concatenate(latencies), np.concatenate(served)
    order = np.lexsort((latency_s, of))
    sorted_s = np.split(latency_s[order], np.searchsorted(of[order], np.arange(1, len(names))))
    return Served(
        good=np.array(good),
        offered=blocks.offered(len(names)),
        p50_s=tuple(nearest_rank(each, 50) for each in sorted_s),
        p99_s=tuple(nearest_rank(each, 99) for each in sorted_s),
    )


def _duration_s(blocks: Sample) -> float:
    """Return the seconds from the end of the warm-up to the last arrival of each block, together."""
    ends = blocks.first[1:][np.diff(blocks.first) > 0]
    return max(float(np.maximum(blocks.arrival_s[ends - 1] - blocks.warmup_s, 0.0).sum()), 1e-9)


def _shared_out(deployment: Layout, good: Integers) -> Integers:
    """Return ``good`` per service as whole requests per replica, shape (service, replica)."""
    count = np.maximum(deployment.replicas, 1)[:, None]
    replica = np.arange(deployment.slot.shape[1])
    each = good[:, None] // count + (replica < good[:, None] % count)
    shares: Integers = np.where(replica < deployment.replicas[:, None], each, 0)
    return shares
