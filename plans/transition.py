"""The way from the running plan to the next: make before break, never beyond the memory of any GPU.

What fits beside the running replicas is loaded first; then routes flip; then what left is drained and unloaded; last,
what had to wait for memory is loaded and routed. Services that wait are without those replicas meanwhile, and a warning
says for how long.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from plans.cluster import Cluster
from plans.diff import EntryChange, diff
from plans.plan import Group, LoadoutEntry, Plan, TransitionStep
from plans.units import format_seconds

__all__ = ["Fall", "Transition", "transition"]

_Usage = dict[tuple[str, int], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fall:
    """A service whose planned rate falls below both plans' on the way: to what, and for about how long.

    Attributes:
        service: Its name.
        before_rps: Rate that the running plan plans for it.
        lowest_rps: Rate that the target plans for its replicas that need not wait for memory.
        after_rps: Rate that the target plans for it.
        for_s: Estimated seconds from the first flip of routes to the last.
    """

    service: str
    before_rps: float
    lowest_rps: float
    after_rps: float
    for_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """Ordered steps, and what they cost: services not among ``falls`` never plan less than both plans do."""

    steps: tuple[TransitionStep, ...]
    warnings: tuple[str, ...]
    falls: tuple[Fall, ...] = ()


def transition(running: Plan | None, target: Plan, cluster: Cluster) -> Transition:
    """Return the steps that lead from ``running`` (None: empty nodes) to ``target``.

    A load is put first when, with everything that runs still in place, every GPU of its group holds it within the
    memory of its type; bigger loads are tried first. Estimated time: the profile's load time for a load, the
    service's deadline (the longest a request may still be in flight) for a drain.
    """
    empty = Plan(solver=target.solver)
    change = diff(running or empty, target)
    before = {group.id: group for group in (running or empty).groups}
    after = {group.id: group for group in target.groups}
    used = _usage(before)
    memory = {node.name: cluster.gpu_types[node.gpus.type].memory_bytes for node in cluster.nodes}
    early: list[EntryChange] = []
    late: list[EntryChange] = []
    loads = [entry for entry in change.entries if entry.reloads]
    for load in sorted(loads, key=lambda load: (-_entry(load).weight_bytes, load.group, load.service)):
        needed = _memory(after[load.group], _entry(load))
        if all(used[gpu] + size <= memory[gpu[0]] for gpu, size in needed.items()):
            for gpu, size in needed.items():
                used[gpu] += size
            early.append(load)
        else:
            late.append(load)
    leaving = [entry for entry in change.entries if entry.before is not None and (entry.after is None or entry.reloads)]

    steps: list[TransitionStep] = []

    def add(action: str, group: str, service: str, *, moved_bytes: int = 0, est_s: float = 0.0) -> None:
        step = {"step": len(steps) + 1, "action": action, "group": group, "service": service}
        steps.append(TransitionStep.model_validate(step | {"moved_bytes": moved_bytes, "est_s": est_s}))

    for load in early:
        add("load", load.group, load.service, moved_bytes=_entry(load).weight_bytes, est_s=_entry(load).load_s)
    for route in change.routes:
        add("route", "", route.service)
    for leave in leaving:
        assert leave.before is not None
        add("drain", leave.group, leave.service, est_s=leave.before.deadline_s)
        add("unload", leave.group, leave.service)
    for load in late:
        add("load", load.group, load.service, moved_bytes=_entry(load).weight_bytes, est_s=_entry(load).load_s)
    for service in sorted({load.service for load in late}):
        add("route", "", service)
    missing_s = _missing_s(late, leaving, after)
    falls = _falls(running or empty, target, late, missing_s)
    return Transition(steps=tuple(steps), warnings=_gaps(late, target, missing_s, falls), falls=falls)


def _missing_s(late: list[EntryChange], leaving: list[EntryChange], after: Mapping[str, Group]) -> float:
    """Return the seconds between the two flips of routes: the longest drain, then each node's late loads in a row."""
    if not late:
        return 0.0
    on_node: dict[str, float] = defaultdict(float)
    for load in late:
        on_node[after[load.group].node] += _entry(load).load_s
    return max((leave.before.deadline_s for leave in leaving if leave.before), default=0.0) + max(on_node.values())


def _rates(plan: Plan) -> dict[str, float]:
    """Return the rate that a plan plans per service."""
    rates: dict[str, float] = defaultdict(float)
    for group in plan.groups:
        for entry in group.loadout:
            rates[entry.service] += entry.rate_rps
    return rates


def _falls(running: Plan, target: Plan, late: list[EntryChange], missing_s: float) -> tuple[Fall, ...]:
    """Return the services that plan less between the flips than before and after."""
    before, after = _rates(running), _rates(target)
    waiting: dict[str, float] = defaultdict(float)
    for load in late:
        waiting[load.service] += _entry(load).rate_rps
    return tuple(
        Fall(
            service=service,
            before_rps=before.get(service, 0.0),
            lowest_rps=max(0.0, after[service] - rate),
            after_rps=after[service],
            for_s=missing_s,
        )
        for service, rate in sorted(waiting.items())
        if after[service] - rate < min(before.get(service, 0.0), after[service]) * (1 - 1e-9)
    )


def _gaps(late: list[EntryChange], target: Plan, missing_s: float, falls: tuple[Fall, ...]) -> tuple[str, ...]:
    """Say for each service how much of its planned rate waits for memory, how long, and what it falls to."""
    fall_of = {fall.service: fall for fall in falls}
    waiting: dict[str, list[LoadoutEntry]] = defaultdict(list)
    for load in late:
        waiting[load.service].append(_entry(load))
    warnings = []
    planned = _rates(target)
    for service, entries in sorted(waiting.items()):
        fall = fall_of.get(service)
        fell = "" if fall is None else f", and its rate falls from {fall.before_rps:.4g} to {fall.lowest_rps:.4g} rps"
        share = sum(entry.rate_rps for entry in entries) / planned[service] if planned[service] > 0 else 1.0
        warnings.append(
            f"{service}: {share:.0%} of its planned rate has no room beside what runs; it is loaded after the old "
            f"replicas are gone, so that share is missing for about {format_seconds(missing_s)}{fell}"
        )
    return tuple(warnings)


def _entry(change: EntryChange) -> LoadoutEntry:
    assert change.after is not None
    return change.after


def _memory(group: Group, entry: LoadoutEntry) -> Mapping[tuple[str, int], int]:
    return {(group.node, gpu): size for gpu, size in zip(group.gpus, entry.memory_bytes, strict=True)}


def _usage(groups: Mapping[str, Group]) -> _Usage:
    used: _Usage = defaultdict(int)
    for group in groups.values():
        for entry in group.loadout:
            for gpu, size in _memory(group, entry).items():
                used[gpu] += size
    return used
