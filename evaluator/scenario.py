"""A plan, its services and a trace as the arrays that a run is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evaluator.state import NOWHERE
from plans.cluster import Cluster
from plans.errors import Fault, InvalidInput
from plans.plan import Group, LoadoutEntry, Plan
from plans.service import FrequencyService, GenerationService, Services, Workflow
from profiles.document import Profile, Row
from profiles.library import ProfileLibrary
from traces.table import RequestTrace

__all__ = [
    "Arrivals",
    "Deadlines",
    "Replicas",
    "check_entries",
    "compile_arrivals",
    "compile_deadlines",
    "compile_replicas",
    "replica_arrays",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """Every service on every group, sorted by group then loadout, as arrays.

    Attributes:
        group_of: Shape (replica,): position of its group, rising.
        service_of: Shape (replica,): position of its service.
        max_batch: Shape (replica,).
        frames: Shape (replica,): frames of one stream that enter together.
        stage_s: Shape (replica, largest batch, most stages): seconds that a batch of b + 1 holds a stage; 0 beyond.
        weight: Shape (replica,): routing weight among the replicas of the service; 0: it gets nothing.
        stages: Shape (group,): pipeline stages.
        quantile: Shape (replica, largest batch, 4): latency over its mean at u = 0, 0.5, 0.95 and 0.99 for a batch of
            b + 1; None where all are 1.
        interference: Shape (replica, concurrent): factor of a batch that starts beside b others; None: b + 1.
    """

    group_of: NDArray[np.int32]
    service_of: NDArray[np.int32]
    max_batch: NDArray[np.int32]
    frames: NDArray[np.int32]
    stage_s: NDArray[np.float64]
    weight: NDArray[np.float64]
    stages: NDArray[np.int32]
    quantile: NDArray[np.float64] | None = None
    interference: NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """What the services allow, and after them the workflows; all of shape (service,).

    Attributes:
        allowed_s: Seconds from arrival to deadline.
        per_token_s: Seconds more for each output token after the first; 0 unless the service generates.
        sticky: Whether streams of the service stay with their replica.
    """

    allowed_s: NDArray[np.float64]
    per_token_s: NDArray[np.float64]
    sticky: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """The requests of a trace; arrays are read-only.

    Attributes:
        arrival_s: Shape (request,), sorted.
        code: Shape (request,): which of the trace's names.
        service_of_code: Shape (name,): position of the service of each name; workflows come after the services.
        duration_s: Time that the trace covers.
        stream: Shape (request,): number of its stream among all of class frequency, or -1; None without any.
        stream_names: For each number the service's position and the name of the stream.
        output_tokens: Shape (request,), NaN where unknown; None where no service asks for them.
        input_tokens: Likewise.
    """

    arrival_s: NDArray[np.float64]
    code: NDArray[np.int64]
    service_of_code: NDArray[np.int32]
    duration_s: float
    stream: NDArray[np.int32] | None = None
    stream_names: tuple[tuple[int, str], ...] = ()
    output_tokens: NDArray[np.float64] | None = None
    input_tokens: NDArray[np.float64] | None = None


def compile_replicas(
    plan: Plan, services: Services, *, cluster: Cluster | None = None, profiles: ProfileLibrary | None = None
) -> Replicas:
    """Return the arrays of ``plan``, with the spread and interference that ``profiles`` state.

    Raises:
        InvalidInput: The plan names a service or a variant that ``services`` does not have.
    """
    weights = {(s, route.group): route.weight for s, routes in plan.routes.items() for route in routes}
    pairs = [(group, entry) for group in plan.groups for entry in group.loadout]
    weight = [weights.get((entry.service, group.id), 0.0) for group, entry in pairs]
    return replica_arrays(plan.groups, pairs, weight, services, cluster=cluster, profiles=profiles)


def check_entries(entries: Sequence[LoadoutEntry], services: Services) -> None:
    """Check that ``services`` has the service and the variant of every entry of a plan.

    Raises:
        InvalidInput: It lacks some; all are named.
    """
    variants = {service.name: [variant.model for variant in service.variants] for service in services.services}
    faults = [
        Fault(where="plan", field="groups", found=repr(name), expected="a service of services.yaml")
        for name in sorted({entry.service for entry in entries} - variants.keys())
    ]
    faults += [
        Fault(
            where="plan",
            field=f"groups: {name}.variant",
            found=repr(variant),
            expected=f"one of {', '.join(variants[name])}",
        )
        for name, variant in sorted({(entry.service, entry.variant) for entry in entries})
        if name in variants and variant not in variants[name]
    ]
    if faults:
        raise InvalidInput(faults)


def replica_arrays(
    groups: Sequence[Group],
    pairs: Sequence[tuple[Group, LoadoutEntry]],
    weight: Sequence[float],
    services: Services,
    *,
    cluster: Cluster | None = None,
    profiles: ProfileLibrary | None = None,
) -> Replicas:
    """Return the arrays of the replicas ``pairs``, which are sorted by their group's place in ``groups``.

    Raises:
        InvalidInput: An entry names a service or a variant that ``services`` does not have.
    """
    index = {service.name: position for position, service in enumerate(services.services)}
    check_entries([entry for _, entry in pairs], services)
    place = {id(group): position for position, group in enumerate(groups)}
    most_stages = max((group.pp for group in groups), default=1)
    largest = max((entry.max_batch for _, entry in pairs), default=1)
    stage_s = np.zeros((len(pairs), largest, most_stages))
    for replica, (_, entry) in enumerate(pairs):
        table = np.asarray(entry.stage_latency_s)
        stage_s[replica, : table.shape[0], : table.shape[1]] = table
    known = [_profile(group, entry, cluster, profiles) for group, entry in pairs]
    return Replicas(
        group_of=np.array([place[id(group)] for group, _ in pairs], dtype=np.int32),
        service_of=np.array([index[entry.service] for _, entry in pairs], dtype=np.int32),
        max_batch=np.array([entry.max_batch for _, entry in pairs], dtype=np.int32),
        frames=np.array([min(entry.multi_frame, entry.max_batch) for _, entry in pairs], dtype=np.int32),
        stage_s=stage_s,
        weight=np.array(weight, dtype=np.float64),
        stages=np.array([group.pp for group in groups], dtype=np.int32),
        quantile=_quantiles(pairs, known, largest),
        interference=_interference(known),
    )


def compile_deadlines(services: Services) -> Deadlines:
    """Return what ``services`` allow."""
    rows = [*services.services, *services.workflows]
    return Deadlines(
        allowed_s=np.array(
            [r.slo.deadline_s if isinstance(r, Workflow) else r.deadline_s(1) for r in rows], dtype=np.float64
        ),
        per_token_s=np.array([r.slo.tpot_s if isinstance(r, GenerationService) else 0.0 for r in rows]),
        sticky=np.array([isinstance(r, FrequencyService) for r in rows], dtype=np.bool_),
    )


def compile_arrivals(trace: RequestTrace, services: Services) -> Arrivals:
    """Return the arrays of ``trace``.

    Raises:
        InvalidInput: The trace names neither services nor workflows of ``services``.
    """
    rows = (*services.services, *services.workflows)
    index = {row.name: position for position, row in enumerate(rows)}
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
    known = [rows[index[name]] for name in trace.services]
    sticky = [isinstance(row, FrequencyService) for row in known]
    stream: NDArray[np.int32] | None = None
    names: tuple[tuple[int, str], ...] = ()
    if any(sticky):
        stream, names = _streams(trace, sticky, index)
    generates = any(isinstance(row, GenerationService | Workflow) for row in known)
    return Arrivals(
        arrival_s=trace.arrival_s,
        code=trace.codes,
        service_of_code=np.array([index[name] for name in trace.services], dtype=np.int32),
        duration_s=trace.duration_s,
        stream=stream,
        stream_names=names,
        output_tokens=trace.numbers("output_tokens") if generates else None,
        input_tokens=trace.numbers("input_tokens") if generates else None,
    )


def _streams(
    trace: RequestTrace, sticky: Sequence[bool], index: dict[str, int]
) -> tuple[NDArray[np.int32] | None, tuple[tuple[int, str], ...]]:
    """Number the streams of the services of class frequency in the order of their first frames."""
    frame = trace.frame
    if "stream" not in frame:
        return None, ()
    label, labels = pd.factorize(frame["stream"])
    counts = (label != NOWHERE) & np.asarray(sticky, dtype=np.bool_)[trace.codes]
    if not counts.any():
        return None, ()
    pair = np.where(counts, trace.codes * len(labels) + label, NOWHERE)
    number, pairs = pd.factorize(np.where(counts, pair, np.iinfo(np.int64).max))
    outside = np.flatnonzero(pairs == np.iinfo(np.int64).max)
    if outside.size:  # rows that belong to no stream: close the gap in the numbers that they leave
        number = np.where(number == outside[0], NOWHERE, number - (number > outside[0]))
        pairs = np.delete(pairs, outside[0])
    names = tuple(
        (index[trace.services[int(each) // len(labels)]], str(labels[int(each) % len(labels)])) for each in pairs
    )
    return number.astype(np.int32), names


def _profile(
    group: Group, entry: LoadoutEntry, cluster: Cluster | None, profiles: ProfileLibrary | None
) -> Profile | None:
    if cluster is None or profiles is None:
        return None
    return profiles.profile(entry.variant, cluster.node(group.node).gpus.type)


def _quantiles(
    pairs: Sequence[tuple[Group, LoadoutEntry]], known: Sequence[Profile | None], largest: int
) -> NDArray[np.float64] | None:
    """Return the spread of each batch, from the row of the nearest batch (the smaller of two equally near)."""
    if all(profile is None for profile in known):
        return None
    factors = np.ones((len(pairs), largest, 4))
    for replica, ((group, entry), profile) in enumerate(zip(pairs, known, strict=True)):
        rows = [] if profile is None else _whole_rows(profile, group.tp, group.pp)
        for batch in range(1, entry.max_batch + 1 if rows else 1):
            factors[replica, batch - 1] = _spread(min(rows, key=lambda row: (abs(row.batch - batch), row.batch)))
    return factors


def _whole_rows(profile: Profile, tp: int, pp: int) -> list[Row]:
    rows = [row for row in profile.rows if (row.tp, row.pp, row.phase) == (tp, pp, "whole")]
    lowest = min((row.concurrency for row in rows), default=1)
    return [row for row in rows if row.concurrency == lowest]


def _spread(row: Row) -> tuple[float, float, float, float]:
    mean = row.latency_s.mean
    r50, r95, r99 = (
        1.0 if value is None else value / mean for value in (row.latency_s.p50, row.latency_s.p95, row.latency_s.p99)
    )
    return max(r50 / 2, 2 * r50 - r95), r50, r95, r99


def _interference(known: Sequence[Profile | None]) -> NDArray[np.float64] | None:
    most = max((k for profile in known if profile for k in profile.interference), default=0)
    if most == 0:
        return None
    factors = np.tile(np.arange(1.0, most + 1), (len(known), 1))
    for replica, profile in enumerate(known):
        for together, factor in (profile.interference if profile else {}).items():
            factors[replica, together - 1] = 1.0 if together == 1 else factor
    return factors
