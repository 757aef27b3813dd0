from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forecaster.backtest import backtest, pinball
from plans.errors import InvalidInput
from traces.files import read_rate_trace
from traces.table import RateTrace

REAL = Path(__file__).parents[3] / "shared" / "data" / "rates_azure_twitter_10x10days.csv.gz"


def history_of(*counts, services=("a", "b", "c")):
    starts_s = np.arange(len(counts[0])) * 60.0
    return RateTrace.from_counts(starts_s, services[: len(counts)], counts, window_s=60.0)


def test_a_perfect_forecast_scores_zero_and_covers_everything():
    score = backtest(history_of([1, 5, 9, 2] * 20), method="seasonal-naive", period=4, windows=4, origins=5)
    assert score.weighted_quantile_loss == 0.0
    assert set(score.coverage.values()) == {1.0}
    assert score.services[0].mean_error_rps == 0.0
    assert (score.origins, score.windows) == (5, 4)


def test_the_loss_of_the_median_is_the_mean_absolute_error_over_the_mean():
    counts = [10] * 30 + [13, 10, 10, 16]
    score = backtest(history_of(counts), method="last-value", windows=1, origins=4, quantiles=(0.5,))
    errors = [13 - 10, 10 - 13, 10 - 10, 16 - 10]
    assert score.weighted_quantile_loss == pytest.approx(np.abs(errors).sum() / sum(counts[-4:]))
    assert score.services[0].mean_error_rps == pytest.approx(-np.mean(errors) / 60)


def test_each_origin_sees_only_what_came_before_it():
    """What comes after the last scored window cannot change the score; what is scored must."""
    counts = np.random.default_rng(1).poisson(30, 100)
    score = backtest(history_of(counts[:60]), method="last-value", windows=5, origins=2)
    changed = counts[:60].copy()
    changed[55:] += 100
    first_only = backtest(history_of(counts[:55]), method="last-value", windows=5, origins=1)
    assert score != backtest(history_of(changed), method="last-value", windows=5, origins=2)
    assert first_only == backtest(history_of(changed[:55]), method="last-value", windows=5, origins=1)


def test_the_last_value_is_calibrated_on_a_random_walk():
    steps = np.random.default_rng(2).integers(-20, 21, (3, 1500)).cumsum(axis=1) + 10_000
    score = backtest(history_of(*steps), method="last-value", windows=5, origins=200, quantiles=(0.1, 0.5, 0.9))
    for level, covered in score.coverage.items():
        assert covered == pytest.approx(level, abs=0.05)


def test_a_silent_service_has_coverage_but_no_loss():
    score = backtest(history_of([0] * 40, [5] * 40), method="last-value", windows=2, origins=3)
    silent, busy = score.services
    assert silent.weighted_quantile_loss is None
    assert silent.coverage[0.99] == 1.0
    assert busy.weighted_quantile_loss == 0.0
    assert backtest(history_of([0] * 40), method="last-value", windows=2, origins=3).weighted_quantile_loss is None


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0.01, 0.99))
def test_the_pinball_loss_is_never_negative_and_zero_at_the_truth(truth, quantile, level):
    loss = pinball(np.array([truth]), np.array([quantile]), level)[0]
    assert loss >= 0
    assert loss == pytest.approx(level * max(truth - quantile, 0) + (1 - level) * max(quantile - truth, 0))


@pytest.mark.parametrize("options", [{"windows": 0}, {"origins": 0}, {"stride": 0}, {"windows": 30}, {"origins": 50}])
def test_impossible_or_too_many_origins_are_refused(options):
    with pytest.raises(InvalidInput):
        backtest(history_of([1] * 40), **{"method": "last-value", "windows": 2, "origins": 2, **options})


@pytest.mark.skipif(not REAL.is_file(), reason="the real rates of ../shared/data are not here")
def test_on_real_rates_the_bands_are_close_to_calibrated():
    history = read_rate_trace(REAL).value
    for method, period in (("last-value", None), ("seasonal-naive", 360)):
        score = backtest(history, method=method, period=period, windows=7, origins=50)
        assert score.weighted_quantile_loss is not None
        assert score.weighted_quantile_loss < 0.2
        assert score.coverage[0.9] == pytest.approx(0.9, abs=0.06)
