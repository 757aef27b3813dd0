"""What one group does: look for something to start, start it, end it. Nothing here depends on other groups."""

# mypy: disable-error-code="no-any-return"
# Records and their fields have no types for mypy.

from __future__ import annotations

from typing import Any

import numpy as np

from evaluator import iterations, rules
from evaluator.access import (
    floats,
    free_of,
    group_at,
    head_keys,
    latencies_of,
    replica_at,
    row_of,
    slot_at,
    stages_of,
)
from evaluator.bundles import flush
from evaluator.calls import lose_call, note_ended
from evaluator.extras import call_at, small_of
from evaluator.memory import compiled, featured, int64
from evaluator.queues import first_slot, free_slot, pop
from evaluator.recording import record, record_busy
from evaluator.state import CREDITS, DISPLACED, EXPONENTIAL, GOOD, HOPELESS, LATE, MEAN, NOWHERE
from plans import dispatch as shared

__all__ = [
    "advance_group",
    "append_running",
    "dispatch",
    "first_free_s",
    "is_call",
    "lose_call_of",
    "reserve",
    "step",
    "wake",
]

_SHARED_HOPELESS = shared.HOPELESS
_LATEST = int64(2**62)
"""Sequence of what goes after everything that has entered a queue."""

COMPLETION, FLUSH, DISPATCH = 1, 3, 4
"""Priorities of the events of a group (docs/evaluator.md, section 1)."""


@compiled
def first_free_s(w: Any, g: int, now: float) -> float:
    """Return from when the first stage of group ``g`` can take a batch; at most ``now`` when it can already."""
    group = group_at(w, g)
    if group.concurrency == 1:
        return free_of(w, g)[0]
    if group.stopped:
        return _lost_free_s(w, g, now)
    return now if group.running_count < group.concurrency else group.end_s


@compiled
def _lost_free_s(w: Any, g: int, now: float) -> float:
    """Return what `first_free_s` would be if the group, which has failed, still ran its batches."""
    first_s = np.inf
    running = 0
    lead = int64(group_at(w, g).running)
    while lead != NOWHERE:
        if slot_at(w, lead).end_s > now:
            first_s = min(first_s, slot_at(w, lead).end_s)
            running += 1
        lead = int64(slot_at(w, lead).batch_after)
    return first_s if running >= group_at(w, g).concurrency else now


@featured("generation", nothing=False)
def _generates(w: Any, r: int) -> bool:
    """Say whether replica ``r`` runs iterations."""
    return w.generation != 0 and replica_at(w, r).generates != NOWHERE


@featured("workflows", nothing=False)
def is_call(w: Any, slot: int) -> bool:
    """Say whether ``slot`` holds a call of a workflow."""
    return w.workflows != 0 and call_at(w, slot).lead != NOWHERE


@compiled
def _ready_s(w: Any, r: int) -> float:
    """Return from when the queue of ``r``, which is not empty, may start a batch."""
    replica = replica_at(w, r)
    head = slot_at(w, first_slot(w, r))
    return rules.ready_s(
        head.entry_s, head.due_s, replica.queued, replica.max_batch, replica.largest_s, w.batch_delay_s
    )


@compiled
def wake(w: Any, g: int, r: int, now: float) -> None:
    """Something entered the queue of replica ``r``: bring the group's dispatch forward if it can start earlier now."""
    group = group_at(w, g)
    if group.stopped:
        return
    when = max(now, first_free_s(w, g, now))
    if w.batch_delay_s > 0.0 and not _generates(w, r):
        when = max(when, _ready_s(w, r))
    if when < group.dispatch_s:
        group.dispatch_s = when


@compiled
def _next_replica(w: Any, g: int, now: float) -> int:
    """Return the replica of group ``g`` to serve next, or NOWHERE when no queue is ready."""
    group = group_at(w, g)
    if group.last - group.first == 1 and w.batch_delay_s == 0.0:
        return group.first
    if w.edf and w.batch_delay_s == 0.0:
        local = rules.earliest(floats(w.head_key + 8 * group.first, group.last - group.first))
        return group.first + local if local >= 0 else NOWHERE
    return _next_ready(w, g, now)


@compiled
def _next_ready(w: Any, g: int, now: float) -> int:
    best = NOWHERE
    smallest = np.inf
    sequence = int64(0)
    for r in range(group_at(w, g).first, group_at(w, g).last):
        key = head_keys(w)[r]
        if key > smallest or key == np.inf:
            continue
        if w.batch_delay_s > 0.0 and not _generates(w, r) and _ready_s(w, r) > now:
            continue
        head = first_slot(w, r)
        entered = _LATEST if head == NOWHERE or slot_at(w, head).key > key else slot_at(w, head).sequence
        if key < smallest or (not w.edf and entered < sequence):
            best, smallest, sequence = r, key, entered
    return best


@compiled
def dispatch(w: Any, g: int, now: float) -> None:
    """Start whatever group ``g`` can start now, drop what cannot be met, and say when to look again."""
    group = group_at(w, g)
    group.dispatch_s = np.inf
    while group.queued > 0 or group.generating > 0:
        free_s = first_free_s(w, g, now)
        if free_s > now or (group.concurrency > 1 and group.running_count >= group.concurrency):
            group.dispatch_s = free_s
            return
        r = _next_replica(w, g, now)
        if r == NOWHERE:
            _look_again(w, g)
            return
        if _generates(w, r):
            _iterate(w, g, r, now)
            continue
        replica = replica_at(w, r)
        due_s = slot_at(w, first_slot(w, r)).due_s
        if w.early_drop:
            size = rules.next_batch(now, due_s, replica.queued, replica.max_batch, latencies_of(w, r))
        else:
            size = rules.next_batch_undropped(now, due_s, replica.queued, replica.max_batch, latencies_of(w, r))
        if size >= 1:
            _start(w, g, r, size, now)
        else:
            _drop_head(w, r, HOPELESS if size == _SHARED_HOPELESS else DISPLACED, now)


@compiled
def _look_again(w: Any, g: int) -> None:
    """No queue of ``g`` is ready: look again when the first one is."""
    when = np.inf
    for r in range(group_at(w, g).first, group_at(w, g).last):
        if replica_at(w, r).queued > 0:
            when = min(when, _ready_s(w, r))
    group_at(w, g).dispatch_s = when


@compiled
def _drop_head(w: Any, r: int, code: int, now: float) -> None:
    slot = pop(w, r)
    while slot != NOWHERE:
        request = slot_at(w, slot)
        after = request.frame_after
        replica_at(w, r).open -= 1
        if is_call(w, slot):
            lose_call_of(w, slot, code, now)
        else:
            record(w, request.position, request.service, request.arrival_s, code, now, r, 0)
            free_slot(w, slot)
        slot = after


@featured("generation", nothing=None)
def _iterate(w: Any, g: int, r: int, now: float) -> None:
    """Give generating replica ``r`` its turn: drop heads that cannot be met, and start an iteration, if any."""
    while iterations.is_hopeless(w, r, now):
        _drop_head(w, r, HOPELESS, now)
    lead, takes_s = iterations.begin(w, r)
    if lead == NOWHERE:
        return
    group = group_at(w, g)
    start_s = now
    for stage in range(group.stages):
        start_s = max(start_s, free_of(w, g)[stage])
    end_s = start_s + takes_s * _factor(w, g, r, NOWHERE)
    for stage in range(group.stages):
        free_of(w, g)[stage] = end_s
        record_busy(w, g, stage, start_s, end_s)
    group.started += 1
    append_running(w, g, lead, end_s)


@compiled
def _start(w: Any, g: int, r: int, size: int, now: float) -> None:
    """Start a batch of the first ``size`` requests of ``r``, or as many as its whole bundles allow."""
    lead = pop(w, r)
    taken = slot_at(w, lead).frames
    last = lead
    if w.bundles:
        last = _chain_frames(w, lead)
    while taken < size:
        if w.bundles and taken + slot_at(w, first_slot(w, r)).frames > size:
            break
        slot = pop(w, r)
        taken += slot_at(w, slot).frames
        slot_at(w, last).after = slot
        last = slot
        if w.bundles:
            last = _chain_frames(w, slot)
    slot_at(w, last).after = NOWHERE
    slot_at(w, lead).batch = taken
    reserve(w, g, r, lead, taken, now)


@compiled
def _chain_frames(w: Any, lead: int) -> int:
    """Chain the frames of a bundle as requests of a batch; return the last."""
    last = lead
    while slot_at(w, last).frame_after != NOWHERE:
        slot_at(w, last).after = slot_at(w, last).frame_after
        last = slot_at(w, last).frame_after
    return last


@compiled
def _factor(w: Any, g: int, r: int, size: int) -> float:
    """Return what multiplies the latency of the batch of ``size`` (NOWHERE: an iteration) that ``g`` starts now."""
    group = group_at(w, g)
    factor = 1.0
    if w.latency != MEAN:
        u = rules.draw(w.seed, rules.DRAW_LATENCY, (int64(g) << 32) + group.started)
        if w.latency == EXPONENTIAL:
            factor = rules.exponential(u)
        elif size != NOWHERE:
            at = row_of(w.quantile, r * w.largest + size - 1, 4)
            factor = rules.quantile(at[0], at[1], at[2], at[3], u)
    if group.concurrency > 1:
        factor *= row_of(w.interference, r, w.most_concurrent)[group.running_count]
    return factor * _overlap_factor(w, g)


@featured("overlaps", nothing=1.0)
def _overlap_factor(w: Any, g: int) -> float:
    """Return 1 more than the number of busy groups that share a GPU with ``g``."""
    factor = 1.0
    if not w.overlaps:
        return factor
    first, last = small_of(w.overlap_first + 4 * g, 2)
    for place in range(first, last):
        other = group_at(w, small_of(w.overlap_other, last)[place])
        if other.running_count > 0 and not other.stopped:
            factor += 1.0
    return factor


@compiled
def reserve(w: Any, g: int, r: int, lead: int, size: int, now: float) -> None:
    """Reserve the stages of ``g`` for a batch, each from when batch and stage are both there, and let it run."""
    group = group_at(w, g)
    factor = _factor(w, g, r, size)
    time_s = now
    for stage in range(group.stages):
        start_s = max(time_s, free_of(w, g)[stage]) if group.concurrency == 1 else now
        time_s = start_s + stages_of(w, r, size)[stage] * factor
        free_of(w, g)[stage] = time_s
        if group.concurrency == 1:
            record_busy(w, g, stage, start_s, time_s)
    if group.concurrency > 1:
        record_busy(w, g, 0, max(now, group.busy_until_s), time_s)
        group.busy_until_s = max(group.busy_until_s, time_s)
    group.started += 1
    append_running(w, g, lead, time_s)


@compiled
def append_running(w: Any, g: int, lead: int, end_s: float) -> None:
    """Put a batch among those that run, in the order of their ends."""
    group = group_at(w, g)
    slot_at(w, lead).end_s = end_s
    slot_at(w, lead).batch_after = NOWHERE
    if group.running == NOWHERE:
        group.running = lead
        group.running_last = lead
        group.end_s = end_s
    elif slot_at(w, group.running_last).end_s <= end_s:
        slot_at(w, group.running_last).batch_after = lead
        group.running_last = lead
    elif end_s < group.end_s:
        slot_at(w, lead).batch_after = group.running
        group.running = lead
        group.end_s = end_s
    else:
        place = group.running
        while slot_at(w, slot_at(w, place).batch_after).end_s <= end_s:
            place = slot_at(w, place).batch_after
        slot_at(w, lead).batch_after = slot_at(w, place).batch_after
        slot_at(w, place).batch_after = lead
    group.running_count += 1


@compiled
def _complete(w: Any, g: int) -> None:
    """The batch of ``g`` that ends first ends."""
    group = group_at(w, g)
    lead = group.running
    end_s = group.end_s
    group.running = slot_at(w, lead).batch_after
    group.running_count -= 1
    if group.running == NOWHERE:
        group.running_last = NOWHERE
        group.end_s = np.inf
    else:
        group.end_s = slot_at(w, group.running).end_s
    w.last_s = max(w.last_s, end_s)
    r = int64(slot_at(w, lead).replica)
    if _generates(w, r):
        _end_iteration(w, r, end_s)
    else:
        _end_batch(w, r, lead, end_s)
    if w.routing == CREDITS:
        _settle_credit(w, r)


@featured("generation", nothing=None)
def _end_iteration(w: Any, r: int, end_s: float) -> None:
    iterations.end_iteration(w, r, end_s)


@featured("workflows", nothing=None)
def lose_call_of(w: Any, slot: int, code: int, now: float) -> None:
    """A call of a workflow is dropped or fails."""
    lose_call(w, slot, code, now)


@featured("workflows", nothing=None)
def _note_ended(w: Any, slot: int) -> None:
    note_ended(w, slot)


@compiled
def _end_batch(w: Any, r: int, lead: int, end_s: float) -> None:
    """End every request of a batch."""
    size = slot_at(w, lead).batch
    replica_at(w, r).open -= size
    finish_s = end_s + w.response_s
    slot = lead
    while slot != NOWHERE:
        request = slot_at(w, slot)
        after = request.after
        if is_call(w, slot):
            _note_ended(w, slot)
        else:
            code = GOOD if finish_s <= request.deadline_s else LATE
            record(w, request.position, request.service, request.arrival_s, code, finish_s, r, size)
            free_slot(w, slot)
        slot = after


@compiled
def _settle_credit(w: Any, r: int) -> None:
    replica = replica_at(w, r)
    credit = floats(w.route_credit, w.replica_count)
    credit[replica.route] = rules.credit_after(
        credit[replica.route],
        replica.queued,
        w.credit_target,
        w.credit_increase,
        w.credit_decrease,
    )


@compiled
def step(w: Any, g: int) -> None:
    """Process the next event of group ``g``, and that alone. There must be one."""
    group = group_at(w, g)
    if group.end_s <= group.flush_s and group.end_s <= group.dispatch_s:
        _complete(w, g)
    elif group.flush_s <= group.dispatch_s:
        now = group.flush_s
        wake(w, g, flush(w, g), now)
    else:
        dispatch(w, g, group.dispatch_s)


@compiled
def advance_group(w: Any, g: int, until_s: float, priority: int) -> None:
    """Process every event of group ``g`` that comes before (``until_s``, ``priority``)."""
    group = group_at(w, g)
    while True:
        end_s, flush_s, dispatch_s = group.end_s, group.flush_s, group.dispatch_s
        if end_s <= flush_s and end_s <= dispatch_s:
            if end_s > until_s or (end_s == until_s and priority <= COMPLETION) or end_s == np.inf:
                return
            _complete(w, g)
        elif flush_s <= dispatch_s:
            if flush_s > until_s or (flush_s == until_s and priority <= FLUSH):
                return
            r = flush(w, g)
            wake(w, g, r, flush_s)
        else:
            if dispatch_s > until_s or (dispatch_s == until_s and priority <= DISPATCH):
                return
            dispatch(w, g, dispatch_s)
