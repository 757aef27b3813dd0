"""The way from the running plan to the next: make before break, never beyond the memory of any GPU.

What fits beside the running replicas is loaded first; then routes flip. What has to wait for memory comes in waves:
some replicas leave, what fits in their place is loaded, routes flip to it, and the next wave starts (`plans.waves`).
Last leaves what is needed no more. Services that fall meanwhile are named, with how far and for how long.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from plans.cluster import Cluster
from plans.diff import diff
from plans.plan import LoadoutEntry, Plan, TransitionStep
from plans.units import format_seconds
from plans.waves import Gpu, Interval, Move, Moves, intervals, order

__all__ = ["Fall", "StepWave", "Transition", "transition", "waves_of"]

_TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Fall:
    """A service whose planned rate falls below both plans' on the way: to what, and for about how long.

    Attributes:
        service: Its name.
        before_rps: Rate that the running plan plans for it.
        lowest_rps: The least on the way; replicas of both plans that share a GPU on the way slow each other.
        after_rps: Rate that the target plans for it.
        for_s: Estimated seconds for which it is below both plans' rates.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWave:
    """The drains and loads of one wave; the first has no drains. Routes flip after the loads of each."""

    drains: tuple[TransitionStep, ...] = ()
    loads: tuple[TransitionStep, ...] = ()


def transition(running: Plan | None, target: Plan, cluster: Cluster) -> Transition:
    """Return the steps that lead from ``running`` (None: empty nodes) to ``target``.

    Estimated time: the profile's load time for a load, the service's deadline (the longest a request may still be in
    flight) for a drain.
    """
    running = running or Plan(solver=target.solver)
    moves = _moves(running, target, cluster)
    waves = order(moves)
    steps = _Steps()
    routed: set[str] = {route.service for route in diff(running, target).routes}
    for number, wave in enumerate(waves):
        steps.leave(wave.leaves)
        steps.load(wave.loads)
        if number:
            routed = {load.service for load in wave.loads}
        following = waves[number + 1 :][:1]
        leaving = [move for each in following for move in each.leaves]
        if not routed and not leaving:  # what stays makes room by itself: the wave begins here all the same
            routed = {load.service for each in following for load in each.loads}
        steps.route(routed | {move.service for move in leaving if number})
    found = intervals(moves, waves)
    falls = _falls(running, target, moves.base_rps, found)
    return Transition(steps=tuple(steps.made), warnings=tuple(_gaps(target, found, falls)), falls=falls)


def waves_of(steps: Sequence[TransitionStep]) -> tuple[StepWave, ...]:
    """Return the waves that ``steps`` of a plan consist of; the first, before anything leaves, is always there.

    A wave begins with the first drain or load after a flip of routes, and with the first drain after a load. Plans of
    older versions have one or two.
    """
    waves: list[tuple[list[TransitionStep], list[TransitionStep]]] = [([], [])]
    last = "load"
    for step in steps:
        leaves = step.action in ("drain", "unload")
        if (leaves and last in ("load", "route")) or (step.action == "load" and last == "route"):
            waves.append(([], []))
        if step.action == "drain":
            waves[-1][0].append(step)
        elif step.action == "load":
            waves[-1][1].append(step)
        last = step.action
    return tuple(StepWave(drains=tuple(drains), loads=tuple(loads)) for drains, loads in waves)


@dataclass(slots=True)
class _Steps:
    """Steps, numbered as they are added."""

    made: list[TransitionStep] = field(default_factory=list)

    def leave(self, moves: Iterable[Move]) -> None:
        """Drain and unload each."""
        for move in moves:
            change = move.change
            assert change is not None
            assert change.before is not None
            self._add("drain", change.group, move.service, est_s=change.before.deadline_s, rate_rps=move.rate_rps)
            self._add("unload", change.group, move.service)

    def load(self, moves: Iterable[Move]) -> None:
        """Load each."""
        for move in moves:
            entry = _entry(move)
            group = move.change.group if move.change else ""
            moved = {"moved_bytes": entry.weight_bytes, "est_s": entry.load_s, "rate_rps": entry.rate_rps}
            self._add("load", group, move.service, **moved)

    def route(self, services: Iterable[str]) -> None:
        """Flip the routes of each."""
        for service in sorted(services):
            self._add("route", "", service)

    def _add(self, action: str, group: str, service: str, **more: float) -> None:
        step = {"step": len(self.made) + 1, "action": action, "group": group, "service": service}
        self.made.append(TransitionStep.model_validate(step | more))


def _moves(running: Plan, target: Plan, cluster: Cluster) -> Moves:
    before = {group.id: group for group in running.groups}
    after = {group.id: group for group in target.groups}
    changes = diff(running, target).entries
    loads = tuple(Move.of(after[c.group], c.after, c) for c in changes if c.reloads and c.after is not None)
    leaves = tuple(
        Move.of(before[c.group], c.before, c)
        for c in changes
        if c.before is not None and (c.after is None or c.reloads)
    )
    coming = {id(load.change.after) for load in loads if load.change}
    stays = tuple(Move.of(g, entry) for g in target.groups for entry in g.loadout if id(entry) not in coming)
    free: dict[Gpu, int] = defaultdict(int)
    for node in cluster.nodes:
        for gpu in range(node.gpus.count):
            free[node.name, gpu] = cluster.gpu_types[node.gpus.type].memory_bytes
    for group in running.groups:
        for entry in group.loadout:
            for gpu, size in zip(group.gpus, entry.memory_bytes, strict=True):
                free[group.node, gpu] -= size
    shrinks: dict[Gpu, int] = defaultdict(int)
    for change in changes:
        if change.before is not None and change.after is not None and not change.reloads:
            group = after[change.group]
            for gpu, was, becomes in zip(
                group.gpus, change.before.memory_bytes, change.after.memory_bytes, strict=True
            ):
                free[group.node, gpu] -= max(0, becomes - was)
                shrinks[group.node, gpu] += max(0, was - becomes)
    rates = [_rates(running), _rates(target)]
    base = {service: min(rate, rates[1].get(service, 0.0)) for service, rate in rates[0].items()}
    return Moves(
        stays=stays,
        loads=loads,
        leaves=leaves,
        free_bytes=free,
        shrinks_bytes=shrinks,
        base_rps={service: rate for service, rate in base.items() if rate > 0},
        most_busy=_most_busy(running, target),
    )


def _most_busy(*plans: Plan) -> dict[Gpu, float]:
    most: dict[Gpu, float] = {}
    for plan in plans:
        for group in plan.groups:
            busy = sum(Move.of(group, entry).busy for entry in group.loadout)
            for gpu in group.gpus:
                most[group.node, gpu] = max(most.get((group.node, gpu), 1.0), busy)
    return most


def _rates(plan: Plan) -> dict[str, float]:
    """Return the rate that a plan plans per service."""
    rates: dict[str, float] = defaultdict(float)
    for group in plan.groups:
        for entry in group.loadout:
            rates[entry.service] += entry.rate_rps
    return rates


def _falls(running: Plan, target: Plan, base_rps: Mapping[str, float], found: Sequence[Interval]) -> tuple[Fall, ...]:
    """Return the services that plan less between flips than before and after."""
    before, after = _rates(running), _rates(target)
    falls = []
    for service, base in sorted(base_rps.items()):
        rates = [(interval.rates_rps.get(service, 0.0), interval.for_s) for interval in found]
        fallen = [(rate, for_s) for rate, for_s in rates if rate < base * (1 - _TOLERANCE)]
        if fallen:
            falls.append(
                Fall(
                    service=service,
                    before_rps=before[service],
                    lowest_rps=min(rate for rate, _ in fallen),
                    after_rps=after[service],
                    for_s=sum(for_s for _, for_s in fallen),
                )
            )
    return tuple(falls)


def _gaps(target: Plan, found: Sequence[Interval], falls: Sequence[Fall]) -> Iterable[str]:
    """Say for each service how much of its planned rate waits for memory, how long, and what it falls to."""
    fall_of = {fall.service: fall for fall in falls}
    waiting: dict[str, list[LoadoutEntry]] = defaultdict(list)
    until_s: dict[str, float] = {}
    now_s = 0.0
    for interval in found:
        now_s += interval.for_s
        for load in interval.wave.loads:
            waiting[load.service].append(_entry(load))
            until_s[load.service] = now_s
    planned = _rates(target)
    for service in sorted(waiting.keys() | fall_of.keys()):
        fall = fall_of.get(service)
        said = []
        if service in waiting:
            rate = sum(entry.rate_rps for entry in waiting[service])
            share = rate / planned[service] if planned[service] > 0 else 1.0
            said.append(
                f"{share:.0%} of its planned rate has no room beside what runs; it is loaded as old replicas go, "
                f"complete about {format_seconds(until_s[service])} after the first flip of routes"
            )
        if fall is not None:
            said.append(
                f"its rate falls from {fall.before_rps:.4g} to {fall.lowest_rps:.4g} rps "
                f"for about {format_seconds(fall.for_s)}"
            )
        yield f"{service}: {', and '.join(said)}"


def _entry(move: Move) -> LoadoutEntry:
    assert move.change is not None
    assert move.change.after is not None
    return move.change.after
