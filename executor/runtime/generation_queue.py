"""The sequences of one generating replica: their prompts and tokens, and what the next iteration does with them.

No model, no clock, no input or output: the time and the tokens go in, iterations come out. The agent keeps one for each
replica whose worker runs the iterations, `executor.runtime.generation_engine` one beside a model of its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from executor.runtime.iteration import Decode, IterationLimits, IterationScheduler, Prefill, Turn
from executor.runtime.protocol import GenerationFacts
from plans.errors import Fault, InvalidInput

__all__ = ["Finished", "GenerationQueue", "Step", "prefill_curve"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A sequence that has all its tokens.

    Attributes:
        number: As `GenerationQueue.add` gave it.
        tokens: What was generated, a stop token included.
        ttft_s: Seconds from its entry to its first token.
        tpot_s: Seconds per token after the first; 0 for a single token.
    """

    number: int
    tokens: tuple[int, ...]
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one iteration brought.

    Attributes:
        produced: One (number, token) for each sequence that was served.
        finished: Sequences that ended with it.
        dropped: Sequences given up because their first token could not come in time.
        preempted: Sequences that lost their memory; they go on later, by computing it again.
    """

    produced: tuple[tuple[int, int], ...] = ()
    finished: tuple[Finished, ...] = ()
    dropped: tuple[int, ...] = ()
    preempted: tuple[int, ...] = ()


@dataclass(slots=True)
class _Sequence:
    prompt: tuple[int, ...]
    entered_s: float
    produced: list[int]
    stop_tokens: frozenset[int]
    first_s: float = 0.0


class GenerationQueue:
    """The waiting and the running sequences of one replica.

    Args:
        limits: What bounds an iteration.
        facts: What the model takes.
        prefill_s: Seconds that a prefill of so many tokens takes, to drop what would be late; without it nothing is.
    """

    def __init__(
        self, limits: IterationLimits, facts: GenerationFacts, prefill_s: Callable[[int], float] | None = None
    ) -> None:
        self._scheduler = IterationScheduler(limits, prefill_s)
        self._facts = facts
        self._sequences: dict[int, _Sequence] = {}
        self._freed: list[int] = []
        self._added = 0
        self._ended_s = 0.0

    @property
    def waiting(self) -> int:
        """Sequences that wait."""
        return len(self._scheduler.waiting)

    @property
    def running(self) -> int:
        """Sequences that run."""
        return len(self._scheduler.running)

    @property
    def is_idle(self) -> bool:
        """Whether no sequence waits or runs."""
        return not self._sequences

    def change(self, limits: IterationLimits, prefill_s: Callable[[int], float] | None) -> None:
        """Go on by other limits; what runs beyond them goes on."""
        self._scheduler.change(limits, prefill_s)

    def key(self, tpot_s: float) -> float | None:
        """Return when the replica's turn is due, on the clock: None when there is nothing to do.

        The deadline of the first token that waits, or ``tpot_s`` after the last iteration of what runs.
        """
        head = self._scheduler.head_key
        if not self.running:
            return head
        running = self._ended_s + tpot_s
        return running if head is None else min(head, running)

    def add(
        self,
        prompt: Sequence[int],
        new_tokens: int,
        *,
        now_s: float,
        ttft_s: float | None = None,
        stop_tokens: Collection[int] = (),
        number: int | None = None,
    ) -> int:
        """Take a sequence in and return its number.

        Args:
            prompt: Tokens of the prompt.
            new_tokens: Tokens to generate, unless a stop token comes before.
            now_s: The time, seconds.
            ttft_s: Seconds from now to the deadline of the first token. Sequences with a deadline go by it, before
                those without, which go in the order of entry.
            stop_tokens: Tokens that end it.
            number: What it is called, other than any other sequence here; one is chosen without it.

        Raises:
            InvalidInput: The prompt is empty or has tokens that the model does not know, or the sequence is longer than
                the model or key-value memory can hold; all faults.
        """
        self._check(prompt, new_tokens)
        if number is None:
            number, self._added = self._added, self._added + 1
        due_s = None if ttft_s is None else now_s + ttft_s
        key = float("inf") if due_s is None else due_s
        self._scheduler.add(number, len(prompt), new_tokens, key=key, due_s=due_s)
        self._sequences[number] = _Sequence(tuple(prompt), now_s, [], frozenset(stop_tokens))
        return number

    def remove(self, number: int) -> None:
        """Forget a sequence, wherever it is; one that is not here is none."""
        if self._sequences.pop(number, None) is not None and self._scheduler.remove(number):
            self._freed.append(number)

    def clear(self) -> tuple[int, ...]:
        """Forget every sequence, and the memory of each; return their numbers."""
        numbers = tuple(self._sequences)
        for number in numbers:
            self.remove(number)
        self._freed.clear()
        return numbers

    def turn(self, now_s: float) -> Turn:
        """Decide what happens next; call `end` with its work before the next turn."""
        turn = self._scheduler.turn(now_s)
        for number in turn.dropped:
            del self._sequences[number]
        self._freed += turn.preempted
        return turn

    def take_freed(self) -> tuple[int, ...]:
        """Return the sequences whose memory must be freed before the next iteration, each once."""
        freed, self._freed = tuple(self._freed), []
        return freed

    def contexts(self, work: Prefill) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Return the number and all tokens so far of each sequence of ``work``."""
        return tuple(
            (number, (*self._sequences[number].prompt, *self._sequences[number].produced)) for number in work.sequences
        )

    def end(self, work: Prefill | Decode, tokens: Sequence[int], now_s: float) -> Step:
        """Give each sequence of ``work`` its token; those that were removed meanwhile get none."""
        produced = []
        stopped = set()
        for number, token in zip(work.sequences, tokens, strict=True):
            sequence = self._sequences.get(number)
            if sequence is None:
                continue
            if not sequence.produced:
                sequence.first_s = now_s
            sequence.produced.append(token)
            produced.append((number, token))
            if token in sequence.stop_tokens:
                stopped.add(number)
        self._ended_s = now_s
        ended = self._scheduler.end(work, stopped)
        return Step(produced=tuple(produced), finished=tuple(self._finish(number, now_s) for number in ended))

    def _finish(self, number: int, now_s: float) -> Finished:
        sequence = self._sequences.pop(number)
        self._freed.append(number)
        more = len(sequence.produced) - 1
        return Finished(
            number=number,
            tokens=tuple(sequence.produced),
            ttft_s=sequence.first_s - sequence.entered_s,
            tpot_s=(now_s - sequence.first_s) / more if more else 0.0,
        )

    def _check(self, prompt: Sequence[int], new_tokens: int) -> None:
        facts, faults = self._facts, []
        if not prompt:
            faults.append(Fault(field="prompt", found="no token", expected="at least one"))
        elif not 0 <= min(prompt) <= max(prompt) < facts.vocabulary:
            found = f"tokens from {min(prompt)} to {max(prompt)}"
            faults.append(Fault(field="prompt", found=found, expected=f"tokens from 0 to {facts.vocabulary - 1}"))
        if new_tokens < 1:
            faults.append(Fault(field="new_tokens", found=str(new_tokens), expected="at least 1"))
        length = len(prompt) + new_tokens
        if length > facts.max_context:
            expected = f"at most {facts.max_context}, the model's longest context"
            faults.append(Fault(field="prompt and new tokens", found=str(length), expected=expected))
        if not self._scheduler.can_ever_hold(len(prompt), new_tokens):
            expected = f"at most {self._scheduler.kv_tokens}, what key-value memory holds"
            faults.append(Fault(field="prompt and new tokens", found=str(length), expected=expected))
        if faults:
            raise InvalidInput(faults)


def prefill_curve(tokens: Sequence[float], seconds: Sequence[float]) -> Callable[[int], float] | None:
    """Return what a prefill takes by its tokens, read from these points as the evaluator does; None without any.

    Linear between points, constant below the first, with the last slope beyond; a single point goes on in proportion.
    """
    if not tokens:
        return None

    def at(count: int) -> float:
        if len(tokens) == 1:
            return seconds[0] * count / tokens[0]
        if count <= tokens[0]:
            return seconds[0]
        segment = min(bisect_right(tokens, count), len(tokens) - 1) - 1
        x, y = tokens[segment], seconds[segment]
        return y + (count - x) * (seconds[segment + 1] - y) / (tokens[segment + 1] - x)

    return at
