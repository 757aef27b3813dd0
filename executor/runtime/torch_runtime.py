"""The torch runtime: models of the registry or of a local safetensors folder, on a CPU or a CUDA device."""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from executor.runtime.acceleration import GraphedModule, acceleration_faults, compiled_module
from executor.runtime.generation import KvMemory, LlamaSequences, LlamaSteps, can_generate, generation_facts
from executor.runtime.generation_engine import GenerationEngine
from executor.runtime.generation_group import GenerationGroup
from executor.runtime.local_models import load_folder, quiet_transformers
from executor.runtime.memory import held_bytes, keep_freed_memory, out_of_memory_named, peak_growth_bytes
from executor.runtime.names import local_model, model_names, registered
from executor.runtime.precision import cast
from executor.runtime.protocol import GenerationFacts, InvalidTensor, TensorSpec, batch_of
from executor.runtime.transfer import DeviceTransfer
from plans.errors import Fault, InvalidInput

__all__ = ["DTYPES", "GeneratingModel", "TorchModel", "TorchRuntime", "check_tokens", "random_inputs", "to_tensor"]

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types that weights and activations can have; inputs and outputs stay FP32."""

_DEVICE = re.compile(r"cpu|cuda(:[0-9]+)?")


class TorchRuntime:
    """Builds, loads and warms up models.

    Weights of a registry model are drawn from ``seed`` and the model's name, and torch's global generator is left as it
    was. A folder ``model_dir/<name>`` with a ``config.json`` and ``*.safetensors`` goes before a registry model of the
    same name. ``<name>-<size>`` is either at another input size, with the same weights where these do not depend on it.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:<index>``.
        dtype: One of `DTYPES`.
        threads: Threads that torch may use for one operation on the CPU; a setting of the whole process.
        model_dir: Folder of local models, or None for the registry alone.
        seed: Of the random weights.
        compiled: Run batches by torch.compile, which takes its time at the first batch of a size.
        cuda_graphs: Record the kernels of each batch size once and replay them; on a CUDA device.

    Raises:
        InvalidInput: An argument is wrong, compiling lacks a C++ compiler, or there is no such device here; all faults
            at once.
    """

    def __init__(
        self,
        device: str = "cpu",
        dtype: str = "fp32",
        threads: int = 1,
        model_dir: Path | None = None,
        seed: int = 0,
        *,
        compiled: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        faults = [*_device_faults(device), *acceleration_faults(device, compiled=compiled, cuda_graphs=cuda_graphs)]
        if dtype not in DTYPES:
            faults.append(Fault(field="dtype", found=repr(dtype), expected="one of " + ", ".join(DTYPES)))
        if threads < 1:
            faults.append(Fault(field="threads", found=str(threads), expected="at least 1"))
        if model_dir is not None and not model_dir.is_dir():
            faults.append(Fault(field="model_dir", found=str(model_dir), expected="a folder of models"))
        if faults:
            raise InvalidInput(faults)
        self._device = torch.device(device)
        self._dtype = dtype
        self._threads = threads
        self._model_dir = model_dir
        self._seed = seed
        self._compiled = compiled
        self._cuda_graphs = cuda_graphs

    def names(self) -> tuple[str, ...]:
        """Names that `load` knows, sorted: the registry's and those of local folders."""
        return model_names(self._model_dir)

    def load(self, variant: str, max_batch: int) -> TorchModel:
        """Build or read ``variant``, move it to the device, and run it once.

        On a CUDA device it is run at ``max_batch`` as well, so that a model which does not fit is found here.

        Raises:
            UnknownVariant: Neither the registry nor the folder has the model.
            InvalidInput: The model's folder is damaged, or ``max_batch`` is below 1.
            OutOfDeviceMemory: The device cannot hold the model at that batch.
        """
        if max_batch < 1:
            raise InvalidInput.of("at least 1", where=variant, field="max_batch", found=max_batch)
        torch.set_num_threads(self._threads)
        if self._device.type == "cpu":
            keep_freed_memory()
        start = time.perf_counter()
        with quiet_transformers(), out_of_memory_named(variant, max_batch):
            module, inputs, wanted = self.build(variant)
            module = cast(module, DTYPES[self._dtype]).to(device=self._device).eval().requires_grad_(False)
            self._synchronize()
            load_s = time.perf_counter() - start
            kind = GeneratingModel if can_generate(module) else TorchModel
            return kind(
                variant,
                module,
                inputs,
                wanted,
                run=self._accelerated(module, variant),
                device=self._device,
                dtype=DTYPES[self._dtype],
                max_batch=max_batch,
                load_s=load_s,
                from_files=self.reads_files(variant),
            )

    def peak_growth_bytes(self, action: Callable[[], object]) -> int:
        """Run ``action`` once and return the bytes that it took on top of what was held before, at the peak."""
        return peak_growth_bytes(action, self._device)

    def held_bytes(self, action: Callable[[], object]) -> int:
        """Run ``action`` once and return all bytes that the process then holds on the CUDA device, CUDA graphs too."""
        return held_bytes(action, self._device)

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and activations."""
        return DTYPES[self._dtype]

    def build(self, variant: str) -> tuple[torch.nn.Module, tuple[TensorSpec, ...], tuple[str, ...]]:
        """Return the module of ``variant`` on the CPU, its inputs, and the names of its outputs.

        Large models of the registry have the runtime's dtype from the start; `cast` gives it to all others.

        Raises:
            UnknownVariant: Neither the registry nor the folder has the model.
            InvalidInput: The model's folder is damaged.
        """
        local = local_model(variant, self._model_dir)
        if self._model_dir is not None and local is not None:
            return load_folder(self._model_dir, *local)
        model, architecture = registered(variant, self._model_dir)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed + zlib.crc32(model.encode()))
            module = architecture.build_as(self.dtype) if architecture.build_as else architecture.build()
        return module, architecture.inputs, architecture.outputs

    def reads_files(self, variant: str) -> bool:
        """Say whether ``variant`` is read from the folder of local models."""
        return local_model(variant, self._model_dir) is not None

    def _accelerated(self, module: torch.nn.Module, variant: str) -> Callable[..., Any]:
        run = compiled_module(module, variant) if self._compiled else module
        return GraphedModule(run, self._device, variant) if self._cuda_graphs else run

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


_PARKED = torch.nn.Module()
"""In place of a module that is not on the device."""


class TorchModel:
    """A module on its device; see `executor.runtime.protocol.LoadedModel`. Made by `TorchRuntime.load`."""

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        inputs: tuple[TensorSpec, ...],
        wanted: tuple[str, ...],
        *,
        run: Callable[..., Any],
        device: torch.device,
        dtype: torch.dtype,
        max_batch: int,
        load_s: float,
        from_files: bool = False,
    ) -> None:
        self.name = name
        self.from_files = from_files
        self.inputs = inputs
        self.load_s = load_s
        self.max_batch = max_batch
        self._module = module
        self._run = run
        self._wanted = wanted
        self._device = device
        self._dtype = dtype
        self._transfer = DeviceTransfer(device, dtype) if device.type == "cuda" else None
        self._vocabulary = int(getattr(getattr(module, "config", None), "vocab_size", 0) or 0)
        tensors = [*module.parameters(), *module.buffers()]
        self.weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        start = time.perf_counter()
        first = self.run(self.example(1))
        self.first_inference_s = time.perf_counter() - start
        self.outputs = tuple(TensorSpec(name, "FP32", array.shape[1:]) for name, array in first.items())
        if device.type == "cuda" and max_batch > 1:
            self.run(self.example(max_batch))

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run one batch: FP32 or integer arrays of shape (batch, *item) in, FP32 arrays of shape (batch, *item) out.

        Raises:
            InvalidTensor: The inputs do not fit, or name a token outside the vocabulary; all faults.
            OutOfDeviceMemory: The device cannot hold this batch.
        """
        batch = batch_of(inputs, self.inputs, max_batch=self.max_batch, where=self.name)
        check_tokens(self.name, self.inputs, self._vocabulary, inputs)
        with torch.inference_mode(), out_of_memory_named(self.name, batch):
            if self._transfer is not None:
                answer = self._run(**self._transfer.to_device(inputs))
                return self._transfer.to_host({name: answer[name] for name in self._wanted})
            answer = self._run(**{name: to_tensor(array, self._device, self._dtype) for name, array in inputs.items()})
            return {name: answer[name].float().numpy() for name in self._wanted}

    def forget_graphs(self) -> None:
        """Drop the CUDA graphs that were recorded, with their memory; they are recorded again when needed."""
        if isinstance(self._run, GraphedModule):
            self._run.forget()

    def park(self) -> None:
        """Let go of the module; nothing runs until `unpark`."""
        self._run = self._module = _PARKED

    def unpark(self, module: torch.nn.Module) -> None:
        """Take ``module``, on the device, in place of the one that was parked."""
        self._run = self._module = module

    def example(self, batch: int, seed: int = 0) -> dict[str, NDArray[Any]]:
        """Return valid random inputs for ``batch`` items; the same seed gives the same values."""
        return random_inputs(self.inputs, self._vocabulary, batch, seed)


class GeneratingModel(TorchModel):
    """A Llama model: as a whole it answers with the logits after a prompt, and its engine generates."""

    def engine(self, *, kv_tokens: int, **chosen: Any) -> GenerationEngine:
        """Return an engine with key-value memory for ``kv_tokens`` tokens; ``chosen`` as for `GenerationEngine`.

        Raises:
            OutOfDeviceMemory: The device cannot hold so many.
            InvalidInput: ``kv_tokens`` or a chosen limit is below 1.
        """
        return GenerationEngine(self.sequences(kv_tokens), kv_tokens=kv_tokens, **chosen)

    def sequences(self, kv_tokens: int) -> LlamaSequences:
        """Return what runs sequences, with key-value memory for ``kv_tokens`` tokens.

        Raises:
            OutOfDeviceMemory: The device cannot hold so many.
            InvalidInput: ``kv_tokens`` is below 1.
        """
        if kv_tokens < 1:
            raise InvalidInput.of("at least 1", where=self.name, field="kv_tokens", found=kv_tokens)
        with out_of_memory_named(self.name, self.max_batch):
            memory = KvMemory(self._module.config, kv_tokens, self._device, self._dtype)
        return LlamaSequences(LlamaSteps(self._module, memory), self.generation, self.name)

    @property
    def generation(self) -> GenerationFacts:
        """What it takes; only weights that were read know when an answer is complete."""
        return generation_facts(self._module.config, self._dtype, from_files=self.from_files)

    def widen(self, max_batch: int) -> None:
        """Take batches of up to ``max_batch``; see `executor.runtime.protocol.GeneratesTokens`."""
        self.max_batch = max(self.max_batch, max_batch)

    def as_group(self) -> GenerationGroup:
        """Return the model as `profiles.profiler.profile_group` measures it."""
        return GenerationGroup(self.name, self, self._module, self._device, self._dtype)


def random_inputs(specs: tuple[TensorSpec, ...], vocabulary: int, batch: int, seed: int) -> dict[str, NDArray[Any]]:
    """Return random inputs for ``batch`` items: tokens of the vocabulary, or normal numbers."""
    generator = np.random.default_rng(seed)
    arrays: dict[str, NDArray[Any]] = {}
    for spec in specs:
        shape = (batch, *spec.shape)
        if spec.datatype == "INT64":
            arrays[spec.name] = generator.integers(0, max(1, vocabulary), shape, dtype=np.int64)
        else:
            arrays[spec.name] = generator.standard_normal(shape, dtype=np.float32)
    return arrays


def check_tokens(name: str, specs: tuple[TensorSpec, ...], vocabulary: int, inputs: Mapping[str, NDArray[Any]]) -> None:
    """Refuse tokens outside the vocabulary: they would read beyond the embedding, and on a GPU end the process.

    Raises:
        InvalidTensor: There are some.
    """
    faults = []
    for spec in specs:
        if spec.datatype == "INT64":
            lowest, highest = int(inputs[spec.name].min()), int(inputs[spec.name].max())
            if lowest < 0 or highest >= vocabulary:
                found = f"token {lowest if lowest < 0 else highest}"
                faults.append(
                    Fault(where=name, field=spec.name, found=found, expected=f"tokens from 0 to {vocabulary - 1}")
                )
    if faults:
        raise InvalidTensor(faults)


def to_tensor(array: NDArray[Any], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return ``array`` on ``device``, floating point numbers as ``dtype``."""
    # torch warns on arrays that cannot be written, such as those over received bytes: those are copied.
    owned = array if array.flags.writeable and array.flags.c_contiguous else np.array(array, order="C")
    tensor = torch.from_numpy(owned).to(device)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _device_faults(device: str) -> Iterator[Fault]:
    if not _DEVICE.fullmatch(device):
        yield Fault(field="device", found=repr(device), expected="cpu, cuda or cuda:<index>")
    elif device != "cpu":
        _, _, index = device.partition(":")
        count = torch.cuda.device_count()
        if int(index or 0) >= count:
            expected = f"a CUDA device that exists: this machine has {count}"
            yield Fault(
                field="device", found=repr(device), expected=expected, remedy="use cpu, or a CUDA build of torch"
            )
