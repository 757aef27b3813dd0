"""A tiny deterministic runtime, ``tests.executor.fake_runtime:FakeRuntime``: numpy only, quick to import.

Variants: ``fake-double`` returns y = 2x for x of four FP32; ``fake-slow-<ms>`` does the same but takes that many
milliseconds for a run, whatever the batch; ``fake-broken`` loads and then fails on every run after the warm-up.
``fake-count`` generates: the tokens after its last one, counting, out of 100, and it stops at 99 unless told otherwise.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from executor.runtime.protocol import GenerationFacts, InvalidTensor, TensorSpec, UnknownVariant, batch_of
from plans.errors import InvalidInput

_COUNTING = GenerationFacts(vocabulary=100, max_context=64, kv_bytes_per_token=10, stop_tokens=(99,))
_SLOW = re.compile(r"fake-slow-([0-9]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeModel:
    """y = 2x, after ``run_s`` seconds."""

    name: str
    max_batch: int
    run_s: float = 0.0
    broken: bool = False
    inputs: tuple[TensorSpec, ...] = (TensorSpec("x", "FP32", (4,)),)
    outputs: tuple[TensorSpec, ...] = (TensorSpec("y", "FP32", (4,)),)
    weight_bytes: int = 1024
    load_s: float = 0.001
    first_inference_s: float = 0.001

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        batch_of(inputs, self.inputs, max_batch=self.max_batch, where=self.name)
        if self.broken:
            raise RuntimeError("fake-broken fails on purpose")
        if self.run_s:
            time.sleep(self.run_s)
        return {"y": 2 * inputs["x"]}

    def example(self, batch: int, seed: int = 0) -> dict[str, NDArray[Any]]:
        generator = np.random.default_rng(seed)
        return {"x": generator.standard_normal((batch, 4), dtype=np.float32)}


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeGenerator(FakeModel):
    """Counts on."""

    generation: GenerationFacts = _COUNTING

    def sequences(self, kv_tokens: int) -> FakeSequences:
        return FakeSequences(self.generation, kv_tokens)

    def widen(self, max_batch: int) -> None:
        object.__setattr__(self, "max_batch", max(self.max_batch, max_batch))


class FakeSequences:
    """Keeps the newest token and the length of each sequence, and minds the memory that they would take."""

    def __init__(self, facts: GenerationFacts, kv_tokens: int) -> None:
        self.facts = facts
        self.kv_tokens = kv_tokens
        self.held: dict[int, tuple[int, int]] = {}

    def hold(self, kv_tokens: int) -> None:
        self.kv_tokens = max(self.kv_tokens, kv_tokens)

    def free(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.held.pop(number, None)

    def prefill(self, contexts: Sequence[tuple[int, Sequence[int]]]) -> list[int]:
        for number, tokens in contexts:
            if number in self.held:
                raise InvalidTensor.of("a sequence that holds no memory", field="prefill", found=number)
            self.held[number] = tokens[-1], len(tokens)
        return self._next([number for number, _ in contexts], 0)

    def decode(self, numbers: Sequence[int]) -> list[int]:
        if unknown := set(numbers) - self.held.keys():
            raise InvalidTensor.of("sequences that were prefilled", field="decode", found=str(unknown))
        return self._next(numbers, 1)

    def _next(self, numbers: Sequence[int], more: int) -> list[int]:
        for number in numbers:
            newest, length = self.held[number]
            self.held[number] = (newest + 1) % self.facts.vocabulary, length + more
        if sum(length for _, length in self.held.values()) > self.kv_tokens:
            raise InvalidTensor.of(f"at most {self.kv_tokens} tokens", field="memory", found="more")
        return [self.held[number][0] for number in numbers]


class FakeRuntime:
    """Takes the keywords of the torch runtimes, of one device and of groups, and needs none of them."""

    def __init__(
        self,
        device: str = "cpu",
        devices: tuple[str, ...] = ("cpu",),
        dtype: str = "fp32",
        threads: int = 1,
        model_dir: Path | None = None,
        seed: int = 0,
    ) -> None:
        self.device = device
        self.devices = devices
        self.dtype = dtype
        self.threads = threads
        self.model_dir = model_dir
        self.seed = seed

    def names(self) -> tuple[str, ...]:
        return ("fake-broken", "fake-count", "fake-double", "fake-slow-20")

    def load(self, variant: str, max_batch: int, shape: tuple[int, int] = (1, 1)) -> FakeModel:
        if max_batch < 1:
            raise InvalidInput.of("at least 1", where=variant, field="max_batch", found=max_batch)
        if shape[0] * shape[1] != len(self.devices):
            raise InvalidInput.of(f"tp x pp = {len(self.devices)} devices", where=variant, field="shape", found=shape)
        slow = _SLOW.fullmatch(variant)
        if slow:
            return FakeModel(name=variant, max_batch=max_batch, run_s=int(slow[1]) / 1000)
        if variant == "fake-count":
            return FakeGenerator(name=variant, max_batch=max_batch)
        if variant in self.names():
            return FakeModel(name=variant, max_batch=max_batch, broken=variant == "fake-broken")
        raise UnknownVariant.of("one of " + ", ".join(self.names()), field="variant", found=repr(variant))
