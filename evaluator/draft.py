"""A placement in the making for the simple policies: tiles of GPUs, what they hold, and what still fits.

A replica takes the smallest parallelism whose memory fits a GPU type, and the most accurate variant that can be placed
at all; its largest batch is the largest one of which two in a row meet the deadline, so that a request may wait for a
whole batch before its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from evaluator.policy import Situation
from plans.cluster import group_id
from plans.plan import Group, LoadoutEntry, Plan, Route, SolverReport
from plans.service import Service
from profiles.generation import token_rules
from profiles.latency import LatencyModel

__all__ = ["HEADROOM_RATIO", "Draft", "Tile"]

HEADROOM_RATIO = 0.05
"""Share of every GPU's memory that is left free, as the planner does by default."""

_LARGEST_BATCH = 256


@dataclass(frozen=True, slots=True, order=True)
class Tile:
    """Aligned neighbouring GPUs of one node that serve as one group of ``tp`` x ``pp``."""

    node_position: int
    gpus: tuple[int, ...]
    tp: int
    pp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Replica:
    entry: LoadoutEntry
    tp: int
    pp: int

    @property
    def size(self) -> int:
        return self.tp * self.pp


class Draft:
    """Replicas on tiles. Keeps memory, pins, forbids and GPU budgets; a service is at most once on a tile."""

    def __init__(self, situation: Situation) -> None:
        self._situation = situation
        self._nodes = situation.cluster.nodes
        self._services = {service.name: service for service in situation.services.services}
        self._replicas: dict[tuple[str, str], _Replica | None] = {}
        self._loadouts: dict[Tile, list[LoadoutEntry]] = {}
        self._owner: dict[tuple[int, int], Tile] = {}
        self._free_bytes = {
            (position, gpu): situation.cluster.gpu_type_of(node.name).memory_bytes * (1 - HEADROOM_RATIO)
            for position, node in enumerate(self._nodes)
            for gpu in range(node.gpus.count)
        }
        self._gpus_of: dict[str, set[tuple[int, int]]] = defaultdict(set)

    def copy(self) -> Draft:
        """Return a draft that can go its own way."""
        other = Draft(self._situation)
        other._replicas = self._replicas  # a cache of what never changes
        other._loadouts = {tile: list(entries) for tile, entries in self._loadouts.items()}
        other._owner = dict(self._owner)
        other._free_bytes = dict(self._free_bytes)
        other._gpus_of = defaultdict(set, {name: set(gpus) for name, gpus in self._gpus_of.items()})
        return other

    def tiles(self, service: str) -> Iterator[Tile]:
        """Yield every tile on which one more replica of ``service`` fits now, in order of node and GPU."""
        for position, node in enumerate(self._nodes):
            replica = self._replica(service, node.gpus.type)
            if replica is None:
                continue
            for first in range(0, node.gpus.count - replica.size + 1, replica.size):
                tile = Tile(position, tuple(range(first, first + replica.size)), replica.tp, replica.pp)
                if self._fits(self._services[service], replica, tile):
                    yield tile

    def place(self, service: str, tile: Tile) -> None:
        """Put a replica of ``service`` on ``tile``, which `tiles` has offered."""
        replica = self._replica(service, self._nodes[tile.node_position].gpus.type)
        assert replica is not None
        self._loadouts.setdefault(tile, []).append(replica.entry)
        for gpu, size in zip(tile.gpus, replica.entry.memory_bytes, strict=True):
            self._owner[tile.node_position, gpu] = tile
            self._free_bytes[tile.node_position, gpu] -= size
            self._gpus_of[service].add((tile.node_position, gpu))

    def request_s(self, service: str, tile: Tile) -> float:
        """Return the seconds that ``tile`` needs per request of ``service``: its bottleneck stage over a full batch."""
        replica = self._replica(service, self._nodes[tile.node_position].gpus.type)
        assert replica is not None
        return max(replica.entry.stage_latency_s[-1]) / replica.entry.max_batch

    def contents(self, tile: Tile) -> tuple[str, tuple[str, ...]]:
        """Return what tells ``tile`` from another of its shape: its GPU type and the services on it."""
        gpu_type = self._nodes[tile.node_position].gpus.type
        return gpu_type, tuple(sorted(entry.service for entry in self._loadouts.get(tile, ())))

    def replicas(self, service: str) -> int:
        """Return how many tiles run ``service``."""
        return sum(entry.service == service for entries in self._loadouts.values() for entry in entries)

    def plan(self, name: str) -> Plan:
        """Return the plan, with every replica of a service weighted alike.

        Its objective is the rate that it plans to serve, its bound the trivial one: all that is offered.
        """
        hosts: dict[str, list[str]] = defaultdict(list)
        for tile, entries in sorted(self._loadouts.items()):
            for entry in entries:
                hosts[entry.service].append(self._identifier(tile))
        offered = {
            service: 0.0 if (demand := self._situation.demand.of(service)) is None else demand.peak_rps(0.5)
            for service in self._services
        }
        served = sum(rate for service, rate in offered.items() if service in hosts)
        total = sum(offered.values())
        gap = (total - served) / max(served, 1e-9)
        report = SolverReport(
            name=name, status="feasible", objective=served, bound=total, gap=gap, wall_s=0.0, seed=self._situation.seed
        )
        groups = tuple(
            Group(
                id=self._identifier(tile),
                node=self._nodes[tile.node_position].name,
                gpus=tile.gpus,
                tp=tile.tp,
                pp=tile.pp,
                loadout=tuple(
                    entry.model_copy(update={"rate_rps": offered[entry.service] / len(hosts[entry.service])})
                    for entry in entries
                ),
            )
            for tile, entries in sorted(self._loadouts.items())
        )
        return Plan(solver=report, groups=groups, routes={name: _equal(groups) for name, groups in hosts.items()})

    def _identifier(self, tile: Tile) -> str:
        return group_id(self._nodes[tile.node_position].name, tile.gpus)

    def _fits(self, service: Service, replica: _Replica, tile: Tile) -> bool:
        places = [(tile.node_position, gpu) for gpu in tile.gpus]
        if not service.allows(self._nodes[tile.node_position].name, tile.gpus):
            return False
        if any(self._owner.get(place, tile) != tile for place in places):
            return False
        if any(entry.service == service.name for entry in self._loadouts.get(tile, ())):
            return False
        if service.max_gpus is not None and len(self._gpus_of[service.name].union(places)) > service.max_gpus:
            return False
        needed = zip(places, replica.entry.memory_bytes, strict=True)
        return all(size <= self._free_bytes[place] for place, size in needed)

    def _replica(self, service: str, gpu_type: str) -> _Replica | None:
        key = service, gpu_type
        if key not in self._replicas:
            self._replicas[key] = self._build(self._services[service], gpu_type)
        return self._replicas[key]

    def _build(self, service: Service, gpu_type: str) -> _Replica | None:
        memory_bytes = self._situation.cluster.gpu_types[gpu_type].memory_bytes * (1 - HEADROOM_RATIO)
        demand = self._situation.demand.of(service.name)
        profiles = self._situation.profiles
        variants = [variant for variant in service.variants if variant.accuracy >= service.min_accuracy]
        for variant in sorted(variants, key=lambda variant: -variant.accuracy):
            shapes = profiles.parallelisms(variant.model, gpu_type)
            for tp, pp in sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape)):
                model = profiles.latency(
                    variant.model,
                    gpu_type,
                    tp,
                    pp,
                    input_tokens=demand.input_tokens if demand else None,
                    output_tokens=demand.output_tokens if demand else None,
                )
                deadline_s = service.deadline_s(demand.output_tokens if demand else None)
                batch = 0 if model is None else _largest_batch(model, deadline_s, memory_bytes)
                if model is not None and batch:
                    entry = LoadoutEntry(
                        service=service.name,
                        variant=variant.model,
                        max_batch=batch,
                        rate_rps=0.0,
                        memory_bytes=tuple(size for size in model.peak_bytes(batch) for _ in range(tp)),
                        weight_bytes=sum(model.weight_bytes) * tp,
                        load_s=model.load_s,
                        deadline_s=deadline_s,
                        stage_latency_s=model.stage_latency_table(batch),
                        tokens=token_rules(service, profiles.profile(variant.model, gpu_type), tp, pp),
                    )
                    return _Replica(entry=entry, tp=tp, pp=pp)
        return None


def _largest_batch(model: LatencyModel, deadline_s: float, memory_bytes: float) -> int:
    """Return the largest profiled batch that fits and of which two in a row meet the deadline; 1 if it fits; else 0."""

    def fits(batch: int) -> bool:
        return max(model.peak_bytes(batch)) <= memory_bytes

    good = [
        batch
        for batch in model.batches
        if batch <= _LARGEST_BATCH and fits(batch) and 2 * model.at(batch).mean_s <= deadline_s
    ]
    return max(good, default=1 if fits(1) and model.at(1).mean_s <= deadline_s else 0)


def _equal(groups: list[str]) -> tuple[Route, ...]:
    share = 1 / len(groups)
    first = 1 - share * (len(groups) - 1)
    return tuple(Route(group=group, weight=first if k == 0 else share) for k, group in enumerate(groups))
