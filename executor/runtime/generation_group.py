"""A Llama model on one device, as the profiler sees it: whole requests, prefills and decode steps."""

from __future__ import annotations

from typing import Any

import torch

from executor.runtime.generation import KvMemory, LlamaSteps, kv_bytes_per_token
from executor.runtime.memory import out_of_memory_named, peak_growth_bytes
from plans.errors import InvalidInput
from profiles.group import Measurable, Pass, Point, SingleDevice

__all__ = ["GenerationGroup", "PhasePass"]


class PhasePass:
    """A prefill or a decode of one batch on this device, to be run again and again at the same places in memory.

    Args:
        steps: Runs the model, or this device's shard or stage of it, with key-value memory for all tokens.
        phase: ``prefill`` or ``decode``.
        batch: Sequences.
        tokens: Of each: those of its prompt, or of its context.
        name: Of the model.

    Attributes:
        kv_bytes: Key-value memory that it holds on this device.
    """

    def __init__(self, steps: LlamaSteps, phase: str, batch: int, tokens: int, name: str) -> None:
        self.kv_bytes = steps.memory.data.nbytes
        self._is_prefill, self._batch, self._name = phase == "prefill", batch, name
        self._steps = steps
        self._places = [steps.memory.take(tokens) for _ in range(batch)]
        self._newest = [(7 * number) % steps.vocabulary for number in range(batch * tokens)]
        self._prompts = [self._newest[start : start + tokens] for start in range(0, len(self._newest), tokens)]

    def __call__(self) -> list[int]:
        """Run it once, and return the next token of each sequence; none in a stage of a pipeline before the last."""
        with out_of_memory_named(self._name, self._batch):
            if self._is_prefill:
                return self._steps.prefill(self._prompts, self._places)
            return self._steps.decode(self._newest[: self._batch], self._places)


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
            return self._whole.prepare(point)
        tokens, longest = series.input_tokens, int(self._module.config.max_position_embeddings)
        if tokens is None or tokens > longest or series.output_tokens is not None:
            found = f"{series.phase} with {tokens} tokens in and {series.output_tokens} out"
            expected = f"1 to {longest} tokens in, and none out"
            raise InvalidInput.of(expected, where=self._name, field="series", found=found)
        with out_of_memory_named(self._name, point.batch):
            memory = KvMemory(self._module.config, point.batch * tokens, self._device, self._module.dtype)
        return PhasePass(LlamaSteps(self._module, memory), series.phase, point.batch, tokens, self._name)

    def activation_bytes(self, run: Pass, /) -> tuple[int, ...]:
        """Run once and return the most bytes held beside the weights, key-value memory included."""
        held = run.kv_bytes if isinstance(run, PhasePass) else 0
        return (peak_growth_bytes(run, self._device) + held,)

    def stage_s(self, run: Pass, /) -> tuple[float, ...]:
        """Return nothing: one stage takes all of the latency."""
        return ()
