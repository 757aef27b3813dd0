"""Generation in one process: the queue of `executor.runtime.generation_queue` before a model of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from executor.runtime.generation_queue import GenerationQueue, Step
from executor.runtime.iteration import IterationLimits, Prefill
from executor.runtime.protocol import SequenceRunner

__all__ = ["GenerationEngine"]


class GenerationEngine:
    """Generates for many sequences at once, iteration by iteration, within key-value memory. Not for several threads.

    Args:
        sequences: Runs the model.
        kv_tokens: Tokens that its memory holds.
        max_batch: Sequences that run together, at most.
        max_prefill_tokens: See `IterationLimits`.
        stop_tokens: Tokens that end a sequence.
        prefill_s: Seconds that a prefill of so many tokens takes, to drop what would be late; without it nothing is.
        clock: Monotonic seconds.

    Raises:
        InvalidInput: A limit is below 1.
    """

    def __init__(
        self,
        sequences: SequenceRunner,
        *,
        kv_tokens: int,
        max_batch: int,
        max_prefill_tokens: int = 8192,
        stop_tokens: Collection[int] = (),
        prefill_s: Callable[[int], float] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        limits = IterationLimits(max_batch=max_batch, kv_tokens=kv_tokens, max_prefill_tokens=max_prefill_tokens)
        self._sequences = sequences
        self._queue = GenerationQueue(limits, sequences.facts, prefill_s)
        self._stop_tokens = frozenset(stop_tokens)
        self._clock = clock

    @property
    def is_idle(self) -> bool:
        """Whether no sequence waits or runs."""
        return self._queue.is_idle

    def add(self, prompt: Sequence[int], new_tokens: int, *, ttft_s: float | None = None) -> int:
        """Take a sequence in and return its number; see `GenerationQueue.add`."""
        return self._queue.add(prompt, new_tokens, now_s=self._clock(), ttft_s=ttft_s, stop_tokens=self._stop_tokens)

    def step(self) -> Step:
        """Run one iteration, if there is anything to do."""
        turn = self._queue.turn(self._clock())
        work = turn.work
        if work is None:
            return Step(dropped=turn.dropped, preempted=turn.preempted)
        self._sequences.free(self._queue.take_freed())
        if isinstance(work, Prefill):
            tokens = self._sequences.prefill(self._queue.contexts(work))
        else:
            tokens = self._sequences.decode(work.sequences)
        step = self._queue.end(work, tokens, self._clock())
        return Step(produced=step.produced, finished=step.finished, dropped=turn.dropped, preempted=turn.preempted)
