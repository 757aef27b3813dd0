"""A model over several devices, as the profiler sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from plans.errors import InvalidInput
from profiles.group import MemoryProbe, Pass, Point, Series

__all__ = ["ParallelGroup"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelGroup:
    """A model that the parallel runtime loaded: whole requests on tp x pp devices.

    What the first device takes beside its weights stands for every stage: only its process can be looked into, and the
    first stage has the largest activations of most models.
    """

    loaded: Any
    memory: MemoryProbe
    tp: int
    pp: int
    kv_bytes_per_token: int | None = None

    @property
    def weight_bytes(self) -> tuple[int, ...]:
        """Bytes of weights on each GPU of a stage; shape (pp,)."""
        stages: tuple[int, ...] = self.loaded.stage_weight_bytes
        return stages

    @property
    def load_s(self) -> float:
        """Seconds that loading took."""
        return float(self.loaded.load_s)

    @property
    def first_inference_s(self) -> float:
        """Seconds of the first inference."""
        return float(self.loaded.first_inference_s)

    def prepare(self, point: Point, /) -> Pass:
        """Return what runs one batch of ``point``.

        Raises:
            InvalidInput: The point is no whole request.
        """
        if point.series != Series():
            series = point.series
            found = f"{series.phase} of {series.input_tokens} tokens on {self.tp * self.pp} devices"
            remedy = "measure prefill and decode on one device"
            raise InvalidInput.of("whole requests", where=self.loaded.name, field="series", found=found, remedy=remedy)
        inputs = self.loaded.example(point.batch)
        return lambda: self.loaded.run(inputs)

    def activation_bytes(self, run: Pass, /) -> tuple[int, ...]:
        """Run once and return the most bytes held beside the weights; shape (pp,)."""
        return (self.memory(run),) * self.pp

    def stage_s(self, run: Pass, /) -> tuple[float, ...]:
        """Run once and return the seconds that each stage computed; shape (pp,)."""
        run()
        stages: tuple[float, ...] = self.loaded.stage_run_s()
        return stages
