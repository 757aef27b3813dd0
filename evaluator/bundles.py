"""Multi-frame: frames of one stream gather at their replica and enter its queue together."""

# mypy: disable-error-code="no-any-return"
# Records and their fields have no types for mypy.

from __future__ import annotations

from typing import Any

import numpy as np

from evaluator.access import group_at, replica_at, slot_at, stream_at
from evaluator.memory import compiled
from evaluator.queues import enqueue
from evaluator.state import NOWHERE

__all__ = ["flush", "gather"]


@compiled
def gather(w: Any, slot: int, now: float) -> bool:
    """Let a frame that came to its replica join its stream's bundle there; say whether that entered the queue."""
    r = slot_at(w, slot).replica
    replica = replica_at(w, r)
    lead = _gathering(w, slot)
    if lead == NOWHERE:
        slot_at(w, slot).end_s = slot_at(w, slot).due_s - replica.largest_s
        slot_at(w, slot).sequence = w.sequence
        w.sequence += 1
        if slot_at(w, slot).end_s <= now:
            _enter(w, slot)
            return True
        slot_at(w, slot).child = slot
        _insert(w, r, slot)
        stream_at(w, slot_at(w, slot).stream).gather = slot
        _set_flush(w, replica.group)
        return False
    slot_at(w, slot_at(w, lead).child).frame_after = slot
    slot_at(w, lead).child = slot
    slot_at(w, lead).frames += 1
    if slot_at(w, lead).frames < replica.frames:
        return False
    _remove(w, r, lead)
    _enter(w, lead)
    return True


@compiled
def flush(w: Any, g: int) -> int:
    """Let the bundle of ``g`` whose time has come enter its queue; return its replica."""
    lead = _first(w, g)
    r = slot_at(w, lead).replica
    _remove(w, r, lead)
    _enter(w, lead)
    return r


@compiled
def _gathering(w: Any, slot: int) -> int:
    """Return the lead of the bundle that the frame joins, or NOWHERE."""
    stream = stream_at(w, slot_at(w, slot).stream)
    r = slot_at(w, slot).replica
    if stream.gather != NOWHERE and slot_at(w, stream.gather).replica == r:
        return stream.gather
    if stream.moved:  # it may be back where an earlier bundle still gathers
        lead = replica_at(w, r).gather
        while lead != NOWHERE:
            if slot_at(w, lead).stream == slot_at(w, slot).stream:
                stream.gather = lead
                return lead
            lead = slot_at(w, lead).batch_after
    return NOWHERE


@compiled
def _enter(w: Any, lead: int) -> None:
    slot_at(w, lead).sequence = w.sequence
    w.sequence += 1
    enqueue(w, lead)


@compiled
def _insert(w: Any, r: int, lead: int) -> None:
    """Put a bundle among those that gather at ``r``, in the order of their times; new ones mostly come last."""
    replica = replica_at(w, r)
    before = replica.gather_last
    while before != NOWHERE and slot_at(w, before).end_s > slot_at(w, lead).end_s:
        before = slot_at(w, before).sibling
    after = replica.gather if before == NOWHERE else slot_at(w, before).batch_after
    slot_at(w, lead).sibling = before
    slot_at(w, lead).batch_after = after
    if before == NOWHERE:
        replica.gather = lead
    else:
        slot_at(w, before).batch_after = lead
    if after == NOWHERE:
        replica.gather_last = lead
    else:
        slot_at(w, after).sibling = lead


@compiled
def _remove(w: Any, r: int, lead: int) -> None:
    replica = replica_at(w, r)
    before, after = slot_at(w, lead).sibling, slot_at(w, lead).batch_after
    if before == NOWHERE:
        replica.gather = after
    else:
        slot_at(w, before).batch_after = after
    if after == NOWHERE:
        replica.gather_last = before
    else:
        slot_at(w, after).sibling = before
    stream = stream_at(w, slot_at(w, lead).stream)
    if stream.gather == lead:
        stream.gather = NOWHERE
    _set_flush(w, replica.group)


@compiled
def _first(w: Any, g: int) -> int:
    """Return the lead of the bundle of ``g`` whose time comes first, of equals the one that began first."""
    first = NOWHERE
    for r in range(group_at(w, g).first, group_at(w, g).last):
        lead = replica_at(w, r).gather
        if lead == NOWHERE:
            continue
        if (
            first == NOWHERE
            or slot_at(w, lead).end_s < slot_at(w, first).end_s
            or (
                slot_at(w, lead).end_s == slot_at(w, first).end_s
                and slot_at(w, lead).sequence < slot_at(w, first).sequence
            )
        ):
            first = lead
    return first


@compiled
def _set_flush(w: Any, g: int) -> None:
    first = _first(w, g)
    group_at(w, g).flush_s = np.inf if first == NOWHERE else slot_at(w, first).end_s
