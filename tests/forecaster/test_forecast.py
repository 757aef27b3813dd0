from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forecaster.errors import ForecastFailed
from forecaster.forecast import METHODS, forecast, forecaster_named
from forecaster.naive import LastValue, SeasonalNaive
from forecaster.protocol import History, Outlook
from plans.demand import Demand
from plans.errors import InvalidInput
from tests.traces.strategies import rate_traces
from traces.demand import observed_demand
from traces.synthesis import Gamma, Streams, synthesise
from traces.table import RateTrace

METHOD = st.sampled_from(METHODS)


def history_of(*counts, window_s=60.0, services=("a", "b", "c")):
    starts_s = np.arange(len(counts[0])) * window_s
    return RateTrace.from_counts(starts_s, services[: len(counts)], counts, window_s=window_s)


@st.composite
def histories(draw, least=16, most=60, max_count=1000):
    windows = draw(st.integers(least, most))
    services = draw(st.integers(1, 3))
    row = st.lists(st.integers(0, max_count), min_size=windows, max_size=windows)
    counts = draw(st.lists(row, min_size=services, max_size=services))
    return history_of(*counts)


@given(histories(), METHOD, st.integers(1, 100), st.lists(st.floats(0.001, 0.999), min_size=1, max_size=5))
def test_a_forecast_is_never_negative_and_its_quantiles_never_fall(history, method, windows, quantiles):
    demand = forecast(history, method=method, windows=windows, quantiles=quantiles)
    assert [service.service for service in demand.services] == list(history.services)
    for service in demand.services:
        assert len(service.rate_rps) == windows
        for rate in service.rate_rps:
            values = [value for _, value in sorted((float(level), value) for level, value in rate.quantiles.items())]
            assert len(values) == len(set(quantiles))
            assert values[0] >= 0
            assert values == sorted(values)
            assert np.isfinite([rate.mean, *values]).all()


@given(
    st.lists(st.integers(0, 1000), min_size=8, max_size=20),
    st.integers(2, 4),
    st.integers(0, 7),
    st.integers(1, 60),
)
def test_seasonal_naive_repeats_a_periodic_history_exactly_and_is_certain_of_it(season, times, extra, windows):
    """Law: for y(t) = y(t - m) throughout, every quantile of the forecast is y(t)."""
    period = len(season)
    counts = (season * (times + 1))[: times * period + extra]
    demand = forecast(history_of(counts), method="seasonal-naive", period=period, windows=windows)
    for step, rate in enumerate(demand.services[0].rate_rps):
        expected = season[(len(counts) + step) % period] / 60.0
        assert rate.mean == expected
        assert set(rate.quantiles.values()) == {expected}


@given(histories(), st.integers(1, 20))
def test_last_value_repeats_the_last_window(history, windows):
    demand = forecast(history, method="last-value", windows=windows)
    for service, row in zip(demand.services, history.counts(), strict=True):
        assert {rate.mean for rate in service.rate_rps} == {row[-1] / 60.0}


@given(histories(least=20))
def test_last_value_is_seasonal_naive_with_a_season_of_one_window(history):
    last = forecast(history, method="last-value", windows=5)
    naive = forecast(history, method="seasonal-naive", period=1, windows=5)
    assert last.services == naive.services


def test_quantiles_are_those_of_the_errors_of_the_same_horizon():
    counts = np.random.default_rng(1).poisson(50, 200)
    demand = forecast(history_of(counts), method="last-value", windows=3, quantiles=(0.1, 0.9))
    for step in (1, 2, 3):
        errors = counts[step:] - counts[:-step]
        expected = np.maximum(0, counts[-1] + np.quantile(errors, (0.1, 0.9))) / 60.0
        np.testing.assert_allclose(list(demand.services[0].rate_rps[step - 1].quantiles.values()), expected)


def test_beyond_the_errors_that_the_history_shows_the_band_widens_with_the_horizon():
    counts = 1000 + np.random.default_rng(1).integers(-20, 21, 12)
    rates = forecast(history_of(counts), method="last-value", windows=50, quantiles=(0.1, 0.9)).services[0].rate_rps
    widths = [rate.quantiles["0.9"] - rate.quantiles["0.1"] for rate in rates[4:]]
    assert widths == sorted(widths)
    assert widths[-1] == pytest.approx(widths[0] * np.sqrt(50 / 5))


def test_the_horizon_starts_where_the_history_ends():
    trace = history_of([5] * 20).window(300.0, 1200.0, rebase=False)
    demand = forecast(trace, method="last-value", windows=2)
    assert (demand.start_s, demand.window_s) == (1200.0, 60.0)


@pytest.mark.parametrize(
    ("windows", "window_s", "period", "words"),
    [
        (3000, 60.0, 1440, "one day"),
        (1448, 60.0, 1440, "one day"),
        (1447, 60.0, 60, "one hour, since"),
        (120, 60.0, 60, "one hour, since"),
        (119, 60.0, 59, "half of the history"),
        (20, 300.0, 10, "half of the history"),
        (16, 60.0, 8, "half of the history"),
        (20, 3600.0 * 24, 10, "half of the history"),
    ],
)
def test_the_season_taken_and_why_are_in_the_method(windows, window_s, period, words):
    counts = np.arange(windows) % 7
    demand = forecast(history_of(counts, window_s=window_s), method="seasonal-naive", windows=1)
    assert f"season of {period} windows" in demand.method
    assert words in demand.method
    assert demand.services[0].rate_rps[0].mean == counts[-period] / window_s


def test_gaps_stand_as_zero_and_the_method_says_how_many():
    frame = history_of([5] * 30).frame
    trace = RateTrace(frame.drop(index=[10, 29 - 1]), 60.0)
    demand = forecast(trace, method="last-value", windows=1)
    assert "2 windows without a count stand as zero" in demand.method
    assert "without" not in forecast(history_of([5] * 30), method="last-value", windows=1).method


@given(rate_traces())
def test_any_rate_trace_gives_a_forecast_or_a_named_fault(trace):
    if trace.windows >= LastValue().least_windows():
        demand = forecast(trace, method="last-value", windows=2)
        assert [service.service for service in demand.services] == list(trace.services)
        return
    with pytest.raises(InvalidInput, match="longer history"):
        forecast(trace, method="last-value", windows=2)


@pytest.mark.parametrize("method", METHODS)
def test_a_silent_service_is_forecast_silent(method):
    demand = forecast(history_of([0] * 30, [7] * 30), method=method, windows=3)
    assert all(rate.mean == 0 and rate.at(0.99) == 0 for rate in demand.of("a").rate_rps)
    assert all(rate.mean == 7 / 60 for rate in demand.of("b").rate_rps)


@pytest.mark.parametrize(
    ("windows", "options"),
    [
        (8, {"method": "last-value"}),
        (15, {"method": "seasonal-naive"}),
        (17, {"method": "seasonal-naive", "period": 10}),
    ],
)
def test_too_short_a_history_is_refused_with_the_remedy(windows, options):
    with pytest.raises(InvalidInput, match="longer history"):
        forecast(history_of([1] * windows), windows=1, **options)
    forecast(history_of([1] * (windows + 1)), windows=1, **options)


def test_an_empty_history_is_refused():
    empty = RateTrace(history_of([1]).frame.iloc[:0], 60.0)
    with pytest.raises(InvalidInput, match="history"):
        forecast(empty, method="last-value", windows=1)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "prophet"},
        {"method": "last-value", "period": 5},
        {"method": "seasonal-naive", "period": 0},
        {"windows": 0},
        {"quantiles": ()},
        {"quantiles": (0.5, 1.0)},
        {"quantiles": (0.0,)},
        {"burstiness_cv": {"a": -1.0}},
        {"burstiness_cv": {"a": float("nan")}},
    ],
)
def test_an_impossible_argument_is_refused(options):
    with pytest.raises(InvalidInput):
        forecast(history_of([1] * 30), **{"method": "last-value", "windows": 1, **options})


def test_what_counts_cannot_show_is_taken_from_the_observed_demand():
    trace = synthesise({"cam": Streams(streams=3, fps=10), "web": Gamma(rate_rps=50, cv=3)}, duration_s=100, seed=1)
    seen = observed_demand(trace, window_s=10)
    demand = forecast(trace.rates(5), method="last-value", windows=1, observed=seen)
    assert demand.of("cam").streams == 3
    assert demand.of("web").burstiness_cv == seen.of("web").burstiness_cv > 2
    overridden = forecast(trace.rates(5), method="last-value", windows=1, observed=seen, burstiness_cv={"web": 1.5})
    assert overridden.of("web").burstiness_cv == 1.5
    assert forecast(trace.rates(5), method="last-value", windows=1).of("web").burstiness_cv == 1.0


def test_a_demand_survives_its_document(tmp_path):
    demand = forecast(history_of([3, 5] * 20), windows=4)
    assert Demand.model_validate_json(demand.model_dump_json()) == demand


@dataclass(frozen=True)
class Broken:
    """A method that answers with whatever it was given, whether or not it is a forecast."""

    mean: np.ndarray
    quantiles: np.ndarray
    name: str = "broken"
    description: str = "broken"

    def least_windows(self) -> int:
        return 1

    def fit(self, history: History) -> "Broken":
        return self

    def outlook(self, windows: int, levels: Sequence[float], *, seed: int) -> Outlook:
        return Outlook(mean=self.mean, quantiles=self.quantiles)


@pytest.mark.parametrize(
    ("mean", "quantiles", "words"),
    [
        (np.full((1, 2), np.nan), np.ones((1, 2, 2)), "means that are not finite"),
        (np.ones((1, 2)), np.full((1, 2, 2), np.inf), "quantiles that are not finite"),
        (np.full((1, 2), -0.1), np.ones((1, 2, 2)), "negative means"),
        (np.ones((1, 2)), np.full((1, 2, 2), -1.0), "negative quantiles"),
        (np.ones((1, 2)), np.array([[[2.0, 1.0]] * 2]), "fall with the level"),
        (np.ones((1, 3)), np.ones((1, 3, 2)), "shape"),
    ],
)
def test_a_failing_method_is_an_error_and_never_a_constant(mean, quantiles, words):
    with pytest.raises(ForecastFailed, match=words):
        forecast(history_of([1] * 30), method=Broken(mean, quantiles), windows=2, quantiles=(0.1, 0.9))


def test_a_method_of_ones_own_is_used_as_it_is():
    demand = forecast(
        history_of([1] * 30), method=Broken(np.full((1, 1), 6.0), np.full((1, 1, 1), 12.0)), windows=1, quantiles=(0.9,)
    )
    assert demand.services[0].rate_rps[0].mean == 0.1
    assert demand.services[0].rate_rps[0].quantiles == {"0.9": 0.2}
    assert demand.method == "broken"


def test_names_stand_for_methods():
    assert forecaster_named("last-value") == LastValue()
    assert forecaster_named("seasonal-naive", period=7) == SeasonalNaive(period=7)
    assert {forecaster_named(name).name for name in METHODS} == set(METHODS)
