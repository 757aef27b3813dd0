"""The single pass over part of a cluster, with batches: what a search needs that changes a few groups at a time.

A *standing* outcome of a block of arrivals is known request by request. When some groups change, only the services on
these groups choose anew, among all of their groups; every other request that went to one of those groups goes there
again, and may fare differently; all others are as they were. With every service choosing anew, this is the single pass
as `evaluator.single_pass` knows it.

Batches: a group keeps the batches that have not begun, in the order of their first requests. A request joins the
earliest of its own option that has room as long as no batch then ends late, else it begins one behind the last; a batch
begins when the one before has left the first stage, and never waits for company. So what is accepted is in time, as
without batches, where this is the same.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluator.memory import compiled, inlined

__all__ = ["Clocks", "Standing", "Traffic", "clocks_of", "serve_again", "standing_of"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Indices = NDArray[np.int32]

_MOST_WAITING = 32
"""Batches of a group that have not begun; what would begin one more is turned away."""


class Traffic(NamedTuple):
    """Arrivals in blocks, and what may serve them.

    Attributes:
        arrival_s: Shape (request,): seconds since the start of the block, sorted within each.
        service: Shape (request,): position of the service.
        first: Shape (block + 1,): block b is requests first[b] to first[b + 1].
        counted: Shape (block,): the first request of each block that counts; those before warm it up.
        deadline_s: Shape (service,): seconds from arrival within which a request is good.
        stage_s: Shape (option, largest batch, stage): seconds that a batch of b + 1 holds each stage.
        stages: Shape (option,): its stages.
        largest: Shape (option,): its largest batch.
        least_finish: Shape (1,): 1 where a request goes where it would finish first, 0 where the last work ends first.
    """

    arrival_s: Floats
    service: Indices
    first: Integers
    counted: Integers
    deadline_s: Floats
    stage_s: Floats
    stages: Indices
    largest: Indices
    least_finish: Indices


class Standing(NamedTuple):
    """The standing outcome of every request: shape (request,) each.

    Attributes:
        slot: Group that it went to, -1 without one.
        option: What served it there.
        good: Whether it was accepted.
    """

    slot: Indices
    option: Indices
    good: NDArray[np.bool_]


class Clocks(NamedTuple):
    """Scratch of one run.

    Attributes:
        free_s: Shape (slot, stage): when each stage is free of what has begun.
        tail_s: Shape (slot, stage): when it is free of what waits too.
        waiting: Shape (slot,): batches that have not begun.
        of: Shape (slot, batch, 2): option and size of each.
        ready_s: Shape (slot, batch): when its first request came.
        due_s: Shape (slot, batch): when it has to end.
        trial_s: Shape (1, stage).
    """

    free_s: Floats
    tail_s: Floats
    waiting: Indices
    of: Indices
    ready_s: Floats
    due_s: Floats
    trial_s: Floats


def standing_of(requests: int) -> Standing:
    """Return the outcome of ``requests`` requests that went nowhere."""
    nowhere = np.full(requests, -1, dtype=np.int32)
    return Standing(slot=nowhere, option=nowhere.copy(), good=np.zeros(requests, dtype=np.bool_))


def clocks_of(slots: int, stages: int) -> Clocks:
    """Return scratch for a cluster of ``slots`` GPUs and pipelines of up to ``stages`` stages."""
    return Clocks(
        free_s=np.zeros((slots, stages)),
        tail_s=np.zeros((slots, stages)),
        waiting=np.zeros(slots, dtype=np.int32),
        of=np.zeros((slots, _MOST_WAITING, 2), dtype=np.int32),
        ready_s=np.zeros((slots, _MOST_WAITING)),
        due_s=np.zeros((slots, _MOST_WAITING)),
        trial_s=np.zeros((1, stages)),
    )


@inlined
def _later(one_s: float, other_s: float) -> float:
    return one_s if one_s > other_s else other_s  # noqa: FURB136 - numba's max also looks for NaN


@inlined
def _walk(stages: int, entry_s: float, clock_s: Floats, slot: int, stage_s: Floats, option: int, size: int) -> float:
    """Return when a batch leaves the last stage: it begins each when done with the one before and it is free."""
    end_s = entry_s
    for stage in range(stages):
        end_s = _later(end_s, clock_s[slot, stage]) + stage_s[option, size - 1, stage]
    return end_s


@inlined
def _reserve(stages: int, entry_s: float, clock_s: Floats, slot: int, stage_s: Floats, option: int, size: int) -> float:
    """Return the same, and move the clocks."""
    end_s = entry_s
    for stage in range(stages):
        end_s = _later(end_s, clock_s[slot, stage]) + stage_s[option, size - 1, stage]
        clock_s[slot, stage] = end_s
    return end_s


@compiled
def _begin(t: Traffic, c: Clocks, slot: int, now: float) -> None:
    """Let the batches of ``slot`` begin that begin by ``now``."""
    begun, waiting = 0, c.waiting[slot]
    while begun < waiting and _later(c.free_s[slot, 0], c.ready_s[slot, begun]) <= now:
        option = c.of[slot, begun, 0]
        _reserve(t.stages[option], c.ready_s[slot, begun], c.free_s, slot, t.stage_s, option, c.of[slot, begun, 1])
        begun += 1
    if begun == 0:
        return
    c.waiting[slot] = waiting - begun
    for batch in range(waiting - begun):
        c.of[slot, batch, 0], c.of[slot, batch, 1] = c.of[slot, batch + begun, 0], c.of[slot, batch + begun, 1]
        c.ready_s[slot, batch] = c.ready_s[slot, batch + begun]
        c.due_s[slot, batch] = c.due_s[slot, batch + begun]


@compiled
def _join(t: Traffic, c: Clocks, slot: int, option: int, due_s: float) -> bool:
    """Add a request to the earliest batch of ``option`` with room, unless that makes one late."""
    joined, stages = -1, c.trial_s.shape[1]
    for batch in range(c.waiting[slot]):
        if c.of[slot, batch, 0] == option and c.of[slot, batch, 1] < t.largest[option]:
            joined = batch
            break
    if joined < 0:
        return False
    for stage in range(stages):
        c.trial_s[0, stage] = c.free_s[slot, stage]
    for batch in range(c.waiting[slot]):
        kind, size = c.of[slot, batch, 0], c.of[slot, batch, 1] + (batch == joined)
        end_s = _reserve(t.stages[kind], c.ready_s[slot, batch], c.trial_s, 0, t.stage_s, kind, size)
        if batch >= joined and (end_s > c.due_s[slot, batch] or (batch == joined and end_s > due_s)):
            return False
    c.of[slot, joined, 1] += 1
    c.due_s[slot, joined] = min(c.due_s[slot, joined], due_s)
    for stage in range(stages):
        c.tail_s[slot, stage] = c.trial_s[0, stage]
    return True


@compiled
def _batched(t: Traffic, c: Clocks, slot: int, option: int, now: float, due_s: float) -> bool:
    """Admit a request to a group with batches."""
    _begin(t, c, slot, now)
    if _join(t, c, slot, option, due_s):
        return True
    batch = c.waiting[slot]
    if batch == _MOST_WAITING or _walk(t.stages[option], now, c.tail_s, slot, t.stage_s, option, 1) > due_s:
        return False
    c.of[slot, batch, 0], c.of[slot, batch, 1] = option, 1
    c.ready_s[slot, batch], c.due_s[slot, batch] = now, due_s
    c.waiting[slot] = batch + 1
    _reserve(t.stages[option], now, c.tail_s, slot, t.stage_s, option, 1)
    return True


@compiled
def serve_again(  # noqa: C901 - one loop over the arrivals, with nothing called that is not copied into it
    t: Traffic,
    s: Standing,
    c: Clocks,
    block: int,
    count: Indices,
    slot: Indices,
    option: Indices,
    chooses: NDArray[np.bool_],
    within: NDArray[np.bool_],
    value: Floats,
    good: Integers,
    worth: Floats,
    changed: Indices,
    changes: int,
) -> int:
    """Serve the requests of one block that concern the groups ``within``; return the number of ``changes`` after it.

    Args:
        t: The arrivals.
        s: Their standing outcome, which stays as it is.
        c: Scratch.
        block: Which block.
        count: Shape (service,): replicas.
        slot: Shape (service, replica): where they are.
        option: Shape (service, replica): what they are.
        chooses: Shape (service,): whether its requests choose anew; all of its groups are ``within``.
        within: Shape (slot,): the groups that are simulated.
        value: Shape (option,): what a request served in time counts.
        good: Shape (service,): the change of requests served in time is added here, of those that count.
        worth: Shape (service,): the change of what they count is added here.
        changed: Shape (request, 4): request, slot, option and whether accepted, of all that were served again.
        changes: Where in it to go on.
    """
    arrival_s, service, deadline_s, stages, stage_s = t.arrival_s, t.service, t.deadline_s, t.stages, t.stage_s
    old_slot, old_option, old_good, tail_s = s.slot, s.option, s.good, c.tail_s
    batching, least_finish = stage_s.shape[1] > 1, t.least_finish[0] > 0
    last, counted = tail_s.shape[1] - 1, t.counted[block]
    for each in range(len(within)):
        if within[each]:
            for stage in range(last + 1):
                c.free_s[each, stage] = tail_s[each, stage] = 0.0
            c.waiting[each] = 0
    for i in range(t.first[block], t.first[block + 1]):
        name, there, now = service[i], old_slot[i], arrival_s[i]
        if chooses[name]:
            there, what, earliest_s = -1, -1, np.inf
            for replica in range(count[name]):
                host = slot[name, replica]
                end_s = tail_s[host, last]
                if least_finish:
                    kind = option[name, replica]
                    end_s = _walk(stages[kind], now, tail_s, host, stage_s, kind, 1)
                if end_s < earliest_s:
                    earliest_s, there, what = end_s, host, option[name, replica]
        elif there >= 0 and within[there]:
            what = old_option[i]
        else:
            continue
        accepted = False
        if there >= 0:
            due_s = now + deadline_s[name]
            if batching:
                accepted = _batched(t, c, there, what, now, due_s)
            elif _walk(stages[what], now, tail_s, there, stage_s, what, 1) <= due_s:
                accepted = True
                _reserve(stages[what], now, tail_s, there, stage_s, what, 1)
        if accepted:
            # The last stage's clock is that of the whole group, however many stages its options have.
            tail_s[there, last] = tail_s[there, stages[what] - 1]
            if i >= counted:
                good[name] += 1
                worth[name] += value[what]
        if old_good[i] and i >= counted:
            good[name] -= 1
            worth[name] -= value[old_option[i]]
        changed[changes, 0], changed[changes, 1] = i, there
        changed[changes, 2], changed[changes, 3] = what, accepted
        changes += 1
    return changes
