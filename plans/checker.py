"""An independent check of a plan, from its documents alone.

Shares no code with the planner: it reads the plan, the cluster, the services and the raw profile figures, and states
every promise that the plan breaks. An empty answer says that the plan can be carried out and is worth what it says;
whether anything could be better is the bound's business.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Protocol

from plans.certificate import check_certificate
from plans.cluster import Cluster
from plans.demand import Demand
from plans.errors import Fault
from plans.plan import Group, LoadoutEntry, Plan
from plans.service import Edge, FrequencyService, GenerationService, Service, Services, Spread, Workflow
from plans.units import format_bytes, format_seconds
from plans.workflow_changes import compare_workflows

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


def check_plan(
    plan: Plan, cluster: Cluster, services: Services, figures: ProfileFigures, demand: Demand | None = None
) -> tuple[Fault, ...]:
    """Return every broken promise: unknown names, memory, latency, capacity, budgets, pins, routes, predictions.

    Also spreading, end-to-end deadlines, the wait for multi-frame batches, affinity that is required, and, with the
    ``demand``, the rates of services that only workflows call; and that the workflows that the plan hands to agents are
    those of ``services``. What the plan's own settings promise is checked too: a required attainment, and what the loss
    of any one node leaves; and its certificate (`plans.certificate`).

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
    if not faults:
        faults.extend(_check_spread(plan, cluster, services))
        faults.extend(_check_workflows(plan, cluster, services, demand))
        faults.extend(_check_attainment(plan))
        faults.extend(_check_losses(plan, cluster))
        faults.extend(check_certificate(plan, cluster, services))
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
    frames_s = (entry.multi_frame - 1) / service.slo.fps if isinstance(service, FrequencyService) else 0.0
    if stated_s + frames_s > deadline_s * (1 + _RELATIVE):
        limit = f"a batch of {entry.max_batch} within the deadline {format_seconds(deadline_s)}"
        waiting = f", {format_seconds(frames_s)} of it waiting for {entry.multi_frame} frames" if frames_s else ""
        yield _fault(field, format_seconds(stated_s + frames_s) + waiting, limit)
    # The deadline of an answer depends on its tokens, which the services document does not state.
    if not isinstance(service, GenerationService) and deadline_s > service.deadline_s() * (1 + _RELATIVE):
        yield _fault(field, format_seconds(deadline_s), f"at most the service's {format_seconds(service.deadline_s())}")
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
    running: dict[str, list[tuple[Group, LoadoutEntry]]] = defaultdict(list)
    for group in plan.groups:
        for entry in group.loadout:
            running[entry.service].append((group, entry))
    for service in services.services:
        hosts = running[service.name]
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


def _check_spread(plan: Plan, cluster: Cluster, services: Services) -> Iterator[Fault]:
    """Domains without a replica count as long as pins, forbids and the GPU types that it runs on leave it a device."""
    for service in services.services:
        if service.spread is None:
            continue
        hosts = [group for group in plan.groups if group.entry(service.name) is not None]
        types = {cluster.node(group.node).gpus.type for group in hosts}
        counts: dict[str, int] = {}
        for node in cluster.nodes:
            able = any(service.allows(node.name, (gpu,)) for gpu in range(node.gpus.count))
            if able and node.gpus.type in types:
                counts[_domain(service.spread, cluster, node.name)] = 0
        for group in hosts:
            counts[_domain(service.spread, cluster, group.node)] += 1
        used = sum(number > 0 for number in counts.values())
        if used < service.spread.min_domains:
            found = f"replicas in {used} {service.spread.over}s"
            yield _fault(f"{service.name}.spread", found, f"at least min_domains {service.spread.min_domains}")
        # How many fit a group of several GPUs decides which domains count; the checker holds used ones to the skew.
        skew = max(counts.values(), default=0) - min((n for n in counts.values() if n or _single(hosts)), default=0)
        if skew > service.spread.max_skew:
            stated = ", ".join(f"{number} in {domain or 'no zone'}" for domain, number in sorted(counts.items()))
            yield _fault(f"{service.name}.spread", stated, f"a difference of at most {service.spread.max_skew}")


def _single(hosts: Sequence[Group]) -> bool:
    return all(len(group.gpus) == 1 for group in hosts)


def _domain(spread: Spread, cluster: Cluster, node: str) -> str:
    return node if spread.over == "node" else cluster.node(node).zone


def _check_workflows(plan: Plan, cluster: Cluster, services: Services, demand: Demand | None) -> Iterator[Fault]:
    rates: dict[str, float] = defaultdict(float)
    for group in plan.groups:
        for entry in group.loadout:
            rates[entry.service] += entry.rate_rps
    if services.workflows and not plan.workflows:
        wanted = f"{', '.join(workflow.name for workflow in services.workflows)}, as in services.yaml"
        remedy = "nodes could not run them by this plan: make it again with `foreplan plan`"
        yield _fault("workflows", "none", wanted, remedy)
    else:
        for change in compare_workflows(services.workflows, plan.workflows):
            expected = f"{change.before}, as in services.yaml"
            yield _fault(change.subject, change.after, expected, "make the plan again with `foreplan plan`")
    called: dict[str, float] = defaultdict(float)
    for workflow in services.workflows:
        yield from _check_deadlines(plan, cluster, workflow)
        for edge in workflow.edges:
            called[edge.target] += edge.fanout * rates[edge.source]
            if workflow.affinity == "require":
                yield from _check_together(plan, edge, f"workflow {workflow.name}")
    for name, rate in called.items():
        if demand is not None and demand.of(name) is None and abs(rates[name] - rate) > 1e-4 * max(1.0, rate):
            expected = f"the {rate:.6g} rps that its callers' rates lead to"
            yield _fault(f"{name}.rate_rps", f"{rates[name]:.6g} rps", expected)


def _check_deadlines(plan: Plan, cluster: Cluster, workflow: Workflow) -> Iterator[Fault]:
    """The longest deadlines along any path, with a transfer for each edge, stay within the end-to-end deadline."""
    parts_s: dict[str, float] = defaultdict(float)
    for group in plan.groups:
        for entry in group.loadout:
            parts_s[entry.service] = max(parts_s[entry.service], entry.deadline_s)
    finished_s: dict[str, float] = {}

    def finish_s(name: str) -> float:
        if name not in finished_s:
            network = cluster.network
            arrivals = [
                finish_s(edge.source) + network.latency_s + edge.payload_bytes / network.bandwidth
                for edge in workflow.edges
                if edge.target == name
            ]
            finished_s[name] = max(arrivals, default=0.0) + parts_s[name]
        return finished_s[name]

    stages = {name for edge in workflow.edges for name in (edge.source, edge.target)}
    if not all(parts_s[name] for name in stages):
        return  # a stage that runs nowhere is unserved, which the plan says
    longest_s = max(finish_s(name) for name in stages)
    if longest_s > workflow.slo.deadline_s * (1 + _RELATIVE):
        limit = f"the end-to-end deadline {format_seconds(workflow.slo.deadline_s)}"
        yield _fault(f"workflow {workflow.name}", f"parts that sum to {format_seconds(longest_s)}", limit)


def _check_together(plan: Plan, edge: Edge, where: str) -> Iterator[Fault]:
    """Every node that calls has what is called, in proportion, as far as one edge alone can tell."""
    nodes: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for group in plan.groups:
        for entry in group.loadout:
            nodes[group.node][entry.service] += entry.rate_rps
    for node, rates in sorted(nodes.items()):
        sent, taken = edge.fanout * rates[edge.source], rates[edge.target]
        if sent > taken + 1e-4 * max(1.0, sent):
            expected = f"at least the {sent:.6g} rps that {edge.source} calls there"
            yield _fault(f"{where}.{node}", f"{taken:.6g} rps of {edge.target}", expected)


def _check_attainment(plan: Plan) -> Iterator[Fault]:
    required = plan.settings.get("attainment")
    if not isinstance(required, float | int):
        return
    for left in plan.unserved:
        offered = next((each.offered_rps for each in plan.predicted if each.service == left.service), 0.0)
        if left.rate_rps > (1 - required) * offered + 1e-4 * max(1.0, offered):
            expected = f"at most {1 - required:.2%} of {offered:.6g} rps unserved (attainment {required:g})"
            yield _fault(f"{left.service}.attainment", f"{left.rate_rps:.6g} rps unserved", expected)


def _check_losses(plan: Plan, cluster: Cluster) -> Iterator[Fault]:
    """What every service's remaining replicas could serve at their whole group's time covers the share to be kept.

    Necessary, not sufficient: that the services share the remaining time is left to the planner's own rows.
    """
    keep = plan.settings.get("keep_after_loss")
    if not isinstance(keep, float | int) or keep <= 0:
        return
    for node in cluster.nodes:
        rates: dict[str, float] = defaultdict(float)
        capacity: dict[str, float] = defaultdict(float)
        for group in plan.groups:
            for entry in group.loadout:
                rates[entry.service] += entry.rate_rps
                if group.node != node.name:
                    capacity[entry.service] += entry.max_batch / max(entry.stage_latency_s[-1])
        for name, rate in sorted(rates.items()):
            if capacity[name] < keep * rate * (1 - 1e-4):
                found = f"{capacity[name]:.6g} rps without {node.name}"
                yield _fault(f"{name}.keep_after_loss", found, f"at least {keep:.0%} of {rate:.6g} rps")
