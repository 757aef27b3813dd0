"""What a runtime is: something that loads a model by name and runs batches of tensors through it.

This module imports no torch. The agent's worker, the profiler and the tests know runtimes only through it; every
implementation passes one contract suite (``tests/executor/runtime/contract.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from plans.errors import Fault, ForeplanError, InvalidInput

__all__ = [
    "NUMPY_TYPES",
    "DevicesLost",
    "GeneratesTokens",
    "GenerationFacts",
    "GroupRuntime",
    "InvalidTensor",
    "LoadedModel",
    "OutOfDeviceMemory",
    "PipelinedModel",
    "Runtime",
    "SequenceRunner",
    "TensorSpec",
    "UnknownVariant",
    "WrongOutputs",
    "batch_of",
    "check_outputs",
]

NUMPY_TYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
}
"""The Open Inference Protocol's datatypes of fixed size, as numpy types."""


class UnknownVariant(InvalidInput):
    """The runtime has no model of that name."""


class InvalidTensor(InvalidInput):
    """Inputs do not fit the model: a name, a datatype, a shape or a value is wrong."""


class DevicesLost(ForeplanError):
    """A process of the group's other devices ended: nothing can be run on the group any more."""


class WrongOutputs(ForeplanError):
    """A model returned something else than it says: its own fault, not that of what it was given."""


class OutOfDeviceMemory(ForeplanError, MemoryError):
    """The device has too little memory for the model at that batch."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a model.

    Attributes:
        name: Name of the tensor.
        datatype: Open Inference Protocol name, such as ``FP32``; one of `NUMPY_TYPES`.
        shape: Shape of one item, without the batch dimension.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.datatype not in NUMPY_TYPES:
            raise ValueError(f"datatype {self.datatype!r} is none of {', '.join(NUMPY_TYPES)}")
        if any(length < 0 for length in self.shape):
            raise ValueError(f"shape {self.shape} has a negative length")

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type of the elements."""
        return NUMPY_TYPES[self.datatype]

    @property
    def item_bytes(self) -> int:
        """Bytes of one item."""
        return math.prod(self.shape) * self.dtype.itemsize


class LoadedModel(Protocol):
    """A model that is ready to run. Dropping the last reference frees it."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `run` wants."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` returns."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights and buffers on the device."""

    @property
    def load_s(self) -> float:
        """Seconds from the request to weights on the device, without the first inference."""

    @property
    def first_inference_s(self) -> float:
        """Seconds of the first inference, at batch 1, which pays for what is set up lazily."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run one batch: arrays of shape (batch, *item) in, arrays of shape (batch, *item) out.

        Raises:
            InvalidTensor: The inputs do not fit `inputs`, or the batch is larger than was loaded for; all faults.
            OutOfDeviceMemory: The device cannot hold this batch.
        """

    def example(self, batch: int, seed: int = 0) -> dict[str, NDArray[Any]]:
        """Return valid inputs for ``batch`` items; the same seed gives the same values."""


@runtime_checkable
class PipelinedModel(LoadedModel, Protocol):
    """A model whose batches may follow each other before the first is out."""

    def submit(self, inputs: Mapping[str, NDArray[Any]]) -> Future[dict[str, NDArray[Any]]]:
        """Start one batch and return when the first stage is free; the future holds what `run` would return.

        Raises:
            InvalidTensor: As `run`.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationFacts:
    """What a model that generates takes.

    Attributes:
        vocabulary: Tokens are 0 to ``vocabulary`` - 1.
        max_context: Tokens of the longest sequence, prompt and answer together.
        kv_bytes_per_token: Key-value memory of one token, over all devices.
        stop_tokens: Tokens by which it says that an answer is complete.
    """

    vocabulary: int
    max_context: int
    kv_bytes_per_token: int
    stop_tokens: tuple[int, ...] = ()


class SequenceRunner(Protocol):
    """Runs the iterations of many sequences over key-value memory of a fixed size. Not for several threads."""

    @property
    def facts(self) -> GenerationFacts:
        """What the model takes."""

    def hold(self, kv_tokens: int) -> None:
        """Have memory for ``kv_tokens`` tokens at least; what it holds stays.

        Raises:
            OutOfDeviceMemory: The device cannot hold so many.
        """

    def free(self, numbers: Sequence[int]) -> None:
        """Forget sequences; unknown ones are none."""

    def prefill(self, contexts: Sequence[tuple[int, Sequence[int]]]) -> list[int]:
        """Read whole contexts of sequences, by number, that hold no memory; return the next token of each.

        Raises:
            InvalidTensor: A token is outside the vocabulary, or memory cannot hold them.
            OutOfDeviceMemory: The device cannot run them together.
        """

    def decode(self, numbers: Sequence[int]) -> list[int]:
        """Return one token more for each of these sequences.

        Raises:
            InvalidTensor: One was not prefilled, or memory cannot hold a token more for each.
            OutOfDeviceMemory: As for `prefill`.
        """


@runtime_checkable
class GeneratesTokens(LoadedModel, Protocol):
    """A model whose answers can be generated token by token."""

    def sequences(self, kv_tokens: int) -> SequenceRunner:
        """Return what runs sequences, with memory for ``kv_tokens`` tokens, at least 1.

        Raises:
            OutOfDeviceMemory: The device cannot hold so many.
        """

    def widen(self, max_batch: int) -> None:
        """Answer whole requests in batches of up to ``max_batch`` from now on, if that is more than before."""

    @property
    def generation(self) -> GenerationFacts:
        """What it takes."""


class Runtime(Protocol):
    """Loads models by name."""

    def names(self) -> tuple[str, ...]:
        """Names that `load` knows, sorted."""

    def load(self, variant: str, max_batch: int) -> LoadedModel:
        """Load ``variant`` for batches of 1 to ``max_batch`` items, and warm it up once.

        Raises:
            UnknownVariant: There is no such model.
            InvalidInput: The model's files or ``max_batch`` are wrong.
            OutOfDeviceMemory: The device cannot hold it.
        """


class GroupRuntime(Protocol):
    """Loads models by name onto all devices of a group.

    One that has processes of its own has an ``await_loss`` too, which returns `DevicesLost` once one of them has ended,
    or at once None where all is in this process.
    """

    def names(self) -> tuple[str, ...]:
        """Names that `load` knows, sorted."""

    def load(self, variant: str, max_batch: int, shape: tuple[int, int] = (1, 1)) -> LoadedModel:
        """Load ``variant`` in ``shape``, tensor and pipeline parallelism, whose product is the number of devices.

        A pipelined model is a `PipelinedModel`. A model with a ``close`` is closed when it is unloaded or replaced. One
        with a ``last_swap_s`` may be off its device between batches: these are the seconds that its last `run` waited
        for it to be brought there, 0 when it was there.

        Raises:
            UnknownVariant: There is no such model.
            InvalidInput: It cannot be cut this way, or its files or ``max_batch`` are wrong.
            OutOfDeviceMemory: The devices cannot hold it.
            DevicesLost: A device's process ended.
        """


def batch_of(
    inputs: Mapping[str, NDArray[Any]], specs: tuple[TensorSpec, ...], *, max_batch: int, where: str = ""
) -> int:
    """Check ``inputs`` against ``specs`` and return the batch, between 1 and ``max_batch``.

    Raises:
        InvalidTensor: With every name that is missing or unknown, and every datatype, shape or batch that is wrong.
    """
    faults = [
        Fault(where=where, field=name, found="an unknown tensor", expected=_listed(specs))
        for name in inputs
        if name not in {spec.name for spec in specs}
    ]
    batches: dict[str, int] = {}
    for spec in specs:
        array = inputs.get(spec.name)
        if array is None:
            expected = f"{spec.datatype} of shape {_shape(spec)}"
            faults.append(Fault(where=where, field=spec.name, found="no such tensor", expected=expected))
            continue
        if array.dtype != spec.dtype:
            faults.append(Fault(where=where, field=spec.name, found=f"type {array.dtype}", expected=spec.datatype))
        if array.ndim != len(spec.shape) + 1 or array.shape[1:] != spec.shape:
            found = f"shape {list(array.shape)}"
            faults.append(Fault(where=where, field=spec.name, found=found, expected=f"shape {_shape(spec)}"))
        else:
            batches[spec.name] = array.shape[0]
            if not 1 <= array.shape[0] <= max_batch:
                found = f"a batch of {array.shape[0]}"
                faults.append(Fault(where=where, field=spec.name, found=found, expected=f"a batch of 1 to {max_batch}"))
    if len(set(batches.values())) > 1:
        found = ", ".join(f"{name}: {batch}" for name, batch in batches.items())
        faults.append(Fault(where=where, found=found, expected="the same batch in every tensor"))
    if faults:
        raise InvalidTensor(faults)
    return next(iter(batches.values()))


def check_outputs(outputs: Mapping[str, NDArray[Any]], specs: tuple[TensorSpec, ...], items: int, where: str) -> None:
    """Refuse outputs of a batch of ``items`` that are not as ``specs`` say: requests would get others' rows, or none.

    Raises:
        WrongOutputs: With every name that is missing or unknown, and every datatype and shape that is wrong.
    """
    faults = [f"{name!r} is none of its outputs" for name in outputs if name not in {spec.name for spec in specs}]
    for spec in specs:
        array = outputs.get(spec.name)
        if array is None:
            faults.append(f"{spec.name!r} is missing")
        elif array.dtype != spec.dtype or array.shape != (items, *spec.shape):
            faults.append(
                f"{spec.name!r} is {array.dtype} of shape {list(array.shape)}, "
                f"not {spec.datatype} of shape {[items, *spec.shape]}"
            )
    if faults:
        raise WrongOutputs(f"{where} returned other outputs than it says: {'; '.join(faults)}")


def _shape(spec: TensorSpec) -> str:
    return f"[batch, {', '.join(map(str, spec.shape))}]" if spec.shape else "[batch]"


def _listed(specs: tuple[TensorSpec, ...]) -> str:
    return "one of " + ", ".join(spec.name for spec in specs)
