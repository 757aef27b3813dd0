"""A lane: the sequences of one replica that generates, beside the queues of requests that its group serves whole.

The rules are those of docs/evaluator.md, section 9, by `executor.runtime.iteration`. A lane says when its turn is due
and what its next iteration is; the group sends that to the worker and brings back the tokens. No clock, no input or
output here. `Lanes` are those of one group.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from executor.dispatcher import HOPELESS_RATIO
from executor.errors import TOO_MUCH, Hopeless, QueueFull, ReplicaUnavailable, RequestRefused
from executor.runtime.generation_queue import Finished, GenerationQueue, prefill_curve
from executor.runtime.iteration import Decode, IterationLimits, Prefill
from executor.runtime.protocol import GenerationFacts
from executor.state import GenerationRules, ReplicaKey
from executor.statistics import Counters
from plans.errors import ForeplanError, InvalidInput

__all__ = ["Generated", "Generating", "Iteration", "Lane", "Lanes", "TokenRequest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRequest:
    """What a client asks of a model that generates.

    Attributes:
        prompt: Tokens of the prompt.
        new_tokens: Tokens to generate, unless one of ``stop_tokens`` comes before.
        stop_tokens: Tokens that end the answer.
    """

    prompt: tuple[int, ...]
    new_tokens: int
    stop_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """A whole answer.

    Attributes:
        tokens: What was generated.
        variant: The model.
        ttft_s: Seconds from submission to the first token.
        tpot_s: Seconds per token after the first; 0 for a single one.
        queue_s: Seconds from submission to the start of the first iteration.
        run_s: Seconds of all iterations that it took part in.
        batch_items: Sequences that shared these with it and itself, on average by time, rounded.
    """

    tokens: tuple[int, ...]
    variant: str
    ttft_s: float
    tpot_s: float
    queue_s: float
    run_s: float
    batch_items: int


@dataclass(slots=True, eq=False)
class Generating:
    """A sequence of a lane.

    Attributes:
        key: The replica.
        number: Its number, unique in the group.
        arrived_s: When it was submitted, on the clock.
        answer: What its client awaits.
        on_token: Told every token, as soon as it is there.
    """

    key: ReplicaKey
    number: int
    arrived_s: float
    answer: asyncio.Future[Generated]
    on_token: Callable[[int], None]
    started_s: float | None = None
    run_s: float = 0.0
    share_s: float = 0.0
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """What a lane does next.

    Attributes:
        work: Which sequences, and what with them.
        contexts: Tokens of those that begin.
        freed: Sequences whose memory is free before.
        expected_s: What it will take, as far as known; 0 where not.
    """

    work: Prefill | Decode
    contexts: tuple[tuple[int, tuple[int, ...]], ...]
    freed: tuple[int, ...]
    expected_s: float


class Lane:
    """The sequences of one replica.

    Args:
        key: The replica.
        facts: What its model takes.
        counters: Where it counts what becomes of its sequences.
        most_waiting: Sequences that may wait.
    """

    def __init__(self, key: ReplicaKey, facts: GenerationFacts, counters: Counters, most_waiting: int) -> None:
        self.key = key
        self._facts = facts
        self._counters = counters
        self._most_waiting = most_waiting
        self._sequences: dict[int, Generating] = {}
        self._queue = GenerationQueue(IterationLimits(max_batch=1), facts)
        self._rules: GenerationRules | None = None
        self._share_s = 0.0
        self._decode_s = 0.0
        self._prefill_s: Callable[[int], float] | None = None

    @property
    def kv_tokens(self) -> int:
        """Tokens of context that its memory holds."""
        return 0 if self._rules is None else self._rules.kv_bytes // self._facts.kv_bytes_per_token

    def configure(self, rules: GenerationRules, max_batch: int, latency_s: float) -> None:
        """Set the rules.

        Args:
            rules: Those of the plan.
            max_batch: Sequences that run together, at most.
            latency_s: Of as many whole answers, as planned: what each that waits counts for is its part of it.
        """
        self._rules = rules
        self._share_s = latency_s / max_batch
        self._prefill_s = prefill_curve(rules.prefill_tokens, rules.prefill_s)
        limits = IterationLimits(
            max_batch=max_batch, kv_tokens=max(1, self.kv_tokens), max_prefill_tokens=rules.max_prefill_tokens
        )
        self._queue.change(limits, self._prefill_s)

    @property
    def waiting(self) -> int:
        """Sequences that wait."""
        return self._queue.waiting

    @property
    def running(self) -> int:
        """Sequences that run."""
        return self._queue.running

    def work_s(self) -> float:
        """Return the seconds of work that waits."""
        return self._queue.waiting * self._share_s

    def due_s(self) -> float | None:
        """Return when its turn is due, on the clock; None when there is nothing to do."""
        return None if self._rules is None else self._queue.key(self._rules.tpot_s)

    def add(self, sequence: Generating, request: TokenRequest) -> None:
        """Let a sequence wait.

        Raises:
            QueueFull: Too many wait already, or the first token would take `HOPELESS_RATIO` times as long as it may.
            InvalidInput: The request is not what the model takes, or could never fit.
        """
        assert self._rules is not None
        if self.work_s() > HOPELESS_RATIO * self._rules.ttft_s:
            self._counters.dropped += 1
            raise QueueFull(
                f"{self.key}: {self.work_s():.3f} s of work wait before it, its first token is due in "
                f"{self._rules.ttft_s:.3f} s, and at most {HOPELESS_RATIO:g} times that may wait; {TOO_MUCH}"
            )
        if self._queue.waiting >= self._most_waiting:
            self._counters.dropped += 1
            raise QueueFull(f"{self.key}: {self._queue.waiting} requests wait already, its queue's limit; {TOO_MUCH}")
        try:
            self._queue.add(
                request.prompt,
                request.new_tokens,
                now_s=sequence.arrived_s,
                ttft_s=self._rules.ttft_s,
                stop_tokens=request.stop_tokens,
                number=sequence.number,
            )
        except InvalidInput:
            self._counters.failed += 1
            raise
        sequence.prompt_tokens = len(request.prompt)
        self._sequences[sequence.number] = sequence

    def cancel(self, sequence: Generating, now_s: float) -> None:
        """Forget a sequence whose client went away."""
        if self._sequences.pop(sequence.number, None) is not None:
            self._queue.remove(sequence.number)
            self._counters.dropped += 1
            self._counters.failed_s += now_s - sequence.arrived_s

    def turn(self, now_s: float) -> Iteration | None:
        """Refuse what is hopeless, and return the next iteration, if any; call `end` or `fail` before the next turn."""
        turn = self._queue.turn(now_s)
        for number in turn.dropped:
            late = Hopeless(f"{self.key}: the first token cannot come in time any more")
            self._settle(self._sequences.pop(number), late, now_s)
        work = turn.work
        if work is None:
            return None
        contexts = self._queue.contexts(work) if isinstance(work, Prefill) else ()
        expected_s = self._decode_s
        if contexts and self._prefill_s is not None:
            expected_s = self._prefill_s(sum(len(tokens) for _, tokens in contexts))
        for number in work.sequences:
            if self._sequences[number].started_s is None:
                self._sequences[number].started_s = now_s
        return Iteration(work=work, contexts=contexts, freed=self._queue.take_freed(), expected_s=expected_s)

    def end(self, iteration: Iteration, tokens: Iterable[int], run_s: float, now_s: float) -> Callable[[], None]:
        """Take the tokens of an iteration; return what hands them out, which may wait until the next one is sent."""
        work = iteration.work
        served = [sequence for number in work.sequences if (sequence := self._sequences.get(number)) is not None]
        for sequence in served:
            sequence.run_s += run_s
            sequence.share_s += run_s / len(work.sequences)
        if isinstance(work, Decode):
            self._decode_s = run_s
        step = self._queue.end(work, tuple(tokens), now_s)
        produced = [(self._sequences[number], token) for number, token in step.produced]
        finished = [(self._sequences.pop(one.number), one) for one in step.finished]

        def hand_out() -> None:
            for sequence, token in produced:
                sequence.on_token(token)
            for sequence, one in finished:
                self._finish(sequence, one, now_s)

        return hand_out

    def fail(self, iteration: Iteration, error: ForeplanError, now_s: float) -> None:
        """Let what was in a failed iteration fail."""
        for number in iteration.work.sequences:
            sequence = self._sequences.pop(number, None)
            if sequence is not None:
                self._queue.remove(number)
                self._settle(sequence, error, now_s)

    def fail_all(self, error: RequestRefused, now_s: float) -> tuple[int, ...]:
        """Let every sequence fail; return their numbers. What the worker holds of them is the caller's to free."""
        sequences, self._sequences = self._sequences, {}
        self._queue.clear()
        for sequence in sequences.values():
            self._settle(sequence, error, now_s)
        return tuple(sequences)

    def _finish(self, sequence: Generating, one: Finished, now_s: float) -> None:
        assert sequence.started_s is not None
        queue_s = sequence.started_s - sequence.arrived_s
        counters = self._counters
        counters.completed += 1
        counters.items += 1
        counters.queue_s += queue_s
        counters.request_s += now_s - sequence.arrived_s
        counters.generated(sequence.prompt_tokens, len(one.tokens), one.ttft_s, one.tpot_s)
        if not sequence.answer.done():
            sequence.answer.set_result(
                Generated(
                    tokens=one.tokens,
                    variant=self.key.variant,
                    ttft_s=one.ttft_s,
                    tpot_s=one.tpot_s,
                    queue_s=queue_s,
                    run_s=sequence.run_s,
                    batch_items=max(1, round(sequence.run_s / sequence.share_s)) if sequence.share_s else 1,
                )
            )

    def _settle(self, sequence: Generating, error: ForeplanError, now_s: float) -> None:
        if not sequence.answer.done():
            sequence.answer.set_exception(error)
        self._counters.failed_s += now_s - sequence.arrived_s
        if isinstance(error, Hopeless):
            self._counters.dropped += 1
        else:
            self._counters.failed += 1


class Lanes:
    """The lanes of one group, opened with their first sequence.

    Args:
        most_waiting: Sequences that may wait in each.
    """

    def __init__(self, most_waiting: int) -> None:
        self._most_waiting = most_waiting
        self._lanes: dict[ReplicaKey, Lane] = {}
        self._left_over: dict[str, list[int]] = {}  # by variant: sequences of lanes that were closed

    def of(self, key: ReplicaKey) -> Lane | None:
        """Return the lane of a replica, if it is open."""
        return self._lanes.get(key)

    def open(self, key: ReplicaKey, facts: GenerationFacts, counters: Counters) -> Lane:
        """Open the lane of a replica; it must be configured."""
        self._lanes[key] = Lane(key, facts, counters, self._most_waiting)
        return self._lanes[key]

    def close(self, key: ReplicaKey, error: RequestRefused, now_s: float) -> None:
        """Let everything in the lane of a replica fail, and forget it."""
        lane = self._lanes.pop(key, None)
        if lane is not None:
            self._left_over.setdefault(key.variant, []).extend(lane.fail_all(error, now_s))

    def worker_lost(self, reason: str, now_s: float) -> None:
        """Let everything fail; a new worker says anew what its models take."""
        for key, lane in self._lanes.items():
            lane.fail_all(ReplicaUnavailable(f"{key}: {reason}"), now_s)
        self._lanes.clear()
        self._left_over.clear()

    def next(self, before_s: float) -> Lane | None:
        """Return the lane whose turn is due first, unless that is after ``before_s``; the first of equals."""
        found, due_s = None, before_s
        for lane in self._lanes.values():
            lane_s = lane.due_s()
            if lane_s is not None and (lane_s < due_s or (found is None and lane_s == due_s)):
                found, due_s = lane, lane_s
        return found

    def work_s(self) -> float:
        """Return the seconds of work that wait."""
        return math.fsum(lane.work_s() for lane in self._lanes.values())

    def kv_tokens(self, variant: str) -> int:
        """Return the tokens of context that the lanes of a model may hold together."""
        return sum(lane.kv_tokens for lane in self._lanes.values() if lane.key.variant == variant)

    def take_left_over(self, variant: str) -> tuple[int, ...]:
        """Return the sequences of closed lanes whose memory must be freed, each once."""
        return tuple(self._left_over.pop(variant, ()))
