"""A Llama model on one device, as the profiler sees it: whole requests, prefills and decode steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from executor.runtime.generation import KvMemory, LlamaSteps, kv_bytes_per_token
from executor.runtime.memory import out_of_memory_named, peak_growth_bytes
from plans.errors import InvalidInput
from profiles.group import Measurable, Pass, Point, SingleDevice

__all__ = ["GenerationGroup"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """One batch, and the key-value memory that it works on."""

    act: Callable[[], object]
    kv_bytes: int = 0

    def __call__(self) -> object:
        return self.act()


class GenerationGroup:
    """See `profiles.group.LoadedGroup`.

    Args:
        name: Of the model.
        loaded: The model as it answers whole requests.
        module: Its `LlamaForCausalLM`.
        device: Where it is.
        dtype: Of its weights.
    """

    tp = 1
    pp = 1

    def __init__(
        self, name: str, loaded: Measurable[Any], module: Any, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.weight_bytes = (loaded.weight_bytes,)
        self.load_s = loaded.load_s
        self.first_inference_s = loaded.first_inference_s
        self.kv_bytes_per_token = kv_bytes_per_token(module.config, dtype)
        self._name, self._module, self._device, self._dtype = name, module, device, dtype
        self._whole = SingleDevice(loaded=loaded)

    def prepare(self, point: Point, /) -> Pass:
        """Return what runs one batch of ``point``.

        Raises:
            OutOfDeviceMemory: The device cannot hold it.
            InvalidInput: There is no such phase, or the context is longer than the model can hold.
        """
        series = point.series
        if series.phase == "whole":
            return _Pass(act=self._whole.prepare(point))
        tokens, longest = series.input_tokens, int(self._module.config.max_position_embeddings)
        if tokens is None or tokens > longest or series.output_tokens is not None:
            found = f"{series.phase} with {tokens} tokens in and {series.output_tokens} out"
            expected = f"1 to {longest} tokens in, and none out"
            raise InvalidInput.of(expected, where=self._name, field="series", found=found)
        with out_of_memory_named(self._name, point.batch):
            memory = KvMemory(self._module.config, point.batch * tokens, self._device, self._dtype)
        steps = LlamaSteps(self._module, memory)
        places = [memory.take(tokens) for _ in range(point.batch)]
        newest = [(7 * number) % steps.vocabulary for number in range(point.batch * tokens)]
        prompts = [newest[start : start + tokens] for start in range(0, len(newest), tokens)]

        def act() -> object:
            with out_of_memory_named(self._name, point.batch):
                if series.phase == "prefill":
                    return steps.prefill(prompts, places)
                return steps.decode(newest[: point.batch], places)

        return _Pass(act=act, kv_bytes=memory.data.nbytes)

    def activation_bytes(self, run: Pass, /) -> tuple[int, ...]:
        """Run once and return the most bytes held beside the weights, key-value memory included."""
        held = run.kv_bytes if isinstance(run, _Pass) else 0
        return (peak_growth_bytes(run, self._device) + held,)

    def stage_s(self, run: Pass, /) -> tuple[float, ...]:
        """Return nothing: one stage takes all of the latency."""
        return ()
