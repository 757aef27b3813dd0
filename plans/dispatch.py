"""The rules by which requests are routed, batched and dropped.

Pure functions on plain numbers and arrays: the executor calls them as they are, the evaluator compiles the very same
functions with numba, so a simulated policy cannot drift from the real one. They therefore use only what both run: no
objects, no exceptions, no keyword arguments.

The rules of one GPU group, applied whenever its first stage is free:

1. Earliest deadline first: the service whose head request has the earliest deadline goes next (`earliest`).
2. The head is dropped when it cannot be met any more, or when keeping it would cost a full batch that waits behind it
   (`next_batch`); then ask again.
3. Otherwise the batch is the largest one, up to ``max_batch``, that still meets the head's deadline. It is started at
   once: a free device never waits for company.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DISPLACED",
    "HIGHEST_CREDIT",
    "HOPELESS",
    "LEAST_PART",
    "LOWEST_CREDIT",
    "corrected_weight",
    "credit_after",
    "earliest",
    "least",
    "next_at_random",
    "next_batch",
    "next_batch_undropped",
    "next_by_credit",
    "next_in_turn",
    "next_replica",
    "ready_s",
]

HOPELESS = 0
"""`next_batch`: the head cannot finish in time even alone; drop it."""
DISPLACED = -1
"""`next_batch`: the head cannot bear a full batch, and more than one waits behind it; drop it."""

LOWEST_CREDIT = 0.05
HIGHEST_CREDIT = 20.0
"""`credit_after`: however bad or good a replica, it is still tried, and never takes all."""

LEAST_PART = 0.05
"""`corrected_weight`: however long its queue, a replica keeps this part of its weight."""


def next_batch(
    now: float, head_deadline: float, queued: int, max_batch: int, latency_s: NDArray[np.float64] | list[float]
) -> int:
    """Return the size of the batch to start now, or the reason (`HOPELESS`, `DISPLACED`) to drop the head.

    Under overload the head is always nearly late; serving it in the small batch that it can still bear would cap
    throughput at that of small batches. So it gives way once more than a full batch is waiting (the window rule of
    Nexus, SOSP 2019, section 5.2, with the window shortened to what waits).

    Args:
        now: The time, seconds.
        head_deadline: The earliest deadline in the queue, seconds on the same clock.
        queued: Requests waiting, at least 1.
        max_batch: Largest batch allowed, at least 1.
        latency_s: Shape (max_batch,) at least: latency of a batch of b in entry b - 1, not falling with b.
    """
    if now + latency_s[0] > head_deadline:
        return HOPELESS
    if queued > max_batch and now + latency_s[max_batch - 1] > head_deadline:
        return DISPLACED
    batch = min(queued, max_batch)
    while batch > 1 and now + latency_s[batch - 1] > head_deadline:
        batch -= 1
    return batch


def next_batch_undropped(
    now: float, head_deadline: float, queued: int, max_batch: int, latency_s: NDArray[np.float64] | list[float]
) -> int:
    """Return the size of the batch to start now where nothing is ever dropped; arguments as for `next_batch`.

    The largest that meets the head's deadline; when not even a batch of one does, a full one, since the head is late
    in any case.
    """
    batch = min(queued, max_batch)
    if now + latency_s[0] > head_deadline:
        return batch
    while batch > 1 and now + latency_s[batch - 1] > head_deadline:
        batch -= 1
    return batch


def ready_s(
    head_entry: float, head_deadline: float, queued: int, max_batch: int, largest_s: float, batch_delay_s: float
) -> float:
    """Return from when a queue may start a batch where a free device waits for company.

    A full batch waits for nothing. Otherwise until the head has waited ``batch_delay_s``, or until a full batch would
    miss its deadline if that is earlier.

    Args:
        head_entry: When the head entered the queue, seconds.
        head_deadline: Its deadline, seconds on the same clock.
        queued: Requests waiting, at least 1.
        max_batch: Largest batch.
        largest_s: Latency of the largest batch, seconds.
        batch_delay_s: Longest wait for company, seconds.
    """
    if queued >= max_batch:
        return head_entry
    return min(head_entry + batch_delay_s, head_deadline - largest_s)


def earliest(head_deadlines: NDArray[np.float64] | list[float]) -> int:
    """Return the position of the smallest deadline, the first of equals; -1 when all are infinite (empty queues)."""
    best = -1
    smallest = np.inf
    for position in range(len(head_deadlines)):
        if head_deadlines[position] < smallest:
            smallest = head_deadlines[position]
            best = position
    return best


def next_replica(weights: Any, credit: Any) -> int:
    """Choose a replica by smooth weighted round robin, and update ``credit`` in place.

    Every replica gains its weight, the richest is chosen (the first of equals) and pays the total. Over any run of
    requests each replica's count differs from its share by less than the number of replicas, without bursts to one.

    Args:
        weights: Shape (replica,), not negative. A weight of 0 leaves the replica out.
        credit: Shape (replica,), carried from call to call, zeros at first.

    Returns:
        The position chosen, or -1 when no weight is positive.
    """
    best = -1
    total = 0.0
    for replica in range(len(weights)):
        if weights[replica] > 0:
            credit[replica] += weights[replica]
            total += weights[replica]
            if best < 0 or credit[replica] > credit[best]:
                best = replica
    if best >= 0:
        credit[best] -= total
    return best


def corrected_weight(weight: float, wait_s: float, deadline_s: float) -> float:
    """Return the weight of a replica now: that of the plan, less the part of the deadline that would be spent waiting.

    A replica whose queue takes the whole deadline keeps `LEAST_PART`, so that its recovery is noticed by what it
    serves. Requests are then spread by `next_replica` over the corrected weights.

    Args:
        weight: Of the plan, not negative.
        wait_s: Until a request that arrives now would start, seconds.
        deadline_s: Of the service, seconds from arrival, above 0.
    """
    return weight * max(LEAST_PART, 1.0 - wait_s / deadline_s)


def next_by_credit(weights: Any, credit: Any, balance: Any) -> int:
    """Choose a replica as `next_replica` does, with ``credit`` in place of weights where the weight is positive.

    Args:
        weights: Shape (replica,). A weight of 0 leaves the replica out.
        credit: Shape (replica,), above 0: what each has earned (`credit_after`).
        balance: Shape (replica,), carried from call to call, zeros at first; updated in place.

    Returns:
        The position chosen, or -1 when no weight is positive.
    """
    best = -1
    total = 0.0
    for replica in range(len(weights)):
        if weights[replica] > 0:
            balance[replica] += credit[replica]
            total += credit[replica]
            if best < 0 or balance[replica] > balance[best]:
                best = replica
    if best >= 0:
        balance[best] -= total
    return best


def credit_after(credit: float, waiting: int, target: int, increase: float, decrease: float) -> float:
    """Return a replica's credit after one of its batches: additive increase, multiplicative decrease.

    Args:
        credit: Before.
        waiting: Requests in its queue when the batch ended.
        target: Requests that may wait without the credit falling.
        increase: Added at or below the target.
        decrease: Factor above it, in (0, 1].
    """
    changed = credit + increase if waiting <= target else credit * decrease
    return min(max(changed, LOWEST_CREDIT), HIGHEST_CREDIT)


def next_at_random(weights: Any, chance: float) -> int:
    """Choose a replica at random by weight.

    Args:
        weights: Shape (replica,), not negative.
        chance: A draw from [0, 1).

    Returns:
        The first replica whose cumulated weight exceeds ``chance`` times the total; -1 when no weight is positive.
    """
    total = 0.0
    for replica in range(len(weights)):
        total += weights[replica]
    wanted = chance * total
    below = 0.0
    last = -1
    for replica in range(len(weights)):
        if weights[replica] > 0:
            below += weights[replica]
            last = replica
            if below > wanted:
                return replica
    return last


def next_in_turn(weights: Any, turn: int) -> int:
    """Return replica number ``turn`` modulo their number, of those with a positive weight; -1 without any."""
    usable = 0
    for replica in range(len(weights)):
        if weights[replica] > 0:
            usable += 1
    if usable == 0:
        return -1
    left = turn % usable
    for replica in range(len(weights)):
        if weights[replica] > 0:
            if left == 0:
                return replica
            left -= 1
    return -1


def least(weights: Any, values: Any) -> int:
    """Return the replica with the smallest value of those with a positive weight, the first of equals; -1 without any.

    With requests routed and not ended as values this is join-shortest-queue, with expected finishes least finish.
    """
    best = -1
    for replica in range(len(weights)):
        if weights[replica] > 0 and (best < 0 or values[replica] < values[best]):
            best = replica
    return best
