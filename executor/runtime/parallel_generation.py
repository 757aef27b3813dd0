"""Generation over several devices, tensor parallel: every rank keeps the sequences, and those of rank 0 lead.

Each rank holds the keys and values of its heads at the same places, since all take the same iterations in the same
order: what rank 0 is asked goes to the others as one command an iteration, with the tokens that it found before. The
sums over the ranks within an iteration are those of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from executor.runtime.generation import LlamaSequences
from executor.runtime.generation_group import PhasePass
from executor.runtime.protocol import DevicesLost, GenerationFacts, OutOfDeviceMemory

__all__ = ["ParallelPass", "ParallelSequences", "follow"]

_Turn = Callable[[], AbstractContextManager[Callable[..., None]]]


class ParallelSequences:
    """Sequences of one model over the ranks, on rank 0; see `executor.runtime.protocol.SequenceRunner`.

    Args:
        own: Rank 0's part of them.
        model: Number of the model on the ranks.
        turn: Lets one thread at a time tell the ranks what to do, and do its own part.
    """

    def __init__(self, own: LlamaSequences, model: int, turn: _Turn) -> None:
        self._own = own
        self._model = model
        self._turn = turn
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
        return self._iterate(lambda: self._own.prefill(contexts), prefill=contexts)

    def decode(self, numbers: Sequence[int]) -> list[int]:
        """Return one token more for each of these sequences."""
        self._own.check_decode(numbers)
        return self._iterate(lambda: self._own.decode(numbers), decode=numbers, newest=self._own.newest(numbers))

    def _iterate(self, act: Callable[[], list[int]], **work: Sequence[Any]) -> list[int]:
        with self._turn() as tell:
            tell(do="iterate", model=self._model, freed=self._freed, kv_tokens=self._kv_tokens, **work)
            self._freed = []
            try:
                return act()
            except OutOfDeviceMemory as error:  # the others are in the middle of it
                raise DevicesLost(f"rank 0 has no memory left for an iteration: {error}") from error


class ParallelPass:
    """A prefill or decode over the ranks, on rank 0; see `executor.runtime.generation_group.PhasePass`.

    Args:
        own: Rank 0's part.
        model: Number of the model on the ranks.
        turn: As for `ParallelSequences`.

    Attributes:
        kv_bytes: Key-value memory that it holds on each device.
    """

    def __init__(self, own: PhasePass, model: int, turn: _Turn) -> None:
        self.kv_bytes = own.kv_bytes
        self._own = own
        self._model = model
        self._turn = turn

    def __call__(self) -> object:
        """Run it once."""
        with self._turn() as tell:
            tell(do="pass", model=self._model)
            return self._own()


def follow(own: LlamaSequences, command: Mapping[str, Any]) -> None:
    """Do another rank's part of what `ParallelSequences` told it."""
    own.free(command["freed"])
    own.hold(command["kv_tokens"])
    if "prefill" in command:
        own.prefill(command["prefill"])
    else:
        own.go_on_from(command["decode"], command["newest"])
        own.decode(command["decode"])
