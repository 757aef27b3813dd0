"""The single-pass mode: admission at arrival, no batching, one pass over the sorted arrivals without an event queue.

The semantics are those of docs/evaluator.md, sections 4, 7 and 13. When a request arrives, everything that decides its
fate is known: the clocks of the pipeline stages, reserved by what was accepted before. So it is routed, its finish is
predicted by walking through the stages, and it is accepted when that is early enough and dropped otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from evaluator.scenario import check_entries
from evaluator.single_pass_kernel import (
    EARLIEST_FREE,
    LEAST_FINISH,
    ROUND_ROBIN,
    WEIGHTED,
    counting_kernel,
    recording_kernel,
)
from plans.errors import InvalidInput
from plans.plan import Plan
from plans.service import Services

__all__ = [
    "SINGLE_PASS_ROUTINGS",
    "Hosts",
    "SinglePassOutcome",
    "SinglePassRouting",
    "SinglePassTrace",
    "compile_hosts",
    "count_good",
    "run_single_pass",
]

SinglePassRouting = Literal["earliest-free", "least-finish", "weighted", "round-robin"]
"""How a request chooses among the groups that host its service; ties go to the first."""

SINGLE_PASS_ROUTINGS: tuple[SinglePassRouting, ...] = get_args(SinglePassRouting)

_POLICIES = {
    "earliest-free": EARLIEST_FREE,
    "least-finish": LEAST_FINISH,
    "weighted": WEIGHTED,
    "round-robin": ROUND_ROBIN,
}
_MOST_UNROLLED = 8
"""Pipelines longer than this run through a loop."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Indices = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class SinglePassTrace:
    """Arrivals in one or several blocks, each simulated from an idle start.

    Attributes:
        arrival_s: Shape (request,): seconds since the start of the block, at least 0, sorted within each block.
        service: Shape (request,): position of the service.
        first: Shape (block + 1,): block b is requests first[b] to first[b + 1].
    """

    arrival_s: Floats
    service: Indices
    first: Integers

    @classmethod
    def whole(cls, arrival_s: Floats, service: NDArray[Any]) -> SinglePassTrace:
        """Return the trace of one block."""
        first = np.array([0, len(arrival_s)], dtype=np.int64)
        return cls(arrival_s=arrival_s, service=service.astype(np.int32), first=first)

    def offered(self, services: int) -> Integers:
        """Return the requests of each service in each block, shape (block, service)."""
        blocks = len(self.first) - 1
        block = np.repeat(np.arange(blocks), np.diff(self.first))
        flat = np.bincount(block * services + self.service, minlength=blocks * services)
        return flat.reshape(blocks, services).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosts:
    """Where each service runs. Rows are services, padded to the service with the most hosts.

    Attributes:
        count: Shape (service,): hosts of each service.
        group: Shape (service, host): position of the group; below ``groups``.
        option: Shape (service, host): row of ``stage_s``.
        weight: Shape (service, host): routing weight, above 0; used by the weighted policy alone.
        stage_s: Shape (option, stage): seconds that one request holds each stage; 0 beyond the last.
        deadline_s: Shape (service,): seconds from arrival within which a request is good.
        groups: Number of groups.
    """

    count: Indices
    group: Indices
    option: Indices
    weight: Floats
    stage_s: Floats
    deadline_s: Floats
    groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SinglePassOutcome:
    """What became of every request.

    Attributes:
        accepted: Shape (request,): whether it was admitted; all others were dropped at arrival, or had no host.
        finish_s: Shape (request,): predicted finish at the client, met exactly when accepted; NaN without a host.
        host: Shape (request,): position among the hosts of its service, -1 without one.
        busy_s: Shape (group, stage): seconds that each stage was held.
    """

    accepted: NDArray[np.bool_]
    finish_s: Floats
    host: Indices
    busy_s: Floats


def compile_hosts(plan: Plan, services: Services) -> Hosts:
    """Return where ``plan`` runs each service, with batches of one; replicas without routing weight are left out.

    Raises:
        InvalidInput: The plan names a service or a variant that ``services`` does not have.
    """
    index = {service.name: position for position, service in enumerate(services.services)}
    check_entries([entry for group in plan.groups for entry in group.loadout], services)
    weights = {(name, route.group): route.weight for name, routes in plan.routes.items() for route in routes}
    rows: list[list[tuple[int, int, float]]] = [[] for _ in index]
    latencies: list[tuple[float, ...]] = []
    for position, group in enumerate(plan.groups):
        for entry in group.loadout:
            weight = weights.get((entry.service, group.id), 0.0)
            if weight > 0:
                rows[index[entry.service]].append((position, len(latencies), weight))
                latencies.append(entry.stage_latency_s[0])
    most = max(1, *map(len, rows))
    padded = np.zeros((len(rows), most, 3))
    for service, row in enumerate(rows):
        padded[service, : len(row)] = np.array(row).reshape(-1, 3)
    stage_s = np.zeros((max(1, len(latencies)), max((group.pp for group in plan.groups), default=1)))
    for option, latency_s in enumerate(latencies):
        stage_s[option, : len(latency_s)] = latency_s
    return Hosts(
        count=np.array([len(row) for row in rows], dtype=np.int32),
        group=padded[:, :, 0].astype(np.int32),
        option=padded[:, :, 1].astype(np.int32),
        weight=padded[:, :, 2].copy(),
        stage_s=stage_s,
        deadline_s=np.array([service.deadline_s() for service in services.services], dtype=np.float64),
        groups=len(plan.groups),
    )


def count_good(
    hosts: Hosts,
    trace: SinglePassTrace,
    *,
    routing: SinglePassRouting = "least-finish",
    overhead_s: float = 0.0,
    response_s: float = 0.0,
    margin_s: float = 0.0,
) -> Integers:
    """Return the requests of each service that are served in time, shape (service,); arguments as `run_single_pass`.

    Raises:
        InvalidInput: There is no such routing policy in this mode.
    """
    good = np.zeros(len(hosts.count), dtype=np.int64)
    times_s = (overhead_s, response_s, margin_s)
    counting_kernel(_unrolled(hosts), _code(routing), not any(times_s))(
        trace.arrival_s,
        trace.service,
        trace.first,
        *_arrays(hosts),
        *times_s,
        good,
    )
    return good


def run_single_pass(
    hosts: Hosts,
    arrival_s: Floats,
    service: NDArray[Any],
    *,
    routing: SinglePassRouting = "least-finish",
    overhead_s: float = 0.0,
    response_s: float = 0.0,
    margin_s: float = 0.0,
) -> SinglePassOutcome:
    """Return what becomes of every request of one trace.

    Args:
        hosts: Where services run.
        arrival_s: Shape (request,), sorted, at least 0.
        service: Shape (request,): position of each request's service.
        routing: How a host is chosen.
        overhead_s: Seconds between a request's arrival and its group.
        response_s: Seconds from the end of the last stage to the client.
        margin_s: A request is accepted when its finish is at least this long before its deadline.

    Raises:
        InvalidInput: There is no such routing policy in this mode.
    """
    requests = len(arrival_s)
    accepted = np.zeros(requests, dtype=np.bool_)
    finish_s = np.full(requests, np.nan)
    host = np.full(requests, -1, dtype=np.int32)
    busy_s = np.zeros((hosts.groups, hosts.stage_s.shape[1]))
    recording_kernel(_unrolled(hosts), _code(routing))(
        arrival_s,
        service.astype(np.int32),
        *_arrays(hosts),
        overhead_s,
        response_s,
        margin_s,
        accepted,
        finish_s,
        host,
        busy_s,
    )
    return SinglePassOutcome(accepted=accepted, finish_s=finish_s, host=host, busy_s=busy_s)


def _arrays(hosts: Hosts) -> tuple[Any, ...]:
    return (
        hosts.count,
        hosts.group,
        hosts.option,
        hosts.weight,
        hosts.stage_s,
        hosts.deadline_s,
        hosts.groups,
    )


def _unrolled(hosts: Hosts) -> int:
    stages = hosts.stage_s.shape[1]
    return stages if stages <= _MOST_UNROLLED else 0


def _code(routing: str) -> int:
    if routing not in SINGLE_PASS_ROUTINGS:
        expected = f"one of {', '.join(SINGLE_PASS_ROUTINGS)} with a single pass"
        raise InvalidInput.of(expected, where="evaluate", field="routing", found=repr(routing))
    return _POLICIES[routing]
