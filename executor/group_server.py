"""One GPU group at work: its queues, its worker process, and the models in it.

Whenever the worker is free, `executor.dispatcher` says what to drop and what to run; the batch's inputs are copied into
shared memory, the worker runs it, and the outputs are split back to their requests. There is a place more in the shared
memory than batches can be under way: the next batch starts before the answers of the last one are taken out. On a
pipeline the next batch starts as soon as the first stage is free.

When the worker ends, everything that waits or runs here fails at once with `ReplicaUnavailable`, so that a gateway can
try another replica in time. A worker that takes much longer for a batch than planned hangs, and is ended by force.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from executor.bundles import Bundles
from executor.delay import Delay
from executor.dispatcher import DEFAULT_PRIORITY, HOPELESS_RATIO, Dispatcher, DropReason, QueueLimits, Waiting
from executor.errors import (
    Displaced,
    Hopeless,
    ModelFailed,
    QueueFull,
    ReplicaUnavailable,
    RequestRefused,
    WorkerRefused,
)
from executor.group_worker import GroupWorker
from executor.lane import Generating, Iteration, Lane, Lanes, TokenRequest
from executor.reconcile import WorkerPhase
from executor.segment import aligned, place_all
from executor.state import DesiredReplica, GenerationRules, ReplicaKey
from executor.statistics import Counters
from executor.tensors import Array
from executor.worker_link import WorkerLink, WorkerSettings
from executor.worker_wire import Done, FromWorker, Iterated, Loaded
from plans.errors import ForeplanError, InvalidInput

__all__ = ["Answer", "GroupServer", "Pending"]

_log = logging.getLogger("executor.agent")


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


@dataclass(slots=True)
class _Region:
    """A place in the shared memory."""

    offset_bytes: int = 0
    size_bytes: int = 0


_LARGEST_OVERRUN = 0.25
"""Batches may be expected to take longer than planned, by this part of the latency of a batch of one at most."""

_PATIENCE = 10.0
"""A batch that takes this many times its planned latency will not end."""


@dataclass(slots=True, eq=False)
class _Running:
    key: ReplicaKey
    pending: list[Pending]
    items: int
    started_s: float
    expected_free_s: float


@dataclass(slots=True)
class _Rules:
    max_batch: int
    latency_s: tuple[float, ...]
    frames: int
    stages: int
    generation: GenerationRules | None


class GroupServer:
    """Serves the replicas of one group.

    Args:
        group: Its id.
        gpus: Its devices; the worker owns them all.
        settings: How its worker is started.
        on_lost: Called with the reason when its worker ended by itself.
        limits: Of each queue.
        clock: The time in seconds.
    """

    def __init__(
        self,
        group: str,
        gpus: tuple[int, ...],
        settings: WorkerSettings,
        on_lost: Callable[[str], None],
        *,
        limits: QueueLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.id = group
        self.gpus = gpus
        self.worker = GroupWorker(group, gpus, settings, self._lost, clock=clock)
        self._run_limit_s = settings.run_limit_s
        self.counters: dict[ReplicaKey, Counters] = {}
        self._on_lost = on_lost
        self._clock = clock
        self._limits = limits or QueueLimits()
        self._dispatcher = Dispatcher(self._limits)
        self._lanes = Lanes(self._limits.requests)
        self._bundles = Bundles()
        self._flush: asyncio.TimerHandle | None = None
        self._rules: dict[ReplicaKey, _Rules] = {}
        self._numbers = itertools.count()
        self._pending: dict[int, Pending] = {}  # by number; what waits in the dispatcher
        self._alone: deque[Pending] = deque()  # to be run one by one, after a batch with a bad request among them
        self._overrun = Delay()  # of batches, beyond what the plan says
        self._running: _Running | None = None  # holds the device, or the first stage of a pipeline
        self._further: list[_Running] = []  # in the later stages
        self._regions = self._new_regions()
        self._turn = 0

    # What it is doing.

    @property
    def process_id(self) -> int | None:
        """Process id of the worker, while it runs."""
        return self.worker.link.process_id if self.worker.link else None

    def queued(self, key: ReplicaKey) -> int:
        """Return how many requests of a replica wait."""
        return (
            self._dispatcher.queued(key)
            + self._bundles.count(key)
            + sum(pending.waiting.key == key for pending in self._alone)
            + (lane.waiting if (lane := self._lanes.of(key)) else 0)
        )

    def running(self, key: ReplicaKey) -> int:
        """Return how many requests of a replica run."""
        under_way = [*self._further, *([self._running] if self._running else [])]
        lane = self._lanes.of(key)
        return (lane.running if lane else 0) + sum(len(batch.pending) for batch in under_way if batch.key == key)

    def expected_wait_s(self) -> float:
        """Return the seconds until a request that arrives now would start: what runs, then what waits."""
        residual_s = max(0.0, self._running.expected_free_s - self._clock()) if self._running else 0.0
        return residual_s + self._queued_s() + self._lanes.work_s()

    def _queued_s(self) -> float:
        """Return the seconds for which what waits keeps the slowest stage busy, in full batches."""
        return math.fsum(
            self._dispatcher.items(key) * rules.latency_s[-1] / (rules.max_batch * rules.stages)
            for key, rules in self._rules.items()
        )

    # The worker.

    async def start_worker(self, spare: WorkerLink | None) -> tuple[str, ...]:
        """Take the process ``spare``, or start one; return the variants that it knows.

        Raises:
            WorkerGone: It ended during its start.
            WorkerRefused: Its runtime could not be made.
        """
        variants = await self.worker.start(spare)
        self._regions = self._new_regions()
        return variants

    async def stop_worker(self, grace_s: float = 5.0) -> None:
        """Let the worker finish what runs, and end it. What waits fails."""
        self._fail_waiting("the agent stops this group")
        await self.worker.stop(grace_s)

    def _lost(self, reason: str) -> None:
        self._fail_waiting(reason)
        self._on_lost(reason)

    # Requests.

    def max_batch(self, key: ReplicaKey) -> int:
        """Return the largest batch that a replica takes now."""
        return self._rules[key].max_batch

    def configure(self, key: ReplicaKey, settings: DesiredReplica, *, limit: int | None = None) -> None:
        """Open the queue of a replica, or change its rules; ``limit`` keeps batches below what the settings allow."""
        max_batch = min(settings.max_batch, limit or settings.max_batch)
        latency_s = settings.batch_latency_s[:max_batch]
        self.counters.setdefault(key, Counters())
        self._rules[key] = _Rules(
            max_batch=max_batch,
            latency_s=latency_s,
            frames=min(settings.multi_frame, max_batch),
            stages=settings.shape[1],
            generation=settings.generation,
        )
        self._configure_lane(key)
        too_large = list(self._dispatcher.configure(key, max_batch, latency_s))
        for waiting in too_large:
            expected = f"a batch of at most {max_batch}"
            self._refuse(waiting, InvalidInput.of(expected, field="inputs", found=waiting.items))
        self._queue_all(self._bundles.close(key))  # they gather anew, by the new rules

    def close(self, key: ReplicaKey, reason: str) -> None:
        """Close the queue of a replica; what waits in it fails with ``reason``."""
        for waiting in (*self._dispatcher.close(key), *self._bundles.close(key)):
            self._refuse(waiting, ReplicaUnavailable(f"{key}: {reason}"))
        self._lanes.close(key, ReplicaUnavailable(f"{key}: {reason}"), self._clock())
        self._rules.pop(key, None)
        self.counters.pop(key, None)

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
        """Queue a request; its ``answer`` is set when it was run, dropped or failed.

        Args:
            key: The replica.
            inputs: Arrays of shape (items, *item), checked against the model.
            items: Items in the request.
            deadline_s: When it must be finished, on the clock.
            priority: 1 goes first, 9 last.
            stream: The stream that it is a frame of; empty for none.

        Raises:
            QueueFull: Too much waits already, or more than can be done before the deadline.
            ReplicaUnavailable: The replica is not here.
        """
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
            rules = self._rules[key]
            ready: Waiting | None = waiting
            if stream and rules.frames > 1 and items == 1:
                largest_s = rules.latency_s[-1]
                ready = self._bundles.add(waiting, stream, most=rules.frames, largest_s=largest_s, now_s=now_s)
            if ready is not None:
                self._dispatcher.add(ready)
        except RequestRefused:
            self.counters[key].dropped += 1
            raise
        self._pending[waiting.number] = pending
        if ready is None:
            self._set_flush()
        else:
            self._dispatch()
        return pending

    def _check_hope(self, waiting: Waiting, now_s: float) -> None:
        """Refuse a request without hope, before it makes the queue longer.

        Raises:
            QueueFull: The work before it takes `HOPELESS_RATIO` times as long as it has.
        """
        left_s = waiting.deadline_s - now_s
        if self._dispatcher.queue_work_s(waiting.key) > HOPELESS_RATIO * left_s:  # a first look, which costs nothing
            wait_s = self._dispatcher.work_before_s(waiting)
            if wait_s > HOPELESS_RATIO * left_s:
                raise QueueFull(
                    f"{waiting.key}: {wait_s:.3f} s of work wait before it, its deadline is in {left_s:.3f} s"
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
        self._dispatch()

    def cancel(self, pending: Pending) -> None:
        """Forget a request whose client went away; one that runs already runs to its end."""
        if self._dispatcher.cancel(pending.waiting):
            self._pending.pop(pending.waiting.number, None)
        if pending.waiting.key in self.counters:
            counters = self.counters[pending.waiting.key]
            counters.dropped += 1
            counters.failed_s += self._clock() - pending.arrived_s

    def _dispatch(self) -> None:
        """Start the next batch, if the worker is free and something waits."""
        while self._running is None and self.worker.phase is WorkerPhase.READY:
            lane = self._lanes.next(-math.inf if self._alone else self._dispatcher.next_deadline_s())
            if lane is not None:
                self._iterate(lane)
                continue
            pending = self._next()
            if not pending:
                return
            self._start(pending[0].waiting.key, pending)

    def _next(self) -> list[Pending]:
        """Take the requests of the next batch out of their queues, and refuse what is dropped on the way."""
        while self._alone:
            pending = self._alone.popleft()
            if not pending.answer.done():
                return [pending]
        decision = self._dispatcher.decide(self._clock() + self._overrun.expected_s)
        for drop in decision.drops:
            key = drop.request.key
            if drop.reason is DropReason.HOPELESS:
                self._overrun.doubt()
                self._refuse(drop.request, Hopeless(f"{key}: the deadline cannot be met any more"))
            else:
                self._refuse(drop.request, Displaced(f"{key}: gave way to a full batch that waits behind it"))
        return [self._pending.pop(waiting.number) for waiting in decision.batch.requests] if decision.batch else []

    def _start(self, key: ReplicaKey, pending: list[Pending]) -> None:
        """Run a batch; where it cannot even be sent, its requests fail and the worker stays free."""
        link, loaded = self.worker.link, self.worker.loaded(key.variant)
        if link is None or loaded is None:
            self._settle(pending, ReplicaUnavailable(f"{key}: its model is not loaded"))
            return
        items = sum(one.waiting.items for one in pending)
        now_s = self._clock()
        latency_s = self._rules[key].latency_s[min(items, self._rules[key].max_batch) - 1]
        batch = _Running(
            key=key,
            pending=pending,
            items=items,
            started_s=now_s,
            expected_free_s=now_s + latency_s / self._rules[key].stages,
        )
        try:
            future = self._send(link, loaded, batch)
        except (OSError, ValueError) as error:
            _log.exception("event=batch_not_sent replica=%r", str(key))
            self._settle(pending, ReplicaUnavailable(f"{key}: its worker cannot be given the batch: {error}"))
            return
        limit_s = max(self._run_limit_s, _PATIENCE * latency_s)
        watch = asyncio.get_running_loop().call_later(limit_s, link.give_up, f"a batch took over {limit_s:g} s")
        self._running = batch
        future.add_done_callback(functools.partial(self._finished, batch, watch, link))

    def _send(self, link: WorkerLink, loaded: Loaded, batch: _Running) -> asyncio.Future[FromWorker]:
        items = batch.items
        inputs = {spec.name: (spec.datatype, (items, *spec.shape)) for spec in loaded.inputs}
        input_bytes = sum(aligned(items * spec.item_bytes) for spec in loaded.inputs)
        output_bytes = sum(aligned(items * spec.item_bytes) for spec in loaded.outputs)
        self._turn = (self._turn + 1) % len(self._regions)
        region = self._regions[self._turn]
        if input_bytes + output_bytes > region.size_bytes:
            offset_bytes = aligned(link.segment.size_bytes)
            size_bytes = max(input_bytes + output_bytes, 2 * region.size_bytes)
            link.segment.grow(offset_bytes + size_bytes)
            region.offset_bytes, region.size_bytes = offset_bytes, size_bytes
        places = place_all(inputs, region.offset_bytes)
        link.segment.write({name: [one.inputs[name] for one in batch.pending] for name in inputs}, places)
        freed = functools.partial(self._freed, batch)
        return link.run(batch.key.variant, places, region.offset_bytes + input_bytes, output_bytes, freed)

    def _freed(self, batch: _Running) -> None:
        """Start the next batch: this one has left the first stage."""
        if self._running is batch:
            self._running = None
            self._further.append(batch)
            self._dispatch()

    def _finished(
        self, batch: _Running, watch: asyncio.TimerHandle, link: WorkerLink, future: asyncio.Future[FromWorker]
    ) -> None:
        """Start the next batch, then hand out the answers of this one."""
        if self._running is batch:
            self._running = None
        else:
            self._further.remove(batch)
        watch.cancel()
        error = future.exception()
        if error is None:
            self._note_overrun(batch)
        if batch.key in self.counters:
            run_s = self._clock() - batch.started_s
            self.counters[batch.key].ran(batch.items, run_s, time.time_ns() // 1_000_000)
        if isinstance(error, WorkerRefused) and error.invalid_input and len(batch.pending) > 1:
            _log.warning("event=batch_refused replica=%r action=run_one_by_one", str(batch.key))
            self._alone.extend(batch.pending)
            self._dispatch()
            return
        self._dispatch()
        if error is not None:
            self._settle(batch.pending, _request_error(batch.key, error))
            return
        done = future.result()
        assert isinstance(done, Done)
        if done.swap_s and batch.key in self.counters:
            self.counters[batch.key].swapped(done.swap_s)
        try:
            self._deliver(batch, done, link)
        except (OSError, ValueError):
            _log.exception("event=answer_not_read replica=%r", str(batch.key))
        finally:
            self._settle(batch.pending, ReplicaUnavailable(f"{batch.key}: the worker's answer cannot be read"))

    def _note_overrun(self, batch: _Running) -> None:
        """Learn from a batch that has ended; one in a pipeline may have waited for those before it."""
        rules = self._rules.get(batch.key)
        if rules is not None and rules.stages == 1:
            planned_s = rules.latency_s[min(batch.items, rules.max_batch) - 1]
            over_s = self._clock() - batch.started_s - planned_s
            self._overrun.note(over_s, most_s=_LARGEST_OVERRUN * rules.latency_s[0])

    def _deliver(self, batch: _Running, done: Done, link: WorkerLink) -> None:
        outputs = {place.name: link.segment.array(place) for place in done.outputs}
        start = 0
        for pending in batch.pending:
            end = start + pending.waiting.items
            if not pending.answer.done():
                pending.answer.set_result(
                    Answer(
                        outputs={name: array[start:end].copy() for name, array in outputs.items()},
                        variant=batch.key.variant,
                        batch_items=batch.items,
                        queue_s=batch.started_s - pending.arrived_s,
                        run_s=done.run_s,
                    )
                )
                counters = self.counters.get(batch.key)
                if counters is not None:
                    counters.completed += 1
                    counters.items += pending.waiting.items
                    counters.queue_s += batch.started_s - pending.arrived_s
                    counters.request_s += self._clock() - pending.arrived_s
            start = end

    def _new_regions(self) -> tuple[_Region, ...]:
        """Return empty places: one for each batch that a pipeline over all devices holds, and one to be read."""
        return tuple(_Region() for _ in range(len(self.gpus) + 1))

    def _refuse(self, waiting: Waiting, error: ForeplanError) -> None:
        for part in waiting.parts:
            pending = self._pending.pop(part.number, None)
            if pending is not None:
                self._settle([pending], error)

    def _settle(self, pending: Iterable[Pending], error: ForeplanError) -> None:
        for one in pending:
            counters = self.counters.get(one.waiting.key)
            if one.answer.done():
                continue
            one.answer.set_exception(error)
            if counters is not None:
                counters.failed_s += self._clock() - one.arrived_s
            if counters is not None and isinstance(error, Hopeless | Displaced):
                counters.dropped += 1
            elif counters is not None:
                counters.failed += 1

    def _fail_waiting(self, reason: str) -> None:
        for waiting in (*self._dispatcher.clear(), *self._bundles.close()):
            self._refuse(waiting, ReplicaUnavailable(f"{waiting.key}: {reason}"))
        alone, self._alone = self._alone, deque()
        for pending in alone:
            self._settle([pending], ReplicaUnavailable(f"{pending.waiting.key}: {reason}"))
        self._lanes.worker_lost(reason, self._clock())

    # Sequences.

    def generates(self, key: ReplicaKey) -> bool:
        """Say whether a replica generates token by token: the plan says how, and its model can."""
        loaded = self.worker.loaded(key.variant)
        return loaded is not None and loaded.generates is not None and self._rules[key].generation is not None

    def generate(
        self, key: ReplicaKey, request: TokenRequest, on_token: Callable[[int], None] = lambda _: None
    ) -> Generating:
        """Let a replica that `generates` answer a request; ``on_token`` is told each token.

        Raises:
            QueueFull: Too much waits already.
            ReplicaUnavailable: The replica is not here.
            InvalidInput: The request is not what the model takes.
        """
        loaded = self.worker.loaded(key.variant)
        if key not in self._rules or loaded is None or loaded.generates is None:
            raise ReplicaUnavailable(f"{key} is not here")
        lane = self._lanes.of(key)
        if lane is None:
            lane = self._lanes.open(key, loaded.generates, self.counters[key])
            self._configure_lane(key)
        sequence = Generating(
            key=key,
            number=next(self._numbers),
            arrived_s=self._clock(),
            answer=asyncio.get_running_loop().create_future(),
            on_token=on_token,
        )
        lane.add(sequence, request)
        self._dispatch()
        return sequence

    def cancel_generation(self, sequence: Generating) -> None:
        """Forget a sequence whose client went away; its memory is free with the next iteration."""
        lane = self._lanes.of(sequence.key)
        if lane is not None:
            lane.cancel(sequence, self._clock())

    def _configure_lane(self, key: ReplicaKey) -> None:
        lane, rules = self._lanes.of(key), self._rules[key]
        if lane is not None and rules.generation is not None:
            lane.configure(rules.generation, rules.max_batch, rules.latency_s[-1])

    def _iterate(self, lane: Lane) -> None:
        """Send the next iteration of ``lane``, if it has any."""
        key, now_s = lane.key, self._clock()
        iteration = lane.turn(now_s)
        if iteration is None:
            return
        link = self.worker.link
        if link is None or self.worker.loaded(key.variant) is None:
            lane.fail(iteration, ReplicaUnavailable(f"{key}: its model is not loaded"), now_s)
            return
        sequences = iteration.work.sequences
        future = link.iterate(
            key.variant,
            self._lanes.kv_tokens(key.variant),
            freed=(*iteration.freed, *self._lanes.take_left_over(key.variant)),
            prefill=iteration.contexts,
            decode=() if iteration.contexts else sequences,
        )
        limit_s = max(self._run_limit_s, _PATIENCE * self._rules[key].latency_s[-1])
        watch = asyncio.get_running_loop().call_later(limit_s, link.give_up, f"an iteration took over {limit_s:g} s")
        self._running = _Running(
            key=key,
            pending=[],
            items=len(sequences),
            started_s=now_s,
            expected_free_s=now_s + iteration.expected_s,
        )
        future.add_done_callback(functools.partial(self._iterated, lane, iteration, watch))

    def _iterated(
        self, lane: Lane, iteration: Iteration, watch: asyncio.TimerHandle, future: asyncio.Future[FromWorker]
    ) -> None:
        """Start what comes next, then hand out the tokens."""
        assert self._running is not None
        started_s, self._running = self._running.started_s, None
        watch.cancel()
        now_s = self._clock()
        error = future.exception()
        if error is not None:
            lane.fail(iteration, _request_error(lane.key, error), now_s)
            self._dispatch()
            return
        answer = future.result()
        assert isinstance(answer, Iterated)
        if lane.key in self.counters:
            run_s, ended_ms = now_s - started_s, time.time_ns() // 1_000_000
            self.counters[lane.key].ran(len(iteration.work.sequences), run_s, ended_ms)
        hand_out = lane.end(iteration, answer.tokens, answer.run_s, now_s)
        self._dispatch()
        hand_out()


def _request_error(key: ReplicaKey, error: BaseException) -> ForeplanError:
    """Return what a client is told when its batch ended with ``error``."""
    if isinstance(error, WorkerRefused):
        if error.invalid_input:
            return InvalidInput.of("inputs that the model takes", where=str(key), field="inputs", found=str(error))
        return ModelFailed(f"{key}: {error}")
    return ReplicaUnavailable(f"{key}: {error}")
