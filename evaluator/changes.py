"""What may change while a plan runs, and when each step of a transition happens (docs/evaluator.md, section 10)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from plans.cluster import Cluster
from plans.errors import Fault, InvalidInput
from plans.plan import Plan, TransitionStep
from plans.transition import transition, waves_of

__all__ = [
    "Change",
    "Failure",
    "PlanChange",
    "Recovery",
    "Schedule",
    "Span",
    "WaveSpans",
    "check_changes",
    "check_failure",
    "check_places",
    "random_failures",
    "schedule",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanChange:
    """From ``at_s`` on it is known that ``plan`` shall run; the transition to it starts then."""

    at_s: float
    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """At ``at_s`` device ``gpu`` of ``node`` fails; the whole node where ``gpu`` is None."""

    at_s: float
    node: str
    gpu: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """At ``at_s`` device ``gpu`` of ``node`` is well again; the whole node where ``gpu`` is None."""

    at_s: float
    node: str
    gpu: int | None = None


Change = PlanChange | Failure | Recovery


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One load or drain: of ``service`` on ``group``, from ``start_s`` to ``end_s``."""

    group: str
    service: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveSpans:
    """One wave of a transition: what leaves at its start, and what is then loaded; ``end_s`` is when all is done."""

    drains: tuple[Span, ...]
    loads: tuple[Span, ...]
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When a transition does what.

    Attributes:
        early_loads: Loads beside what runs.
        flip_s: Routes flip to what is loaded.
        waves: What follows; routes flip at the end of each that loads something.
        old_weights: Routing weight of each replica that leaves, by (group, service), from the first flip until it does.
    """

    early_loads: tuple[Span, ...]
    flip_s: float
    waves: tuple[WaveSpans, ...]
    old_weights: Mapping[tuple[str, str], float]

    @property
    def end_s(self) -> float:
        """When the transition is over."""
        return self.waves[-1].end_s if self.waves else self.flip_s


def schedule(running: Plan, target: Plan, cluster: Cluster, *, start_s: float) -> Schedule:
    """Return when the steps of the transition from ``running`` to ``target`` happen if it starts at ``start_s``.

    A node does its loads one after the other in the order of the steps, nodes work side by side. Drains take their
    estimate, from the flip on; the loads of a wave start when the last of its drains is over. What still leaves has its
    planned rate as weight, in units of what the target plans for the service.
    """
    first, *rest = waves_of(transition(running, target, cluster).steps)
    early = _loads(first.loads, target, start_s)
    flip_s = now_s = max((span.end_s for span in early), default=start_s)
    waves = []
    for wave in rest:
        drains = tuple(
            Span(group=step.group, service=step.service, start_s=now_s, end_s=now_s + step.est_s)
            for step in wave.drains
        )
        now_s = max((span.end_s for span in drains), default=now_s)
        loads = _loads(wave.loads, target, now_s)
        now_s = max((span.end_s for span in loads), default=now_s)
        waves.append(WaveSpans(drains=drains, loads=loads, end_s=now_s))
    planned: dict[str, float] = defaultdict(float)
    for group in target.groups:
        for entry in group.loadout:
            planned[entry.service] += entry.rate_rps
    return Schedule(
        early_loads=early,
        flip_s=flip_s,
        waves=tuple(waves),
        old_weights={
            (step.group, step.service): step.rate_rps / (planned[step.service] or 1.0)
            for wave in rest
            for step in wave.drains
        },
    )


def random_failures(
    cluster: Cluster, *, mtbf_s: float, mttr_s: float, until_s: float, seed: int
) -> tuple[Failure | Recovery, ...]:
    """Return failures and recoveries of whole nodes before ``until_s``, by time.

    Every node alternates between being well for an exponential time of mean ``mtbf_s`` and being down for one of mean
    ``mttr_s``, drawn node by node.

    Raises:
        InvalidInput: A mean is not positive and finite, or ``until_s`` is negative or infinite.
    """
    faults = [
        Fault(where="random failures", field=field, found=str(value), expected="more than 0 seconds and finite")
        for field, value in (("mtbf_s", mtbf_s), ("mttr_s", mttr_s))
        if not 0 < value < math.inf
    ]
    if not 0 <= until_s < math.inf:
        faults.append(Fault(where="random failures", field="until_s", found=str(until_s), expected="a finite time"))
    if faults:
        raise InvalidInput(faults)
    rng = np.random.default_rng(seed)
    events: list[Failure | Recovery] = []
    for node in cluster.nodes:
        now_s = rng.exponential(mtbf_s)
        kinds: tuple[type[Failure], type[Recovery]] = (Failure, Recovery)
        count = 0
        while now_s < until_s:
            events.append(kinds[count % 2](at_s=now_s, node=node.name))
            count += 1
            now_s += rng.exponential(mttr_s if count % 2 else mtbf_s)
    return tuple(sorted(events, key=lambda event: event.at_s))


def check_changes(changes: Sequence[Change], cluster: Cluster | None) -> None:
    """Check times, and that what fails or recovers exists.

    Raises:
        InvalidInput: With every fault; among them a new plan without a cluster, whose memory decides what is loaded
            beside what runs.
    """
    faults = [
        Fault(where="changes", field=f"[{position}].at_s", found=str(change.at_s), expected="a finite time from 0 on")
        for position, change in enumerate(changes)
        if not 0 <= change.at_s < math.inf
    ]
    for position, change in enumerate(changes):
        if isinstance(change, PlanChange):
            faults.extend(_plan_faults(change.plan, cluster, f"[{position}].plan"))
        elif cluster is not None:
            faults.extend(_place_faults(change, cluster, "changes", f"[{position}]."))
    if faults:
        raise InvalidInput(faults)


def check_failure(failure: Failure, cluster: Cluster, where: str) -> None:
    """Check that what fails is in ``cluster``; ``where`` names the failure in errors.

    Raises:
        InvalidInput: It is not.
    """
    if faults := list(_place_faults(failure, cluster, where)):
        raise InvalidInput(faults)


def _plan_faults(plan: Plan, cluster: Cluster | None, field: str) -> Iterable[Fault]:
    if cluster is None:
        yield Fault(where="changes", field=field, found="no cluster", expected="the cluster that the plans run on")
        return
    yield from _places_of(plan, cluster, "changes", field)


def check_places(plan: Plan, cluster: Cluster | None, where: str) -> None:
    """Check that the GPUs of ``plan`` are in ``cluster``, where there is one; ``where`` names the plan in errors.

    Raises:
        InvalidInput: With every group that is not.
    """
    if cluster is not None and (faults := list(_places_of(plan, cluster, where, "groups"))):
        raise InvalidInput(faults)


def _places_of(plan: Plan, cluster: Cluster, where: str, field: str) -> Iterable[Fault]:
    counts = {node.name: node.gpus.count for node in cluster.nodes}
    for name in sorted({group.node for group in plan.groups} - counts.keys()):
        yield Fault(where=where, field=field, found=repr(name), expected=f"one of {', '.join(sorted(counts))}")
    for group in plan.groups:
        count = counts.get(group.node)
        if count is not None and max(group.gpus) >= count:
            expected = f"devices of {group.node}: 0 to {count - 1}"
            yield Fault(where=where, field=field, found=repr(group.id), expected=expected)


def _place_faults(change: Failure | Recovery, cluster: Cluster, where: str, prefix: str = "") -> Iterable[Fault]:
    counts = {node.name: node.gpus.count for node in cluster.nodes}
    if change.node not in counts:
        expected = f"a node of the cluster: {', '.join(sorted(counts))}"
        yield Fault(where=where, field=f"{prefix}node", found=repr(change.node), expected=expected)
    elif change.gpu is not None and not 0 <= change.gpu < counts[change.node]:
        expected = f"a device of {change.node}: 0 to {counts[change.node] - 1}"
        yield Fault(where=where, field=f"{prefix}gpu", found=str(change.gpu), expected=expected)


def _loads(steps: Sequence[TransitionStep], target: Plan, start_s: float) -> tuple[Span, ...]:
    free_s: dict[str, float] = defaultdict(lambda: start_s)
    spans = []
    for step in steps:
        node = target.group(step.group).node
        end_s = free_s[node] + step.est_s
        spans.append(Span(group=step.group, service=step.service, start_s=free_s[node], end_s=end_s))
        free_s[node] = end_s
    return tuple(spans)
