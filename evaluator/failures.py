"""What happens to a group that fails, and to what was on it (docs/evaluator.md, section 10)."""

# mypy: disable-error-code="no-any-return"
# Records and their fields have no types for mypy.

from __future__ import annotations

from typing import Any

import numpy as np

from evaluator import generation
from evaluator.access import free_of, group_at, replica_at, slot_at, stream_at
from evaluator.agenda import push_pending
from evaluator.calls import lose_call
from evaluator.extras import ORPHANED, TRANSIT, call_at, small_of
from evaluator.memory import compiled, int64
from evaluator.queues import free_slot, pop, set_head_key
from evaluator.recording import record
from evaluator.state import LOST, NOWHERE

__all__ = ["clear_group", "restart_group", "retry", "stop_group"]


@compiled
def stop_group(w: Any, g: int, now: float) -> None:
    """Let group ``g`` start and end nothing from now on. What runs stays where it is, to be found by `clear_group`."""
    group = group_at(w, g)
    if group.running != NOWHERE:
        w.last_s = max(w.last_s, now)
    group.busy_until_s = now
    group.stopped = 1
    group.end_s = np.inf
    group.dispatch_s = np.inf


@compiled
def restart_group(w: Any, g: int, now: float) -> None:
    """Let group ``g`` start again, with all of its stages free."""
    group_at(w, g).stopped = 0
    for stage in range(group_at(w, g).stages):
        free_of(w, g)[stage] = now


@compiled
def clear_group(w: Any, g: int, found: int, count: int) -> int:
    """Take everything off group ``g``.

    Args:
        w: The world.
        g: The group.
        found: Address of a list of slots (int32), long enough.
        count: How long that is.

    Returns:
        How long it is with the slots of what was there.
    """
    group = group_at(w, g)
    for r in range(group.first, group.last):
        replica = replica_at(w, r)
        while replica.queued > 0:
            count = _take_frames(w, int64(pop(w, r)), found, count)
        while replica.gather != NOWHERE:
            lead = int64(replica.gather)
            replica.gather = slot_at(w, lead).batch_after
            if stream_at(w, slot_at(w, lead).stream).gather == lead:
                stream_at(w, slot_at(w, lead).stream).gather = NOWHERE
            count = _take_frames(w, lead, found, count)
        replica.gather_last = NOWHERE
        if replica.generates != NOWHERE:
            rest = small_of(found + 4 * count, w.slot_count - count)
            count += generation.release_all(w, int64(replica.generates), rest)
            set_head_key(w, r)
    lead = int64(group.running)
    while lead != NOWHERE:
        following = int64(slot_at(w, lead).batch_after)
        slot = lead
        while slot != NOWHERE and replica_at(w, slot_at(w, lead).replica).generates == NOWHERE:
            small_of(found, w.slot_count)[count] = slot
            count += 1
            slot = int64(slot_at(w, slot).after)
        lead = following
    group.running = NOWHERE
    group.running_last = NOWHERE
    group.running_count = 0
    group.generating = 0
    group.flush_s = np.inf
    group.work_s = 0.0
    return count


@compiled
def _take_frames(w: Any, slot: int, found: int, count: int) -> int:
    while slot != NOWHERE:
        small_of(found, w.slot_count)[count] = slot
        count += 1
        slot = int64(slot_at(w, slot).frame_after)
    return count


@compiled
def retry(w: Any, slot: int, most: int, now: float) -> None:
    """Let a request that its group lost enter again now, or fail when it has been retried ``most`` times."""
    call = call_at(w, slot)
    request = slot_at(w, slot)
    is_call = call.lead != NOWHERE
    replica_at(w, request.replica).open -= 1
    if is_call and call.state == ORPHANED:
        call.lead = NOWHERE
        free_slot(w, slot)
    elif request.retries < most:
        request.retries += 1
        request.replica = NOWHERE
        request.frames = 1
        request.frame_after = NOWHERE
        request.due_s = request.deadline_s - w.response_s
        call.state = TRANSIT
        push_pending(w, slot, now)
    elif is_call:
        lose_call(w, slot, LOST, now)
    else:
        record(w, request.position, request.service, request.arrival_s, LOST, now, request.replica, 0)
        free_slot(w, slot)
