"""A runtime for tests of the agent, ``tests.executor.scripted_runtime:ScriptedRuntime``: y = 2x, with trouble.

Gates are files in the model folder: a load or run that waits ends once its file exists.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from executor.runtime.protocol import InvalidTensor, OutOfDeviceMemory
from tests.executor.fake_runtime import FakeModel, FakeRuntime

TROUBLES = ("dies-at-load", "dies-at-run", "gated-load", "gated-run", "no-memory", "picky", "pipeline")
TROUBLES += ("raises", "twice", "twin")


class ScriptedRuntime(FakeRuntime):
    """``twice`` and ``twin`` just work; the others do what their name says, ``picky`` refuses negative numbers."""

    def names(self) -> tuple[str, ...]:
        return tuple(sorted({*TROUBLES, *super().names()}))

    def load(self, variant: str, max_batch: int, shape: tuple[int, int] = (1, 1)) -> FakeModel:
        if variant == "dies-at-load":
            os._exit(7)
        if variant == "no-memory":
            raise OutOfDeviceMemory(f"{variant} does not fit")
        if variant == "gated-load":
            _wait_for(self.model_dir, "load")
        if variant == "pipeline":
            return ScriptedPipeline(name=variant, max_batch=max_batch, model_dir=self.model_dir)
        loaded = super().load("fake-double" if variant in TROUBLES else variant, max_batch)
        return ScriptedModel(name=variant, max_batch=loaded.max_batch, model_dir=self.model_dir)


class ScriptedModel(FakeModel):
    """See `ScriptedRuntime`."""

    def __init__(self, *, name: str, max_batch: int, model_dir: Path | None) -> None:
        super().__init__(name=name, max_batch=max_batch)
        object.__setattr__(self, "model_dir", model_dir)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if self.name == "dies-at-run":
            os._exit(7)
        if self.name == "raises":
            raise RuntimeError("raised on purpose")
        if self.name == "gated-run":
            _wait_for(self.model_dir, "run")
        if self.name == "picky" and np.any(inputs["x"] < 0):
            raise InvalidTensor.of("numbers of at least 0", field="x", found="a negative number")
        return super().run(inputs)


class ScriptedPipeline(FakeModel):
    """Its first stage takes a batch whenever there is one, its second waits for the gate ``run``."""

    def __init__(self, *, name: str, max_batch: int, model_dir: Path | None) -> None:
        super().__init__(name=name, max_batch=max_batch)
        between: SimpleQueue[tuple[Future[dict[str, NDArray[Any]]], NDArray[Any]]] = SimpleQueue()
        object.__setattr__(self, "between", between)

        def second_stage() -> None:
            while True:
                answer, hidden = between.get()
                _wait_for(model_dir, "run")
                answer.set_result({"y": 2 * hidden})

        threading.Thread(target=second_stage, daemon=True).start()

    def submit(self, inputs: Mapping[str, NDArray[Any]]) -> Future[dict[str, NDArray[Any]]]:
        answer: Future[dict[str, NDArray[Any]]] = Future()
        self.between.put((answer, inputs["x"].copy()))
        return answer


def _wait_for(folder: Path | None, name: str) -> None:
    assert folder is not None
    while not (folder / name).exists():
        time.sleep(0.002)


def exit_at_once(**_: Any) -> None:
    """A runtime factory that ends the process."""
    os._exit(3)
