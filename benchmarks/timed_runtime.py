"""A runtime whose models take a stated time and no processor: ``timed-<base ms>-<ms per item>-<floats per item>``.

Over several devices, tensor parallel, a model takes as many times less. What is measured around it is what gateway,
agent and worker cost, on a machine too small for a real model beside them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from executor.runtime.protocol import TensorSpec, UnknownVariant, batch_of

NAMES = (
    "timed-20-0-37500",
    "timed-20-2-4",
    "timed-30-2-4",
    "timed-0-0-4",
    "timed-5-1-4",
    "timed-40-4-4",
    "timed-10-2-4",
    "timed-25-5-4",
    "timed-50-10-4",
    "timed-100-10-4",
    "timed-150-10-4",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedModel:
    """Sleeps, and returns the sum of each item."""

    name: str
    max_batch: int
    base_s: float
    item_s: float
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...] = (TensorSpec("y", "FP32", (1,)),)
    weight_bytes: int = 1024
    load_s: float = 0.001
    first_inference_s: float = 0.001

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Take the time of a batch of this size."""
        start_s = time.perf_counter()
        batch = batch_of(inputs, self.inputs, max_batch=self.max_batch, where=self.name)
        outputs = {"y": inputs["x"].sum(axis=1, keepdims=True, dtype=np.float32)}
        time.sleep(max(0.0, self.base_s + batch * self.item_s - (time.perf_counter() - start_s)))
        return outputs

    def example(self, batch: int, seed: int = 0) -> dict[str, NDArray[Any]]:
        """Return seeded inputs."""
        generator = np.random.default_rng(seed)
        return {"x": generator.standard_normal((batch, *self.inputs[0].shape), dtype=np.float32)}


def latency_table_s(variant: str, max_batch: int) -> tuple[tuple[float], ...]:
    """Return the planned latency of each batch up to ``max_batch``, one stage each, seconds."""
    _, base, item, _ = variant.split("-")
    return tuple(((float(base) + float(item) * batch) / 1000 or 1e-4,) for batch in range(1, max_batch + 1))


class TimedRuntime:
    """Takes the keywords of the torch runtime, and needs only the devices."""

    def __init__(self, devices: Sequence[str] = ("cpu",), **_: Any) -> None:
        self._devices = len(devices)

    def names(self) -> tuple[str, ...]:
        """Return the models there are."""
        return tuple(sorted(NAMES))

    def load(self, variant: str, max_batch: int, shape: tuple[int, int] = (1, 1)) -> TimedModel:
        """Return the model that its name describes."""
        if variant not in NAMES:
            raise UnknownVariant.of(f"one of {', '.join(NAMES)}", field="variant", found=repr(variant))
        _, base, item, floats = variant.split("-")
        spec = TensorSpec("x", "FP32", (int(floats),))
        base_s, item_s = (float(ms) / 1000 / self._devices for ms in (base, item))
        return TimedModel(name=variant, max_batch=max_batch, base_s=base_s, item_s=item_s, inputs=(spec,))
