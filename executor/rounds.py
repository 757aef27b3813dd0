"""The stops on the way from one plan to another: what nodes run, and gateways route to, after each wave of it.

A stop is a plan in which replicas of both stand beside each other, also on groups that share devices. Nodes are brought
from stop to stop as from plan to plan. Each carries the digest of the plan that it leads to: an apply that is cut short
at one is taken up by running it again: what agents have committed says where it stands.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from executor.apply_plan import Live, is_at, live_prior
from executor.state import DesiredGroup, DesiredReplica, ReplicaKey
from plans.cluster import Cluster
from plans.plan import Group, LoadoutEntry, Plan, Route, TokenRules, TransitionStep
from plans.transition import transition, waves_of

__all__ = ["PlannedWave", "Stop", "is_settled", "outlook", "running_plan", "stops", "stops_from"]

_Place = tuple[str, str]
"""A group and a service."""


class Stop(Plan):
    """A plan on the way, never validated as one: groups may share devices."""

    leads_to: str

    @property
    def placement_digest(self) -> str:
        """Digest of the plan that it leads to."""
        return self.leads_to


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedWave:
    """What goes and then comes between two flips of routes: about ``at_s`` seconds from the start, for ``for_s``."""

    at_s: float
    for_s: float
    leaves: tuple[ReplicaKey, ...]
    loads: tuple[ReplicaKey, ...]


def running_plan(live: Live, target: Plan) -> Plan | None:
    """Return what all agents have committed, as far as the way from there to ``target`` needs it.

    Routes are in proportion to planned rates, the stages of a pipeline take equal times; workflows, predictions and the
    like are those of ``target``. An apply of ``target`` may have been cut short while agents committed: then what those
    that had not yet done so have staged counts.

    None where the peers are at different places otherwise, or do not tell what they shall run.
    """
    prior = live_prior(live)
    if prior is None or not (is_settled(live) or prior.digest == target.placement_digest):
        return None
    states = [
        next((one for one in (state.committed, state.staged) if one is not None and is_at(one, prior)), None)
        for state in live.agents.values()
    ]
    if None in states:
        return None
    groups = tuple(_group(state.node, group) for state in states if state for group in state.groups)
    rates: dict[str, dict[str, float]] = defaultdict(dict)
    for group in groups:
        for entry in group.loadout:
            rates[entry.service][group.id] = entry.rate_rps
    routes = {
        service: tuple(
            Route.model_construct(group=group, weight=rate / sum(of_group.values()))
            for group, rate in of_group.items()
            if rate > 0
        )
        for service, of_group in rates.items()
    }
    return _stop_of(target, groups=groups, routes=routes, leads_to=prior.digest)


def is_settled(live: Live) -> bool:
    """Say whether every agent has committed, and every gateway routes, what is live."""
    prior = live_prior(live)
    return prior is not None and all(is_at(state, prior) for state in live.peers)


def _group(node: str, group: DesiredGroup) -> Group:
    return Group.model_construct(
        id=group.id,
        node=node,
        gpus=group.gpus,
        tp=group.tensor_parallel,
        pp=group.pipeline_parallel,
        loadout=tuple(_entry(replica, group.pipeline_parallel) for replica in group.replicas),
    )


def _entry(replica: DesiredReplica, stages: int) -> LoadoutEntry:
    rules = replica.generation
    return LoadoutEntry.model_construct(
        service=replica.service,
        variant=replica.variant,
        max_batch=replica.max_batch,
        multi_frame=replica.multi_frame,
        rate_rps=replica.rate_rps,
        memory_bytes=replica.memory_bytes,
        weight_bytes=max(0, sum(replica.memory_bytes) - rules.kv_bytes) if rules else 0,
        deadline_s=replica.deadline_s,
        stage_latency_s=tuple((latency_s / stages,) * stages for latency_s in replica.batch_latency_s),
        tokens=None
        if rules is None
        else TokenRules.model_construct(
            ttft_s=rules.ttft_s,
            tpot_s=rules.tpot_s,
            max_prefill_tokens=rules.max_prefill_tokens,
            prefill_tokens=rules.prefill_tokens,
            prefill_s=rules.prefill_s,
        ),
    )


def outlook(
    present: Collection[ReplicaKey], way: Sequence[Plan], waiting: Collection[ReplicaKey]
) -> tuple[PlannedWave, ...]:
    """Return what goes and comes when, on ``way`` from a cluster that runs ``present``.

    The first wave is what is loaded beside that; the others begin with what leaves. Loads of a node follow each other,
    and a request may be in flight until its deadline; how long that is, is taken from the plans of the way.

    Args:
        present: Replicas that run.
        way: The stops, the target last.
        waiting: Replicas of the first stop that have to wait for memory.
    """
    entries = {key: (group.node, entry) for plan in way for group, entry, key in _replicas(plan)}
    deadline_s = {entry.service: entry.deadline_s for _, entry in entries.values()}
    plans = [frozenset(present), *(frozenset(key for *_, key in _replicas(plan)) for plan in way)]
    pairs = [(set[ReplicaKey](), plans[1] - plans[0] - set(waiting))]
    for number, (before, after) in enumerate(itertools.pairwise(plans)):
        pairs.append((set(before - after), (after - before) & set(waiting) if number == 0 else after - before))
    waves: list[PlannedWave] = []
    at_s = 0.0
    for leaves, loads in pairs:
        if leaves or loads:
            on_node: dict[str, float] = defaultdict(float)
            for key in loads:
                node, entry = entries[key]
                on_node[node] += entry.load_s
            drain_s = max((deadline_s.get(key.service, 0.0) for key in leaves), default=0.0)
            for_s = drain_s + max(on_node.values(), default=0.0)
            waves.append(PlannedWave(at_s=at_s, for_s=for_s, leaves=tuple(sorted(leaves)), loads=tuple(sorted(loads))))
            at_s += for_s
    return tuple(waves)


def _replicas(plan: Plan) -> Iterable[tuple[Group, LoadoutEntry, ReplicaKey]]:
    for group in plan.groups:
        for entry in group.loadout:
            yield group, entry, ReplicaKey(group=group.id, service=entry.service, variant=entry.variant)


def stops(running: Plan, target: Plan, cluster: Cluster) -> tuple[Plan, ...]:
    """Return what stands after each wave of the transition from ``running`` to ``target``; the last is ``target``.

    Where all that comes has room beside what runs there is no other stop. Replicas that both plans have are as in
    ``target``; but as in ``running`` where they need less memory, for the room may still be taken. Nothing here checks
    that a node has the memory that ``cluster`` promises.
    """
    _, *rest = waves_of(transition(running, target, cluster).steps)
    if not any(wave.loads for wave in rest) or _recut(running, target):
        return (target,)
    old = {_place(step): step for wave in rest for step in wave.drains}
    late = {_place(step) for wave in rest for step in wave.loads}
    coming = {(group.id, entry.service) for group in target.groups for entry in group.loadout}
    found: list[Plan] = []
    told: tuple[set[_Place], set[_Place]] = (set(), set())
    for wave in rest:
        gone = {_place(step) for step in wave.drains}
        late = late - {_place(step) for step in wave.loads}
        # What is replaced in its place goes at once: requests find a replica by group and service.
        old = {
            place: step for place, step in old.items() if place not in gone and (place in late or place not in coming)
        }
        if not old and not late:
            break
        if told != (told := (set(old), late)):
            found.append(_stop(running, target, old, late))
    return (*found, target)


def stops_from(running: Plan, target: Plan, cluster: Cluster, *, settled: bool) -> tuple[Plan, ...]:
    """Return the stops from ``running``, which itself comes first where some peers are not there yet (``settled``)."""
    way = stops(running, target, cluster)
    is_there = {key for *_, key in _replicas(running)} == {key for *_, key in _replicas(target)}
    return way if settled or is_there else (_stop_of(running, leads_to=target.placement_digest), *way)


def _place(step: TransitionStep) -> _Place:
    return step.group, step.service


def _recut(running: Plan, target: Plan) -> bool:
    """Say whether the same devices become a group of another shape: its name cannot stand for both."""
    shapes = {group.id: (group.tp, group.pp) for group in running.groups}
    return any(shapes.get(group.id, (group.tp, group.pp)) != (group.tp, group.pp) for group in target.groups)


def _stop(running: Plan, target: Plan, old: Mapping[_Place, TransitionStep], late: set[_Place]) -> Plan:
    before = {(group.id, entry.service): entry for group in running.groups for entry in group.loadout}
    loadouts: dict[str, list[LoadoutEntry]] = defaultdict(list)
    for group in target.groups:
        for entry in group.loadout:
            place = (group.id, entry.service)
            if place not in late:
                loadouts[group.id].append(_smaller(before.get(place), entry))
    for name, service in old:
        loadouts[name].append(before[name, service])
    shapes = {group.id: group for group in (*running.groups, *target.groups)}
    groups = tuple(
        Group.model_construct(**dict(shapes[name]) | {"loadout": tuple(loadout)}) for name, loadout in loadouts.items()
    )
    routes = {
        service: _routes(service, running, target, old, late) for service in target.routes.keys() | running.routes
    }
    routes = {service: routes[service] for service in sorted(routes) if routes[service]}
    return _stop_of(target, groups=groups, routes=routes, leads_to=target.placement_digest)


def _stop_of(target: Plan, **changed: object) -> Stop:
    return Stop.model_construct(**{name: getattr(target, name) for name in Plan.model_fields} | changed)


def _smaller(before: LoadoutEntry | None, after: LoadoutEntry) -> LoadoutEntry:
    """Return the replica as it can stand for certain: before it grows."""
    if before is None or before.variant != after.variant:
        return after
    grows = any(was < becomes for was, becomes in zip(before.memory_bytes, after.memory_bytes, strict=True))
    return before if grows else after


def _routes(
    service: str, running: Plan, target: Plan, old: Mapping[_Place, TransitionStep], late: set[_Place]
) -> tuple[Route, ...]:
    """Return where requests go: by the target's weights, and to what is still to leave by its rate in their units."""
    planned = sum(e.rate_rps for group in target.groups for e in group.loadout if e.service == service)
    weights: dict[str, float] = defaultdict(float)
    for route in target.routes.get(service, ()):
        if (route.group, service) not in late:
            weights[route.group] += route.weight
    for route in running.routes.get(service, ()):
        if (route.group, service) in old:
            weights[route.group] += old[route.group, service].rate_rps / (planned or 1.0)
    total = sum(weights.values())
    return tuple(
        Route.model_construct(group=group, weight=weight / total) for group, weight in weights.items() if weight > 0
    )
