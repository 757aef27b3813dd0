"""The queues of one GPU group: earliest deadline first, batches as large as the head's deadline bears.

The rules are those of `plans.dispatch`, called as they are. There is no clock and no input or output here: requests
and the time go in, decisions come out. A queue belongs to one replica (`executor.state.ReplicaKey`), so that during a
change of variants the old and the new one are queued apart.

A request may hold several items (a client's own batch). It is kept whole: the rules then count items, and its head
needs the latency of a batch of at least that many.
"""

from __future__ import annotations

import enum
import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from executor.errors import QueueFull
from executor.state import ReplicaKey
from plans.dispatch import DISPLACED, HOPELESS, earliest, next_batch

__all__ = ["Batch", "Decision", "Dispatcher", "Drop", "DropReason", "QueueLimits", "Waiting"]


class DropReason(enum.Enum):
    """Why a request is dropped; see `plans.dispatch.next_batch`."""

    HOPELESS = "hopeless"
    DISPLACED = "displaced"


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """What may wait in one replica's queue: requests, and bytes of their inputs."""

    requests: int = 1024
    payload_bytes: int = 512 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A request in a queue.

    Attributes:
        number: Its number, unique in the dispatcher.
        key: The replica that shall serve it.
        deadline_s: When it must be finished, seconds on the caller's clock; finite.
        items: Items in it, at least 1.
        payload_bytes: Bytes of its inputs.
    """

    number: int
    key: ReplicaKey
    deadline_s: float
    items: int = 1
    payload_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Requests to run together now, earliest deadline first; ``items`` is at most the replica's ``max_batch``."""

    key: ReplicaKey
    requests: tuple[Waiting, ...]
    items: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """A request that left its queue unserved."""

    request: Waiting
    reason: DropReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do now: requests to drop, and the batch to start, if any."""

    drops: tuple[Drop, ...] = ()
    batch: Batch | None = None


class _Queue:
    """Requests of one replica in a heap by (deadline, order of arrival)."""

    __slots__ = ("heap", "items", "latency_s", "max_batch", "payload_bytes")

    def __init__(self, max_batch: int, latency_s: Sequence[float]) -> None:
        self.max_batch = max_batch
        self.latency_s = list(latency_s)
        self.heap: list[tuple[float, int, Waiting]] = []
        self.items = 0
        self.payload_bytes = 0

    def pop(self) -> Waiting:
        request = heapq.heappop(self.heap)[2]
        self.items -= request.items
        self.payload_bytes -= request.payload_bytes
        return request

    def keep(self, entries: list[tuple[float, int, Waiting]]) -> None:
        heapq.heapify(entries)
        self.heap = entries
        self.items = sum(request.items for _, _, request in entries)
        self.payload_bytes = sum(request.payload_bytes for _, _, request in entries)

    def size_now(self, now_s: float) -> int:
        """Return the items to start now, or why to drop the head."""
        more = self.heap[0][2].items - 1  # items of the head beyond its first: they run in any case
        latency_s = self.latency_s[more:] if more else self.latency_s
        size = next_batch(now_s, self.heap[0][0], self.items - more, self.max_batch - more, latency_s)
        return size + more if size > 0 else size

    def take(self, size: int) -> tuple[Waiting, ...]:
        """Remove the head and those after it, in order, while they fit into ``size`` items together."""
        taken = [self.pop()]
        room = size - taken[0].items
        while self.heap and self.heap[0][2].items <= room:
            taken.append(self.pop())
            room -= taken[-1].items
        return tuple(taken)

    def work_s(self) -> float:
        """Return the seconds that all waiting items take in full batches."""
        full, rest = divmod(self.items, self.max_batch)
        return full * self.latency_s[-1] + (self.latency_s[rest - 1] if rest else 0.0)


class Dispatcher:
    """The queues of one group. Same calls, same decisions: nothing here depends on the clock or on chance."""

    def __init__(self, limits: QueueLimits | None = None) -> None:
        self._limits = limits or QueueLimits()
        self._queues: dict[ReplicaKey, _Queue] = {}
        self._arrivals = itertools.count()

    def configure(self, key: ReplicaKey, max_batch: int, latency_s: Sequence[float]) -> tuple[Waiting, ...]:
        """Open the queue of ``key``, or change its rules; return the requests that are too large for the new ones.

        Args:
            key: The replica.
            max_batch: Largest batch, in items.
            latency_s: Shape (max_batch,): seconds of a batch of b in entry b - 1.
        """
        if max_batch < 1 or len(latency_s) != max_batch:
            raise ValueError(f"one latency for each batch up to {max_batch}, found {len(latency_s)}")
        queue = self._queues.setdefault(key, _Queue(max_batch, latency_s))
        queue.max_batch, queue.latency_s = max_batch, list(latency_s)
        too_large = tuple(entry[2] for entry in sorted(queue.heap) if entry[2].items > max_batch)
        if too_large:
            queue.keep([entry for entry in queue.heap if entry[2].items <= max_batch])
        return too_large

    def close(self, key: ReplicaKey) -> tuple[Waiting, ...]:
        """Remove the queue of ``key`` and return what waited in it, earliest deadline first."""
        queue = self._queues.pop(key, None)
        return tuple(request for _, _, request in sorted(queue.heap)) if queue else ()

    def clear(self) -> tuple[Waiting, ...]:
        """Empty every queue, keeping their rules, and return what waited."""
        waiting = tuple(request for queue in self._queues.values() for _, _, request in sorted(queue.heap))
        for queue in self._queues.values():
            queue.keep([])
        return waiting

    def add(self, request: Waiting) -> None:
        """Queue a request.

        Raises:
            QueueFull: The replica's queue is at its limit.
            KeyError: The replica has no queue.
        """
        queue = self._queues[request.key]
        if not math.isfinite(request.deadline_s) or not 1 <= request.items <= queue.max_batch:
            raise ValueError(f"a finite deadline and 1 to {queue.max_batch} items: {request}")
        if len(queue.heap) >= self._limits.requests:
            raise QueueFull(f"{request.key}: {len(queue.heap)} requests wait already, the limit")
        if queue.payload_bytes + request.payload_bytes > self._limits.payload_bytes:
            raise QueueFull(f"{request.key}: {queue.payload_bytes} bytes wait already, near the limit")
        heapq.heappush(queue.heap, (request.deadline_s, next(self._arrivals), request))
        queue.items += request.items
        queue.payload_bytes += request.payload_bytes

    def cancel(self, request: Waiting) -> bool:
        """Take ``request`` out of its queue; False when it is not there any more. Cost is linear in the queue."""
        queue = self._queues.get(request.key)
        if queue is None:
            return False
        kept = [entry for entry in queue.heap if entry[2].number != request.number]
        if len(kept) == len(queue.heap):
            return False
        queue.keep(kept)
        return True

    def decide(self, now_s: float) -> Decision:
        """Return what to drop and what to start now that the group is free, and take both out of the queues."""
        drops: list[Drop] = []
        queues = list(self._queues.items())
        while True:
            position = earliest([queue.heap[0][0] if queue.heap else math.inf for _, queue in queues])
            if position < 0:
                return Decision(drops=tuple(drops))
            key, queue = queues[position]
            size = queue.size_now(now_s)
            if size == HOPELESS:
                drops.append(Drop(request=queue.pop(), reason=DropReason.HOPELESS))
            elif size == DISPLACED:
                drops.append(Drop(request=queue.pop(), reason=DropReason.DISPLACED))
            else:
                requests = queue.take(size)
                items = sum(request.items for request in requests)
                return Decision(drops=tuple(drops), batch=Batch(key=key, requests=requests, items=items))

    def queued(self, key: ReplicaKey) -> int:
        """Return how many requests wait for ``key``."""
        queue = self._queues.get(key)
        return len(queue.heap) if queue else 0

    def work_s(self) -> float:
        """Return the seconds of work that wait in all queues, in full batches."""
        return math.fsum(queue.work_s() for queue in self._queues.values())
