"""The loop over time for runs in which groups depend on each other: every event in the order of its time.

Used where calls of workflows are released by what other groups finish, where what failed enters again, and where
groups share a GPU. Otherwise `evaluator.kernel` does the same faster.
"""

# mypy: disable-error-code="no-any-return"
# Records and their fields have no types for mypy.

from __future__ import annotations

from typing import Any

import numpy as np

from evaluator.access import floats, integers, replica_at, slot_at, small
from evaluator.agenda import first_group, first_pending_s, note_group, pop_pending, push_pending, rebuild
from evaluator.batching import step, wake
from evaluator.calls import (
    begin_instance,
    complete_instance,
    draw_instance,
    finish_call,
    is_released_by,
    longest_transfer_s,
    lose_call,
    touch,
)
from evaluator.extras import (
    INSIDE,
    ORPHANED,
    TRANSIT,
    agenda_at,
    call_at,
    flow_at,
    flow_stage_at,
    instance_at,
    instance_stage_at,
    small_of,
)
from evaluator.memory import compiled, int64
from evaluator.queues import free_slot
from evaluator.recording import record
from evaluator.routing import arrive, come_in, route, route_frame
from evaluator.state import NOWHERE, UNROUTED

__all__ = ["run_ordered"]

_ENTRY = 2
_CALLS = 4096
"""Calls of an instance that have draws of their own."""


@compiled
def run_ordered(w: Any, until_s: float, priority: int) -> bool:
    """Process every event before (until_s, priority), in order; say whether the pool was large enough for that."""
    rebuild(w)
    while True:
        g = first_group(w)
        event_s, event_priority = np.inf, int64(0)
        if g != NOWHERE:
            event_s, event_priority = agenda_at(w, g).next_s, agenda_at(w, g).priority
        sent_s = np.inf
        if w.cursor < w.request_count:
            sent_s = floats(w.arrival_s, w.request_count)[w.cursor] + w.overhead_s
        entry_s = min(sent_s, first_pending_s(w))
        is_entry = entry_s < event_s or (entry_s == event_s and event_priority > _ENTRY)
        now = entry_s if is_entry else event_s
        if now == np.inf or now > until_s:
            return True
        if now == until_s and priority <= (_ENTRY if is_entry else event_priority):
            return True
        if not is_entry:
            step(w, g)
            _take_in_ended(w, now)
            note_group(w, g)
        elif sent_s > entry_s:
            _enter(w, pop_pending(w), now)
        elif not _send(w, w.cursor, now):
            return False
        else:
            w.cursor += 1
        _look_again(w, now)


@compiled
def _look_again(w: Any, now: float) -> None:
    """Tell the agenda of every group that was touched."""
    for place in range(w.touched_count):
        r = int64(small_of(w.touched, w.touched_count)[place])
        g = int64(replica_at(w, r).group)
        if replica_at(w, r).queued > 0:
            wake(w, g, r, now)
        note_group(w, g)
    w.touched_count = 0


@compiled
def _send(w: Any, position: int, now: float) -> bool:
    """A row of the trace enters now; say whether the pool has room for it."""
    code = integers(w.code, w.request_count)[position]
    row = int64(small(w.service_of_code, code + 1)[code])
    workflow = row - (w.service_count - w.flow_count)
    if workflow < 0:
        if w.free == NOWHERE:
            return False
        g = arrive(w, position, now)
        if g != NOWHERE:
            note_group(w, g)
        return True
    if draw_instance(w, workflow, position) > w.slot_count - w.in_use:
        return False
    lead = begin_instance(w, workflow, position)
    for stage in range(flow_at(w, workflow).stages):
        if flow_stage_at(w, workflow, stage).entry and not instance_at(w, lead).over:
            _release(w, lead, stage, NOWHERE, now, True)
    return True


@compiled
def _release(w: Any, lead: int, stage: int, by: int, now: float, at_once: bool) -> None:
    """Route the calls of ``stage`` and let them enter, at once or after the transfer from what released them."""
    instance = instance_at(w, lead)
    instance_stage_at(w, lead, stage).released = 1
    slot = int64(instance_stage_at(w, lead, stage).first)
    position = slot_at(w, lead).position
    for _ in range(instance_stage_at(w, lead, stage).calls):
        call = call_at(w, slot)
        following = int64(call.after)
        call.number = instance.released_calls
        instance.released_calls += 1
        r = int64(route(w, int64(slot_at(w, slot).service), position * _CALLS + call.number, now))
        slot_at(w, slot).replica = r
        if r == NOWHERE:
            lose_call(w, slot, UNROUTED, now)
        elif at_once:
            _come_in(w, slot, now)
        else:
            replica_at(w, r).open += 1
            call.state = TRANSIT
            transfer_s = longest_transfer_s(w, lead, stage, by, int64(replica_at(w, r).group))
            push_pending(w, slot, now + transfer_s)
        if instance.over:
            return
        slot = following


@compiled
def _come_in(w: Any, slot: int, now: float) -> None:
    r = int64(slot_at(w, slot).replica)
    call_at(w, slot).state = INSIDE
    come_in(w, slot, now)
    touch(w, r)


@compiled
def _enter(w: Any, slot: int, now: float) -> None:
    """Something on its way arrives now; where its replica takes no requests any more it is routed anew."""
    call = call_at(w, slot)
    is_call = call.lead != NOWHERE
    if call.state == ORPHANED:
        call.lead = NOWHERE
        free_slot(w, slot)
        return
    request = slot_at(w, slot)
    r = int64(request.replica)
    if r != NOWHERE:
        replica_at(w, r).open -= 1
        if not floats(w.route_weight, w.replica_count)[replica_at(w, r).route] > 0.0:
            r = int64(NOWHERE)
    if r == NOWHERE:
        index = request.position * _CALLS + call.number if is_call else request.position
        if request.stream != NOWHERE:
            r = int64(route_frame(w, int64(request.stream), int64(request.service), index, now))
        else:
            r = int64(route(w, int64(request.service), index, now))
        request.replica = r
    if r != NOWHERE:
        _come_in(w, slot, now)
    elif is_call:
        lose_call(w, slot, UNROUTED, now)
    else:
        record(w, request.position, request.service, request.arrival_s, UNROUTED, now, NOWHERE, 0)
        free_slot(w, slot)


@compiled
def _take_in_ended(w: Any, now: float) -> None:
    """Release and end what the calls that finished just now release and end."""
    for place in range(w.ended_count):
        slot = int64(small_of(w.ended, w.ended_count)[place])
        lead = int64(call_at(w, slot).lead)
        stage = int64(call_at(w, slot).stage)
        if not finish_call(w, slot):
            continue
        instance = instance_at(w, lead)
        workflow = int64(instance.workflow)
        for target in range(stage + 1, flow_at(w, workflow).stages):
            if not instance.over and is_released_by(w, lead, target, stage):
                by_any = flow_stage_at(w, workflow, target).join_any != 0
                _release(w, lead, target, slot if by_any else int64(NOWHERE), now, False)
        if not instance.over and instance.open_last == 0:
            complete_instance(w, lead, now)
    w.ended_count = 0
