"""The order of events across groups: a tournament of their next events, and a heap of what enters later."""

# mypy: disable-error-code="no-any-return"
# Records and their fields have no types for mypy.

from __future__ import annotations

from typing import Any

import numpy as np

from evaluator.access import group_at
from evaluator.extras import agenda_at, call_at, small_of
from evaluator.memory import compiled, inlined, int64
from evaluator.state import NOWHERE

__all__ = ["first_group", "first_pending_s", "note_group", "pop_pending", "push_pending", "rebuild"]

_COMPLETION, _FLUSH, _DISPATCH = 1, 3, 4


@compiled
def _look(w: Any, g: int) -> None:
    """Read the next event of group ``g``."""
    group = group_at(w, g)
    entry = agenda_at(w, g)
    if group.end_s <= group.flush_s and group.end_s <= group.dispatch_s:
        entry.next_s = group.end_s
        entry.priority = _COMPLETION
    elif group.flush_s <= group.dispatch_s:
        entry.next_s = group.flush_s
        entry.priority = _FLUSH
    else:
        entry.next_s = group.dispatch_s
        entry.priority = _DISPATCH


@compiled
def _winner(w: Any, one: int, other: int) -> int:
    """Return the group whose event comes first; ``one`` has the smaller position."""
    if one == NOWHERE:
        return other
    if other == NOWHERE:
        return one
    first, second = agenda_at(w, one), agenda_at(w, other)
    if second.next_s < first.next_s or (second.next_s == first.next_s and second.priority < first.priority):
        return other
    return one


@compiled
def note_group(w: Any, g: int) -> None:
    """Something happened to group ``g``: find out anew whose event is first."""
    _look(w, g)
    tree = small_of(w.tree, 2 * w.leaves)
    node = (w.leaves + g) // 2
    while node >= 1:
        tree[node] = _winner(w, int64(tree[2 * node]), int64(tree[2 * node + 1]))
        node //= 2


@compiled
def rebuild(w: Any) -> None:
    """Find out anew what the next event of every group is."""
    tree = small_of(w.tree, 2 * w.leaves)
    tree[:] = NOWHERE
    for g in range(w.group_count):
        _look(w, g)
        tree[w.leaves + g] = g
    for node in range(w.leaves - 1, 0, -1):
        tree[node] = _winner(w, int64(tree[2 * node]), int64(tree[2 * node + 1]))


@inlined
def first_group(w: Any) -> int:
    """Return the group whose event is first; NOWHERE when there is no group."""
    return int64(small_of(w.tree, 2)[1])


@compiled
def _earlier(w: Any, one: int, other: int) -> bool:
    first, second = call_at(w, one), call_at(w, other)
    return first.enter_s < second.enter_s or (first.enter_s == second.enter_s and first.order < second.order)


@compiled
def push_pending(w: Any, slot: int, enter_s: float) -> None:
    """Let ``slot`` enter at ``enter_s``."""
    call_at(w, slot).enter_s = enter_s
    call_at(w, slot).order = w.pending_order
    w.pending_order += 1
    place = w.pending_count
    w.pending_count += 1
    heap = small_of(w.pending, w.pending_count)
    while place > 0 and _earlier(w, slot, int64(heap[(place - 1) // 2])):
        heap[place] = heap[(place - 1) // 2]
        place = (place - 1) // 2
    heap[place] = slot


@compiled
def first_pending_s(w: Any) -> float:
    """Return when the next of what enters later does; inf without any."""
    if w.pending_count == 0:
        return np.inf
    return float(call_at(w, int64(small_of(w.pending, 1)[0])).enter_s)


@compiled
def pop_pending(w: Any) -> int:
    """Take out what enters next."""
    heap = small_of(w.pending, w.pending_count)
    top = int64(heap[0])
    w.pending_count -= 1
    size = w.pending_count
    slot = int64(heap[size])
    place = 0
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and _earlier(w, int64(heap[child + 1]), int64(heap[child])):
            child += 1
        if not _earlier(w, int64(heap[child]), slot):
            break
        heap[place] = heap[child]
        place = child
    heap[place] = slot
    return top
