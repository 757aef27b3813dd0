"""The profiler: times a loaded model, batch by batch, until the median is known well enough.

It measures anything that can be loaded and run, and knows no torch: the clock, the way to measure memory and power and
the way to show progress are handed in.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plans.errors import Fault, InvalidInput
from profiles.document import Profile, ProfileMeta, Row
from profiles.group import Grid, LoadedGroup, Measurable, MemoryProbe, Pass, Point, Series, SingleDevice
from profiles.memory import resident_growth_bytes
from profiles.sampling import median_interval_ratio, summarise

__all__ = [
    "CallableModel",
    "Measurable",
    "Progress",
    "StopRule",
    "load_callable",
    "profile_callable",
    "profile_group",
    "sample",
]

_STAGE_RUNS = 5
"""Runs over which the seconds per pipeline stage are averaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRule:
    """When a point of the grid has been measured enough.

    Attributes:
        median_error_ratio: Stop when the 95 % confidence interval of the median lies within this share of it.
        point_s: Stop when warm-up and samples of the point took this long, seconds.
        max_samples: Stop at this many samples.
        tail_samples: A well-known median does not stop the point before this many; a hundred support a p99.
        least_samples: Nothing stops the point before this many.
        warmup_runs: Runs before the samples, not counted; the second and later only within half of ``point_s``.
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
        left_s: Seconds that the rest will take if it goes on like this; None before anything is done.
    """

    model: str
    batch: int | None
    point: int
    points: int
    samples: int
    done_ratio: float
    left_s: float | None = None


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
    batches: Sequence[int] | None,
    stop: StopRule | None = None,
    clock: Callable[[], float] = time.perf_counter,
    memory: MemoryProbe = resident_growth_bytes,
    progress: Callable[[Progress], None] | None = None,
    meta: ProfileMeta | None = None,
) -> Profile:
    """Load a model once and measure it at each of ``batches``, smallest first, on one device (tp = pp = 1).

    ``load`` loads and warms up the model, and is called once. All else is as for `profile_group`.

    Raises:
        InvalidInput: ``batches`` is empty or names a batch below 1.
        MemoryError: The device cannot hold even the smallest batch.
    """
    grid = Grid(batches=None if batches is None else tuple(batches))
    return profile_group(
        SingleDevice(loaded=load(), memory=memory),
        model=model,
        gpu_type=gpu_type,
        grid=grid,
        stop=stop,
        clock=clock,
        progress=progress,
        meta=meta,
    )


def profile_group(
    group: LoadedGroup,
    *,
    model: str,
    gpu_type: str,
    grid: Grid,
    stop: StopRule | None = None,
    clock: Callable[[], float] = time.perf_counter,
    energy_j: Callable[[], float | None] = lambda: None,
    progress: Callable[[Progress], None] | None = None,
    meta: ProfileMeta | None = None,
    known: Iterable[Row] = (),
    on_row: Callable[[Row], None] | None = None,
) -> Profile:
    """Measure a loaded model at every point of ``grid``, smallest batch first.

    A grid that doubles goes back where its points are not on a line (`Grid.refined`).

    A batch that the device cannot hold (`MemoryError`) ends its series there, if anything was measured before.

    Args:
        group: The loaded model.
        model: Its name.
        gpu_type: Name of the device's type, as in ``cluster.yaml``.
        grid: What to measure.
        stop: When a point is measured enough.
        clock: Monotonic seconds.
        energy_j: Energy that the group's GPUs took so far, joules, or None where nothing counts it.
        progress: Called after the load and after every sample.
        meta: How the numbers came about.
        known: Rows of an earlier run that need not be measured again.
        on_row: Called with every row that was measured, as soon as it is.

    Returns:
        A profile with source ``measured``. ``peak_bytes`` never falls with the batch.

    Raises:
        InvalidInput: The model has no such phase or number of tokens.
        MemoryError: The device cannot hold even the smallest batch.
    """
    bench = _Bench(
        group=group,
        model=model,
        grid=grid,
        stop=stop or StopRule(),
        clock=clock,
        energy_j=energy_j,
        show=progress,
        known={row.key: row for row in known},
        on_row=on_row,
        started_s=clock(),
    )
    bench.report(None, point=0, samples=0, share=0.0)
    rows: list[Row] = []
    for position, series in enumerate(grid.series):
        rows.extend(bench.measure_series(series, position, may_fail=bool(rows)))
    bench.report(rows[-1].batch, point=bench.points, samples=rows[-1].samples, share=0.0)
    return Profile(
        model=model,
        gpu_type=gpu_type,
        source="measured",
        meta=meta or ProfileMeta(),
        rows=tuple(rows),
        kv_bytes_per_token=group.kv_bytes_per_token,
    )


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
    for warmed in range(stop.warmup_runs):
        if warmed and clock() - start > stop.point_s / 2:
            break
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

    group: LoadedGroup
    model: str
    grid: Grid
    stop: StopRule
    clock: Callable[[], float]
    energy_j: Callable[[], float | None]
    show: Callable[[Progress], None] | None
    known: dict[object, Row]
    on_row: Callable[[Row], None] | None
    started_s: float

    @property
    def points(self) -> int:
        return len(self.grid.series) * self.grid.most_points

    def measure_series(self, series: Series, position: int, *, may_fail: bool) -> list[Row]:
        """Measure the batches of one series, doubling first, then where it is not straight."""
        first_point = position * self.grid.most_points
        rows: dict[int, Row] = {}
        for batch in self.grid.candidates:
            try:
                rows[batch] = self._row(Point(series=series, batch=batch), first_point + len(rows))
            except MemoryError:
                if not rows and not may_fail:
                    raise
                break
            if self.grid.is_enough(_means(rows)):
                break
        doubled = len(rows)
        while rows and len(rows) < doubled + self.grid.most_refined:
            halfway = self.grid.refined(_means(rows))
            if halfway is None:
                break
            try:
                rows[halfway] = self._row(Point(series=series, batch=halfway), first_point + len(rows))
            except MemoryError:
                break
        return _with_rising_peaks([rows[batch] for batch in sorted(rows)])

    def _row(self, at: Point, point: int) -> Row:
        earlier = self.known.get(_key(self.group, at))
        if earlier is not None:
            return earlier
        row = self._measure(at, point)
        if self.on_row is not None:
            self.on_row(row)
        return row

    def _measure(self, at: Point, point: int) -> Row:
        run = self.group.prepare(at)
        # Memory first: what the allocator keeps from this run would hide from a later look at the process.
        used = self.group.activation_bytes(run)
        before_j, before_s = self.energy_j(), self.clock()
        samples = sample(
            run,
            self.stop,
            clock=self.clock,
            on_sample=lambda count, share: self.report(at.batch, point=point, samples=count, share=share),
        )
        after_j, after_s = self.energy_j(), self.clock()
        latency_s = summarise(samples)
        return Row(
            tp=self.group.tp,
            pp=self.group.pp,
            batch=at.batch,
            phase=at.series.phase,
            input_tokens=at.series.input_tokens,
            output_tokens=at.series.output_tokens,
            latency_s=latency_s,
            stage_latency_s=_stages(self.group, run) or (latency_s.mean,),
            weight_bytes=self.group.weight_bytes,
            peak_bytes=tuple(weight + more for weight, more in zip(self.group.weight_bytes, used, strict=True)),
            load_s=self.group.load_s,
            first_inference_s=self.group.first_inference_s,
            samples=len(samples),
            power_w=_power_w(before_j, after_j, after_s - before_s),
        )

    def report(self, batch: int | None, *, point: int, samples: int, share: float) -> None:
        if self.show is None:
            return
        done_ratio = min(1.0, (point + share) / self.points)
        taken_s = self.clock() - self.started_s
        self.show(
            Progress(
                model=self.model,
                batch=batch,
                point=point,
                points=self.points,
                samples=samples,
                done_ratio=done_ratio,
                left_s=taken_s * (1 - done_ratio) / done_ratio if done_ratio > 0 else None,
            )
        )


def _means(rows: Mapping[int, Row]) -> dict[int, float]:
    return {batch: row.latency_s.mean for batch, row in rows.items()}


def _with_rising_peaks(rows: Sequence[Row]) -> list[Row]:
    """Return ``rows``, batch rising, with peaks that never fall from one to the next."""
    risen: list[Row] = []
    for row in rows:
        before = risen[-1].peak_bytes if risen else row.peak_bytes
        peaks = tuple(max(pair) for pair in zip(row.peak_bytes, before, strict=True))
        risen.append(row if peaks == row.peak_bytes else row.model_copy(update={"peak_bytes": peaks}))
    return risen


def _stages(group: LoadedGroup, run: Pass) -> tuple[float, ...]:
    """Return the mean seconds per stage of a few runs; empty where there is one stage."""
    held = [group.stage_s(run) for _ in range(_STAGE_RUNS)] if group.pp > 1 else []
    return tuple(sum(stage) / len(held) for stage in zip(*held, strict=True))


def _key(group: LoadedGroup, at: Point) -> tuple[object, ...]:
    tokens = at.series.input_tokens or 0, at.series.output_tokens or 0
    return at.series.phase, group.tp, group.pp, *tokens, 1, at.batch


def _power_w(before_j: float | None, after_j: float | None, taken_s: float) -> float | None:
    if before_j is None or after_j is None or taken_s <= 0 or after_j <= before_j:
        return None
    return (after_j - before_j) / taken_s
