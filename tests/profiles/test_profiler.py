from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans.errors import InvalidInput
from profiles.profiler import Progress, StopRule, load_callable, profile_callable, sample


class FakeClock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def taking(self, *durations_s: float) -> Callable[..., None]:
        """An action that takes these times in turn."""
        upcoming: Iterator[float] = cycle(durations_s)

        def action(*_: object) -> None:
            self.now_s += next(upcoming)

        return action


class FakeModel:
    """Takes 10 ms and 5 ms an item; too large from ``limit`` items on."""

    def __init__(self, clock: FakeClock, limit: int = 1000) -> None:
        self.clock = clock
        self.limit = limit
        self.weight_bytes = 5000
        self.load_s = 0.7
        self.first_inference_s = 0.3
        self.runs: list[int] = []

    def example(self, batch: int, seed: int = 0) -> list[int]:
        return [seed] * batch

    def run(self, inputs: list[int], /) -> None:
        if len(inputs) >= self.limit:
            raise MemoryError(f"batch {len(inputs)}")
        self.runs.append(len(inputs))
        self.clock.now_s += 0.010 + 0.005 * len(inputs)


def memory_of(model: FakeModel) -> Callable[[Callable[[], object]], int]:
    """A memory measurement that sees 100 bytes an item, and one byte fewer from 4 items on."""

    def measure(action: Callable[[], object]) -> int:
        action()
        return 100 * min(model.runs[-1], 3)

    return measure


def test_a_steady_run_stops_as_soon_as_a_p99_is_supported() -> None:
    clock = FakeClock()
    samples = sample(clock.taking(0.001), StopRule(), clock=clock)
    assert len(samples) == 100
    assert samples == pytest.approx([0.001] * 100)


def test_a_run_that_varies_goes_on_until_its_median_is_known() -> None:
    clock = FakeClock()
    stop = StopRule(tail_samples=6, point_s=1e9, max_samples=100_000)
    steady = sample(clock.taking(0.0100, 0.0101), stop, clock=clock)
    varying = sample(clock.taking(*(0.010 + 0.0001 * step for step in range(50))), stop, clock=clock)
    assert len(steady) == 6
    assert 50 < len(varying) < 100_000


def test_a_run_that_never_settles_stops_at_the_caps() -> None:
    clock = FakeClock()
    wild = clock.taking(0.001, 1.0)
    assert len(sample(wild, StopRule(max_samples=40, point_s=1e9), clock=clock)) == 40
    start = clock.now_s
    sample(wild, StopRule(point_s=10.0), clock=clock)
    assert clock.now_s - start < 10.0 + 1.1


def test_a_slow_run_is_timed_the_least_number_of_times() -> None:
    clock = FakeClock()
    assert len(sample(clock.taking(60.0), StopRule(point_s=2.0, least_samples=3), clock=clock)) == 3


def test_warm_up_runs_are_not_samples() -> None:
    clock = FakeClock()
    slow_twice = iter([5.0, 5.0])

    def run() -> None:
        clock.now_s += next(slow_twice, 0.01)

    assert max(sample(run, StopRule(warmup_runs=2, point_s=30.0), clock=clock)) == pytest.approx(0.01)


def test_a_run_too_short_for_the_clock_still_takes_time() -> None:
    clock = FakeClock()
    assert min(sample(clock.taking(0.0), StopRule(max_samples=10, tail_samples=6), clock=clock)) > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"median_error_ratio": 0.0},
        {"point_s": -1.0},
        {"least_samples": 0},
        {"least_samples": 9, "max_samples": 8},
        {"warmup_runs": -1},
    ],
)
def test_an_impossible_stop_rule_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidInput):
        StopRule(**wrong)  # type: ignore[arg-type]


def test_a_profile_holds_what_was_measured() -> None:
    clock = FakeClock()
    model = FakeModel(clock)
    profile = profile_callable(
        lambda: model, model="m", gpu_type="cpu", batches=(4, 1, 2, 2), clock=clock, memory=memory_of(model)
    )
    assert profile.source == "measured"
    assert [row.batch for row in profile.rows] == [1, 2, 4]
    assert [row.latency_s.mean for row in profile.rows] == pytest.approx([0.015, 0.020, 0.030])
    assert [row.stage_latency_s[0] for row in profile.rows] == [row.latency_s.mean for row in profile.rows]
    assert [row.peak_bytes[0] for row in profile.rows] == [5100, 5200, 5300]
    assert {(row.weight_bytes, row.load_s, row.first_inference_s) for row in profile.rows} == {((5000,), 0.7, 0.3)}


def test_peak_memory_never_falls_with_batch() -> None:
    clock = FakeClock()
    model = FakeModel(clock)
    readings = iter([900, 100])

    def memory(action: Callable[[], object]) -> int:
        action()
        return next(readings)

    profile = profile_callable(lambda: model, model="m", gpu_type="cpu", batches=(1, 2), clock=clock, memory=memory)
    assert [row.peak_bytes[0] for row in profile.rows] == [5900, 5900]


def test_the_grid_ends_before_the_first_batch_that_does_not_fit() -> None:
    clock = FakeClock()
    model = FakeModel(clock, limit=4)
    profile = profile_callable(
        lambda: model, model="m", gpu_type="cpu", batches=(1, 2, 4, 8), clock=clock, memory=memory_of(model)
    )
    assert [row.batch for row in profile.rows] == [1, 2]


def test_a_model_that_fits_at_no_batch_is_an_error() -> None:
    clock = FakeClock()
    model = FakeModel(clock, limit=1)
    with pytest.raises(MemoryError):
        profile_callable(lambda: model, model="m", gpu_type="cpu", batches=(1, 2), clock=clock, memory=memory_of(model))


@pytest.mark.parametrize("batches", [(), (0, 1), (-3,)])
def test_a_grid_without_batches_is_refused_before_anything_is_loaded(batches: tuple[int, ...]) -> None:
    def load() -> FakeModel:
        raise AssertionError("loaded")

    with pytest.raises(InvalidInput, match="batches"):
        profile_callable(load, model="m", gpu_type="cpu", batches=batches)


@given(st.sets(st.integers(1, 64), min_size=1, max_size=4), st.integers(2, 70))
def test_progress_never_falls_and_ends_at_one(batches: set[int], limit: int) -> None:
    clock = FakeClock()
    model = FakeModel(clock, limit=max(limit, min(batches) + 1))
    seen: list[Progress] = []
    profile_callable(
        lambda: model,
        model="m",
        gpu_type="cpu",
        batches=tuple(batches),
        stop=StopRule(point_s=0.5),
        clock=clock,
        memory=memory_of(model),
        progress=seen.append,
    )
    ratios = [progress.done_ratio for progress in seen]
    assert ratios == sorted(ratios)
    assert (ratios[0], ratios[-1]) == (0.0, 1.0)
    assert seen[0].batch is None


def test_any_function_can_be_profiled() -> None:
    clock = FakeClock()
    taking_time = clock.taking(0.25)

    def build() -> Callable[[int], object]:
        clock.now_s += 3.0
        return taking_time

    model = load_callable(build, weight_bytes=10, clock=clock)
    assert (model.load_s, model.first_inference_s) == (3.0, 0.25)
    profile = profile_callable(lambda: model, model="f", gpu_type="cpu", batches=(8,), clock=clock)
    assert profile.rows[0].latency_s.p50 == pytest.approx(0.25)
    assert profile.rows[0].peak_bytes[0] >= 10
