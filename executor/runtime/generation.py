"""Generation with Llama models: key-value memory in pages of one token, prefill and decode steps, and sequences.

A prefill packs its prompts one behind the other, so it costs what their tokens cost together and nothing for padding;
attention works on all that is packed together, which is why many tokens are packed into several passes.
A decode reads the context of each sequence from where its tokens lie. Decoding is greedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

from executor.runtime.memory import out_of_memory_named
from executor.runtime.protocol import GenerationFacts, InvalidTensor

__all__ = ["KvMemory", "LlamaSequences", "LlamaSteps", "can_generate", "generation_facts", "kv_bytes_per_token"]

_PACKED_TOKENS = 4096

Places = NDArray[np.int64]
"""Where the tokens of one sequence lie in memory, in their order; shape (token,)."""


def can_generate(module: object) -> bool:
    """Return whether `LlamaSteps` can run ``module``."""
    return isinstance(module, LlamaForCausalLM)


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes of one token's keys and values: 2 x layers x key-value heads x head size x bytes a number."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head * dtype.itemsize)


def generation_facts(config: Any, dtype: torch.dtype, *, from_files: bool) -> GenerationFacts:
    """Return what a model takes; only weights that were read know when an answer is complete."""
    ends = config.eos_token_id if from_files else None
    return GenerationFacts(
        vocabulary=int(config.vocab_size),
        max_context=int(config.max_position_embeddings),
        kv_bytes_per_token=kv_bytes_per_token(config, dtype),
        stop_tokens=() if ends is None else tuple(np.atleast_1d(ends).tolist()),
    )


class KvMemory:
    """Keys and values of every layer for ``tokens`` tokens, whoever's they are.

    Tensor parallel, each of ``shards`` devices holds those of its heads; a stage of a pipeline those of its ``layers``.

    Raises:
        torch.OutOfMemoryError: The device cannot hold them.
    """

    def __init__(
        self,
        config: Any,
        tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        shards: int = 1,
        layers: range | None = None,
    ) -> None:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layers = range(config.num_hidden_layers) if layers is None else layers
        shape = (len(layers), 2, tokens, config.num_key_value_heads // shards, head)
        self._first_layer = layers.start
        self.tokens = tokens
        self.data = torch.zeros(shape, device=device, dtype=dtype)
        self._free = list(range(tokens - 1, -1, -1))

    @property
    def free_tokens(self) -> int:
        """Tokens that memory could still take."""
        return len(self._free)

    def of_layer(self, layer: int) -> torch.Tensor:
        """Return the keys and the values of one layer, by its number in the model; shape (2, token, head, number)."""
        return self.data[layer - self._first_layer]

    def grow(self, tokens: int) -> None:
        """Have room for ``tokens`` tokens at least; what is kept stays where it is.

        Raises:
            torch.OutOfMemoryError: The device cannot hold the old and the new memory together.
        """
        if tokens > self.tokens:
            layers, both, _, heads, head = self.data.shape
            data = torch.zeros((layers, both, tokens, heads, head), device=self.data.device, dtype=self.data.dtype)
            data[:, :, : self.tokens] = self.data
            self._free = [*range(tokens - 1, self.tokens - 1, -1), *self._free]
            self.tokens, self.data = tokens, data

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
        kept_keys, kept_values = self._memory.of_layer(layer)
        kept_keys[self._places] = keys[0].transpose(0, 1)
        kept_values[self._places] = values[0].transpose(0, 1)
        return keys, values


class _DecodeCache:
    """What attention of a decode sees: all that memory holds of each sequence, its newest token included."""

    def __init__(self, memory: KvMemory, places: torch.Tensor, newest: torch.Tensor) -> None:
        self._memory, self._places, self._newest = memory, places, newest

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep ``keys`` and ``values`` of shape (sequence, head, 1, number) and return what to attend to."""
        kept_keys, kept_values = self._memory.of_layer(layer)
        kept_keys[self._newest] = keys[:, :, 0]
        kept_values[self._newest] = values[:, :, 0]
        return kept_keys[self._places].transpose(1, 2), kept_values[self._places].transpose(1, 2)


class LlamaSteps:
    """Runs steps of one Llama on one device.

    Args:
        module: A `LlamaForCausalLM` on its device, in evaluation mode, or a `generation_stage.LlamaStage`: only that of
            the last stage of a pipeline finds tokens.
        memory: Key-value memory on the same device.
        packed_tokens: Tokens that one pass of a prefill takes, unless a single prompt has more; 4096 without.
    """

    def __init__(self, module: Any, memory: KvMemory, packed_tokens: int | None = None) -> None:
        self.memory = memory
        self._module = module
        self._packed_tokens = packed_tokens or _PACKED_TOKENS
        self._device = memory.data.device

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model knows."""
        return int(self._module.config.vocab_size)

    def prefill(self, contexts: Sequence[Sequence[int]], places: Sequence[Places]) -> list[int]:
        """Read ``contexts``, keep their keys and values at ``places``, and return the next token of each."""
        passes: list[list[int]] = []
        tokens = 0
        for number, context in enumerate(contexts):
            if not passes or tokens + len(context) > self._packed_tokens:
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


class LlamaSequences:
    """Sequences of one Llama on one device; see `executor.runtime.protocol.SequenceRunner`.

    In a stage of a pipeline before the last, iterations return no tokens, and `go_on_from` says which they were.

    Args:
        steps: Runs the model.
        facts: What it takes.
        name: Of the model.
    """

    def __init__(self, steps: LlamaSteps, facts: GenerationFacts, name: str) -> None:
        self.facts = facts
        self._name = name
        self._steps = steps
        self._places: dict[int, Places] = {}
        self._newest: dict[int, int] = {}

    def hold(self, kv_tokens: int) -> None:
        """Have memory for ``kv_tokens`` tokens at least."""
        with out_of_memory_named(self._name, 1):
            self._steps.memory.grow(kv_tokens)

    def free(self, numbers: Sequence[int]) -> None:
        """Forget sequences; unknown ones are none."""
        for number in numbers:
            places = self._places.pop(number, None)
            self._newest.pop(number, None)
            if places is not None:
                self._steps.memory.give_back(places)

    def check_prefill(self, contexts: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Refuse what `prefill` would.

        Raises:
            InvalidTensor: A token is outside the vocabulary, or memory cannot hold them.
        """
        for number, tokens in contexts:
            if not tokens or not 0 <= min(tokens) <= max(tokens) < self.facts.vocabulary:
                expected = f"tokens from 0 to {self.facts.vocabulary - 1}, at least one"
                raise InvalidTensor.of(expected, field=f"context of sequence {number}", found="others")
        self._need(sum(len(tokens) for _, tokens in contexts))

    def prefill(self, contexts: Sequence[tuple[int, Sequence[int]]]) -> list[int]:
        """Read whole contexts and return the next token of each."""
        self.check_prefill(contexts)
        for number, tokens in contexts:
            self.free((number,))
            self._places[number] = self._steps.memory.take(len(tokens))
        numbers = [number for number, _ in contexts]
        places = [self._places[number] for number in numbers]
        with out_of_memory_named(self._name, len(numbers)):
            return self._noted(numbers, self._steps.prefill([tokens for _, tokens in contexts], places))

    def check_decode(self, numbers: Sequence[int]) -> None:
        """Refuse what `decode` would.

        Raises:
            InvalidTensor: One was not prefilled, or memory cannot hold a token more for each.
        """
        if unknown := [number for number in numbers if number not in self._places]:
            raise InvalidTensor.of("sequences that were prefilled", field="decode", found=str(unknown))
        self._need(len(numbers))

    def newest(self, numbers: Sequence[int]) -> list[int]:
        """Return the last token of each of these sequences."""
        return [self._newest[number] for number in numbers]

    def go_on_from(self, numbers: Sequence[int], newest: Sequence[int]) -> None:
        """Take ``newest`` for the last tokens of these sequences."""
        self._newest.update(zip(numbers, newest, strict=True))

    def decode(self, numbers: Sequence[int]) -> list[int]:
        """Return one token more for each of these sequences."""
        self.check_decode(numbers)
        for number in numbers:
            self._places[number] = np.append(self._places[number], self._steps.memory.take(1))
        places = [self._places[number] for number in numbers]
        with out_of_memory_named(self._name, len(numbers)):
            return self._noted(numbers, self._steps.decode(self.newest(numbers), places))

    def _noted(self, numbers: Sequence[int], tokens: list[int]) -> list[int]:
        if tokens:
            self.go_on_from(numbers, tokens)
        return tokens

    def _need(self, tokens: int) -> None:
        free = self._steps.memory.free_tokens
        if tokens > free:
            raise InvalidTensor.of(f"at most {free}, what key-value memory holds", field="tokens", found=tokens)
