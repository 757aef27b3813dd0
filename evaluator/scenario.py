"""A plan, its services and a trace as the arrays that the kernel runs on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from plans.errors import Fault, InvalidInput
from plans.plan import Plan
from plans.service import Services
from traces.table import RequestTrace

__all__ = ["Replicas", "Requests", "compile_replicas", "compile_requests"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """Every service on every group, sorted by group then service, as arrays.

    Attributes:
        group_of: Shape (replica,): index of the group in ``Plan.groups``.
        service_of: Shape (replica,): index of the service in ``Services.services``.
        max_batch: Shape (replica,).
        stage_s: Shape (replica, largest batch, most stages): seconds that a batch of b + 1 holds a stage; 0 beyond.
        total_s: Shape (replica, largest batch): latency of a batch of b + 1.
        stages: Shape (group,): pipeline stages.
        first: Shape (group + 1,): replicas of group g are first[g] to first[g + 1].
        weight: Shape (replica,): routing weight among the replicas of the service.
        service_first: Shape (service + 1,): replicas of service s are service_replicas[service_first[s] :
            service_first[s + 1]].
        service_replicas: Shape (replica,): replicas sorted by service, then group.
    """

    group_of: NDArray[np.int64]
    service_of: NDArray[np.int64]
    max_batch: NDArray[np.int64]
    stage_s: NDArray[np.float64]
    total_s: NDArray[np.float64]
    stages: NDArray[np.int64]
    first: NDArray[np.int64]
    weight: NDArray[np.float64]
    service_first: NDArray[np.int64]
    service_replicas: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """The requests of a trace, in order of arrival: when, for which service, and until when, all shape (request,)."""

    arrival_s: NDArray[np.float64]
    service: NDArray[np.int64]
    deadline_s: NDArray[np.float64]


def compile_replicas(plan: Plan, services: Services) -> Replicas:
    """Return the arrays of ``plan``.

    Raises:
        InvalidInput: The plan names a service that ``services`` does not have.
    """
    index = {service.name: position for position, service in enumerate(services.services)}
    pairs = [(g, entry) for g, group in enumerate(plan.groups) for entry in group.loadout]
    unknown = sorted({entry.service for _, entry in pairs} - index.keys())
    if unknown:
        raise InvalidInput(
            Fault(where="plan", field="groups", found=repr(name), expected="a service of services.yaml")
            for name in unknown
        )
    most_stages = max((group.pp for group in plan.groups), default=1)
    largest = max((entry.max_batch for _, entry in pairs), default=1)
    stage_s = np.zeros((len(pairs), largest, most_stages))
    for replica, (_, entry) in enumerate(pairs):
        table = np.asarray(entry.stage_latency_s)
        stage_s[replica, : table.shape[0], : table.shape[1]] = table
    service_of = np.array([index[entry.service] for _, entry in pairs], dtype=np.int64)
    group_of = np.array([g for g, _ in pairs], dtype=np.int64)
    weights = {(s, route.group): route.weight for s, routes in plan.routes.items() for route in routes}
    return Replicas(
        group_of=group_of,
        service_of=service_of,
        max_batch=np.array([entry.max_batch for _, entry in pairs], dtype=np.int64),
        stage_s=stage_s,
        total_s=stage_s.sum(axis=2),
        stages=np.array([group.pp for group in plan.groups], dtype=np.int64),
        first=np.searchsorted(group_of, np.arange(len(plan.groups) + 1)).astype(np.int64),
        weight=np.array([weights.get((entry.service, plan.groups[g].id), 0.0) for g, entry in pairs], dtype=np.float64),
        service_first=np.searchsorted(np.sort(service_of), np.arange(len(services.services) + 1)).astype(np.int64),
        service_replicas=np.argsort(service_of, kind="stable").astype(np.int64),
    )


def compile_requests(trace: RequestTrace, services: Services) -> Requests:
    """Return the arrays of ``trace``, with each request's deadline from its service's SLO (and its tokens).

    Raises:
        InvalidInput: The trace names services that ``services`` does not have.
    """
    index = {service.name: position for position, service in enumerate(services.services)}
    unknown = sorted(set(trace.services) - index.keys())
    if unknown:
        raise InvalidInput(
            Fault(
                where="trace",
                field="service",
                found=repr(name),
                expected=f"one of {', '.join(index)}",
                remedy="map the trace's names to services when importing it",
            )
            for name in unknown
        )
    service = np.array([index[name] for name in trace.services], dtype=np.int64)[trace.codes]
    allowed_s = np.array([service.deadline_s() for service in services.services], dtype=np.float64)[service]
    tokens = trace.numbers("output_tokens")
    for position, known in enumerate(services.services):
        if known.request_class == "generation":
            rows = np.flatnonzero((service == position) & ~np.isnan(tokens))
            allowed_s[rows] = [known.deadline_s(count) for count in tokens[rows]]
    return Requests(arrival_s=trace.arrival_s, service=service, deadline_s=trace.arrival_s + allowed_s)
