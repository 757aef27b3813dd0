from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plans.errors import InvalidInput
from profiles.curve import Curve
from profiles.document import Profile, Row
from profiles.group import Grid, Pass, Point, Series, SingleDevice
from profiles.latency import LatencyModel
from profiles.profiler import Progress, StopRule, load_callable, profile_group


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class TwoStages:
    """A pipeline of two stages on 2 GPUs each: 2 ms, and 1 ms an item and 100 tokens; throughput is flat from 8 on."""

    tp, pp = 2, 2
    weight_bytes = (1000, 2000)
    load_s, first_inference_s = 1.5, 0.2
    kv_bytes_per_token = 64

    def __init__(self, clock: Clock, limit: int = 10**6) -> None:
        self.clock = clock
        self.limit = limit
        self.prepared: list[Point] = []

    def prepare(self, point: Point, /) -> Pass:
        if point.batch > self.limit:
            raise MemoryError(f"batch {point.batch}")
        self.prepared.append(point)
        work_s = 0.001 * (point.series.input_tokens or 100) / 100
        first_s, second_s = 0.002, work_s * max(point.batch, 8)

        self.held_s = (first_s, second_s)

        def run() -> None:
            self.clock.now_s += first_s + second_s

        return run

    def activation_bytes(self, run: Pass, /) -> tuple[int, ...]:
        run()
        return (10, 20 * self.prepared[-1].batch)

    def stage_s(self, run: Pass, /) -> tuple[float, ...]:
        run()
        return self.held_s


def profiled(group: TwoStages, **arguments: object) -> tuple[Row, ...]:
    stop = StopRule(tail_samples=5, max_samples=10)
    return profile_group(  # type: ignore[arg-type]
        group, model="m", gpu_type="g", clock=group.clock, **{"stop": stop, "grid": Grid(), **arguments}
    ).rows


def profile_of(rows: Sequence[Row]) -> Profile:
    return Profile(model="m", gpu_type="g", source="measured", rows=tuple(rows))


def test_stages_parallelism_and_memory_of_a_group_are_kept() -> None:
    (row,) = profiled(TwoStages(Clock()), grid=Grid(batches=(4,)))
    assert (row.tp, row.pp) == (2, 2)
    assert row.stage_latency_s == pytest.approx((0.002, 0.008))
    assert row.latency_s.mean == pytest.approx(0.010)
    assert (row.weight_bytes, row.peak_bytes) == ((1000, 2000), (1010, 2080))
    assert row.activation_bytes == (10, 80)
    assert row.power_w is None


def test_batches_double_until_throughput_is_flat() -> None:
    # 8 items take what 1 takes; 32 are only 1.19 times as fast as 8; 128 are not 5 % faster than 32.
    batches = [row.batch for row in profiled(TwoStages(Clock()), grid=Grid(most_refined=0))]
    assert batches == [1, 2, 4, 8, 16, 32, 64, 128]
    assert [row.batch for row in profiled(TwoStages(Clock()), grid=Grid(max_batch=4))] == [1, 2, 4]


def test_batches_stop_doubling_once_one_takes_too_long() -> None:
    grid = Grid(max_batch_s=0.015, most_refined=0)
    assert [row.batch for row in profiled(TwoStages(Clock()), grid=grid)] == [1, 2, 4, 8, 16]


def test_batches_around_a_kink_are_measured_too() -> None:
    # Throughput is flat from 8 on. Between 4 and 8, which take equally long, nothing is left open.
    batches = [row.batch for row in profiled(TwoStages(Clock()))]
    assert batches == [1, 2, 4, 8, 9, 10, 12, 16, 32, 64, 128]
    model = LatencyModel(profile_of(profiled(TwoStages(Clock()))), 2, 2)
    for batch in range(1, 129):
        assert model.at(batch).mean_s == pytest.approx(0.002 + 0.001 * max(batch, 8), rel=0.05)


@settings(max_examples=60)
@given(
    kink=st.integers(2, 60),
    step_ratio=st.floats(0.0, 3.0),
    slope_s=st.floats(1e-4, 1e-2),
    base_s=st.floats(1e-3, 0.1),
)
def test_refining_ends_with_every_gap_within_what_was_asked(
    kink: int, step_ratio: float, slope_s: float, base_s: float
) -> None:
    def latency_s(batch: int) -> float:
        return base_s * (1 + step_ratio * (batch >= kink)) + slope_s * batch

    grid = Grid(max_batch=64, refine_error_ratio=0.04)
    known = {batch: latency_s(batch) for batch in grid.candidates}
    while (batch := grid.refined(known)) is not None:
        assert batch not in known
        known[batch] = latency_s(batch)
    fitted = Curve.fit(sorted(known), [known[batch] for batch in sorted(known)], [1.0] * len(known))
    halfway = [(low + high) // 2 for low, high in pairwise(sorted(known))]
    assert all(fitted.gap_error_ratio(batch) <= 0.04 for batch in halfway)
    assert len(known) <= 7 + 2 * 6  # a single step is closed in on by halving, from both sides
    truth = {batch: latency_s(batch) for batch in range(1, 65)}
    assert sum(abs(fitted.at(batch) / truth[batch] - 1) > 2 * 0.04 for batch in truth) <= 2


def test_given_batches_and_straight_lines_are_not_refined() -> None:
    kinked = {1: 1.0, 8: 1.0, 16: 9.0}
    assert Grid(batches=(1, 8, 16)).refined(kinked) is None
    assert Grid().refined(kinked) == 12
    assert Grid().refined({batch: 0.01 + 0.002 * batch for batch in (1, 2, 4, 8, 16)}) is None
    assert Grid().refined({1: 1.0}) is None
    assert Grid().refined({1: 1.0, 2: 5.0, 3: 6.0}) is None  # no batch is left between them


def test_a_refined_batch_that_does_not_fit_ends_the_series() -> None:
    class Fragmented(TwoStages):
        def prepare(self, point: Point, /) -> Pass:
            if point.batch in (6, 12):
                raise MemoryError("fragments")
            return super().prepare(point)

    assert [row.batch for row in profiled(Fragmented(Clock()), grid=Grid(max_batch=16))] == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("wrong", [{"refine_error_ratio": 0.0}, {"most_refined": -1}])
def test_an_impossible_refinement_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidInput):
        Grid(**wrong)  # type: ignore[arg-type]


def test_the_end_of_memory_ends_the_series_but_not_the_profile() -> None:
    series = (Series(phase="prefill", input_tokens=100), Series(phase="decode", input_tokens=500))
    rows = profiled(TwoStages(Clock(), limit=3), grid=Grid(series=series))
    assert [(row.phase, row.batch, row.input_tokens) for row in rows] == [
        ("prefill", 1, 100),
        ("prefill", 2, 100),
        ("decode", 1, 500),
        ("decode", 2, 500),
    ]
    with pytest.raises(MemoryError):
        profiled(TwoStages(Clock(), limit=0))


def test_rows_of_an_interrupted_run_are_not_measured_again() -> None:
    first: list[Row] = []

    class Interrupted(Exception):
        pass

    def stop_after_three(row: Row) -> None:
        first.append(row)
        if len(first) == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        profiled(TwoStages(Clock()), on_row=stop_after_three)
    again = TwoStages(Clock())
    rows = profiled(again, known=first)
    assert [point.batch for point in again.prepared] == [8, 16, 32, 64, 128, 12, 10, 9]
    assert [row.batch for row in rows] == [1, 2, 4, 8, 9, 10, 12, 16, 32, 64, 128]
    for row, whole in zip(rows, profiled(TwoStages(Clock())), strict=True):
        assert (row.key, row.peak_bytes) == (whole.key, whole.peak_bytes)
        assert row.latency_s.mean == pytest.approx(whole.latency_s.mean)


def test_power_is_energy_over_time_and_missing_where_nothing_counts_it() -> None:
    clock = Clock()
    (row,) = profiled(TwoStages(clock), grid=Grid(batches=(1,)), energy_j=lambda: 250.0 * clock.now_s)
    assert row.power_w == pytest.approx(250.0)
    (row,) = profiled(TwoStages(Clock()), grid=Grid(batches=(1,)), energy_j=lambda: 3.0)
    assert row.power_w is None


def test_progress_tells_the_time_left_and_never_goes_back() -> None:
    told: list[Progress] = []
    profiled(TwoStages(Clock()), grid=Grid(batches=(1, 2)), progress=told.append)
    assert told[0].left_s is None
    done = [each.done_ratio for each in told]
    assert done == sorted(done)
    assert (told[-1].done_ratio, told[-1].left_s) == (1.0, 0.0)
    halfway = next(each for each in told if each.done_ratio >= 0.5)
    assert halfway.left_s is not None
    assert 0 < halfway.left_s < 1


def test_one_device_knows_whole_requests_alone() -> None:
    def build() -> Callable[[int], object]:
        return lambda batch: None

    group = SingleDevice(loaded=load_callable(build, weight_bytes=5), input_tokens=16)
    run = group.prepare(Point(series=Series(input_tokens=16), batch=2))
    assert group.stage_s(run) == ()
    for series in (Series(phase="decode", input_tokens=16), Series(input_tokens=32), Series(output_tokens=4)):
        with pytest.raises(InvalidInput, match="whole requests"):
            group.prepare(Point(series=series, batch=1))


@pytest.mark.parametrize(
    "wrong",
    [{"batches": ()}, {"batches": (0,)}, {"series": ()}, {"max_batch": 0}, {"flat_gain_ratio": -1}, {"max_batch_s": 0}],
)
def test_a_grid_of_nothing_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(wrong))):
        Grid(**wrong)  # type: ignore[arg-type]
