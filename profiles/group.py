"""What the profiler measures: points of a grid, on a model that is loaded on the devices of one group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, TypeVar

from plans.errors import Fault, InvalidInput
from profiles.curve import Curve
from profiles.document import Phase
from profiles.memory import resident_growth_bytes

__all__ = ["Grid", "LoadedGroup", "Measurable", "MemoryProbe", "Pass", "Point", "Series", "SingleDevice"]

Inputs = TypeVar("Inputs")

MemoryProbe = Callable[[Callable[[], object]], int]
"""Runs an action once and returns the bytes that it took on top of what was held before, at the peak."""

Pass = Callable[[], object]
"""Runs one batch to its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points that differ in nothing but the batch; the fields are those of `profiles.document.Row`."""

    phase: Phase = "whole"
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One point to measure: ``batch`` items of a series."""

    series: Series
    batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What to measure.

    Attributes:
        batches: The batches of every series. None doubles from 1, until throughput flattens, a batch takes too long, or
            memory ends.
        series: What else to vary.
        max_batch: Doubling goes no further.
        flat_gain_ratio: Throughput is flat when a batch gains less than this over a quarter of it.
        max_batch_s: Doubling stops after a batch that takes longer, seconds.
        refine_error_ratio: After doubling, the batch halfway between two others is measured too where a straight line
            between these may be further off than this share of it.
        most_refined: At most so many batches of a series are measured for that; 0 for none.
    """

    batches: tuple[int, ...] | None = None
    series: tuple[Series, ...] = (Series(),)
    max_batch: int = 256
    flat_gain_ratio: float = 0.05
    max_batch_s: float = 4.0
    refine_error_ratio: float = 0.05
    most_refined: int = 4

    def __post_init__(self) -> None:
        faults = []
        if self.batches is not None and (not self.batches or min(self.batches) < 1):
            expected = "at least one batch, each at least 1"
            faults.append(Fault(field="batches", found=str(list(self.batches)), expected=expected))
        if not self.series:
            faults.append(Fault(field="series", found="none", expected="at least one"))
        if self.max_batch < 1:
            faults.append(Fault(field="max_batch", found=str(self.max_batch), expected="at least 1"))
        if not self.flat_gain_ratio >= 0:
            faults.append(Fault(field="flat_gain_ratio", found=str(self.flat_gain_ratio), expected="at least 0"))
        if not self.max_batch_s > 0:
            faults.append(Fault(field="max_batch_s", found=str(self.max_batch_s), expected="above 0"))
        if not self.refine_error_ratio > 0:
            faults.append(Fault(field="refine_error_ratio", found=str(self.refine_error_ratio), expected="above 0"))
        if self.most_refined < 0:
            faults.append(Fault(field="most_refined", found=str(self.most_refined), expected="at least 0"))
        if faults:
            raise InvalidInput(faults)

    @property
    def candidates(self) -> tuple[int, ...]:
        """The batches that may be measured, rising."""
        if self.batches is not None:
            return tuple(sorted(set(self.batches)))
        return tuple(2**exponent for exponent in range(self.max_batch.bit_length()))

    @property
    def most_points(self) -> int:
        """The most batches of a series that may be measured."""
        return len(self.candidates) + (self.most_refined if self.batches is None else 0)

    def refined(self, latencies_s: Mapping[int, float]) -> int | None:
        """Return the batch to measure next, once doubling is over; None where lines between batches are good enough.

        It halves the gap in which the latency model's own bounds leave most open (`Curve.error_ratio`): a straight line
        needs nothing more, and a kink is closed in on. The same latencies give the same batch, in any order.
        """
        if self.batches is not None:
            return None
        known = sorted(latencies_s)
        curve = Curve.fit(known, [latencies_s[batch] for batch in known], [1.0] * len(known))
        gaps = [(curve.gap_error_ratio((low + high) // 2), (low + high) // 2) for low, high in pairwise(curve.batches)]
        error_ratio, batch = max(gaps, default=(0.0, 0))
        return batch if error_ratio > self.refine_error_ratio else None

    def is_enough(self, latencies_s: dict[int, float]) -> bool:
        """Return whether the batches measured so far, by batch in rising order, tell all that doubling can tell."""
        if self.batches is not None:
            return False
        batch, latency_s = list(latencies_s.items())[-1]
        if latency_s > self.max_batch_s:
            return True
        before = [earlier / taken_s for earlier, taken_s in latencies_s.items() if 4 * earlier <= batch]
        return bool(before) and batch / latency_s < (1 + self.flat_gain_ratio) * max(before)


class LoadedGroup(Protocol):
    """A model on the devices of one group. `SingleDevice` is one.

    A loaded model that has more than one device or phase brings its own: `foreplan.measure` takes what its method
    ``as_group()`` returns, where it has one.

    Attributes and what they mean are those of `profiles.document.Row`: bytes have one entry per pipeline stage.
    """

    @property
    def tp(self) -> int:
        """GPUs per stage."""

    @property
    def pp(self) -> int:
        """Pipeline stages."""

    @property
    def weight_bytes(self) -> tuple[int, ...]:
        """Bytes of weights on each GPU of a stage; shape (pp,)."""

    @property
    def load_s(self) -> float:
        """Seconds that loading took, without the first inference."""

    @property
    def first_inference_s(self) -> float:
        """Seconds of the first inference."""

    @property
    def kv_bytes_per_token(self) -> int | None:
        """Bytes of key-value cache of one token over all GPUs, or None where nothing is generated."""

    def prepare(self, point: Point, /) -> Pass:
        """Return what runs one batch of ``point``, ready to be timed again and again.

        Raises:
            MemoryError: A device cannot hold it.
            InvalidInput: The model has no such phase or number of tokens.
        """

    def activation_bytes(self, run: Pass, /) -> tuple[int, ...]:
        """Run once and return the most bytes held beside the weights on each GPU of a stage; shape (pp,)."""

    def stage_s(self, run: Pass, /) -> tuple[float, ...]:
        """Run once and return the seconds that each pipeline stage was held; shape (pp,), or empty for one stage."""


class Measurable(Protocol[Inputs]):
    """A loaded model on one device; `executor.runtime.protocol.LoadedModel` is one, and so is `CallableModel`."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights on the device."""

    @property
    def load_s(self) -> float:
        """Seconds that loading took, without the first inference."""

    @property
    def first_inference_s(self) -> float:
        """Seconds of the first inference."""

    def example(self, batch: int, seed: int = 0) -> Inputs:
        """Return valid inputs for ``batch`` items."""

    def run(self, inputs: Inputs, /) -> object:
        """Run one batch to its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleDevice:
    """A `Measurable` as a group of one device; it knows whole requests alone, with inputs of one size."""

    loaded: Measurable[Any]
    memory: MemoryProbe = resident_growth_bytes
    input_tokens: int | None = None
    tp: int = 1
    pp: int = 1
    kv_bytes_per_token: int | None = None

    @property
    def weight_bytes(self) -> tuple[int, ...]:
        """Bytes of weights on the device."""
        return (self.loaded.weight_bytes,)

    @property
    def load_s(self) -> float:
        """Seconds that loading took, without the first inference."""
        return self.loaded.load_s

    @property
    def first_inference_s(self) -> float:
        """Seconds of the first inference."""
        return self.loaded.first_inference_s

    def prepare(self, point: Point, /) -> Pass:
        """Return what runs one batch of ``point``.

        Raises:
            InvalidInput: The point is no whole request, or of another number of tokens than the model's inputs have.
        """
        series = point.series
        if series.phase != "whole" or series.input_tokens not in (None, self.input_tokens) or series.output_tokens:
            raise InvalidInput.of(
                "whole requests with the inputs that the model was built for",
                field="series",
                found=f"{series.phase} with {series.input_tokens} tokens in and {series.output_tokens} out",
                remedy="use a model that generates",
            )
        inputs = self.loaded.example(point.batch)
        return lambda: self.loaded.run(inputs)

    def activation_bytes(self, run: Pass, /) -> tuple[int, ...]:
        """Run once and return the most bytes held beside the weights."""
        return (self.memory(run),)

    def stage_s(self, run: Pass, /) -> tuple[float, ...]:
        """Return nothing: one stage takes all of the latency."""
        return ()
