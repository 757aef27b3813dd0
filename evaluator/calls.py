"""Instances of workflows in a run: what is drawn, released, joined and lost (docs/evaluator.md, section 11).

An instance is known by the slot of its first call; all slots of its calls are taken when it arrives and given back when
it ends. Calls that run or travel on at that time are orphans, and give theirs back when that is over.
"""

# mypy: disable-error-code="no-any-return"
# Records and their fields have no types for mypy.

from __future__ import annotations

from typing import Any

import numpy as np

from evaluator import rules
from evaluator.access import floats, replica_at, slot_at
from evaluator.extras import (
    ENDED,
    IDLE,
    INSIDE,
    ORPHANED,
    TRANSIT,
    call_at,
    flow_at,
    flow_edge_at,
    flow_stage_at,
    instance_at,
    instance_stage_at,
    place_at,
    small_of,
    taken_of,
)
from evaluator.memory import compiled, int64
from evaluator.queues import free_slot, take_slot, withdraw
from evaluator.recording import record
from evaluator.state import GOOD, LATE, NOWHERE

__all__ = [
    "begin_instance",
    "complete_instance",
    "draw_instance",
    "finish_call",
    "is_released_by",
    "longest_transfer_s",
    "lose_call",
    "note_ended",
    "touch",
]


@compiled
def touch(w: Any, r: int) -> None:
    """Note that the group of ``r`` may have to look again."""
    small_of(w.touched, w.touched_count + 1)[w.touched_count] = r
    w.touched_count += 1


@compiled
def note_ended(w: Any, slot: int) -> None:
    """Note that a call has finished; what follows from it is done when the event is over."""
    small_of(w.ended, w.ended_count + 1)[w.ended_count] = slot
    w.ended_count += 1


@compiled
def draw_instance(w: Any, workflow: int, position: int) -> int:
    """Draw the calls of each edge and stage of an instance (their ``drawn``); return how many calls that makes."""
    flow = flow_at(w, workflow)
    for edge in range(flow.edges):
        flow_edge_at(w, workflow, edge).drawn = 0
    total = 0
    for stage in range(flow.stages):
        calls = int64(1 if flow_stage_at(w, workflow, stage).entry else 0)
        for edge in range(flow.edges):
            if flow_edge_at(w, workflow, edge).target == stage:
                calls = max(calls, flow_edge_at(w, workflow, edge).drawn)
        flow_stage_at(w, workflow, stage).drawn = calls
        total += calls
        if calls > 0:
            _draw_edges(w, workflow, stage, position)
    return total


@compiled
def _draw_edges(w: Any, workflow: int, stage: int, position: int) -> None:
    """Draw the calls of the edges that leave a stage which is not skipped."""
    calls = flow_stage_at(w, workflow, stage).drawn
    u = rules.draw(w.seed, rules.DRAW_SWITCHES, position * 256 + stage)
    below = 0.0
    chosen = False
    for number in range(flow_at(w, workflow).edges):
        edge = flow_edge_at(w, workflow, number)
        if edge.source != stage:
            continue
        if not np.isnan(edge.probability):
            below += edge.probability
            if chosen or below <= u:
                continue
            chosen = True
        part = rules.draw(w.seed, rules.DRAW_EDGES, position * 256 + number)
        edge.drawn = int(np.floor(edge.fanout * calls + part + 1e-9))


@compiled
def begin_instance(w: Any, workflow: int, position: int) -> int:
    """Make the calls of the instance that was drawn last; return its lead. There must be slots enough."""
    flow = flow_at(w, workflow)
    lead = int64(NOWHERE)
    last = int64(NOWHERE)
    for stage in range(flow.stages):
        for number in range(flow_stage_at(w, workflow, stage).drawn):
            slot = _take_call(w, workflow, stage, position)
            if lead == NOWHERE:
                lead = slot
            else:
                call_at(w, last).after = slot
            call_at(w, slot).lead = lead
            if number == 0:
                instance_stage_at(w, lead, stage).first = slot
            last = slot
    instance = instance_at(w, lead)
    instance.workflow = workflow
    instance.over = 0
    instance.released_calls = 0
    instance.open_last = 0
    for edge in range(flow.edges):
        taken_of(w, lead)[edge] = flow_edge_at(w, workflow, edge).drawn > 0
    for stage in range(flow.stages):
        part = instance_stage_at(w, lead, stage)
        part.calls = flow_stage_at(w, workflow, stage).drawn
        part.unfinished = part.calls
        part.lost = 0
        part.released = 0
        if _is_last(w, lead, stage):
            instance.open_last += part.calls
    return lead


@compiled
def _take_call(w: Any, workflow: int, stage: int, position: int) -> int:
    """Return a slot for a call that is not released."""
    slot = int64(take_slot(w))
    request = slot_at(w, slot)
    arrival_s = floats(w.arrival_s, w.request_count)[position]
    request.position = position
    request.service = flow_stage_at(w, workflow, stage).service
    request.arrival_s = arrival_s
    request.deadline_s = arrival_s + flow_at(w, workflow).deadline_s - flow_stage_at(w, workflow, stage).tail_s
    request.due_s = request.deadline_s - w.response_s
    request.replica = NOWHERE
    call = call_at(w, slot)
    call.stage = stage
    call.after = NOWHERE
    call.state = IDLE
    return slot


@compiled
def _is_last(w: Any, lead: int, stage: int) -> bool:
    """Say whether no taken edge leaves ``stage``."""
    workflow = instance_at(w, lead).workflow
    for edge in range(flow_at(w, workflow).edges):
        if flow_edge_at(w, workflow, edge).source == stage and taken_of(w, lead)[edge]:
            return False
    return True


@compiled
def _transfer_s(w: Any, source: int, target: int, payload_bytes: float) -> float:
    """Return the seconds that ``payload_bytes`` take from group ``source`` to group ``target``."""
    if source == target:
        return 0.0
    if place_at(w, source).node == place_at(w, target).node:
        return float(payload_bytes / place_at(w, source).intra_bandwidth)
    return float(w.network_latency_s + payload_bytes / w.network_bandwidth)


@compiled
def longest_transfer_s(w: Any, lead: int, stage: int, by: int, group: int) -> float:
    """Return the longest transfer to a call of ``stage`` on ``group``, over the inputs that released it.

    Args:
        w: The world.
        lead: The instance.
        stage: The stage released.
        by: Slot of the call that released it, for a join of any; NOWHERE for all calls of all taken sources.
        group: Where the call goes.
    """
    workflow = instance_at(w, lead).workflow
    longest_s = 0.0
    for number in range(flow_at(w, workflow).edges):
        edge = flow_edge_at(w, workflow, number)
        if edge.target != stage or not taken_of(w, lead)[number]:
            continue
        if by != NOWHERE and call_at(w, by).stage != edge.source:
            continue
        slot = int64(instance_stage_at(w, lead, edge.source).first) if by == NOWHERE else by
        for _ in range(instance_stage_at(w, lead, edge.source).calls if by == NOWHERE else 1):
            came_from = int64(replica_at(w, slot_at(w, slot).replica).group)
            longest_s = max(longest_s, _transfer_s(w, came_from, group, edge.payload_bytes))
            slot = int64(call_at(w, slot).after)
    return longest_s


@compiled
def is_released_by(w: Any, lead: int, stage: int, source: int) -> bool:
    """Say whether ``stage`` is to be released now that a call of stage ``source`` has finished."""
    if instance_stage_at(w, lead, stage).released:
        return False
    workflow = instance_at(w, lead).workflow
    concerned = False
    complete = True
    for number in range(flow_at(w, workflow).edges):
        edge = flow_edge_at(w, workflow, number)
        if edge.target == stage and taken_of(w, lead)[number]:
            concerned = concerned or edge.source == source
            complete = complete and instance_stage_at(w, lead, edge.source).unfinished == 0
    return concerned and (complete or flow_stage_at(w, workflow, stage).join_any != 0)


@compiled
def _forget(w: Any, slot: int) -> None:
    """Free the slot of a call."""
    call_at(w, slot).lead = NOWHERE
    free_slot(w, slot)


@compiled
def finish_call(w: Any, slot: int) -> bool:
    """Take in that a call has finished. An orphan is freed; say whether it was none."""
    call = call_at(w, slot)
    if call.state == ORPHANED:
        _forget(w, slot)
        return False
    call.state = ENDED
    instance_stage_at(w, call.lead, call.stage).unfinished -= 1
    if _is_last(w, call.lead, call.stage):
        instance_at(w, call.lead).open_last -= 1
    return True


@compiled
def complete_instance(w: Any, lead: int, end_s: float) -> None:
    """End an instance of which all is finished."""
    finish_s = end_s + w.response_s
    deadline_s = slot_at(w, lead).arrival_s + flow_at(w, instance_at(w, lead).workflow).deadline_s
    _end_instance(w, lead, GOOD if finish_s <= deadline_s else LATE, finish_s)


@compiled
def lose_call(w: Any, slot: int, code: int, now: float) -> None:
    """Take in that a call, which is in no queue any more, was dropped or failed."""
    call = call_at(w, slot)
    if call.state == ORPHANED:
        _forget(w, slot)
        return
    call.state = ENDED
    lead = int64(call.lead)
    instance_stage_at(w, lead, call.stage).lost += 1
    workflow = instance_at(w, lead).workflow
    fatal = True
    for number in range(flow_at(w, workflow).edges):
        edge = flow_edge_at(w, workflow, number)
        if edge.source == call.stage and taken_of(w, lead)[number]:
            by_all = flow_stage_at(w, workflow, edge.target).join_any == 0
            fatal = by_all or _has_lost_all(w, lead, edge.target)
            if fatal:
                break
    if fatal:
        _end_instance(w, lead, code, now)


@compiled
def _has_lost_all(w: Any, lead: int, stage: int) -> bool:
    """Say whether ``stage`` is not released and every call of each of its taken sources was lost."""
    if instance_stage_at(w, lead, stage).released:
        return False
    workflow = instance_at(w, lead).workflow
    for number in range(flow_at(w, workflow).edges):
        edge = flow_edge_at(w, workflow, number)
        if edge.target == stage and taken_of(w, lead)[number]:
            source = instance_stage_at(w, lead, edge.source)
            if source.lost < source.calls:
                return False
    return True


@compiled
def _end_instance(w: Any, lead: int, code: int, end_s: float) -> None:
    """End an instance, take its calls out of the queues, and free its slots."""
    request = slot_at(w, lead)
    instance_at(w, lead).over = 1
    row = w.service_count - w.flow_count + instance_at(w, lead).workflow
    record(w, request.position, row, request.arrival_s, code, end_s, NOWHERE, 0)
    slot = lead
    while slot != NOWHERE:
        call = call_at(w, slot)
        following = int64(call.after)
        r = int64(slot_at(w, slot).replica)
        if call.state == TRANSIT:
            if r != NOWHERE:
                replica_at(w, r).open -= 1
            call.state = ORPHANED
        elif call.state == INSIDE and slot_at(w, slot).waiting:
            replica_at(w, r).open -= 1
            call.lead = NOWHERE
            withdraw(w, slot)
            touch(w, r)
        elif call.state == INSIDE:
            call.state = ORPHANED
        else:
            _forget(w, slot)
        slot = following
