"""Iteration-level batching: which sequences the next iteration of a generating model serves (docs/evaluator.md, 9).

Pure: the clock, the time of a prefill and what the iterations produce are handed in, so the evaluator's rules can be
held against these decision by decision. After Orca (Yu et al., OSDI 2022): sequences join and leave between iterations.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from plans.errors import Fault, InvalidInput

__all__ = ["Decode", "IterationLimits", "IterationScheduler", "Prefill", "Turn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationLimits:
    """What bounds an iteration.

    Attributes:
        max_batch: Sequences that run together, at most.
        kv_tokens: Tokens of context that key-value memory holds; None without limit.
        max_prefill_tokens: Tokens that one prefill takes, unless its first sequence alone has more.
    """

    max_batch: int
    kv_tokens: int | None = None
    max_prefill_tokens: int = 8192

    def __post_init__(self) -> None:
        stated = {"max_batch": self.max_batch, "max_prefill_tokens": self.max_prefill_tokens}
        if self.kv_tokens is not None:
            stated["kv_tokens"] = self.kv_tokens
        faults = [
            Fault(field=name, found=str(value), expected="at least 1") for name, value in stated.items() if value < 1
        ]
        if faults:
            raise InvalidInput(faults)


@dataclass(frozen=True, slots=True)
class Prefill:
    """Read the contexts of these sequences, in the order of their admission; each gets one token."""

    sequences: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Decode:
    """One token more for each running sequence, in the order of their admission."""

    sequences: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What to do next.

    Attributes:
        dropped: Sequences whose first token cannot come in time any more; they are forgotten.
        preempted: Sequences whose memory must be freed now; they wait, and are prefilled over all they have later.
        work: The iteration, or None when there is nothing to do.
    """

    dropped: tuple[int, ...] = ()
    preempted: tuple[int, ...] = ()
    work: Prefill | Decode | None = None


@dataclass(slots=True, order=True)
class _Sequence:
    key: float
    entry: int
    number: int = field(compare=False)
    context: int = field(compare=False)
    left: int = field(compare=False)
    due_s: float | None = field(compare=False)
    has_produced: bool = field(compare=False, default=False)


class IterationScheduler:
    """The waiting and the running sequences of one replica.

    Args:
        limits: What bounds an iteration.
        prefill_s: Seconds that a prefill of so many tokens takes; without it nothing is dropped.
    """

    def __init__(self, limits: IterationLimits, prefill_s: Callable[[int], float] | None = None) -> None:
        self._limits = limits
        self._prefill_s = prefill_s
        self._waiting: list[_Sequence] = []
        self._running: list[_Sequence] = []
        self._entries = 0

    @property
    def waiting(self) -> tuple[int, ...]:
        """Sequences that wait, the next first."""
        return tuple(sequence.number for sequence in self._waiting)

    @property
    def running(self) -> tuple[int, ...]:
        """Sequences that run, in the order of their admission."""
        return tuple(sequence.number for sequence in self._running)

    @property
    def context_tokens(self) -> int:
        """Context of the running sequences together."""
        return _context(self._running)

    @property
    def head_key(self) -> float | None:
        """Key of the sequence that waits first; None when none waits."""
        return self._waiting[0].key if self._waiting else None

    @property
    def kv_tokens(self) -> int | None:
        """Tokens of context that key-value memory holds; None without limit."""
        return self._limits.kv_tokens

    def change(self, limits: IterationLimits, prefill_s: Callable[[int], float] | None) -> None:
        """Go on by other limits from the next turn on; what runs beyond them goes on."""
        self._limits, self._prefill_s = limits, prefill_s

    def remove(self, number: int) -> bool:
        """Forget a sequence that waits or runs; say whether it held memory."""
        running = len(self._running)
        self._waiting = [sequence for sequence in self._waiting if sequence.number != number]
        self._running = [sequence for sequence in self._running if sequence.number != number]
        return len(self._running) < running

    def can_ever_hold(self, prompt_tokens: int, new_tokens: int) -> bool:
        """Return whether memory holds such a sequence when it runs alone."""
        return self._limits.kv_tokens is None or prompt_tokens + new_tokens <= self._limits.kv_tokens

    def add(self, number: int, prompt_tokens: int, new_tokens: int, *, key: float, due_s: float | None = None) -> None:
        """Let a sequence wait; one that `can_ever_hold` refuses must not come here.

        Args:
            number: What the sequence is called in turns.
            prompt_tokens: Tokens of its prompt, at least 1.
            new_tokens: Tokens that it wants, at least 1.
            key: Who has the least goes first: the deadline of the first token, or the time of entry. Equal keys go in
                the order of entry.
            due_s: When the first token must be there, seconds; None never drops it.
        """
        assert self.can_ever_hold(prompt_tokens, new_tokens)
        insort(self._waiting, _Sequence(key, self._entries, number, prompt_tokens, new_tokens, due_s))
        self._entries += 1

    def turn(self, now_s: float) -> Turn:
        """Decide what happens next; call `end` with its work before the next turn. Cost linear in what runs."""
        dropped = self._drop_hopeless(now_s)
        admitted = self._admit()
        if admitted:
            self._running += admitted
            return Turn(dropped=dropped, work=Prefill(tuple(sequence.number for sequence in admitted)))
        preempted = self._preempt()
        return Turn(dropped=dropped, preempted=preempted, work=Decode(self.running) if self._running else None)

    def end(self, work: Prefill | Decode, stopped: Collection[int] = ()) -> tuple[int, ...]:
        """Give each sequence of ``work`` its token; return those that have all of theirs, in the order of admission.

        ``stopped`` are sequences whose token said that they end here.
        """
        served = set(work.sequences)
        ended = []
        for sequence in self._running:
            if sequence.number in served:
                sequence.context += 1
                sequence.left -= 1
                sequence.has_produced = True
                if sequence.left == 0 or sequence.number in stopped:
                    ended.append(sequence.number)
        self._running = [sequence for sequence in self._running if sequence.number not in set(ended)]
        return tuple(ended)

    def _drop_hopeless(self, now_s: float) -> tuple[int, ...]:
        dropped = []
        while self._waiting and self._prefill_s is not None:
            head = self._waiting[0]
            in_time = head.due_s is None or now_s + self._prefill_s(head.context) <= head.due_s
            if head.has_produced or in_time:
                break
            dropped.append(self._waiting.pop(0).number)
        return tuple(dropped)

    def _admit(self) -> list[_Sequence]:
        admitted: list[_Sequence] = []
        running, held, prefill = len(self._running), self.context_tokens, 0
        while self._waiting and running + len(admitted) < self._limits.max_batch:
            context = self._waiting[0].context
            if admitted and prefill + context > self._limits.max_prefill_tokens:
                break
            together = running + len(admitted) + 1
            if together > 1 and not self._holds(held + prefill + context + together):
                break
            admitted.append(self._waiting.pop(0))
            prefill += context
        return admitted

    def _preempt(self) -> tuple[int, ...]:
        preempted = []
        while len(self._running) > 1 and not self._holds(self.context_tokens + len(self._running)):
            sequence = self._running.pop()
            insort(self._waiting, sequence)
            preempted.append(sequence.number)
        return tuple(preempted)

    def _holds(self, tokens: int) -> bool:
        return self._limits.kv_tokens is None or tokens <= self._limits.kv_tokens


def _context(sequences: Sequence[_Sequence]) -> int:
    return sum(sequence.context for sequence in sequences)
