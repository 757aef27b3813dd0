"""Groups and replicas over all plans of a run: what is loaded, routed, failed, and for how long GPUs were held."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from evaluator.changes import Failure, Recovery, Span
from plans.cluster import Cluster
from plans.plan import Group, LoadoutEntry, Plan

__all__ = ["Fleet", "FleetGroup", "FleetReplica"]

_Gpu = tuple[str, int]


@dataclass(slots=True, kw_only=True, eq=False)
class FleetReplica:
    """One variant of a service on a group.

    Attributes:
        entry: Its limits now.
        loaded: Whether it is there.
        weight: Of the plan in force; 0 while it is not loaded.
        largest_batch: The largest that any plan allowed it.
    """

    entry: LoadoutEntry
    largest_batch: int
    loaded: bool = False
    weight: float = 0.0


@dataclass(slots=True, kw_only=True, eq=False)
class FleetGroup:
    """GPUs that some plan makes one unit.

    Attributes:
        planned: As in the first plan that has it; its loadout does not count.
        replicas: In order of their positions.
        failed: Whether some of its GPUs are.
        known: Whether the router knows.
        outages: Failures so far.
        detection_s: When the last failure that stopped it is known.
    """

    planned: Group
    replicas: list[FleetReplica] = field(default_factory=list)
    failed: bool = False
    known: bool = False
    outages: int = 0
    detection_s: float = 0.0

    @property
    def gpus(self) -> frozenset[_Gpu]:
        """Its devices."""
        return frozenset((self.planned.node, gpu) for gpu in self.planned.gpus)

    def hit_by(self, change: Failure | Recovery) -> bool:
        """Say whether it has a GPU of what fails or recovers."""
        return self.planned.node == change.node and (change.gpu is None or change.gpu in self.planned.gpus)


class Fleet:
    """All groups and replicas, in the order of their positions.

    Args:
        plan: What is loaded at first.
        cluster: Where plans run; without it there is only what ``plan`` uses.
    """

    def __init__(self, plan: Plan, cluster: Cluster | None) -> None:
        self.plan = plan
        self._counts = {node.name: node.gpus.count for node in cluster.nodes} if cluster else {}
        if cluster is None:
            for planned in plan.groups:
                self._counts[planned.node] = max(self._counts.get(planned.node, 0), max(planned.gpus) + 1)
        self.groups: list[FleetGroup] = []
        self._failed: set[_Gpu] = set()
        self._holds: dict[FleetReplica, tuple[FleetGroup, float]] = {}
        self._held: dict[_Gpu, list[tuple[float, float]]] = defaultdict(list)
        for group, replica in self.add(plan):
            replica.loaded = True
            self._holds[replica] = (group, 0.0)
        self.flip(plan)

    def add(self, plan: Plan) -> list[tuple[FleetGroup, FleetReplica]]:
        """Make what ``plan`` has and no plan before had; return all that it has."""
        return [
            (self._group(group), self._replica(self._group(group), e)) for group in plan.groups for e in group.loadout
        ]

    def flip(self, plan: Plan, old: Mapping[FleetReplica, float] = MappingProxyType({})) -> None:
        """Give replicas that are loaded weight and limits as in ``plan``, or weight as in ``old``; others none."""
        weights = {(service, route.group): route.weight for service, routes in plan.routes.items() for route in routes}
        for group in self.groups:
            for replica in group.replicas:
                replica.weight = old.get(replica, 0.0)
        for planned in plan.groups:
            for entry in planned.loadout:
                replica = self._replica(self._group(planned), entry)
                if replica.loaded:
                    replica.weight = weights.get((entry.service, planned.id), 0.0)
                    replica.entry = entry
                    replica.largest_batch = max(replica.largest_batch, entry.max_batch)
        self.plan = plan

    def replicas(self) -> Iterator[tuple[FleetGroup, FleetReplica]]:
        """Yield every replica with its group, in order of position."""
        for group in self.groups:
            for replica in group.replicas:
                yield group, replica

    def overlaps(self) -> list[tuple[int, ...]]:
        """Return for each group the positions of the others that share a GPU with it."""
        users: dict[_Gpu, list[int]] = defaultdict(list)
        for position, group in enumerate(self.groups):
            for gpu in group.gpus:
                users[gpu].append(position)
        return [
            tuple(sorted({other for gpu in group.gpus for other in users[gpu]} - {position}))
            for position, group in enumerate(self.groups)
        ]

    # What fails and recovers ---------------------------------------------------------------------------------------

    def hit_by(self, change: Failure | Recovery) -> list[tuple[int, FleetGroup]]:
        """Return the groups, with their positions, that have a GPU of what fails or recovers."""
        return [(position, group) for position, group in enumerate(self.groups) if group.hit_by(change)]

    def note_failure(self, failure: Failure) -> None:
        """Remember that devices failed, for groups that come later."""
        self._failed |= self._devices(failure)

    def note_recovery(self, recovery: Recovery) -> None:
        """Remember that devices are well again."""
        self._failed -= self._devices(recovery)

    def is_well(self, group: FleetGroup) -> bool:
        """Say whether all GPUs of ``group`` are well."""
        return not group.gpus & self._failed

    def _devices(self, change: Failure | Recovery) -> set[_Gpu]:
        if change.gpu is not None:
            return {(change.node, change.gpu)}
        return {(change.node, gpu) for gpu in range(self._counts.get(change.node, 0))}

    # What is held --------------------------------------------------------------------------------------------------

    def load(self, span: Span, plan: Plan, *, done: bool) -> None:
        """A load of ``plan`` begins, or is done."""
        planned = plan.group(span.group)
        group = self._group(planned)
        entry = planned.entry(span.service)
        assert entry is not None
        replica = self._replica(group, entry)
        self._holds.setdefault(replica, (group, span.start_s))
        if done:
            replica.loaded = True

    def unload(self, group: FleetGroup, replica: FleetReplica, now_s: float) -> None:
        """A replica has left, unless it was loaded again meanwhile."""
        if replica in self._holds and not replica.loaded:
            _, since_s = self._holds.pop(replica)
            for gpu in group.gpus:
                self._held[gpu].append((since_s, now_s))

    def gpu_seconds(self, start_s: float, end_s: float) -> float:
        """Return how long GPUs were held between two times, summed over all GPUs."""
        held = {gpu: list(spans) for gpu, spans in self._held.items()}
        for group, since_s in self._holds.values():
            for gpu in group.gpus:
                held.setdefault(gpu, []).append((since_s, end_s))
        return sum(_length(spans, start_s, end_s) for spans in held.values())

    # ---------------------------------------------------------------------------------------------------------------

    def _group(self, planned: Group) -> FleetGroup:
        cut = planned.id, planned.tp, planned.pp
        for group in self.groups:
            if (group.planned.id, group.planned.tp, group.planned.pp) == cut:
                return group
        group = FleetGroup(planned=planned)
        group.failed = group.known = not self.is_well(group)
        self.groups.append(group)
        return group

    @staticmethod
    def _replica(group: FleetGroup, entry: LoadoutEntry) -> FleetReplica:
        for replica in group.replicas:
            if (replica.entry.service, replica.entry.variant) == (entry.service, entry.variant):
                return replica
        group.replicas.append(FleetReplica(entry=entry, largest_batch=entry.max_batch))
        return group.replicas[-1]


def _length(spans: Sequence[tuple[float, float]], start_s: float, end_s: float) -> float:
    """Return the length of the union of ``spans`` between two times."""
    total_s, upto_s = 0.0, start_s
    for begin_s, finish_s in sorted(spans):
        total_s += max(0.0, min(finish_s, end_s) - max(begin_s, upto_s))
        upto_s = max(upto_s, min(finish_s, end_s))
    return total_s
