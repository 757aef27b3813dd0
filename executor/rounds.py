"""The stops on the way from one plan to another: what nodes run, and gateways route to, after each wave of it.

A stop is a plan in which replicas of both stand beside each other, also on groups that share devices. Nodes are brought
from stop to stop as from plan to plan. Each carries the digest of the plan that it leads to: an apply that is cut short
at one is taken up by running it again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from plans.cluster import Cluster
from plans.plan import Group, LoadoutEntry, Plan, Route, TransitionStep
from plans.transition import transition, waves_of

__all__ = ["stops"]

_Place = tuple[str, str]
"""A group and a service."""


class _Stop(Plan):
    """A plan on the way, never validated as one: groups may share devices."""

    leads_to: str

    @property
    def placement_digest(self) -> str:
        """Digest of the plan that it leads to."""
        return self.leads_to


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
    found: list[Plan] = []
    for wave in rest:
        for step in wave.drains:
            del old[_place(step)]
        late -= {_place(step) for step in wave.loads}
        if not old and not late:
            break
        found.append(_stop(running, target, old, late))
    return (*found, target)


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
    fields = {name: getattr(target, name) for name in Plan.model_fields}
    routes = {
        service: _routes(service, running, target, old, late) for service in target.routes.keys() | running.routes
    }
    routes = {service: routes[service] for service in sorted(routes) if routes[service]}
    return _Stop.model_construct(**fields | {"groups": groups, "routes": routes, "leads_to": target.placement_digest})


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
