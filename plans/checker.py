"""An independent check of a plan, from its documents alone.

Shares no code with the planner: it reads the plan, the cluster, the services and the raw profile figures, and states
every promise that the plan breaks. An empty answer is a certificate of feasibility; optimality is the bound's business.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Protocol

from plans.cluster import Cluster
from plans.errors import Fault
from plans.plan import Group, LoadoutEntry, Plan
from plans.service import Service, Services
from plans.units import format_bytes, format_seconds

__all__ = ["ProfileFigures", "check_plan"]

_RELATIVE = 1e-6


class ProfileFigures(Protocol):
    """What the checker asks of profiles; owned here because profiles are a layer above."""

    def memory_bytes(
        self, service: str, model: str, gpu_type: str, tp: int, pp: int, batch: int
    ) -> Sequence[int] | None:
        """Return peak bytes per GPU of each pipeline stage at ``batch``, or None without a profile.

        The service tells how many tokens its requests have, where that matters.
        """
        ...

    def latency_s(self, service: str, model: str, gpu_type: str, tp: int, pp: int, batch: int) -> float | None:
        """Return the mean latency of a batch from start to end, or None without a profile."""
        ...


def check_plan(plan: Plan, cluster: Cluster, services: Services, figures: ProfileFigures) -> tuple[Fault, ...]:
    """Return every broken promise: unknown names, memory, latency, capacity, budgets, pins, routes, predictions.

    Memory is checked against each GPU's full memory, summed over everything that shares it, and each entry's stated
    memory against the profile's; a device may not be asked for more than its whole time (rate / batch * bottleneck
    stage, summed over the group, at most 1).
    """
    known = {service.name: service for service in services.services}
    nodes = {node.name: node for node in cluster.nodes}
    faults: list[Fault] = []
    for position, group in enumerate(plan.groups):
        where = f"groups[{position}] ({group.id})"
        node = nodes.get(group.node)
        if node is None:
            faults.append(_fault(where, group.node, "a node of the cluster", "this plan is for another cluster"))
            continue
        if max(group.gpus) >= node.gpus.count:
            limit = f"GPUs 0 to {node.gpus.count - 1} of {node.name}"
            faults.append(_fault(where, list(group.gpus), limit, "this plan is for another cluster"))
            continue
        for entry in group.loadout:
            service = known.get(entry.service)
            if service is None:
                faults.append(_fault(where, entry.service, "a service of services.yaml"))
            else:
                faults.extend(_check_entry(where, group, entry, service, node.gpus.type, figures))
        faults.extend(_check_compute(where, group))
    faults.extend(_check_memory(plan, cluster))
    faults.extend(_check_services(plan, services))
    return tuple(faults)


def _fault(field: str, found: object, expected: str, remedy: str = "") -> Fault:
    return Fault(where="plan", field=field, found=str(found), expected=expected, remedy=remedy)


def _check_entry(
    where: str, group: Group, entry: LoadoutEntry, service: Service, gpu_type: str, figures: ProfileFigures
) -> Iterator[Fault]:
    field = f"{where}.{entry.service}"
    accuracies = {variant.model: variant.accuracy for variant in service.variants}
    if entry.variant not in accuracies:
        yield _fault(field, entry.variant, f"one of the service's variants: {', '.join(accuracies)}")
        return
    if accuracies[entry.variant] < service.min_accuracy:
        yield _fault(field, f"accuracy {accuracies[entry.variant]}", f"at least min_accuracy {service.min_accuracy}")
    if not service.allows(group.node, group.gpus):
        yield _fault(field, group.id, "devices that pin and forbid allow")
    memory = figures.memory_bytes(service.name, entry.variant, gpu_type, group.tp, group.pp, entry.max_batch)
    latency_s = figures.latency_s(service.name, entry.variant, gpu_type, group.tp, group.pp, entry.max_batch)
    if memory is None or latency_s is None:
        shape = f"tp {group.tp}, pp {group.pp}"
        yield _fault(field, "none", f"a profile of {entry.variant} on {gpu_type} with {shape}")
        return
    per_gpu = [size for size in memory for _ in range(group.tp)]
    for gpu, stated, profiled in zip(group.gpus, entry.memory_bytes, per_gpu, strict=True):
        if stated < profiled * (1 - _RELATIVE):
            yield _fault(field, format_bytes(stated), f"at least the profiled {format_bytes(profiled)} on GPU {gpu}")
    stated_s = sum(entry.stage_latency_s[entry.max_batch - 1])
    if abs(stated_s - latency_s) > _RELATIVE * latency_s:
        yield _fault(field, format_seconds(stated_s), f"the profiled latency {format_seconds(latency_s)}")
    deadline_s = entry.deadline_s
    if stated_s > deadline_s * (1 + _RELATIVE):
        limit = f"a batch of {entry.max_batch} within the deadline {format_seconds(deadline_s)}"
        yield _fault(field, format_seconds(stated_s), limit)
    totals = [sum(row) for row in entry.stage_latency_s]
    if any(later < earlier * (1 - _RELATIVE) for earlier, later in itertools.pairwise(totals)):
        yield _fault(field, "a latency that falls with batch", "latencies that do not fall with batch")


def _check_compute(where: str, group: Group) -> Iterator[Fault]:
    busy = sum(entry.rate_rps / entry.max_batch * max(entry.stage_latency_s[-1]) for entry in group.loadout)
    if busy > 1 + 1e-6:
        yield _fault(where, f"{busy:.4f} of the group's time", "at most 1")


def _check_memory(plan: Plan, cluster: Cluster) -> Iterator[Fault]:
    nodes = {node.name: node for node in cluster.nodes}
    used: dict[tuple[str, int], int] = defaultdict(int)
    for group in plan.groups:
        for entry in group.loadout:
            for gpu, size in zip(group.gpus, entry.memory_bytes, strict=True):
                used[group.node, gpu] += size
    for (name, gpu), size in sorted(used.items()):
        if name in nodes:
            limit = cluster.gpu_types[nodes[name].gpus.type].memory_bytes
            if size > limit:
                yield _fault(f"{name}/{gpu}", format_bytes(size), f"at most {format_bytes(limit)} of GPU memory")


def _check_services(plan: Plan, services: Services) -> Iterator[Fault]:
    predicted = {prediction.service: prediction for prediction in plan.predicted}
    for service in services.services:
        hosts = [(group, entry) for group in plan.groups if (entry := group.entry(service.name)) is not None]
        gpus = sum(len(group.gpus) for group, _ in hosts)
        if len(hosts) < service.min_replicas:
            yield _fault(service.name, f"{len(hosts)} replicas", f"at least min_replicas {service.min_replicas}")
        if service.max_gpus is not None and gpus > service.max_gpus:
            yield _fault(service.name, f"{gpus} GPUs", f"at most max_gpus {service.max_gpus}")
        rate = sum(entry.rate_rps for _, entry in hosts)
        routes = {route.group: route.weight for route in plan.routes.get(service.name, ())}
        for group, entry in hosts:
            share = entry.rate_rps / rate if rate > 0 else None
            if share is not None and abs(routes.get(group.id, 0.0) - share) > 1e-4:
                yield _fault(f"routes.{service.name}", routes.get(group.id, 0.0), f"weight {share:.4f} to {group.id}")
        if (promise := predicted.get(service.name)) is not None:
            limit = promise.offered_rps if hosts else 0.0
            if promise.goodput_rps > limit * (1 + _RELATIVE) + 1e-9:
                found, expected = f"{promise.goodput_rps:.6g} rps", f"at most the {limit:.6g} rps that can be served"
                yield _fault(f"predicted.{service.name}", found, expected)
    names = {service.name for service in services.services}
    for name in sorted((plan.routes.keys() | predicted.keys()) - names):
        yield _fault(name, name, "a service of services.yaml")
