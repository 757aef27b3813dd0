"""Sequences of a model that is loaded anew, in another shape, while they run: each goes on where it began.

Unless there is no memory left there: limits may have grown with the new load. Then it is read again by the new one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from executor.runtime.protocol import GenerationFacts, InvalidTensor, SequenceRunner

__all__ = ["SuccessiveSequences"]


class SuccessiveSequences:
    """A `executor.runtime.protocol.SequenceRunner` over the model as it is loaded now and as it was before.

    For one thread, and another that loads.

    Args:
        runner: Runs the sequences that begin from now on.
    """

    def __init__(self, runner: SequenceRunner) -> None:
        self._runner = runner
        self._numbers: set[int] = set()
        self._contexts: dict[int, list[int]] = {}  # all tokens so far, of every sequence
        self._before: list[tuple[SequenceRunner, set[int], Callable[[], None]]] = []
        self._lock = threading.Lock()

    def succeed(self, runner: SequenceRunner, close: Callable[[], None]) -> None:
        """Begin sequences on ``runner`` from now on; ``close`` the model before once its sequences have ended."""
        with self._lock:
            self._before.append((self._runner, self._numbers, close))
            self._runner, self._numbers = runner, set()
            self._close_ended()

    def close(self) -> None:
        """Close the models before, whatever runs there."""
        with self._lock:
            for _, numbers, _ in self._before:
                numbers.clear()
            self._close_ended()

    @property
    def facts(self) -> GenerationFacts:
        """What the model takes, however it is loaded."""
        return self._runner.facts

    def hold(self, kv_tokens: int) -> None:
        """Have memory for ``kv_tokens`` tokens at least, for those that begin from now on."""
        with self._lock:
            self._runner.hold(kv_tokens)

    def free(self, numbers: Sequence[int]) -> None:
        """Forget sequences; unknown ones are none."""
        with self._lock:
            self._runner.free(numbers)
            self._numbers.difference_update(numbers)
            for number in numbers:
                self._contexts.pop(number, None)
            for runner, held, _ in self._before:
                runner.free(tuple(held.intersection(numbers)))
                held.difference_update(numbers)
            self._close_ended()

    def prefill(self, contexts: Sequence[tuple[int, Sequence[int]]]) -> list[int]:
        """Read whole contexts of sequences that hold no memory; return the next token of each."""
        with self._lock:
            tokens = self._runner.prefill(contexts)
            self._numbers.update(number for number, _ in contexts)
            for (number, context), token in zip(contexts, tokens, strict=True):
                self._contexts[number] = [*context, token]
            return tokens

    def decode(self, numbers: Sequence[int]) -> list[int]:
        """Return one token more for each of these sequences."""
        with self._lock:
            tokens = self._decode(numbers) if self._before else self._runner.decode(numbers)
            for number, token in zip(numbers, tokens, strict=True):
                self._contexts[number].append(token)
            return tokens

    def _decode(self, numbers: Sequence[int]) -> list[int]:
        tokens: dict[int, int] = {}
        left, moved = list(numbers), []
        for runner, held, _ in self._before:
            own = [number for number in left if number in held]
            left = [number for number in left if number not in held]
            while own:
                try:
                    tokens.update(zip(own, runner.decode(own), strict=True))
                    break
                except InvalidTensor:  # it has them all, so it is its memory: the last to come makes room
                    moved.append(own.pop())
                    runner.free(moved[-1:])
                    held.discard(moved[-1])
        if left:
            tokens.update(zip(left, self._runner.decode(left), strict=True))
        if moved:
            self._numbers.update(moved)
            contexts = [(number, self._contexts[number]) for number in moved]
            tokens.update(zip(moved, self._runner.prefill(contexts), strict=True))
            self._close_ended()
        return [tokens[number] for number in numbers]

    def _close_ended(self) -> None:
        for _, numbers, close in self._before:
            if not numbers:
                close()
        self._before = [entry for entry in self._before if entry[1]]
