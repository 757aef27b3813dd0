"""The queues of one GPU group: earliest deadline first, batches as large as the head's deadline bears.

The rules are those of `plans.dispatch`, called as they are. There is no clock and no input or output here: requests
and the time go in, decisions come out. A queue belongs to one replica (`executor.state.ReplicaKey`), so that during a
change of variants the old and the new one are queued apart.

A request may hold several items (a client's own batch). It is kept whole: the rules then count items, and its head
needs the latency of a batch of at least that many. A bundle of frames (`executor.bundles`) is kept whole too.

Priorities go before deadlines: while a request of a more urgent priority waits, in any queue of the group, no other one
heads a batch, nor is one displaced for the sake of less urgent ones. What is left of its batch is filled in order.
"""

from __future__ import annotations

import dataclasses
import enum
import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from executor.errors import TOO_MUCH, QueueFull
from executor.state import ReplicaKey
from plans.dispatch import DISPLACED, HOPELESS, earliest, next_batch

__all__ = [
    "DEFAULT_PRIORITY",
    "LAST_PRIORITY",
    "Batch",
    "Decision",
    "Dispatcher",
    "HOPELESS_RATIO",
    "Drop",
    "DropReason",
    "QueueLimits",
    "Waiting",
    "goes_before",
]

DEFAULT_PRIORITY = 5
LAST_PRIORITY = 9

HOPELESS_RATIO = 2.0
"""A request is refused on arrival when the work before it takes this many times as long as it has.

Under overload part of what waits is dropped when its turn comes, by rules that know more than the order of arrival. So
a queue that is longer than a deadline is no reason to refuse; one of twice that length can only grow.
"""


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
        priority: 1 goes first, `LAST_PRIORITY` last.
        frames: The frames of a bundle, this one's first; none for a request by itself.
    """

    number: int
    key: ReplicaKey
    deadline_s: float
    items: int = 1
    payload_bytes: int = 0
    priority: int = DEFAULT_PRIORITY
    frames: tuple[Waiting, ...] = ()

    @property
    def parts(self) -> tuple[Waiting, ...]:
        """The frames of a bundle, or the request itself."""
        return self.frames or (self,)

    @classmethod
    def bundle(cls, frames: Sequence[Waiting]) -> Waiting:
        """Return ``frames`` as a bundle, with their earliest deadline and most urgent priority; one frame is none."""
        if len(frames) == 1:
            return frames[0]
        return dataclasses.replace(
            frames[0],
            deadline_s=min(frame.deadline_s for frame in frames),
            priority=min(frame.priority for frame in frames),
            items=sum(frame.items for frame in frames),
            payload_bytes=sum(frame.payload_bytes for frame in frames),
            frames=tuple(frames),
        )


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


_Entry = tuple[int, float, int, Waiting]


def goes_before(one: Waiting, other: Waiting) -> bool:
    """Say whether ``one`` goes before ``other``, which comes now."""
    return (one.priority, one.deadline_s) <= (other.priority, other.deadline_s)


class _Queue:
    """Requests of one replica in a heap by (priority, deadline, order of arrival)."""

    __slots__ = ("heap", "items", "items_at", "latency_s", "max_batch", "payload_bytes", "requests")

    def __init__(self, max_batch: int, latency_s: Sequence[float]) -> None:
        self.max_batch = max_batch
        self.latency_s = list(latency_s)
        self.heap: list[_Entry] = []
        self.items = 0
        self.items_at = [0] * (LAST_PRIORITY + 1)
        self.payload_bytes = 0
        self.requests = 0  # each frame of a bundle is one

    def push(self, request: Waiting, order: int) -> None:
        heapq.heappush(self.heap, (request.priority, request.deadline_s, order, request))
        self._count(request, 1)

    def pop(self) -> Waiting:
        request = heapq.heappop(self.heap)[3]
        self._count(request, -1)
        return request

    def keep(self, entries: list[_Entry]) -> None:
        heapq.heapify(entries)
        self.heap = entries
        self.items = self.payload_bytes = self.requests = 0
        self.items_at = [0] * (LAST_PRIORITY + 1)
        for entry in entries:
            self._count(entry[3], 1)

    def _count(self, request: Waiting, sign: int) -> None:
        self.items += sign * request.items
        self.items_at[request.priority] += sign * request.items
        self.payload_bytes += sign * request.payload_bytes
        self.requests += sign * len(request.parts)

    def size_now(self, now_s: float) -> int:
        """Return the items to start now, or why to drop the head."""
        head = self.heap[0][3]
        more = 0 if head.frames else head.items - 1  # items of the head beyond its first: they run in any case
        latency_s = self.latency_s[more:] if more else self.latency_s
        limit = self.max_batch - more
        urgent = self.items_at[head.priority]
        size = next_batch(now_s, head.deadline_s, urgent - more, limit, latency_s)
        if size > 0 and urgent < self.items and size == urgent - more:  # room for what is less urgent
            size = next_batch(now_s, head.deadline_s, min(self.items - more, limit), limit, latency_s)
        return size + more if size > 0 else size

    def take(self, size: int) -> tuple[Waiting, ...]:
        """Remove the head and those after it, in order, while they fit into ``size`` items together."""
        taken = [self.pop()]
        room = size - taken[0].items
        while self.heap and self.heap[0][3].items <= room:
            taken.append(self.pop())
            room -= taken[-1].items
        return tuple(taken)

    def work_s(self, until: Waiting | None = None, more_items: int = 0) -> float:
        """Return the seconds that all waiting items take in full batches, or those that go before ``until``."""
        items = self.items
        if until is not None:
            items = sum(entry[3].items for entry in self.heap if goes_before(entry[3], until))
        items += more_items
        full, rest = divmod(items, self.max_batch)
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
        if any(entry[3].frames and entry[3].items > max_batch for entry in queue.heap):  # bundles come apart
            parts = [part for entry in sorted(queue.heap) for part in entry[3].parts]
            queue.keep([(part.priority, part.deadline_s, next(self._arrivals), part) for part in parts])
        too_large = tuple(entry[3] for entry in sorted(queue.heap) if entry[3].items > max_batch)
        if too_large:
            queue.keep([entry for entry in queue.heap if entry[3].items <= max_batch])
        return too_large

    def close(self, key: ReplicaKey) -> tuple[Waiting, ...]:
        """Remove the queue of ``key`` and return what waited in it, earliest deadline first."""
        queue = self._queues.pop(key, None)
        return tuple(entry[3] for entry in sorted(queue.heap)) if queue else ()

    def clear(self) -> tuple[Waiting, ...]:
        """Empty every queue, keeping their rules, and return what waited."""
        waiting = tuple(entry[3] for queue in self._queues.values() for entry in sorted(queue.heap))
        for queue in self._queues.values():
            queue.keep([])
        return waiting

    def add(self, request: Waiting) -> None:
        """Queue a request.

        Raises:
            QueueFull: The replica's queue is at its limit.
            KeyError: The replica has no queue.
        """
        self.check_room(request)
        self._queues[request.key].push(request, next(self._arrivals))

    def check_room(self, request: Waiting, *, requests: int = 0, payload_bytes: int = 0) -> None:
        """Refuse a request for which there is no room beside what waits here, and what waits for the replica elsewhere.

        Args:
            request: The request.
            requests: How many requests wait elsewhere.
            payload_bytes: Bytes of their inputs.

        Raises:
            QueueFull: The replica's queue is at its limit.
            KeyError: The replica has no queue.
        """
        queue = self._queues[request.key]
        requests, payload_bytes = requests + queue.requests, payload_bytes + queue.payload_bytes
        if not math.isfinite(request.deadline_s) or not 1 <= request.items <= queue.max_batch:
            raise ValueError(f"a finite deadline and 1 to {queue.max_batch} items: {request}")
        if not 1 <= request.priority <= LAST_PRIORITY:
            raise ValueError(f"a priority of 1 to {LAST_PRIORITY}: {request}")
        if requests + len(request.parts) > self._limits.requests:
            raise QueueFull(f"{request.key}: {requests} requests wait already, its queue's limit; {TOO_MUCH}")
        if payload_bytes + request.payload_bytes > self._limits.payload_bytes:
            raise QueueFull(
                f"{request.key}: {payload_bytes} bytes wait already, and {request.payload_bytes} more exceed its "
                f"queue's limit of {self._limits.payload_bytes}; {TOO_MUCH}"
            )

    def cancel(self, request: Waiting) -> bool:
        """Take ``request`` out of its queue, or out of its bundle there; False when it is not there any more.

        Cost is linear in the queue.
        """
        queue = self._queues.get(request.key)
        if queue is None:
            return False
        for position, (*_, order, waiting) in enumerate(queue.heap):
            left = [part for part in waiting.parts if part.number != request.number]
            if len(left) == len(waiting.parts):
                continue
            kept = [*queue.heap[:position], *queue.heap[position + 1 :]]
            if left:
                rest = Waiting.bundle(left)
                kept.append((rest.priority, rest.deadline_s, order, rest))
            queue.keep(kept)
            return True
        return False

    def decide(self, now_s: float) -> Decision:
        """Return what to drop and what to start now that the group is free, and take both out of the queues."""
        drops: list[Drop] = []
        queues = list(self._queues.items())
        while True:
            urgent = min((queue.heap[0][0] for _, queue in queues if queue.heap), default=0)
            heads = [queue.heap[0][1] if queue.heap and queue.heap[0][0] == urgent else math.inf for _, queue in queues]
            position = earliest(heads)
            if position < 0:
                return Decision(drops=tuple(drops))
            key, queue = queues[position]
            size = queue.size_now(now_s)
            if size == HOPELESS:
                drops += [Drop(request=part, reason=DropReason.HOPELESS) for part in queue.pop().parts]
            elif size == DISPLACED:
                drops += [Drop(request=part, reason=DropReason.DISPLACED) for part in queue.pop().parts]
            else:
                taken = queue.take(size)
                items = sum(request.items for request in taken)
                requests = tuple(part for request in taken for part in request.parts)
                return Decision(drops=tuple(drops), batch=Batch(key=key, requests=requests, items=items))

    def next_deadline_s(self) -> float:
        """Return the earliest deadline of what waits; inf when nothing does, -inf when it has priority."""
        first_s = math.inf
        for queue in self._queues.values():
            if queue.heap:
                priority, deadline_s, _, _ = queue.heap[0]
                if priority < DEFAULT_PRIORITY:
                    return -math.inf
                first_s = min(first_s, deadline_s)
        return first_s

    def queued(self, key: ReplicaKey) -> int:
        """Return how many requests wait for ``key``, each frame of a bundle by itself."""
        queue = self._queues.get(key)
        return sum(len(entry[3].parts) for entry in queue.heap) if queue else 0

    def work_before_s(self, request: Waiting, more_items: int = 0) -> float:
        """Return the seconds of work in its own queue that goes before ``request``, in full batches.

        ``more_items`` go before it as well. Cost is linear in the queue.
        """
        return self._queues[request.key].work_s(request, more_items)

    def queue_work_s(self, key: ReplicaKey, more_items: int = 0) -> float:
        """Return the seconds of work in the queue of ``key``, with ``more_items``, in full batches."""
        return self._queues[key].work_s(None, more_items)

    def items(self, key: ReplicaKey) -> int:
        """Return how many items wait for ``key``."""
        queue = self._queues.get(key)
        return queue.items if queue else 0
