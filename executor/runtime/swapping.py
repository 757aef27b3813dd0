"""Models that take turns on a device which cannot hold them all: swapped between batches, from host memory.

A batch whose model is not on the device waits for a copy of its weights; the model whose last batch is longest ago
gives up its place. On a CPU a limit in bytes stands in for the memory of a device, and the copy is made all the same.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from executor.runtime.generation import LlamaSequences
from executor.runtime.host_cache import CachingTorchRuntime, Recipe, placed_copy, size_bytes
from executor.runtime.protocol import GenerationFacts, OutOfDeviceMemory
from executor.runtime.residency import Residency
from executor.runtime.torch_runtime import GeneratingModel, TorchModel
from plans.errors import InvalidInput
from plans.units import format_bytes

__all__ = ["SwappedGenerator", "SwappedModel", "SwappingTorchRuntime"]


class _CopyingRuntime(CachingTorchRuntime):
    """Builds copies on the device of what is kept in host memory, on a CPU too."""

    def build(self, variant: str) -> Recipe:
        """Return a copy of ``variant`` on the device."""
        module, inputs, wanted = self.host_recipe(variant)
        return placed_copy(module, self.place), inputs, wanted


class SwappingTorchRuntime:
    """A runtime whose models may together be larger than the device.

    Args:
        device: As for `CachingTorchRuntime`, and so the following.
        dtype: Of the weights.
        threads: Of one operation.
        model_dir: Folder of local models.
        budget_bytes: Of the weights that are kept in host memory. What does not fit there is read anew for each swap.
        device_bytes: Of all models on the device together: weights, and on a CUDA device what their largest batch
            takes beside.

    Raises:
        InvalidInput: As for `CachingTorchRuntime`, or ``device_bytes`` is below 1.
    """

    def __init__(
        self, device: str, dtype: str, threads: int, model_dir: Path | None, *, budget_bytes: int, device_bytes: int
    ) -> None:
        self._host = _CopyingRuntime(device, dtype, threads, model_dir, budget_bytes=budget_bytes)
        if device_bytes < 1:
            raise InvalidInput.of("at least 1 byte", field="device_bytes", found=device_bytes)
        self.residency: Residency[SwappedModel] = Residency(device_bytes)
        self._working = (
            threading.Lock()
        )  # held while a batch runs or a model comes or goes: loads have their own thread

    def names(self) -> tuple[str, ...]:
        """Names that `load` knows, sorted."""
        return self._host.names()

    def load(self, variant: str, max_batch: int) -> SwappedModel:
        """Load ``variant``, in the place of models whose last use is longest ago where needed; see `TorchRuntime`."""
        start_s = time.perf_counter()
        module, _, _ = self._host.host_recipe(variant)  # what takes long, while batches of others run
        weight_bytes = size_bytes(module)
        with self._working:
            self._make_room(variant, weight_bytes)
            model = self._host.load(variant, max_batch)
            model.load_s = time.perf_counter() - start_s - model.first_inference_s
            device_bytes = weight_bytes + self._beside_bytes(model)
            if isinstance(model, GeneratingModel):
                swapped: SwappedModel = SwappedGenerator(self, model, device_bytes)
            else:
                swapped = SwappedModel(self, model, device_bytes)
            self._make_room(variant, swapped.device_bytes)
            self.residency.enter(swapped, swapped.device_bytes)
        return swapped

    def run(self, swapped: SwappedModel, inputs: Mapping[str, NDArray[Any]]) -> tuple[dict[str, NDArray[Any]], float]:
        """Run a batch once its model is on the device; return the outputs, and the seconds that it took to get there.

        Raises:
            InvalidTensor: As for `TorchModel.run`.
            OutOfDeviceMemory: The device cannot hold the model, or not the batch.
        """
        with self._working:
            swap_s = self._bring(swapped)
            return swapped.model.run(inputs), swap_s

    def pin(self, swapped: SwappedModel, more_bytes: int) -> None:
        """Keep a model on the device for good, with ``more_bytes`` beside it, or instead of those of before.

        Raises:
            OutOfDeviceMemory: The device cannot hold both beside what else is pinned.
        """
        with self._working:
            self._bring(swapped)
            size = swapped.device_bytes + more_bytes
            self._make_room(swapped.name, size, swapped)
            self.residency.enter(swapped, size, pinned=True)

    def forget(self, swapped: SwappedModel) -> None:
        """Free the place of a model."""
        with self._working:
            self.residency.leave(swapped)
            swapped.model.park()

    def _bring(self, swapped: SwappedModel) -> float:
        if self.residency.is_here(swapped):
            self.residency.use(swapped)
            return 0.0
        start_s = time.perf_counter()
        self._make_room(swapped.name, swapped.device_bytes)
        swapped.model.unpark(self._host.build(swapped.name)[0])
        if self._host.place.type == "cuda":
            torch.cuda.synchronize(self._host.place)
        self.residency.enter(swapped, swapped.device_bytes)
        return time.perf_counter() - start_s

    def _make_room(self, variant: str, size: int, grows: SwappedModel | None = None) -> None:
        leaving = self.residency.leavers(size, grows)
        if leaving is None:
            limit = format_bytes(self.residency.limit_bytes)
            raise OutOfDeviceMemory(f"{variant} needs {format_bytes(size)} of the {limit} that this device may hold")
        for other in leaving:
            self.residency.leave(other)
            other.model.park()

    def _beside_bytes(self, model: TorchModel) -> int:
        """Return what the largest batch takes beside the weights; on a CPU that is not the stand-in's business."""
        if self._host.place.type == "cpu":
            return 0
        inputs = model.example(model.max_batch)
        return self._host.peak_growth_bytes(lambda: model.run(inputs))


class SwappedModel:
    """A model that may be off the device between its batches; see `executor.runtime.protocol.LoadedModel`.

    Attributes:
        model: The model itself, parked while it is not on the device.
        device_bytes: What it takes there.
        last_swap_s: Seconds that its last batch waited for it to get there; 0 when it was there.
    """

    def __init__(self, runtime: SwappingTorchRuntime, model: TorchModel, device_bytes: int) -> None:
        self.model = model
        self.device_bytes = device_bytes
        self.last_swap_s = 0.0
        self.name, self.max_batch = model.name, model.max_batch
        self.inputs, self.outputs = model.inputs, model.outputs
        self.weight_bytes, self.load_s = model.weight_bytes, model.load_s
        self.first_inference_s = model.first_inference_s
        self._runtime = runtime

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run one batch, after a swap where needed."""
        outputs, self.last_swap_s = self._runtime.run(self, inputs)
        return outputs

    def example(self, batch: int, seed: int = 0) -> dict[str, NDArray[Any]]:
        """Return valid random inputs for ``batch`` items."""
        return self.model.example(batch, seed)

    def close(self) -> None:
        """Free its place on the device."""
        self._runtime.forget(self)


class SwappedGenerator(SwappedModel):
    """A model that generates: once it does, it stays on the device with its key-value memory.

    Attributes:
        generation: What it takes.
    """

    def __init__(self, runtime: SwappingTorchRuntime, model: GeneratingModel, device_bytes: int) -> None:
        super().__init__(runtime, model, device_bytes)
        self.generation: GenerationFacts = model.generation
        self._generating = model

    def sequences(self, kv_tokens: int) -> _PinnedSequences:
        """Return what runs sequences; see `GeneratingModel.sequences`."""
        self._pin(kv_tokens)
        return _PinnedSequences(self._generating.sequences(kv_tokens), self._pin, kv_tokens)

    def widen(self, max_batch: int) -> None:
        """Take batches of up to ``max_batch``; see `executor.runtime.protocol.GeneratesTokens`."""
        self._generating.widen(max_batch)
        self.max_batch = self._generating.max_batch

    def _pin(self, kv_tokens: int) -> None:
        self._runtime.pin(self, kv_tokens * self.generation.kv_bytes_per_token)


class _PinnedSequences:
    """Sequences whose key-value memory counts among what is on the device, however large it grows.

    Args:
        own: Runs them.
        pin: Finds room for so many tokens in all.
        kv_tokens: Tokens that there is room for.
    """

    def __init__(self, own: LlamaSequences, pin: Callable[[int], None], kv_tokens: int) -> None:
        self.facts, self.free, self.prefill, self.decode = own.facts, own.free, own.prefill, own.decode
        self._own = own
        self._pin = pin
        self._kv_tokens = kv_tokens

    def hold(self, kv_tokens: int) -> None:
        """Have memory for ``kv_tokens`` tokens at least, in the place of other models where needed."""
        if kv_tokens > self._kv_tokens:
            self._pin(kv_tokens)
            self._own.hold(kv_tokens)
            self._kv_tokens = kv_tokens
