"""Policies to compare with: round robin, random, least loaded, and selective replication.

All four put replicas on the smallest parallelism that fits (`evaluator.draft`) and fill memory until nothing fits or
nothing is gained; they differ in where the next replica goes and in how requests are routed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from evaluator.draft import Draft, Tile
from evaluator.policy import Decision, Situation, Undecided
from evaluator.settings import Settings
from evaluator.simulation import evaluate
from plans.plan import Plan
from plans.service import Workflow
from traces.table import RequestTrace

__all__ = ["LeastLoaded", "RandomPlacement", "RoundRobin", "SelectiveReplication"]


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """Services in turn onto tiles in turn, until memory is full; requests to replicas in turn."""

    name: str = "round-robin"

    def decide(self, situation: Situation) -> Decision:
        """Return what should run in ``situation``; see `Policy`."""
        draft = Draft(situation)
        last: Tile | None = None
        while True:
            placed = False
            for service in situation.services.services:
                tiles = list(draft.tiles(service.name))
                if tiles:
                    last = next((tile for tile in tiles if last is not None and tile > last), tiles[0])
                    draft.place(service.name, last)
                    placed = True
            if not placed:
                break
        return Decision(plan=_filled(draft, self.name), routing="round-robin")


@dataclass(frozen=True, slots=True)
class RandomPlacement:
    """Random services onto random tiles, until memory is full; requests to replicas at random."""

    name: str = "random"

    def decide(self, situation: Situation) -> Decision:
        """Return what should run in ``situation``; see `Policy`."""
        draft = Draft(situation)
        generator = np.random.default_rng(situation.seed)
        names = [service.name for service in situation.services.services]
        while names:
            name = names[int(generator.integers(len(names)))]
            tiles = list(draft.tiles(name))
            if tiles:
                draft.place(name, tiles[int(generator.integers(len(tiles)))])
            else:
                names.remove(name)
        return Decision(plan=_filled(draft, self.name), routing="weighted-random")


@dataclass(frozen=True, slots=True)
class LeastLoaded:
    """The service with the most load per replica onto the tile with the least load; requests to the shortest queue."""

    name: str = "least-loaded"

    def decide(self, situation: Situation) -> Decision:
        """Return what should run in ``situation``; see `Policy`."""
        draft = Draft(situation)
        rates = {
            service.name: 0.0 if (demand := situation.demand.of(service.name)) is None else demand.peak_rps(0.5)
            for service in situation.services.services
        }
        hosts: dict[str, list[Tile]] = {name: [] for name in rates}
        open_names = list(rates)
        while open_names:
            name = max(open_names, key=lambda each: rates[each] / (len(hosts[each]) + 0.5))
            tiles = list(draft.tiles(name))
            if not tiles:
                open_names.remove(name)
                continue
            loads = _loads(draft, rates, hosts)
            tile = min(tiles, key=lambda each: (sum(loads[each.node_position, gpu] for gpu in each.gpus), each))
            draft.place(name, tile)
            hosts[name].append(tile)
        return Decision(plan=_filled(draft, self.name), routing="shortest-queue")


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectiveReplication:
    """One replica at a time, wherever the simulated gain on the history is largest; stops when none gains.

    A workflow begins with one replica of every stage at once, each on the tile with the fewest services.
    Without model parallelism beyond what memory asks for: the selective replication that AlpaServe (OSDI 2023,
    section 6) compares with.

    Attributes:
        services: Services and workflows tried in each round, those with the most weighted misses first.
        requests: Requests of the history that are simulated, taken from its end.
    """

    name: str = "selective-replication"
    services: int = 12
    requests: int = 8_000

    def decide(self, situation: Situation) -> Decision:
        """Return what should run in ``situation``; see `Policy`."""
        sample = _latest(situation.history, self.requests)
        stages: dict[str, tuple[str, ...]] = {each.name: (each.name,) for each in situation.services.services}
        stages |= {flow.name: _stages(flow) for flow in situation.services.workflows}
        weights = dict.fromkeys(stages, 1.0) | {each.name: each.weight for each in situation.services.services}
        offered = defaultdict(int, zip(*np.unique(sample.frame["service"], return_counts=True), strict=True))
        draft = Draft(situation)
        good: dict[str, int] = dict.fromkeys(weights, 0)
        score = 0.0
        while True:
            missed = sorted(weights, key=lambda name: (weights[name] * (good[name] - offered[name]), name))
            best: tuple[float, Draft, dict[str, int]] | None = None
            for name in [name for name in missed if offered[name] > good[name]][: self.services]:
                for trial in _extensions(draft, stages[name]):
                    found = _goods(trial, situation, sample, self.name)
                    gained = sum(weights[each] * found[each] for each in weights)
                    if gained > (score if best is None else best[0]):
                        best = gained, trial, found
            if best is None:
                break
            score, draft, good = best
        return Decision(plan=_filled(draft, self.name), routing="least-finish")


def _stages(flow: Workflow) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for edge in flow.edges for name in (edge.source, edge.target)))


def _extensions(draft: Draft, stages: Sequence[str]) -> Iterator[Draft]:
    """Yield ``draft`` with one replica more of one of ``stages``, or first with one of each stage that has none.

    A single replica gains nothing for a workflow of which another stage runs nowhere.
    """
    missing = [stage for stage in stages if not draft.replicas(stage)]
    if len(missing) > 1:
        trial = draft.copy()
        for stage in missing:
            tiles = _distinct(trial, stage)
            if not tiles:
                return
            trial.place(stage, min(tiles, key=lambda tile: len(trial.contents(tile)[1])))
        yield trial
        return
    for stage in missing or stages:
        for tile in _distinct(draft, stage):
            trial = draft.copy()
            trial.place(stage, tile)
            yield trial


def _filled(draft: Draft, name: str) -> Plan:
    plan = draft.plan(name)
    if not plan.groups:
        raise Undecided.of(
            "a service that fits on some GPU and can meet its deadline there",
            where=f"policy {name}",
            found="none",
            remedy="check the profiles, the memory of the GPU types and the deadlines",
        )
    return plan


def _loads(draft: Draft, rates: dict[str, float], hosts: dict[str, list[Tile]]) -> defaultdict[tuple[int, int], float]:
    """Return the utilisation of each (node, GPU) when every service spreads its rate evenly over its hosts."""
    loads: defaultdict[tuple[int, int], float] = defaultdict(float)
    for name, tiles in hosts.items():
        for tile in tiles:
            for gpu in tile.gpus:
                loads[tile.node_position, gpu] += rates[name] / len(tiles) * draft.request_s(name, tile)
    return loads


def _distinct(draft: Draft, service: str) -> list[Tile]:
    """Return one tile of each kind: others with the same GPU type and loadout would give the same gain."""
    kinds: dict[tuple[str, tuple[str, ...]], Tile] = {}
    for tile in draft.tiles(service):
        kinds.setdefault(draft.contents(tile), tile)
    return list(kinds.values())


def _latest(trace: RequestTrace, requests: int) -> RequestTrace:
    if len(trace) <= requests:
        return trace
    return trace.window(float(trace.arrival_s[-requests]), trace.duration_s + 1e-9)


def _goods(draft: Draft, situation: Situation, sample: RequestTrace, name: str) -> dict[str, int]:
    settings = Settings(routing="least-finish", seed=situation.seed)
    result = evaluate(
        draft.plan(name),
        situation.services,
        sample,
        settings=settings,
        cluster=situation.cluster,
        profiles=situation.profiles,
        keep_requests=False,
    )
    return {service.service: service.good for service in result.summary.services}
