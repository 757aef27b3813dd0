"""The pool of requests in flight, and the queues, batches and bundles that are made of its slots.

A queue is a list of what entered in the order of its keys, which costs nothing to keep, and a pairing heap (Fredman,
Sedgewick, Sleator, Tarjan, Algorithmica 1986) of what did not: constant time to enter, logarithmic amortised to leave,
however much the deadlines of one queue vary. Its head is the smaller of the two by (key, sequence).
"""

# mypy: disable-error-code="no-any-return"
# Records and their fields have no types for mypy.

from __future__ import annotations

from typing import Any

import numpy as np

from evaluator.access import group_at, head_keys, replica_at, slot_at
from evaluator.generation import turn_key
from evaluator.memory import compiled, featured, int64
from evaluator.state import NOWHERE

__all__ = ["enqueue", "first_slot", "free_slot", "pop", "set_head_key", "take_slot", "withdraw"]


@compiled
def take_slot(w: Any) -> int:
    """Return a free slot with its links cleared. There must be one: `World.free` is not NOWHERE."""
    slot = w.free
    w.free = slot_at(w, slot).after
    w.in_use += 1
    if w.in_use > w.most_in_use:
        w.most_in_use = w.in_use
    slot_at(w, slot).frames = 1
    slot_at(w, slot).frame_after = NOWHERE
    slot_at(w, slot).stream = NOWHERE
    slot_at(w, slot).retries = 0
    slot_at(w, slot).waiting = 0
    slot_at(w, slot).withdrawn = 0
    return slot


@compiled
def free_slot(w: Any, slot: int) -> None:
    """Give ``slot`` back."""
    slot_at(w, slot).after = w.free
    w.free = slot
    w.in_use -= 1


@compiled
def _before(w: Any, one: int, other: int) -> bool:
    """Say whether slot ``one`` goes before slot ``other``."""
    if slot_at(w, one).key != slot_at(w, other).key:
        return slot_at(w, one).key < slot_at(w, other).key
    return slot_at(w, one).sequence < slot_at(w, other).sequence


@compiled
def _melded(w: Any, one: int, other: int) -> int:
    """Return the root of the heaps with roots ``one`` and ``other`` together."""
    if _before(w, other, one):
        one, other = other, one
    slot_at(w, other).sibling = slot_at(w, one).child
    slot_at(w, one).child = other
    return one


@compiled
def _without_root(w: Any, root: int) -> int:
    """Return the root of the heap without its root: pair the children from the left, meld the pairs from the right."""
    child = int64(slot_at(w, root).child)
    pairs = int64(NOWHERE)
    while child != NOWHERE:
        partner = int64(slot_at(w, child).sibling)
        if partner == NOWHERE:
            slot_at(w, child).sibling = pairs
            pairs = child
            break
        rest = int64(slot_at(w, partner).sibling)
        pair = _melded(w, child, partner)
        slot_at(w, pair).sibling = pairs
        pairs = pair
        child = rest
    if pairs == NOWHERE:
        return pairs
    root = pairs
    pairs = int64(slot_at(w, root).sibling)
    while pairs != NOWHERE:
        rest = int64(slot_at(w, pairs).sibling)
        root = _melded(w, root, pairs)
        pairs = rest
    slot_at(w, root).sibling = NOWHERE
    return root


@compiled
def first_slot(w: Any, r: int) -> int:
    """Return the slot at the head of the queue of replica ``r``; NOWHERE when it is empty."""
    replica = replica_at(w, r)
    if replica.heap == NOWHERE:
        return replica.head
    if replica.head == NOWHERE or _before(w, replica.heap, replica.head):
        return replica.heap
    return replica.head


@compiled
def set_head_key(w: Any, r: int) -> None:
    """Find out anew by which key replica ``r`` asks for its turn; inf: it has nothing to do."""
    slot = first_slot(w, r)
    key = np.inf if slot == NOWHERE else slot_at(w, slot).key
    head_keys(w)[r] = min(key, _turn_key(w, r))


@featured("generation", nothing=np.inf)
def _turn_key(w: Any, r: int) -> float:
    """Return by which key the running sequences of ``r`` ask for its turn; inf: none run."""
    if w.generation != 0 and replica_at(w, r).generates != NOWHERE:
        return turn_key(w, int64(replica_at(w, r).generates))
    return np.inf


@compiled
def enqueue(w: Any, slot: int) -> None:
    """Put ``slot`` into the queue of its replica by its key and sequence."""
    r = slot_at(w, slot).replica
    replica = replica_at(w, r)
    group = group_at(w, replica.group)
    frames = slot_at(w, slot).frames
    replica.queued += frames
    group.queued += frames
    for _ in range(frames):
        group.work_s += replica.share_s
    slot_at(w, slot).waiting = 1
    slot_at(w, slot).after = NOWHERE
    tail = replica.tail
    if tail == NOWHERE:
        replica.head = slot
        replica.tail = slot
    elif not _before(w, slot, tail):
        slot_at(w, tail).after = slot
        replica.tail = slot
    else:
        slot_at(w, slot).child = NOWHERE
        slot_at(w, slot).sibling = NOWHERE
        replica.heap = slot if replica.heap == NOWHERE else _melded(w, replica.heap, slot)
    if slot_at(w, slot).key < head_keys(w)[r]:
        head_keys(w)[r] = slot_at(w, slot).key


@compiled
def _unlink_first(w: Any, r: int) -> int:
    replica = replica_at(w, r)
    slot = first_slot(w, r)
    if slot == replica.head:
        replica.head = slot_at(w, slot).after
        if replica.head == NOWHERE:
            replica.tail = NOWHERE
    else:
        replica.heap = _without_root(w, slot)
    slot_at(w, slot).waiting = 0
    return slot


@compiled
def _leave(w: Any, r: int, frames: int) -> None:
    """Take ``frames`` requests off the counts of the queue of ``r``."""
    replica = replica_at(w, r)
    group = group_at(w, replica.group)
    replica.queued -= frames
    group.queued -= frames
    if group.queued == 0:
        group.work_s = 0.0
    else:
        for _ in range(frames):
            group.work_s -= replica.share_s


@compiled
def _free_withdrawn(w: Any, r: int) -> None:
    """Free the slots at the head of the queue of ``r`` that were withdrawn."""
    slot = first_slot(w, r)
    while slot != NOWHERE and slot_at(w, slot).withdrawn:
        _unlink_first(w, r)
        free_slot(w, slot)
        slot = first_slot(w, r)


@compiled
def pop(w: Any, r: int) -> int:
    """Take the head out of the queue of replica ``r``, which must not be empty, and return its slot."""
    slot = _unlink_first(w, r)
    _leave(w, r, slot_at(w, slot).frames)
    if w.withdrawals:
        _free_withdrawn(w, r)
    set_head_key(w, r)
    return slot


@compiled
def withdraw(w: Any, slot: int) -> None:
    """Take ``slot`` out of its queue from wherever it is; its slot is freed when it comes to the head.

    Only where `Rules.withdrawals` is set, and only slots without further frames.
    """
    r = slot_at(w, slot).replica
    slot_at(w, slot).waiting = 0
    slot_at(w, slot).withdrawn = 1
    _leave(w, r, 1)
    _free_withdrawn(w, r)
    set_head_key(w, r)
