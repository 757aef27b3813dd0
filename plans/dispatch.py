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

__all__ = ["DISPLACED", "HOPELESS", "earliest", "next_batch", "next_replica"]

HOPELESS = 0
"""`next_batch`: the head cannot finish in time even alone; drop it."""
DISPLACED = -1
"""`next_batch`: the head cannot bear a full batch, and more than one waits behind it; drop it."""


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
