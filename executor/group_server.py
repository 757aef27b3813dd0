"""One GPU group at work: its worker process, and who may use it next.

Whenever the worker is free, it gets the next batch of the requests that are served whole (`executor.whole_requests`) or
the next iteration of a lane of sequences (`executor.group_lanes`), whichever is due first. There is a place more in the
shared memory than batches can be under way: the next batch starts before the answers of the last one are taken out. On
a pipeline the next batch starts as soon as the first stage is free.

When the worker ends, everything that waits or runs here fails at once with `ReplicaUnavailable`, so that a gateway can
try another replica in time. A worker that takes much longer for a batch than planned hangs, and is ended by force.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import time
from collections.abc import Callable, Mapping

from executor.dispatcher import DEFAULT_PRIORITY, QueueLimits
from executor.errors import ReplicaUnavailable, WorkerRefused, request_error
from executor.group_batch import Batch, Regions, deliver
from executor.group_lanes import GroupLanes, SentIteration
from executor.group_worker import GroupWorker
from executor.lane import Generating, Lane, TokenRequest
from executor.reconcile import WorkerPhase
from executor.state import DesiredReplica, ReplicaKey
from executor.statistics import Counters
from executor.tensors import Array
from executor.whole_requests import Pending, ReplicaRules, WholeRequests
from executor.worker_link import WorkerLink, WorkerSettings
from executor.worker_wire import Done, FromWorker

__all__ = ["GroupServer"]

_log = logging.getLogger("executor.agent")

_LARGEST_OVERRUN = 0.25
"""Batches may be expected to take longer than planned, by this part of the latency of a batch of one at most."""

_PATIENCE = 10.0
"""A batch that takes this many times its planned latency will not end."""


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
        self.counters: dict[ReplicaKey, Counters] = {}
        self._run_limit_s = settings.run_limit_s
        self._on_lost = on_lost
        self._clock = clock
        self._rules: dict[ReplicaKey, ReplicaRules] = {}
        limits = limits or QueueLimits()
        self._requests = WholeRequests(self._rules, self.counters, limits, clock, self._dispatch)
        self._lanes = GroupLanes(self.worker, self._rules, self.counters, limits.requests, clock, self._dispatch)
        self._running: Batch | None = None  # holds the device, or the first stage of a pipeline
        self._further: list[Batch] = []  # in the later stages
        self._regions = Regions(len(gpus))

    # What it is doing.

    @property
    def process_id(self) -> int | None:
        """Process id of the worker, while it runs."""
        return self.worker.link.process_id if self.worker.link else None

    def queued(self, key: ReplicaKey) -> int:
        """Return how many requests of a replica wait."""
        return self._requests.queued(key) + self._lanes.queued(key)

    def running(self, key: ReplicaKey) -> int:
        """Return how many requests of a replica run."""
        under_way = [*self._further, *([self._running] if self._running else [])]
        return self._lanes.running(key) + sum(len(batch.pending) for batch in under_way if batch.key == key)

    def expected_wait_s(self) -> float:
        """Return the seconds until a request that arrives now would start: what runs, then what waits.

        What runs longer than planned is expected to go on for as long as it is late: it may hang.
        """
        residual_s = abs(self._running.expected_free_s - self._clock()) if self._running else 0.0
        return residual_s + self._requests.work_s() + self._lanes.work_s()

    # The worker.

    async def start_worker(self, spare: WorkerLink | None) -> tuple[str, ...]:
        """Take the process ``spare``, or start one; return the variants that it knows.

        Raises:
            WorkerGone: It ended during its start.
            WorkerRefused: Its runtime could not be made.
        """
        variants = await self.worker.start(spare)
        self._regions = Regions(len(self.gpus))
        return variants

    async def stop_worker(self, grace_s: float = 5.0) -> None:
        """Let the worker finish what runs, and end it. What waits fails."""
        self._fail_waiting("the agent stops this group")
        await self.worker.stop(grace_s)

    def _lost(self, reason: str) -> None:
        self._fail_waiting(reason)
        self._on_lost(reason)

    def _fail_waiting(self, reason: str) -> None:
        self._requests.fail_all(reason)
        self._lanes.fail_all(reason)

    # Requests.

    def max_batch(self, key: ReplicaKey) -> int:
        """Return the largest batch that a replica takes now."""
        return self._rules[key].max_batch

    def configure(self, key: ReplicaKey, settings: DesiredReplica, *, limit: int | None = None) -> None:
        """Open the queue of a replica, or change its rules; ``limit`` keeps batches below what the settings allow."""
        max_batch = min(settings.max_batch, limit or settings.max_batch)
        self.counters.setdefault(key, Counters())
        self._rules[key] = ReplicaRules(
            max_batch=max_batch,
            latency_s=settings.batch_latency_s[:max_batch],
            frames=min(settings.multi_frame, max_batch),
            stages=settings.shape[1],
            generation=settings.generation,
        )
        self._lanes.configure(key)
        self._requests.configure(key)

    def close(self, key: ReplicaKey, reason: str) -> None:
        """Close the queue of a replica; what waits in it fails with ``reason``."""
        self._requests.close(key, reason)
        self._lanes.close(key, reason)
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
            Hopeless: The deadline has passed already.
            QueueFull: Too much waits already, or more than can be done before the deadline.
            ReplicaUnavailable: The replica is not here.
        """
        return self._requests.submit(key, inputs, items, deadline_s, priority=priority, stream=stream)

    def cancel(self, pending: Pending) -> None:
        """Forget a request whose client went away; one that runs already runs to its end."""
        self._requests.cancel(pending)

    def generates(self, key: ReplicaKey) -> bool:
        """Say whether a replica generates token by token: the plan says how, and its model can."""
        return self._lanes.generates(key)

    def generate(
        self, key: ReplicaKey, request: TokenRequest, on_token: Callable[[int], None] = lambda _: None
    ) -> Generating:
        """Let a replica that `generates` answer a request; ``on_token`` is told each token.

        Raises:
            QueueFull: Too much waits already.
            ReplicaUnavailable: The replica is not here.
            InvalidInput: The request is not what the model takes.
        """
        return self._lanes.generate(key, request, on_token)

    def cancel_generation(self, sequence: Generating) -> None:
        """Forget a sequence whose client went away; its memory is free with the next iteration."""
        self._lanes.cancel(sequence)

    # Who is next.

    def _dispatch(self) -> None:
        """Start the next batch or iteration, if the worker is free and something waits.

        The first stage of a pipeline may be far ahead of a later one, which answers nobody sooner for that. No more
        batches are under way than there are devices: each needs its place in the shared memory until it is answered.
        """
        most_further = len(self.gpus) - 1
        while self._running is None and len(self._further) <= most_further and self.worker.phase is WorkerPhase.READY:
            deadline_s = self._requests.next_deadline_s()
            lane = self._lanes.next(deadline_s)
            if lane is not None:
                self._iterate(lane)
                continue
            if deadline_s == math.inf:
                return
            pending = self._requests.next()
            if pending:  # otherwise all were dropped, and a lane may be next
                self._start(pending[0].waiting.key, pending)

    def _iterate(self, lane: Lane) -> None:
        """Have the next iteration of ``lane`` done, if it has any."""
        sent = self._lanes.send(lane)
        link = self.worker.link
        if sent is None or link is None:
            return
        watch = self._watch(link, self._rules[lane.key].latency_s[-1], "an iteration")
        self._running = Batch(
            key=lane.key,
            pending=[],
            items=len(sent.iteration.work.sequences),
            started_s=sent.started_s,
            expected_free_s=sent.started_s + sent.iteration.expected_s,
        )
        sent.answer.add_done_callback(functools.partial(self._iterated, sent, watch))

    def _iterated(self, sent: SentIteration, watch: asyncio.TimerHandle, _: asyncio.Future[FromWorker]) -> None:
        """Start what comes next, then hand out the tokens."""
        self._running = None
        watch.cancel()
        hand_out = self._lanes.end(sent)
        self._dispatch()
        hand_out()

    def _start(self, key: ReplicaKey, pending: list[Pending]) -> None:
        """Run a batch; where it cannot even be sent, its requests fail and the worker stays free."""
        link, loaded = self.worker.link, self.worker.loaded(key.variant)
        if link is None or loaded is None:
            self._requests.settle(pending, ReplicaUnavailable(f"{key}: its model is not loaded"))
            return
        rules, now_s = self._rules[key], self._clock()
        items = sum(one.waiting.items for one in pending)
        latency_s = rules.batch_latency_s(items)
        batch = Batch(
            key=key,
            pending=pending,
            items=items,
            started_s=now_s,
            expected_free_s=now_s + latency_s / rules.stages,
        )
        try:
            future = self._regions.send(link, loaded, batch, functools.partial(self._freed, batch))
            batch.input_s = self._clock() - now_s
            if key in self.counters:
                self.counters[key].input_s += batch.input_s
        except (OSError, ValueError) as error:
            _log.exception("event=batch_not_sent replica=%r", str(key))
            refused = ReplicaUnavailable(f"{key}: its worker cannot be given the batch: {error}")
            self._requests.settle(pending, refused)
            return
        watch = self._watch(link, latency_s, "a batch")
        self._running = batch
        future.add_done_callback(functools.partial(self._finished, batch, watch, link))

    def _watch(self, link: WorkerLink, latency_s: float, what: str) -> asyncio.TimerHandle:
        """See to it that the worker is ended if it takes much longer than ``latency_s``, as planned."""
        limit_s = max(self._run_limit_s, _PATIENCE * latency_s)
        return asyncio.get_running_loop().call_later(limit_s, link.give_up, f"{what} took over {limit_s:g} s")

    def _freed(self, batch: Batch) -> None:
        """Start the next batch: this one has left the first stage."""
        if self._running is batch:
            self._running = None
            self._further.append(batch)
            self._dispatch()

    def _finished(
        self, batch: Batch, watch: asyncio.TimerHandle, link: WorkerLink, future: asyncio.Future[FromWorker]
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
                run_s = self._clock() - batch.started_s - batch.input_s
                self.counters[batch.key].ran(batch.items, run_s, time.time_ns() // 1_000_000)
        if isinstance(error, WorkerRefused) and error.invalid_input and len(batch.pending) > 1:
            _log.warning("event=batch_refused replica=%r action=run_one_by_one", str(batch.key))
            self._requests.run_alone(batch.pending)
            self._dispatch()
            return
        self._dispatch()
        if error is not None:
            self._requests.settle(batch.pending, request_error(str(batch.key), error))
            return
        done = future.result()
        assert isinstance(done, Done)
        self._hand_out(batch, done, link)

    def _note_overrun(self, batch: Batch) -> None:
        """Learn from a batch that has ended; one in a pipeline may have waited for those before it."""
        rules = self._rules.get(batch.key)
        if rules is not None and rules.stages == 1:
            over_s = self._clock() - batch.started_s - rules.batch_latency_s(batch.items)
            self._requests.overrun.note(over_s, most_s=_LARGEST_OVERRUN * rules.latency_s[0])

    def _hand_out(self, batch: Batch, done: Done, link: WorkerLink) -> None:
        counters = self.counters.get(batch.key)
        if done.swap_s and counters is not None:
            counters.swapped(done.swap_s)
        begun_s = self._clock()
        try:
            for pending in deliver(batch, done, link):
                if counters is not None:
                    counters.completed += 1
                    counters.items += pending.waiting.items
                    counters.queue_s += batch.started_s - pending.arrived_s
                    counters.request_s += self._clock() - pending.arrived_s
            if counters is not None:
                counters.output_s += self._clock() - begun_s
        except (OSError, ValueError):
            _log.exception("event=answer_not_read replica=%r", str(batch.key))
        finally:
            if not all(one.answer.done() for one in batch.pending):
                unread = ReplicaUnavailable(f"{batch.key}: the worker's answer cannot be read")
                self._requests.settle(batch.pending, unread)
