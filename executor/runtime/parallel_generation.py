"""Generation over several devices: every rank keeps the sequences, and those of rank 0 lead.

Each rank holds the keys and values of its heads and layers at the same places, since all take the same iterations in
the same order: what rank 0 is asked goes to the others as one command an iteration, with the tokens that were found
before. Tensor parallel, the sums over the ranks within an iteration are those of the model.

In a pipeline an iteration goes from stage to stage, as hidden states, and from the last one its tokens come back to
rank 0. It ends before the next one begins, which holds all stages as docs/evaluator.md, section 9, has it; a prefill in
several passes has one of them in each stage meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from executor.runtime.generation import LlamaSequences
from executor.runtime.generation_group import PhasePass
from executor.runtime.protocol import DevicesLost, GenerationFacts, OutOfDeviceMemory

__all__ = ["Lead", "ParallelPass", "ParallelSequences", "follow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead:
    """How rank 0 has the ranks generate with one model.

    Attributes:
        model: Its number on the ranks.
        turn: Lets one thread at a time tell the ranks what to do, and do its own part.
        tokens: Called in a turn: returns the ``tokens`` that the last stage will send for it. None without pipeline,
            where rank 0 finds them itself.
    """

    model: int
    turn: Callable[[], AbstractContextManager[Callable[..., None]]]
    tokens: Callable[[], Future[dict[str, NDArray[Any]]]] | None = None

    def __call__(self, act: Callable[[], list[int]], **command: Any) -> list[int]:
        """Tell the other ranks ``command``, ``act`` on this one, and return the tokens.

        Raises:
            DevicesLost: A rank ended.
        """
        with self.turn() as tell:
            tell(model=self.model, **command)
            answer = self.tokens() if self.tokens is not None else None
            found = act()
        if answer is not None:
            found = answer.result()["tokens"].tolist()
        return found


class ParallelSequences:
    """Sequences of one model over the ranks, on rank 0; see `executor.runtime.protocol.SequenceRunner`.

    Args:
        own: Rank 0's part of them.
        lead: Tells the others.
    """

    def __init__(self, own: LlamaSequences, lead: Lead) -> None:
        self._own = own
        self._lead = lead
        self._freed: list[int] = []  # what the other ranks do not know yet
        self._kv_tokens = 0

    @property
    def facts(self) -> GenerationFacts:
        """What the model takes."""
        return self._own.facts

    def hold(self, kv_tokens: int) -> None:
        """Have memory for ``kv_tokens`` tokens at least."""
        self._own.hold(kv_tokens)
        self._kv_tokens = max(kv_tokens, self._kv_tokens)

    def free(self, numbers: Sequence[int]) -> None:
        """Forget sequences; unknown ones are none."""
        self._own.free(numbers)
        self._freed += numbers

    def prefill(self, contexts: Sequence[tuple[int, Sequence[int]]]) -> list[int]:
        """Read whole contexts and return the next token of each."""
        self._own.check_prefill(contexts)  # what is refused, the others never hear of
        numbers = [number for number, _ in contexts]
        return self._iterate(numbers, lambda: self._own.prefill(contexts), prefill=contexts)

    def decode(self, numbers: Sequence[int]) -> list[int]:
        """Return one token more for each of these sequences."""
        self._own.check_decode(numbers)
        newest = self._own.newest(numbers)
        return self._iterate(numbers, lambda: self._own.decode(numbers), decode=numbers, newest=newest)

    def _iterate(self, numbers: Sequence[int], act: Callable[[], list[int]], **work: Sequence[Any]) -> list[int]:
        freed, self._freed = self._freed, []
        try:
            tokens = self._lead(act, do="iterate", freed=freed, kv_tokens=self._kv_tokens, **work)
        except OutOfDeviceMemory as error:  # the others are in the middle of it
            raise DevicesLost(f"rank 0 has no memory left for an iteration: {error}") from error
        self._own.go_on_from(numbers, tokens)
        return tokens


class ParallelPass:
    """A prefill or decode over the ranks, on rank 0; see `executor.runtime.generation_group.PhasePass`.

    Args:
        own: Rank 0's part.
        run: Runs it.
        lead: Tells the others.
        kv_bytes: See the attribute.

    Attributes:
        kv_bytes: Key-value memory that it holds on each device of a stage; shape (pp,).
    """

    def __init__(
        self, own: PhasePass, run: Callable[[PhasePass], list[int]], lead: Lead, kv_bytes: tuple[int, ...]
    ) -> None:
        self.kv_bytes = kv_bytes
        self._own = own
        self._run = run
        self._lead = lead

    def __call__(self) -> list[int]:
        """Run it once, and return the next token of each sequence."""
        return self._lead(lambda: self._run(self._own), do="pass")


def follow(own: LlamaSequences, command: Mapping[str, Any]) -> list[int]:
    """Do another rank's part of what `ParallelSequences` told it, and return the tokens that it found."""
    own.free(command["freed"])
    own.hold(command["kv_tokens"])
    if "prefill" in command:
        return own.prefill(command["prefill"])
    own.go_on_from(command["decode"], command["newest"])
    return own.decode(command["decode"])
