"""The evaluator as the planner's `Scorer`: its single pass, and its event engine where batches matter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

import evaluator
from evaluator.single_pass import Hosts, SinglePassRouting, SinglePassTrace, compile_hosts, race, run_single_pass
from planner import Deployment, Heat, ScoringTables
from plans.plan import Plan
from plans.service import Services
from traces.outcomes import nearest_rank
from traces.table import RequestTrace

__all__ = ["EventScorer", "Served", "SinglePassScorer", "scorer_for", "served_by"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def scorer_for(
    tables: ScoringTables, blocks: SinglePassTrace, routing: SinglePassRouting
) -> SinglePassScorer | EventScorer:
    """Return the event engine where batches matter, else the single pass, which is much faster."""
    if tables.batch_stage_s is None:
        return SinglePassScorer(tables, blocks, routing)
    return EventScorer(tables, tables.batch_stage_s, blocks)


class SinglePassScorer:
    """Scores by the evaluator's single pass: admission at arrival, batches of one."""

    name = "single pass (admission at arrival, no batching)"

    def __init__(self, tables: ScoringTables, blocks: SinglePassTrace, routing: SinglePassRouting) -> None:
        self._tables = tables
        self._blocks = blocks
        self._routing = routing
        self._weight = np.ones((len(tables.names), 1))
        self.offered = blocks.offered(len(tables.names))
        self.simulated_s = _duration_s(blocks)

    def race(
        self, deployment: Deployment, value: Floats, *, rival: Floats, needed: float, start: int, least: int
    ) -> Heat:
        """Race one candidate; see `planner.Scorer`."""
        hosts = Hosts(
            count=deployment.count,
            group=deployment.slot,
            option=deployment.option,
            weight=self._weight,
            stage_s=self._tables.stage_s,
            deadline_s=self._tables.deadline_s,
            groups=self._tables.gpus,
        )
        found = race(
            hosts, self._blocks, value, rival=rival, needed=needed, start=start, least=least, routing=self._routing
        )
        return Heat(blocks=found.blocks, value=found.value, good=found.good)


class EventScorer:
    """Scores by the event engine: earliest deadline first, dynamic batches, early drop, least expected finish.

    The engine counts per service; what a service is served is shared out among its replicas alike.
    """

    name = "event engine (earliest deadline first, dynamic batches)"

    def __init__(self, tables: ScoringTables, batch_stage_s: Floats, blocks: SinglePassTrace) -> None:
        self._tables = tables
        self._batch_stage_s = batch_stage_s
        self._stages = np.maximum(1, (tables.stage_s > 0).sum(axis=1)).astype(np.int32)
        services = len(tables.names)
        self._deadlines = evaluator.Deadlines(
            allowed_s=tables.deadline_s, per_token_s=np.zeros(services), sticky=np.zeros(services, dtype=np.bool_)
        )
        self._settings = event_settings()
        self._arrivals = [
            evaluator.Arrivals(
                arrival_s=blocks.arrival_s[first:last],
                code=blocks.service[first:last].astype(np.int64),
                service_of_code=np.arange(services, dtype=np.int32),
                duration_s=float(blocks.arrival_s[last - 1]) if last > first else 0.0,
            )
            for first, last in zip(blocks.first[:-1], blocks.first[1:], strict=True)
        ]
        self.offered = blocks.offered(services)
        self.simulated_s = _duration_s(blocks)

    def race(
        self, deployment: Deployment, value: Floats, *, rival: Floats, needed: float, start: int, least: int
    ) -> Heat:
        """Race one candidate; see `planner.Scorer`."""
        blocks = len(self._arrivals)
        values = np.zeros(blocks)
        good = np.zeros(len(deployment.count), dtype=np.int64)
        worth = _mean_worth(deployment, value)
        replicas = self._replicas(deployment)
        gains: list[float] = []
        for turn in range(blocks):
            block = (start + turn) % blocks
            served = self._served(replicas, block)
            good += served
            values[block] = float(served @ worth)
            gains.append(values[block] - float(rival[block]))
            if least <= len(gains) < blocks and _hopeless(gains, needed / blocks):
                break
        return Heat(blocks=len(gains), value=values, good=_shared_out(deployment, good))

    def _served(self, replicas: evaluator.Replicas | None, block: int) -> Integers:
        arrivals = self._arrivals[block]
        if replicas is None or not len(arrivals.arrival_s):
            return np.zeros(len(self._tables.names), dtype=np.int64)
        return evaluator.simulate_counts(replicas, arrivals, self._deadlines, self._settings)

    def _replicas(self, deployment: Deployment) -> evaluator.Replicas | None:
        """Return the engine's arrays, replicas by group; None without any."""
        taken = np.arange(deployment.slot.shape[1]) < deployment.count[:, None]
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


def event_settings() -> evaluator.Settings:
    """Return how the event engine runs for the polish: as the executor does, routed by least expected finish."""
    return evaluator.Settings(routing="least-finish")


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


def served_by(
    plan: Plan, services: Services, blocks: SinglePassTrace, routing: SinglePassRouting, *, batches: bool
) -> Served:
    """Return what ``plan`` does on ``blocks``, by the engine that scored it."""
    count = len(services.services)
    run = _by_events if batches else _by_single_pass
    good, latency_s, service = run(plan, services, blocks, routing)
    sorted_s = [np.sort(latency_s[service == position]) for position in range(count)]
    return Served(
        good=good,
        offered=blocks.offered(count),
        p50_s=tuple(nearest_rank(each, 50) for each in sorted_s),
        p99_s=tuple(nearest_rank(each, 99) for each in sorted_s),
    )


def _by_single_pass(
    plan: Plan, services: Services, blocks: SinglePassTrace, routing: SinglePassRouting
) -> tuple[Integers, Floats, NDArray[np.int32]]:
    """Return good per block and service, and latency and service of everything that was served."""
    hosts = compile_hosts(plan, services)
    good, latencies, served = [], [], []
    for first, last in zip(blocks.first[:-1], blocks.first[1:], strict=True):
        arrival_s, service = blocks.arrival_s[first:last], blocks.service[first:last]
        outcome = run_single_pass(hosts, arrival_s, service, routing=routing)
        good.append(np.bincount(service[outcome.accepted], minlength=len(services.services)))
        latencies.append((outcome.finish_s - arrival_s)[outcome.accepted])
        served.append(service[outcome.accepted])
    return np.array(good), np.concatenate(latencies), np.concatenate(served)


def _by_events(
    plan: Plan, services: Services, blocks: SinglePassTrace, routing: SinglePassRouting
) -> tuple[Integers, Floats, NDArray[np.int32]]:
    names = np.array([service.name for service in services.services], dtype=object)
    good, latencies, served = [], [], []
    for first, last in zip(blocks.first[:-1], blocks.first[1:], strict=True):
        service = blocks.service[first:last]
        if last == first:
            good.append(np.zeros(len(names), dtype=np.int64))
            continue
        frame = pd.DataFrame({"arrival_s": blocks.arrival_s[first:last], "service": names[service].astype(str)})
        requests = evaluator.evaluate(plan, services, RequestTrace(frame), settings=event_settings()).requests
        good.append(np.bincount(service[requests["outcome"] == "good"], minlength=len(names)))
        finished = requests["latency_s"].notna().to_numpy()
        latencies.append(requests["latency_s"].to_numpy()[finished])
        served.append(service[finished])
    empty = [np.zeros(0)]
    return np.array(good), np.concatenate(latencies or empty), np.concatenate(served or [np.zeros(0, dtype=np.int32)])


def _duration_s(blocks: SinglePassTrace) -> float:
    """Return the seconds up to the last arrival of each block, together."""
    ends = blocks.first[1:][np.diff(blocks.first) > 0]
    return max(float(blocks.arrival_s[ends - 1].sum()), 1e-9)


def _mean_worth(deployment: Deployment, value: Floats) -> Floats:
    """Return the mean worth of a request over the replicas of each service, shape (service,)."""
    taken = np.arange(deployment.slot.shape[1]) < deployment.count[:, None]
    worth = np.where(taken, value[deployment.option], 0.0).sum(axis=1)
    mean: Floats = worth / np.maximum(deployment.count, 1)
    return mean


def _shared_out(deployment: Deployment, good: Integers) -> Integers:
    """Return ``good`` per service as whole requests per replica, shape (service, replica)."""
    count = np.maximum(deployment.count, 1)[:, None]
    replica = np.arange(deployment.slot.shape[1])
    each = good[:, None] // count + (replica < good[:, None] % count)
    shares: Integers = np.where(replica < deployment.count[:, None], each, 0)
    return shares


def _hopeless(gains: list[float], needed: float) -> bool:
    """Say whether a mean gain of ``needed`` lies more than two standard errors above that of ``gains``."""
    count = len(gains)
    mean = math.fsum(gains) / count
    spread = math.fsum((gain - mean) ** 2 for gain in gains)
    return mean + 2.0 * math.sqrt(spread / count / max(count - 1, 1)) < needed
