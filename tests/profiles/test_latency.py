from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans.errors import InvalidInput
from profiles.document import LatencyStatistics
from profiles.latency import MEASUREMENT_ERROR_RATIO, UNMEASURED_ERROR_RATIO, LatencyModel, worst
from tests.profiles.documents import GRIDS, curve, profile, row


def model(means: dict[int, float], **fields: object) -> LatencyModel:
    return LatencyModel(curve(means, **fields), 1, 1)


def test_a_parallelism_without_rows_is_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match="tp = 2, pp = 1"):
        LatencyModel(curve({1: 0.1}), 2, 1)


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_below_one_is_refused(batch: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        model({1: 0.1}).at(batch)
    with pytest.raises(ValueError, match="at least 1"):
        model({1: 0.1}).peak_bytes(batch)


@given(GRIDS, st.integers(1, 300), st.integers(1, 300))
def test_fitted_latency_and_memory_never_fall_with_batch(means: dict[int, float], one: int, other: int) -> None:
    fitted = model(means)
    small, large = min(one, other), max(one, other)
    assert fitted.at(small).mean_s <= fitted.at(large).mean_s
    assert fitted.at(small).p99_s <= fitted.at(large).p99_s
    assert fitted.peak_bytes(small) <= fitted.peak_bytes(large)


@given(GRIDS, st.integers(1, 300))
def test_every_estimate_is_sound(means: dict[int, float], batch: int) -> None:
    fitted = model(means)
    estimate = fitted.at(batch)
    assert 0 < estimate.mean_s <= estimate.p99_s
    assert sum(estimate.stage_s) == pytest.approx(estimate.mean_s)
    assert estimate.error_ratio >= MEASUREMENT_ERROR_RATIO
    assert all(peak >= weight for peak, weight in zip(fitted.peak_bytes(batch), fitted.weight_bytes, strict=True))


@given(st.lists(st.floats(1e-4, 10.0), min_size=1, max_size=6))
def test_rising_rows_come_back_exactly_and_as_measured(latencies: list[float]) -> None:
    means = {2**index: mean for index, mean in enumerate(sorted(latencies))}
    fitted = model(means)
    for batch, mean in means.items():
        assert fitted.at(batch).mean_s == mean
        assert fitted.at(batch).confidence == "measured"
        assert fitted.peak_bytes(batch) == (1000 + 100 * batch,)


def test_confidence_says_where_the_batch_lies() -> None:
    fitted = model({2: 0.2, 4: 0.3, 8: 0.5})
    found = {batch: fitted.at(batch).confidence for batch in (1, 2, 3, 8, 9)}
    assert found == {1: "extrapolated", 2: "measured", 3: "interpolated", 8: "measured", 9: "extrapolated"}


def test_extrapolation_upward_is_never_a_clamp() -> None:
    fitted = model({1: 0.1, 2: 0.15, 4: 0.25})
    assert fitted.at(8).mean_s > 0.25 + 4 * 0.05
    assert fitted.at(8).error_ratio < fitted.at(64).error_ratio


def test_one_row_extrapolates_as_if_batching_gained_nothing() -> None:
    assert model({1: 0.1}).at(4).mean_s >= 0.4


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 8])
def test_a_modelled_profile_makes_every_estimate_modelled(batch: int) -> None:
    estimate = model({2: 0.2, 4: 0.3}, source="modelled").at(batch)
    assert estimate.confidence == "modelled"
    assert estimate.error_ratio >= UNMEASURED_ERROR_RATIO


def test_an_import_counts_as_measured_only_with_percentiles() -> None:
    bare = profile(row(1, 0.1, latency_s=LatencyStatistics(mean=0.1)), source="imported")
    assert LatencyModel(bare, 1, 1).at(1).confidence == "modelled"
    assert LatencyModel(profile(row(1, 0.1), source="imported"), 1, 1).at(1).confidence == "measured"


def test_a_missing_p99_takes_the_mean_with_a_lower_confidence() -> None:
    estimate = LatencyModel(profile(row(1, 0.1, latency_s=LatencyStatistics(mean=0.1))), 1, 1).at(1)
    assert (estimate.p99_s, estimate.confidence) == (0.1, "interpolated")


def test_a_missing_p99_is_carried_over_from_the_nearest_row_that_states_a_tail() -> None:
    rows = (row(1, 0.1, p99=0.15), row(2, 0.2, latency_s=LatencyStatistics(mean=0.2, p50=0.2)))
    estimate = LatencyModel(profile(*rows), 1, 1).at(2)
    assert estimate.p99_s == pytest.approx(0.3)
    assert estimate.confidence == "interpolated"


def test_more_samples_mean_a_smaller_error() -> None:
    spread = LatencyStatistics(mean=1.0, p50=1.0, p95=1.5, p99=1.6)
    few, many = (
        LatencyModel(profile(row(1, 1.0, latency_s=spread, samples=samples)), 1, 1).at(1) for samples in (10, 1000)
    )
    assert few.error_ratio > many.error_ratio


def test_stages_are_scaled_to_the_mean_and_interpolated_between_rows() -> None:
    rows = (
        row(1, 0.4, pp=2, stage_latency_s=(0.1, 0.1)),
        row(3, 0.8, pp=2, stage_latency_s=(0.2, 0.6)),
    )
    fitted = LatencyModel(profile(*rows), 1, 2)
    assert fitted.at(1).stage_s == pytest.approx((0.2, 0.2))
    assert fitted.at(2).stage_s == pytest.approx((0.6 * 0.375, 0.6 * 0.625))
    assert fitted.at(6).stage_s[1] == pytest.approx(0.75 * fitted.at(6).mean_s)


def test_the_stage_table_has_a_row_per_batch() -> None:
    fitted = LatencyModel(profile(row(1, 0.1, pp=2), row(4, 0.2, pp=2)), 1, 2)
    table = fitted.stage_latency_table(6)
    assert [len(stages) for stages in table] == [2] * 6
    assert table[2] == fitted.at(3).stage_s


def test_memory_is_linear_between_rows_and_goes_on_with_a_margin() -> None:
    fitted = model({2: 0.2, 4: 0.3})
    assert fitted.peak_bytes(3) == (1300,)
    assert fitted.peak_bytes(8) == (1000 + 880,)  # 800 on the line, and 10 %
    assert fitted.peak_bytes(1) == (1200,)


def test_memory_of_one_row_goes_on_in_proportion_beside_the_weights() -> None:
    assert model({2: 0.2}).peak_bytes(4) == (1000 + 440,)


def test_memory_that_falls_with_batch_is_held_at_its_highest() -> None:
    rows = (row(1, 0.1, peak_bytes=(5000,)), row(2, 0.2, peak_bytes=(3000,)))
    assert LatencyModel(profile(*rows), 1, 1).peak_bytes(2) == (5000,)


def test_memory_without_anything_beside_the_weights_is_the_weights() -> None:
    assert LatencyModel(profile(row(1, 0.1, peak_bytes=(1000,))), 1, 1).peak_bytes(64) == (1000,)


def test_the_longest_load_counts() -> None:
    rows = (row(1, 0.1, load_s=1.0, first_inference_s=0.3), row(2, 0.2, load_s=2.0, first_inference_s=0.2))
    fitted = LatencyModel(profile(*rows), 1, 1)
    assert (fitted.load_s, fitted.first_inference_s) == (2.0, 0.3)


def test_of_several_concurrencies_the_lowest_is_taken() -> None:
    rows = (row(1, 0.9, concurrency=4), row(1, 0.1, concurrency=1))
    assert LatencyModel(profile(*rows), 1, 1).at(1).mean_s == 0.1


def tokens(input_tokens: float | None, output_tokens: float | None) -> tuple[float, str]:
    rows = [
        row(1, mean, input_tokens=prompt, output_tokens=answer)
        for prompt, answer, mean in ((128, 64, 1.0), (512, 64, 2.0), (512, 256, 4.0))
    ]
    estimate = LatencyModel(profile(*rows), 1, 1, input_tokens, output_tokens).at(1)
    return estimate.mean_s, estimate.confidence


def test_tokens_on_the_grid_are_measured() -> None:
    assert tokens(512, 64) == (2.0, "measured")


def test_tokens_between_rows_take_the_nearest_rows_that_are_not_smaller() -> None:
    assert tokens(100, 64) == (1.0, "interpolated")
    assert tokens(200, 10) == (2.0, "interpolated")
    assert tokens(10, 100) == (4.0, "interpolated")


def test_tokens_beyond_the_rows_scale_the_largest_and_say_so() -> None:
    assert tokens(1024, 256) == (8.0, "extrapolated")


def test_unstated_tokens_take_the_largest_rows() -> None:
    assert tokens(None, None) == (4.0, "interpolated")


def test_rows_without_tokens_serve_any_number_but_not_as_measured() -> None:
    assert LatencyModel(curve({1: 0.1}), 1, 1, 100, 100).at(1).confidence == "interpolated"


def test_the_worst_confidence_wins() -> None:
    assert worst("interpolated", "measured") == "interpolated"
    assert worst("modelled", "extrapolated", "measured") == "modelled"


def test_p99_beyond_the_grid_is_no_less_than_the_mean_even_where_it_rises_more_slowly() -> None:
    estimate = LatencyModel(profile(row(1, 0.1, p99=0.5), row(2, 0.4, p99=0.5)), 1, 1).at(8)
    assert estimate.p99_s == estimate.mean_s > 2.0


def test_a_p95_stands_for_a_missing_p99() -> None:
    statistics = LatencyStatistics(mean=0.1, p50=0.1, p95=0.12)
    estimate = LatencyModel(profile(row(1, 0.1, latency_s=statistics)), 1, 1).at(1)
    assert (estimate.p99_s, estimate.confidence) == (pytest.approx(0.12), "interpolated")


def test_where_rows_contradict_each_other_the_better_measured_one_counts_for_more() -> None:
    fitted = LatencyModel(profile(row(1, 2.0, samples=10), row(2, 1.0, samples=90)), 1, 1)
    assert fitted.at(1).mean_s == fitted.at(2).mean_s == pytest.approx(1.1)


def test_scaling_for_more_tokens_adds_to_the_error() -> None:
    rows = profile(row(1, 1.0, input_tokens=100, samples=1000))
    known, scaled = (LatencyModel(rows, 1, 1, tokens).at(1) for tokens in (100, 150))
    assert scaled.error_ratio == pytest.approx(known.error_ratio + 0.5)


TOKEN_GRIDS = st.dictionaries(
    st.tuples(st.integers(1, 64), st.sampled_from((64, 256, 1024, 4096))),
    st.floats(min_value=1e-4, max_value=10.0),
    min_size=1,
    max_size=12,
)
"""Noisy, incomplete grids of (batch, tokens)."""


def surface(means: dict[tuple[int, int], float], tokens: float) -> LatencyModel:
    rows = [row(batch, mean, input_tokens=count, phase="decode") for (batch, count), mean in means.items()]
    return LatencyModel(profile(*rows), 1, 1, tokens, phase="decode")


@given(TOKEN_GRIDS, st.integers(1, 100), st.floats(1, 9000), st.floats(1, 9000))
def test_latency_never_falls_with_tokens(
    means: dict[tuple[int, int], float], batch: int, one: float, other: float
) -> None:
    few, many = min(one, other), max(one, other)
    assert surface(means, few).at(batch).mean_s <= surface(means, many).at(batch).mean_s * (1 + 1e-9)


@given(TOKEN_GRIDS, st.integers(1, 100), st.integers(1, 100), st.floats(1, 9000))
def test_latency_between_tokens_never_falls_with_batch(
    means: dict[tuple[int, int], float], one: int, other: int, tokens: float
) -> None:
    fitted = surface(means, tokens)
    small, large = min(one, other), max(one, other)
    assert fitted.at(small).mean_s <= fitted.at(large).mean_s * (1 + 1e-9)
    assert all(a <= b for a, b in zip(fitted.peak_bytes(small), fitted.peak_bytes(large), strict=True))


def test_tokens_between_rows_are_interpolated_where_nothing_else_varies() -> None:
    means = {(1, 64): 0.1, (1, 256): 0.2, (4, 64): 0.2, (4, 256): 0.4}
    halfway = surface(means, 160)
    assert halfway.at(1).mean_s == pytest.approx(0.15)
    assert halfway.at(4).mean_s == pytest.approx(0.3)
    assert (halfway.at(4).confidence, halfway.at(4).method) == ("interpolated", "interpolation")
    assert surface(means, 256).at(4).confidence == "measured"
    assert halfway.at(4).error_ratio > surface(means, 256).at(4).error_ratio


def test_every_estimate_says_how_it_came_about() -> None:
    fitted = model({1: 0.1, 2: 0.15, 4: 0.25})
    assert [fitted.at(batch).method for batch in (1, 3, 9)] == ["measured", "interpolation", "line"]
    assert model({1: 0.1, 4: 0.25}).at(2).method == "line"
    assert model({1: 0.1, 4: 0.25}, source="modelled").at(1).method == "roofline"


def test_the_error_that_a_modelled_profile_states_is_its_error() -> None:
    stated = curve({1: 0.1}, source="modelled").model_copy(update={"error_ratio": 0.7})
    assert LatencyModel(stated, 1, 1).at(1).error_ratio == pytest.approx(0.7)
