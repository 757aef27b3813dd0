"""A model over several devices, as the profiler sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from plans.errors import InvalidInput
from profiles.group import MemoryProbe, Pass, Point, Series

__all__ = ["ParallelGroup"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelGroup:
    """A model that the parallel runtime loaded on tp x pp devices: whole requests, and the phases of generation.

    What the first device takes beside its weights stands for every stage: only its process can be looked into, and the
    first stage has the largest activations of most models. Key-value memory is that of each stage's layers.
    """

    loaded: Any
    memory: MemoryProbe
    tp: int
    pp: int

    @property
    def kv_bytes_per_token(self) -> int | None:
        """Bytes of key-value cache of one token over all devices; None where nothing is generated."""
        facts = getattr(self.loaded, "generation", None)
        return None if facts is None else int(facts.kv_bytes_per_token)

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
            InvalidInput: The model has no such phase, or the context is longer than it can hold.
        """
        series = point.series
        if series.phase != "whole" and series.input_tokens is not None and series.output_tokens is None:
            return self._phase(series.phase, point.batch, series.input_tokens)
        if series != Series():
            raise InvalidInput.of("whole requests", where=self.loaded.name, field="series", found=repr(series))
        inputs = self.loaded.example(point.batch)
        return lambda: self.loaded.run(inputs)

    def _phase(self, phase: str, batch: int, tokens: int) -> Pass:
        """Return what runs a prefill or decode of ``batch`` sequences of ``tokens`` tokens."""
        facts = getattr(self.loaded, "generation", None)
        if facts is None or tokens > facts.max_context:
            found = f"{phase} of {tokens} tokens on {self.tp} x {self.pp} devices"
            expected = "whole requests" if facts is None else f"at most {facts.max_context} tokens"
            remedy = "measure prefill and decode of a Llama" if facts is None else ""
            raise InvalidInput.of(expected, where=self.loaded.name, field="series", found=found, remedy=remedy)
        run: Pass = self.loaded.phase_pass(phase, batch, tokens)
        return run

    def activation_bytes(self, run: Pass, /) -> tuple[int, ...]:
        """Run once and return the most bytes held beside the weights, key-value memory included; shape (pp,)."""
        working: int = self.memory(run)
        return tuple(working + kv_bytes for kv_bytes in getattr(run, "kv_bytes", (0,) * self.pp))

    def stage_s(self, run: Pass, /) -> tuple[float, ...]:
        """Run once and return the seconds that each stage computed; shape (pp,), or empty for one stage."""
        if self.pp == 1:
            return ()
        run()
        stages: tuple[float, ...] = self.loaded.stage_run_s()
        return stages
