"""Generation with Llama models: key-value memory in pages of one token, prefill and decode steps, and their engine.

A prefill packs its prompts one behind the other, so it costs what their tokens cost together and nothing for padding;
attention works on all that is packed together, which is why many tokens are packed into several passes.
A decode reads the context of each sequence from where its tokens lie. Decoding is greedy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

from executor.runtime.iteration import Decode, IterationLimits, IterationScheduler, Prefill
from plans.errors import Fault, InvalidInput

__all__ = ["Finished", "GenerationEngine", "KvMemory", "LlamaSteps", "Step", "can_generate", "kv_bytes_per_token"]

_PACKED_TOKENS = 4096
"""Tokens that one pass of a prefill takes, unless a single prompt has more."""

Places = NDArray[np.int64]
"""Where the tokens of one sequence lie in memory, in their order; shape (token,)."""


def can_generate(module: object) -> bool:
    """Return whether `LlamaSteps` can run ``module``."""
    return isinstance(module, LlamaForCausalLM)


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes of one token's keys and values: 2 x layers x key-value heads x head size x bytes a number."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head * dtype.itemsize)


class KvMemory:
    """Keys and values of every layer for ``tokens`` tokens, whoever's they are.

    Raises:
        torch.OutOfMemoryError: The device cannot hold them.
    """

    def __init__(self, config: Any, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 2, tokens, config.num_key_value_heads, head)
        self.tokens = tokens
        self.data = torch.zeros(shape, device=device, dtype=dtype)
        self._free = list(range(tokens - 1, -1, -1))

    @property
    def free_tokens(self) -> int:
        """Tokens that memory could still take."""
        return len(self._free)

    def take(self, count: int) -> Places:
        """Return ``count`` free places, not free any more; there must be so many."""
        assert 0 < count <= len(self._free)
        taken = self._free[-count:]
        del self._free[-count:]
        return np.array(taken, dtype=np.int64)

    def give_back(self, places: Places) -> None:
        """Free ``places``."""
        self._free.extend(places.tolist())


class _PrefillCache:
    """What attention of a prefill sees: the keys and values of the step itself, which it keeps in memory."""

    def __init__(self, memory: KvMemory, places: torch.Tensor) -> None:
        self._memory, self._places = memory, places

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep ``keys`` and ``values`` of shape (1, head, token, number) and return what to attend to."""
        self._memory.data[layer, 0, self._places] = keys[0].transpose(0, 1)
        self._memory.data[layer, 1, self._places] = values[0].transpose(0, 1)
        return keys, values


class _DecodeCache:
    """What attention of a decode sees: all that memory holds of each sequence, its newest token included."""

    def __init__(self, memory: KvMemory, places: torch.Tensor, newest: torch.Tensor) -> None:
        self._memory, self._places, self._newest = memory, places, newest

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep ``keys`` and ``values`` of shape (sequence, head, 1, number) and return what to attend to."""
        kept_keys, kept_values = self._memory.data[layer]
        kept_keys[self._newest] = keys[:, :, 0]
        kept_values[self._newest] = values[:, :, 0]
        return kept_keys[self._places].transpose(1, 2), kept_values[self._places].transpose(1, 2)


class LlamaSteps:
    """Runs steps of one Llama on one device.

    Args:
        module: A `LlamaForCausalLM` on its device, in evaluation mode.
        memory: Key-value memory on the same device.
    """

    def __init__(self, module: Any, memory: KvMemory) -> None:
        self.memory = memory
        self._module = module
        self._device = memory.data.device

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model knows."""
        return int(self._module.config.vocab_size)

    @property
    def max_context(self) -> int:
        """Tokens of the longest sequence."""
        return int(self._module.config.max_position_embeddings)

    def prefill(self, contexts: Sequence[Sequence[int]], places: Sequence[Places]) -> list[int]:
        """Read ``contexts``, keep their keys and values at ``places``, and return the next token of each."""
        passes: list[list[int]] = []
        tokens = 0
        for number, context in enumerate(contexts):
            if not passes or tokens + len(context) > _PACKED_TOKENS:
                passes.append([])
                tokens = 0
            passes[-1].append(number)
            tokens += len(context)
        return [
            token
            for packed in passes
            for token in self._prefill([contexts[number] for number in packed], [places[number] for number in packed])
        ]

    def _prefill(self, contexts: Sequence[Sequence[int]], places: Sequence[Places]) -> list[int]:
        lengths = [len(context) for context in contexts]
        owner = np.repeat(np.arange(len(contexts)), lengths)
        position = np.concatenate([np.arange(length) for length in lengths])
        ids = np.concatenate([np.asarray(context, dtype=np.int64) for context in contexts])
        owners, positions = self._to_device(owner), self._to_device(position)
        # Positions rise within a prompt, and prompts lie one behind the other: causal where the owner is the same.
        mask = (owners[:, None] == owners[None, :]).tril_()[None, None]
        cache = _PrefillCache(self.memory, self._to_device(np.concatenate(places)))
        last = self._to_device(np.cumsum(lengths) - 1)
        return self._next(self._to_device(ids)[None], positions[None], mask, cache, last)

    def decode(self, tokens: Sequence[int], places: Sequence[Places]) -> list[int]:
        """Add ``tokens``, the newest of each sequence, whose contexts lie at ``places``; return the next of each.

        The last place of a sequence is where its newest token goes.
        """
        lengths = np.array([len(held) for held in places], dtype=np.int64)
        table = np.zeros((len(places), int(lengths.max())), dtype=np.int64)
        for row, held in zip(table, places, strict=True):
            row[: len(held)] = held
        seen = np.arange(table.shape[1]) < lengths[:, None]
        newest = np.array([held[-1] for held in places], dtype=np.int64)
        cache = _DecodeCache(self.memory, self._to_device(table), self._to_device(newest))
        ids = self._to_device(np.array(tokens, dtype=np.int64))[:, None]
        positions = self._to_device(lengths - 1)[:, None]
        return self._next(ids, positions, self._to_device(seen)[:, None, None], cache, 1)

    def _next(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, cache: object, keep: int | torch.Tensor
    ) -> list[int]:
        with torch.inference_mode():
            answer = self._module(
                input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, logits_to_keep=keep
            )
            tokens: list[int] = answer["logits"].argmax(dim=-1).flatten().tolist()
            return tokens

    def _to_device(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A sequence that has all its tokens.

    Attributes:
        number: As `GenerationEngine.add` gave it.
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
    places: Places
    first_s: float = 0.0


_NO_PLACES: Places = np.empty(0, dtype=np.int64)


class GenerationEngine:
    """Generates for many sequences at once, iteration by iteration, within key-value memory. Not for several threads.

    Args:
        steps: Runs the model.
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
        steps: LlamaSteps,
        *,
        max_batch: int,
        max_prefill_tokens: int = 8192,
        stop_tokens: Collection[int] = (),
        prefill_s: Callable[[int], float] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        limits = IterationLimits(
            max_batch=max_batch, kv_tokens=steps.memory.tokens, max_prefill_tokens=max_prefill_tokens
        )
        self._steps = steps
        self._scheduler = IterationScheduler(limits, prefill_s)
        self._stop_tokens = frozenset(stop_tokens)
        self._clock = clock
        self._sequences: dict[int, _Sequence] = {}
        self._added = 0

    @property
    def is_idle(self) -> bool:
        """Whether no sequence waits or runs."""
        return not self._sequences

    def add(self, prompt: Sequence[int], new_tokens: int, *, ttft_s: float | None = None) -> int:
        """Take a sequence in and return its number.

        Args:
            prompt: Tokens of the prompt.
            new_tokens: Tokens to generate, unless a stop token comes before.
            ttft_s: Seconds from now to the deadline of the first token. Sequences with a deadline go by it, before
                those without, which go in the order of entry.

        Raises:
            InvalidInput: The prompt is empty or has tokens that the model does not know, or the sequence is longer than
                the model or key-value memory can hold; all faults.
        """
        self._check(prompt, new_tokens)
        now_s = self._clock()
        number = self._added
        self._added += 1
        due_s = None if ttft_s is None else now_s + ttft_s
        key = float("inf") if due_s is None else due_s
        self._scheduler.add(number, len(prompt), new_tokens, key=key, due_s=due_s)
        self._sequences[number] = _Sequence(tuple(prompt), now_s, [], _NO_PLACES)
        return number

    def step(self) -> Step:
        """Run one iteration, if there is anything to do."""
        turn = self._scheduler.turn(self._clock())
        for number in turn.dropped:
            del self._sequences[number]
        for number in turn.preempted:
            self._free(self._sequences[number])
        if turn.work is None:
            return Step(dropped=turn.dropped, preempted=turn.preempted)
        tokens = self._prefill(turn.work) if isinstance(turn.work, Prefill) else self._decode(turn.work)
        now_s = self._clock()
        produced = tuple(zip(turn.work.sequences, tokens, strict=True))
        for number, token in produced:
            sequence = self._sequences[number]
            if not sequence.produced:
                sequence.first_s = now_s
            sequence.produced.append(token)
        stopped = {number for number, token in produced if token in self._stop_tokens}
        ended = self._scheduler.end(turn.work, stopped)
        finished = tuple(self._finish(number, now_s) for number in ended)
        return Step(produced=produced, finished=finished, dropped=turn.dropped, preempted=turn.preempted)

    def _prefill(self, work: Prefill) -> list[int]:
        served = [self._sequences[number] for number in work.sequences]
        for sequence in served:
            sequence.places = self._steps.memory.take(len(sequence.prompt) + len(sequence.produced))
        contexts = [(*sequence.prompt, *sequence.produced) for sequence in served]
        return self._steps.prefill(contexts, [sequence.places for sequence in served])

    def _decode(self, work: Decode) -> list[int]:
        served = [self._sequences[number] for number in work.sequences]
        for sequence in served:
            sequence.places = np.append(sequence.places, self._steps.memory.take(1))
        return self._steps.decode([each.produced[-1] for each in served], [each.places for each in served])

    def _finish(self, number: int, now_s: float) -> Finished:
        sequence = self._sequences.pop(number)
        self._free(sequence)
        more = len(sequence.produced) - 1
        return Finished(
            number=number,
            tokens=tuple(sequence.produced),
            ttft_s=sequence.first_s - sequence.entered_s,
            tpot_s=(now_s - sequence.first_s) / more if more else 0.0,
        )

    def _free(self, sequence: _Sequence) -> None:
        self._steps.memory.give_back(sequence.places)
        sequence.places = _NO_PLACES

    def _check(self, prompt: Sequence[int], new_tokens: int) -> None:
        steps, faults = self._steps, []
        if not prompt:
            faults.append(Fault(field="prompt", found="no token", expected="at least one"))
        elif not 0 <= min(prompt) <= max(prompt) < steps.vocabulary:
            found = f"tokens from {min(prompt)} to {max(prompt)}"
            faults.append(Fault(field="prompt", found=found, expected=f"tokens from 0 to {steps.vocabulary - 1}"))
        if new_tokens < 1:
            faults.append(Fault(field="new_tokens", found=str(new_tokens), expected="at least 1"))
        length = len(prompt) + new_tokens
        if length > steps.max_context:
            expected = f"at most {steps.max_context}, the model's longest context"
            faults.append(Fault(field="prompt and new tokens", found=str(length), expected=expected))
        if not self._scheduler.can_ever_hold(len(prompt), new_tokens):
            expected = f"at most {steps.memory.tokens}, what key-value memory holds"
            faults.append(Fault(field="prompt and new tokens", found=str(length), expected=expected))
        if faults:
            raise InvalidInput(faults)
