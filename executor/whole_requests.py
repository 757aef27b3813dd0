"""Requests that a group serves whole: from their submission to their batch, or to the reason why they get none.

They wait in the queues of `executor.dispatcher`, which says what to drop and what to run; frames of one stream may
gather in `executor.bundles` before. No worker here: `executor.group_server` asks for the next batch when one can run.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from executor.bundles import Bundles
from executor.delay import Delay
from executor.dispatcher import DEFAULT_PRIORITY, HOPELESS_RATIO, Dispatcher, DropReason, QueueLimits, Waiting
from executor.errors import TOO_MUCH, Displaced, Hopeless, QueueFull, ReplicaUnavailable, RequestRefused
from executor.state import GenerationRules, ReplicaKey
from executor.statistics import Counters
from executor.tensors import Array
from plans.errors import ForeplanError, InvalidInput

__all__ = ["Answer", "Pending", "ReplicaRules", "WholeRequests"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The outputs of one request, and how they came about.

    Attributes:
        outputs: Arrays of shape (items, *item) by name.
        variant: The model that ran.
        batch_items: Items in the batch that it ran in.
        queue_s: Seconds from submission to the start of the batch.
        run_s: Seconds that the model ran.
    """

    outputs: Mapping[str, Array]
    variant: str
    batch_items: int
    queue_s: float
    run_s: float


@dataclass(slots=True, eq=False)
class Pending:
    """A request that waits or runs, and the future that its client awaits."""

    waiting: Waiting
    inputs: Mapping[str, Array]
    answer: asyncio.Future[Answer]
    arrived_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRules:
    """How a replica is run now.

    Attributes:
        max_batch: Largest batch.
        latency_s: Shape (max_batch,): seconds that a batch of b takes, in element b - 1.
        frames: Frames of one stream that are batched together, at most.
        stages: Stages of its pipeline.
        generation: How it generates; None where it does not.
    """

    max_batch: int
    latency_s: tuple[float, ...]
    frames: int
    stages: int
    generation: GenerationRules | None

    def batch_latency_s(self, items: int) -> float:
        """Return the seconds that a batch of ``items`` takes; of the largest, if there are more."""
        return self.latency_s[min(items, self.max_batch) - 1]


_LATE_TIMER_S = 0.005
"""Bundles enter their queue earlier by this than they must, since timers ring late and a moment later is too late."""


class WholeRequests:
    """The requests of one group that wait.

    Args:
        rules: Of every replica that is here; kept by the caller.
        counters: Where it is counted what becomes of requests; kept by the caller, for the same replicas.
        limits: Of each queue.
        clock: The time in seconds.
        on_ready: Called when a batch may have become possible.
    """

    def __init__(
        self,
        rules: Mapping[ReplicaKey, ReplicaRules],
        counters: Mapping[ReplicaKey, Counters],
        limits: QueueLimits,
        clock: Callable[[], float],
        on_ready: Callable[[], None],
    ) -> None:
        self.overrun = Delay()  # of batches, beyond what the plan says
        self._rules = rules
        self._counters = counters
        self._clock = clock
        self._on_ready = on_ready
        self._dispatcher = Dispatcher(limits)
        self._bundles = Bundles()
        self._flush: asyncio.TimerHandle | None = None
        self._numbers = itertools.count()
        self._pending: dict[int, Pending] = {}  # by number; what waits in the dispatcher
        self._alone: deque[Pending] = deque()  # to be run one by one, after a batch with a bad request among them

    def queued(self, key: ReplicaKey) -> int:
        """Return how many requests of a replica wait."""
        alone = sum(pending.waiting.key == key for pending in self._alone)
        return self._dispatcher.queued(key) + self._bundles.gathered(key).frames + alone

    def work_s(self) -> float:
        """Return the seconds for which what is queued keeps the slowest stage busy, in full batches.

        Frames that gather are not queued yet, as in the evaluator (docs/evaluator.md, section 5).
        """
        if not self._pending:
            return 0.0
        return math.fsum(
            self._dispatcher.items(key) * rules.latency_s[-1] / (rules.max_batch * rules.stages)
            for key, rules in self._rules.items()
        )

    def next_deadline_s(self) -> float:
        """Return the deadline of what is next, on the clock; -inf for what must run alone, inf when nothing waits."""
        return -math.inf if self._alone else self._dispatcher.next_deadline_s()

    # Coming in.

    def configure(self, key: ReplicaKey) -> None:
        """Open the queue of a replica, or follow its new rules."""
        rules = self._rules[key]
        too_large = list(self._dispatcher.configure(key, rules.max_batch, rules.latency_s))
        for waiting in too_large:
            expected = f"a batch of at most {rules.max_batch}"
            self._refuse(waiting, InvalidInput.of(expected, field="inputs", found=waiting.items))
        self._queue_all(self._bundles.close(key))  # they gather anew, by the new rules

    def close(self, key: ReplicaKey, reason: str) -> None:
        """Close the queue of a replica; what waits in it fails with ``reason``."""
        for waiting in (*self._dispatcher.close(key), *self._bundles.close(key)):
            self._refuse(waiting, ReplicaUnavailable(f"{key}: {reason}"))
        self.settle([one for one in self._alone if one.waiting.key == key], ReplicaUnavailable(f"{key}: {reason}"))
        self._alone = deque(one for one in self._alone if one.waiting.key != key)

    def fail_all(self, reason: str) -> None:
        """Let everything that waits fail; its queues stay open."""
        for waiting in (*self._dispatcher.clear(), *self._bundles.close()):
            self._refuse(waiting, ReplicaUnavailable(f"{waiting.key}: {reason}"))
        alone, self._alone = self._alone, deque()
        for pending in alone:
            self.settle([pending], ReplicaUnavailable(f"{pending.waiting.key}: {reason}"))

    def submit(
        self,
        key: ReplicaKey,
        inputs: Mapping[str, Array],
        items: int,
        deadline_s: float,
        *,
        priority: int = DEFAULT_PRIORITY,
        stream: str = "",
    ) -> Pending:
        """Queue a request; see `executor.group_server.GroupServer.submit`."""
        if key not in self._rules:
            raise ReplicaUnavailable(f"{key} is not here")
        waiting = Waiting(
            number=next(self._numbers),
            key=key,
            deadline_s=deadline_s,
            items=items,
            payload_bytes=sum(array.nbytes for array in inputs.values()),
            priority=priority,
        )
        now_s = self._clock()
        pending = Pending(
            waiting=waiting,
            inputs=inputs,
            answer=asyncio.get_running_loop().create_future(),
            arrived_s=now_s,
        )
        try:
            self._check_hope(waiting, now_s)
            gathered = self._bundles.gathered(key)
            self._dispatcher.check_room(waiting, requests=gathered.frames, payload_bytes=gathered.payload_bytes)
            rules = self._rules[key]
            ready: Waiting | None = waiting
            if stream and rules.frames > 1 and items == 1:
                largest_s = rules.latency_s[-1] + self.overrun.expected_s + _LATE_TIMER_S
                ready = self._bundles.add(waiting, stream, most=rules.frames, largest_s=largest_s, now_s=now_s)
            if ready is not None:
                self._dispatcher.add(ready)
        except RequestRefused:
            self._counters[key].dropped += 1
            raise
        self._pending[waiting.number] = pending
        if ready is None:
            self._set_flush()
        else:
            self._on_ready()
        return pending

    def cancel(self, pending: Pending) -> None:
        """Forget a request whose client went away; one that runs already runs to its end."""
        if pending.answer.done() and not pending.answer.cancelled():
            return  # it was counted as what it became
        if self._bundles.remove(pending.waiting):
            self._pending.pop(pending.waiting.number, None)
            self._set_flush()
        elif self._dispatcher.cancel(pending.waiting):
            self._pending.pop(pending.waiting.number, None)
        if pending.waiting.key in self._counters:
            counters = self._counters[pending.waiting.key]
            counters.dropped += 1
            counters.failed_s += self._clock() - pending.arrived_s

    def _check_hope(self, waiting: Waiting, now_s: float) -> None:
        """Refuse a request without hope, before it makes the queue longer.

        Raises:
            Hopeless: Its time is over.
            QueueFull: The work before it takes `HOPELESS_RATIO` times as long as it has.
        """
        left_s = waiting.deadline_s - now_s
        if left_s <= 0:
            raise Hopeless(f"{waiting.key}: the deadline has passed before it could be queued")
        all_s = self._dispatcher.queue_work_s(waiting.key, self._bundles.gathered(waiting.key).items)
        if all_s > HOPELESS_RATIO * left_s:  # a first look, which costs nothing
            wait_s = self._dispatcher.work_before_s(waiting, self._bundles.items_before(waiting))
            if wait_s > HOPELESS_RATIO * left_s:
                raise QueueFull(
                    f"{waiting.key}: {wait_s:.3f} s of work wait before it in its queue, its deadline is in "
                    f"{left_s:.3f} s, and at most {HOPELESS_RATIO:g} times that may wait; {TOO_MUCH}"
                )

    def _set_flush(self) -> None:
        """See to it that bundles enter their queue when their time comes."""
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        next_s = self._bundles.next_s()
        if next_s is not None:
            self._flush = asyncio.get_running_loop().call_later(max(0.0, next_s - self._clock()), self._flush_due)

    def _flush_due(self) -> None:
        self._queue_all(self._bundles.due(self._clock()))
        self._set_flush()

    def _queue_all(self, bundles: Iterable[Waiting]) -> None:
        """Queue frames that gather no more, and start what can start."""
        for bundle in bundles:
            try:
                self._dispatcher.add(bundle)
            except RequestRefused as refused:
                self._refuse(bundle, refused)
        self._on_ready()

    # Going out.

    def next(self) -> list[Pending]:
        """Take the requests of the next batch out of their queues, and refuse what is dropped on the way."""
        while self._alone:
            pending = self._alone.popleft()
            if not pending.answer.done():
                return [pending]
        decision = self._dispatcher.decide(self._clock() + self.overrun.expected_s)
        for drop in decision.drops:
            key = drop.request.key
            if drop.reason is DropReason.HOPELESS:
                self.overrun.doubt()
                self._refuse(drop.request, Hopeless(f"{key}: the deadline cannot be met any more"))
            else:
                self._refuse(drop.request, Displaced(f"{key}: gave way to a full batch that waits behind it"))
        return [self._pending.pop(waiting.number) for waiting in decision.batch.requests] if decision.batch else []

    def run_alone(self, pending: Iterable[Pending]) -> None:
        """Let requests whose batch was refused for one of them wait again, to be run one by one before all others."""
        for one in pending:
            if one.waiting.key in self._rules:
                self._alone.append(one)
            else:
                self.settle([one], ReplicaUnavailable(f"{one.waiting.key} is not here any more"))

    def settle(self, pending: Iterable[Pending], error: ForeplanError) -> None:
        """Let requests that have no answer yet fail with ``error``."""
        for one in pending:
            counters = self._counters.get(one.waiting.key)
            if one.answer.done():
                continue
            one.answer.set_exception(error)
            if counters is not None:
                counters.failed_s += self._clock() - one.arrived_s
            if counters is not None and isinstance(error, Hopeless | Displaced):
                counters.dropped += 1
            elif counters is not None:
                counters.failed += 1

    def _refuse(self, waiting: Waiting, error: ForeplanError) -> None:
        for part in waiting.parts:
            pending = self._pending.pop(part.number, None)
            if pending is not None:
                self.settle([pending], error)
