"""The profiler: loads a model and times it, batch by batch, until the median is known well enough.

It measures anything that can be loaded and run, and knows no torch: the clock, the way to measure memory and the way
to show progress are handed in.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from plans.errors import Fault, InvalidInput
from profiles.document import Profile, ProfileMeta, Row
from profiles.memory import resident_growth_bytes
from profiles.sampling import median_interval_ratio, summarise

__all__ = ["CallableModel", "Measurable", "Progress", "StopRule", "load_callable", "profile_callable", "sample"]

Inputs = TypeVar("Inputs")


class Measurable(Protocol[Inputs]):
    """A loaded model; `executor.runtime.protocol.LoadedModel` is one, and `load_callable` makes one of any function."""

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
class StopRule:
    """When a point of the grid has been measured enough.

    Attributes:
        median_error_ratio: Stop when the 95 % confidence interval of the median lies within this share of it.
        point_s: Stop when warm-up and samples of the point took this long, seconds.
        max_samples: Stop at this many samples.
        tail_samples: A well-known median does not stop the point before this many; a hundred support a p99.
        least_samples: Nothing stops the point before this many.
        warmup_runs: Runs before the samples, not counted.
    """

    median_error_ratio: float = 0.02
    point_s: float = 2.0
    max_samples: int = 1000
    tail_samples: int = 100
    least_samples: int = 3
    warmup_runs: int = 2

    def __post_init__(self) -> None:
        faults = []
        if not self.median_error_ratio > 0:
            faults.append(Fault(field="median_error_ratio", found=str(self.median_error_ratio), expected="above 0"))
        if not self.point_s > 0:
            faults.append(Fault(field="point_s", found=str(self.point_s), expected="above 0"))
        if not 1 <= self.least_samples <= self.max_samples:
            found = str(self.least_samples)
            faults.append(Fault(field="least_samples", found=found, expected=f"1 to max_samples ({self.max_samples})"))
        if self.warmup_runs < 0:
            faults.append(Fault(field="warmup_runs", found=str(self.warmup_runs), expected="at least 0"))
        if faults:
            raise InvalidInput(faults)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a profile has come: after the load, and after every sample.

    Attributes:
        model: What is being profiled.
        batch: Batch being measured; None while the model loads.
        point: Points finished.
        points: Points of the whole grid.
        samples: Samples of this point.
        done_ratio: Share of the whole profile that is done, from 0 to 1; never falls.
    """

    model: str
    batch: int | None
    point: int
    points: int
    samples: int
    done_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CallableModel:
    """A function of the batch as a `Measurable`; made by `load_callable`."""

    function: Callable[[int], object]
    weight_bytes: int
    load_s: float
    first_inference_s: float

    def example(self, batch: int, seed: int = 0) -> int:
        """Return the batch itself."""
        return batch

    def run(self, batch: int, /) -> object:
        """Call the function."""
        return self.function(batch)


def load_callable(
    build: Callable[[], Callable[[int], object]],
    *,
    weight_bytes: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> CallableModel:
    """Call ``build`` as the load and its result at batch 1 as the first inference, timing both."""
    start = clock()
    function = build()
    loaded = clock()
    function(1)
    return CallableModel(
        function=function, weight_bytes=weight_bytes, load_s=loaded - start, first_inference_s=clock() - loaded
    )


def profile_callable(
    load: Callable[[], Measurable[Any]],
    *,
    model: str,
    gpu_type: str,
    batches: Sequence[int],
    stop: StopRule | None = None,
    clock: Callable[[], float] = time.perf_counter,
    memory: Callable[[Callable[[], object]], int] = resident_growth_bytes,
    progress: Callable[[Progress], None] | None = None,
    meta: ProfileMeta | None = None,
) -> Profile:
    """Load a model once and measure it at each of ``batches``, smallest first, on one device (tp = pp = 1).

    A batch that the device cannot hold (`MemoryError`) ends the grid there, if a smaller one was measured.

    Args:
        load: Loads and warms up the model, and is called once.
        model: Name of the model.
        gpu_type: Name of the device's type, as in ``cluster.yaml``.
        batches: The grid; order and repetition do not matter.
        stop: When a point is measured enough.
        clock: Monotonic seconds.
        memory: Runs an action once and returns the bytes that it took on top of what was held before, at the peak.
        progress: Called after the load and after every sample.
        meta: How the numbers came about.

    Returns:
        A profile with source ``measured``. ``peak_bytes`` is the weights plus what ``memory`` reports; it never falls
        with the batch.

    Raises:
        InvalidInput: ``batches`` is empty or names a batch below 1.
        MemoryError: The device cannot hold even the smallest batch.
    """
    grid = sorted(set(batches))
    if not grid or grid[0] < 1:
        raise InvalidInput.of("at least one batch, each at least 1", field="batches", found=list(batches))
    loaded = load()
    bench = _Bench(
        loaded=loaded, model=model, points=len(grid), stop=stop or StopRule(), clock=clock, memory=memory, show=progress
    )
    bench.report(None, point=0, samples=0, share=0.0)
    rows: list[Row] = []
    for point, batch in enumerate(grid):
        try:
            rows.append(bench.measure(point, batch, at_least_bytes=rows[-1].peak_bytes[0] if rows else 0))
        except MemoryError:
            if not rows:
                raise
            break
    bench.report(rows[-1].batch, point=len(grid), samples=rows[-1].samples, share=0.0)
    return Profile(model=model, gpu_type=gpu_type, source="measured", meta=meta or ProfileMeta(), rows=tuple(rows))


def sample(
    run: Callable[[], object],
    stop: StopRule,
    *,
    clock: Callable[[], float] = time.perf_counter,
    on_sample: Callable[[int, float], None] | None = None,
) -> tuple[float, ...]:
    """Warm up, then time ``run`` until ``stop`` says enough; return the samples in order, seconds.

    ``on_sample`` gets the number of samples so far and the share of the point that is done. A run too short for the
    clock counts as a nanosecond.
    """
    start = clock()
    for _ in range(stop.warmup_runs):
        run()
    samples: list[float] = []
    ordered: list[float] = []
    while True:
        before = clock()
        run()
        after = clock()
        taken = max(after - before, 1e-9)
        samples.append(taken)
        insort(ordered, taken)
        done = _is_enough(ordered, after - start, stop)
        if on_sample is not None:
            share = max(len(samples) / stop.max_samples, (after - start) / stop.point_s)
            on_sample(len(samples), 1.0 if done else min(1.0, share))
        if done:
            return tuple(samples)


def _is_enough(ordered: Sequence[float], elapsed_s: float, stop: StopRule) -> bool:
    if len(ordered) < stop.least_samples:
        return False
    if len(ordered) >= stop.max_samples or elapsed_s >= stop.point_s:
        return True
    if len(ordered) < stop.tail_samples:
        return False
    error = median_interval_ratio(ordered)
    return error is not None and error <= stop.median_error_ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """One loaded model and all that measuring a point of its grid takes."""

    loaded: Measurable[Any]
    model: str
    points: int
    stop: StopRule
    clock: Callable[[], float]
    memory: Callable[[Callable[[], object]], int]
    show: Callable[[Progress], None] | None

    def measure(self, point: int, batch: int, *, at_least_bytes: int) -> Row:
        inputs = self.loaded.example(batch)

        def run() -> object:
            return self.loaded.run(inputs)

        # Memory first: what the allocator keeps from this run would hide from a later look at the process.
        peak_bytes = max(self.loaded.weight_bytes + self.memory(run), at_least_bytes)
        samples = sample(
            run,
            self.stop,
            clock=self.clock,
            on_sample=lambda count, share: self.report(batch, point=point, samples=count, share=share),
        )
        latency_s = summarise(samples)
        return Row(
            batch=batch,
            latency_s=latency_s,
            stage_latency_s=(latency_s.mean,),
            weight_bytes=(self.loaded.weight_bytes,),
            peak_bytes=(peak_bytes,),
            load_s=self.loaded.load_s,
            first_inference_s=self.loaded.first_inference_s,
            samples=len(samples),
        )

    def report(self, batch: int | None, *, point: int, samples: int, share: float) -> None:
        if self.show is not None:
            done_ratio = min(1.0, (point + share) / self.points)
            self.show(
                Progress(
                    model=self.model,
                    batch=batch,
                    point=point,
                    points=self.points,
                    samples=samples,
                    done_ratio=done_ratio,
                )
            )
