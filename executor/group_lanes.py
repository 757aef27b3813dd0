"""The replicas of a group that generate: their lanes, and the iterations that its worker does for them.

`executor.lane` says what the next iteration of a lane is; here it is sent to the worker, and its tokens come back.
Which of lanes and batches goes first is said by `executor.group_server`.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from executor.errors import ReplicaUnavailable, request_error
from executor.group_worker import GroupWorker
from executor.lane import Generating, Iteration, Lane, Lanes, TokenRequest
from executor.state import ReplicaKey
from executor.statistics import Counters
from executor.whole_requests import ReplicaRules
from executor.worker_wire import FromWorker, Iterated

__all__ = ["GroupLanes", "SentIteration"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SentIteration:
    """An iteration that the worker does.

    Attributes:
        lane: Whose.
        iteration: What.
        started_s: When it was sent, on the clock.
        answer: What the worker will say.
    """

    lane: Lane
    iteration: Iteration
    started_s: float
    answer: asyncio.Future[FromWorker]


class GroupLanes:
    """The sequences of one group.

    Args:
        worker: That of the group.
        rules: Of every replica that is here; kept by the caller.
        counters: Where it is counted what becomes of sequences; kept by the caller, for the same replicas.
        most_waiting: Sequences that may wait in each lane.
        clock: The time in seconds.
        on_ready: Called when an iteration may have become possible.
    """

    def __init__(
        self,
        worker: GroupWorker,
        rules: Mapping[ReplicaKey, ReplicaRules],
        counters: Mapping[ReplicaKey, Counters],
        most_waiting: int,
        clock: Callable[[], float],
        on_ready: Callable[[], None],
    ) -> None:
        self._worker = worker
        self._rules = rules
        self._counters = counters
        self._clock = clock
        self._on_ready = on_ready
        self._lanes = Lanes(most_waiting)
        self._numbers = itertools.count()

    def queued(self, key: ReplicaKey) -> int:
        """Return how many sequences of a replica wait."""
        lane = self._lanes.of(key)
        return lane.waiting if lane else 0

    def running(self, key: ReplicaKey) -> int:
        """Return how many sequences of a replica run."""
        lane = self._lanes.of(key)
        return lane.running if lane else 0

    def work_s(self) -> float:
        """Return the seconds of work that wait."""
        return self._lanes.work_s()

    # Coming in.

    def configure(self, key: ReplicaKey) -> None:
        """Follow the new rules of a replica."""
        lane, rules = self._lanes.of(key), self._rules[key]
        if lane is not None and rules.generation is not None:
            lane.configure(rules.generation, rules.max_batch, rules.latency_s[-1])

    def close(self, key: ReplicaKey, reason: str) -> None:
        """Close the lane of a replica; its sequences fail with ``reason``."""
        self._lanes.close(key, ReplicaUnavailable(f"{key}: {reason}"), self._clock())

    def fail_all(self, reason: str) -> None:
        """Let every sequence fail; a new worker says anew what its models take."""
        self._lanes.worker_lost(reason, self._clock())

    def generates(self, key: ReplicaKey) -> bool:
        """Say whether a replica generates token by token: the plan says how, and its model can."""
        loaded = self._worker.loaded(key.variant)
        return loaded is not None and loaded.generates is not None and self._rules[key].generation is not None

    def generate(self, key: ReplicaKey, request: TokenRequest, on_token: Callable[[int], None]) -> Generating:
        """Let a sequence wait; see `executor.group_server.GroupServer.generate`."""
        loaded = self._worker.loaded(key.variant)
        if key not in self._rules or loaded is None or loaded.generates is None:
            raise ReplicaUnavailable(f"{key} is not here")
        lane = self._lanes.of(key)
        if lane is None:
            lane = self._lanes.open(key, loaded.generates, self._counters[key])
            self.configure(key)
        sequence = Generating(
            key=key,
            number=next(self._numbers),
            arrived_s=self._clock(),
            answer=asyncio.get_running_loop().create_future(),
            on_token=on_token,
        )
        lane.add(sequence, request)
        self._on_ready()
        return sequence

    def cancel(self, sequence: Generating) -> None:
        """Forget a sequence whose client went away; its memory is free with the next iteration."""
        lane = self._lanes.of(sequence.key)
        if lane is not None:
            lane.cancel(sequence, self._clock())

    # Going out.

    def next(self, before_s: float) -> Lane | None:
        """Return the lane whose turn is due first, unless that is after ``before_s``."""
        return self._lanes.next(before_s)

    def send(self, lane: Lane) -> SentIteration | None:
        """Send the next iteration of ``lane`` to the worker, if it has any; `end` takes what comes back."""
        key, now_s = lane.key, self._clock()
        iteration = lane.turn(now_s)
        if iteration is None:
            return None
        link = self._worker.link
        if link is None or self._worker.loaded(key.variant) is None:
            lane.fail(iteration, ReplicaUnavailable(f"{key}: its model is not loaded"), now_s)
            return None
        answer = link.iterate(
            key.variant,
            self._lanes.kv_tokens(key.variant),
            freed=(*iteration.freed, *self._lanes.take_left_over(key.variant)),
            prefill=iteration.contexts,
            decode=() if iteration.contexts else iteration.work.sequences,
        )
        return SentIteration(lane=lane, iteration=iteration, started_s=now_s, answer=answer)

    def end(self, sent: SentIteration) -> Callable[[], None]:
        """Take what the worker said; return what hands out the tokens, which may wait until more work is sent."""
        lane, now_s = sent.lane, self._clock()
        error = sent.answer.exception()
        if error is not None:
            lane.fail(sent.iteration, request_error(str(lane.key), error), now_s)
            return lambda: None
        answer = sent.answer.result()
        assert isinstance(answer, Iterated)
        if lane.key in self._counters:
            sequences, ended_ms = len(sent.iteration.work.sequences), time.time_ns() // 1_000_000
            self._counters[lane.key].ran(sequences, now_s - sent.started_s, ended_ms)
        return lane.end(sent.iteration, answer.tokens, answer.run_s, now_s)
