"""Where a request goes, and how it comes into a queue there."""

# mypy: disable-error-code="no-any-return"
# Records and their fields have no types for mypy.

from __future__ import annotations

from typing import Any

import numpy as np

from evaluator import rules
from evaluator.access import (
    floats,
    free_of,
    group_at,
    integers,
    latencies_of,
    replica_at,
    service_at,
    slot_at,
    small,
    stages_of,
    stream_at,
)
from evaluator.batching import advance_group, first_free_s, is_call, lose_call_of, reserve, wake
from evaluator.bundles import gather
from evaluator.iterations import prepare
from evaluator.memory import compiled, featured, int64
from evaluator.queues import enqueue, free_slot, take_slot
from evaluator.recording import record
from evaluator.state import (
    ADMISSION,
    CORRECTED,
    CREDITS,
    EARLIEST_FREE,
    LEAST_FINISH,
    NOWHERE,
    ROUND_ROBIN,
    SHORTEST_QUEUE,
    TOO_LARGE,
    UNROUTED,
    WEIGHTED,
    WEIGHTED_RANDOM,
)

__all__ = ["arrive", "come_in", "predicted_end_s", "route", "route_frame"]

ENTRY = 2
"""Priority of an entry (docs/evaluator.md, section 1)."""


@compiled
def route(w: Any, service: int, draw_index: int, now: float) -> int:
    """Return the replica for a request of ``service`` that enters now, or NOWHERE; all of its groups are as of now."""
    first, last = service_at(w, service).first, service_at(w, service).last
    policy = w.routing
    chosen = NOWHERE
    if policy == WEIGHTED:
        if last - first == 1:
            chosen = 0 if floats(w.route_weight, w.replica_count)[first] > 0.0 else NOWHERE
        else:
            chosen = rules.next_replica(
                floats(w.route_weight + 8 * first, last - first), floats(w.route_balance + 8 * first, last - first)
            )
    else:
        chosen = _route_otherwise(w, service, draw_index, now)
    return int64(small(w.route_replica, w.replica_count)[first + chosen]) if chosen >= 0 else NOWHERE


@compiled
def _route_otherwise(w: Any, service: int, draw_index: int, now: float) -> int:
    first, last = service_at(w, service).first, service_at(w, service).last
    policy = w.routing
    weights = floats(w.route_weight + 8 * first, last - first)
    if policy == WEIGHTED_RANDOM:
        return rules.next_at_random(weights, rules.draw(w.seed, rules.DRAW_ROUTING, draw_index))
    if policy == ROUND_ROBIN:
        chosen = rules.next_in_turn(weights, service_at(w, service).turn)
        if chosen >= 0:
            service_at(w, service).turn += 1
        return chosen
    replicas = small(w.route_replica + 4 * first, last - first)
    if not w.in_order:
        for r in replicas:
            advance_group(w, replica_at(w, r).group, now, ENTRY)
    if policy == CREDITS:
        return rules.next_by_credit(
            weights, floats(w.route_credit + 8 * first, last - first), floats(w.route_balance + 8 * first, last - first)
        )
    values = floats(w.scratch, last - first)
    if policy == CORRECTED:
        deadline_s = service_at(w, service).allowed_s
        for local in range(last - first):
            wait_s = _start_s(w, replicas[local], now) - now
            values[local] = rules.corrected_weight(weights[local], wait_s, deadline_s)
        return rules.next_replica(values, floats(w.route_balance + 8 * first, last - first))
    for local in range(last - first):
        values[local] = _value(w, replicas[local], now)
    return rules.least(weights, values)


@compiled
def _start_s(w: Any, r: int, now: float) -> float:
    """Return when a request that enters the queue of ``r`` now is expected to start, behind all that waits there."""
    g = replica_at(w, r).group
    return max(now, first_free_s(w, g, now)) + group_at(w, g).work_s


@compiled
def _value(w: Any, r: int, now: float) -> float:
    """Return what the policy wants least of at replica ``r``."""
    policy = w.routing
    replica = replica_at(w, r)
    group = group_at(w, replica.group)
    if policy == SHORTEST_QUEUE:
        return float(replica.open)
    if policy == EARLIEST_FREE:
        return free_of(w, replica.group)[group.stages - 1]
    if policy == LEAST_FINISH and w.admission:
        return predicted_end_s(w, r, now)
    return _start_s(w, r, now) + latencies_of(w, r)[0]


@compiled
def predicted_end_s(w: Any, r: int, now: float) -> float:
    """Return when a request would end that enters the stages of ``r`` now, behind what is reserved there."""
    g = replica_at(w, r).group
    time_s = now
    for stage in range(group_at(w, g).stages):
        time_s = max(time_s, free_of(w, g)[stage]) + stages_of(w, r, 1)[stage]
    return time_s


@compiled
def _stream_of(w: Any, position: int, service: int) -> int:
    if w.stream_of != 0 and service_at(w, service).sticky:
        return int64(small(w.stream_of, w.request_count)[position])
    return NOWHERE


@compiled
def route_frame(w: Any, stream: int, service: int, draw_index: int, now: float) -> int:
    """Return the replica that ``stream`` is on, or follow the policy when it is on none that takes requests."""
    r = int64(stream_at(w, stream).replica)
    if r != NOWHERE and floats(w.route_weight, w.replica_count)[replica_at(w, r).route] > 0.0:
        return r
    chosen = route(w, service, draw_index, now)
    if r != NOWHERE and chosen != NOWHERE and chosen != r:
        stream_at(w, stream).moved = 1
    if chosen != NOWHERE:
        stream_at(w, stream).replica = chosen
    return chosen


@compiled
def _allowed_s(w: Any, position: int, service: int) -> float:
    """Return the time from arrival to deadline."""
    allowed_s = service_at(w, service).allowed_s
    if service_at(w, service).allowed_per_token_s > 0.0:
        tokens = floats(w.output_tokens, w.request_count)[position] if w.output_tokens != 0 else np.nan
        if np.isnan(tokens):
            tokens = 128.0
        allowed_s += service_at(w, service).allowed_per_token_s * max(0.0, tokens - 1.0)
    return allowed_s


@compiled
def arrive(w: Any, position: int, now: float) -> int:
    """A request of the trace enters now; return the group it went to, or NOWHERE. There must be a free slot."""
    service = int64(small(w.service_of_code, w.request_count)[integers(w.code, w.request_count)[position]])
    arrival_s = floats(w.arrival_s, w.request_count)[position]
    stream = _stream_of(w, position, service)
    if stream == NOWHERE:  # noqa: SIM108 - as one line it is hard to read
        r = route(w, service, position, now)
    else:
        r = route_frame(w, stream, service, position, now)
    if r == NOWHERE:
        record(w, position, service, arrival_s, UNROUTED, now, NOWHERE, 0)
        return NOWHERE
    deadline_s = arrival_s + _allowed_s(w, position, service)
    slot = take_slot(w)
    request = slot_at(w, slot)
    request.position = position
    request.service = service
    request.arrival_s = arrival_s
    request.deadline_s = deadline_s
    request.due_s = deadline_s - w.response_s
    request.stream = stream
    request.replica = r
    come_in(w, slot, now)
    return int64(replica_at(w, r).group)


@compiled
def come_in(w: Any, slot: int, now: float) -> None:
    """A request that was routed comes to its replica now: into the queue, a bundle, or, once admitted, the stages."""
    request = slot_at(w, slot)
    r = request.replica
    replica = replica_at(w, r)
    if not w.in_order:
        advance_group(w, replica.group, now, ENTRY)
    request.entry_s = now
    replica.open += 1
    if not _fits(w, slot):
        _turn_away(w, slot, TOO_LARGE, now)
        return
    request.key = request.due_s if w.edf else now
    if w.admission:
        _admit(w, slot, now)
        return
    if w.bundles and replica.frames > 1 and request.stream != NOWHERE:
        if gather(w, slot, now):
            wake(w, replica.group, r, now)
        return
    request.sequence = w.sequence
    w.sequence += 1
    enqueue(w, slot)
    wake(w, replica.group, r, now)


@featured("generation", nothing=True)
def _fits(w: Any, slot: int) -> bool:
    """Prepare a request for a generating replica; say whether it could ever fit there."""
    generates = w.generation != 0 and replica_at(w, slot_at(w, slot).replica).generates != NOWHERE
    return not generates or prepare(w, slot)


@compiled
def _admit(w: Any, slot: int, now: float) -> None:
    """Accept a request whose predicted finish is early enough, and reserve the stages for it; drop any other."""
    r = slot_at(w, slot).replica
    finish_s = predicted_end_s(w, r, now) + w.response_s
    if finish_s + w.margin_s <= slot_at(w, slot).deadline_s:
        slot_at(w, slot).after = NOWHERE
        slot_at(w, slot).batch = 1
        reserve(w, replica_at(w, r).group, r, slot, 1, now)
        return
    _turn_away(w, slot, ADMISSION, now)


@compiled
def _turn_away(w: Any, slot: int, code: int, now: float) -> None:
    """Drop a request on entry."""
    request = slot_at(w, slot)
    r = int64(request.replica)
    replica_at(w, r).open -= 1
    if is_call(w, slot):
        lose_call_of(w, slot, code, now)
        return
    record(w, request.position, request.service, request.arrival_s, code, now, r, 0)
    free_slot(w, slot)
