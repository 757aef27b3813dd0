import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans.errors import InvalidInput
from tests.traces.strategies import rate_traces
from traces.statistics import burstiness_cv
from traces.synthesis import Diurnal, Gamma, Poisson, Streams, expand, synthesise
from traces.table import RateTrace

PROCESSES = st.sampled_from([("uniform", None), ("even", None), ("gamma", 0.3), ("gamma", 1.0), ("gamma", 5.0)])
LOADS = {
    "poisson": Poisson(rate_rps=40),
    "gamma": Gamma(rate_rps=40, cv=3),
    "diurnal": Diurnal(mean_rps=40, period_s=100, amplitude_ratio=0.8, noise=0.2, noise_window_s=10),
    "streams": Streams(streams=4, fps=10, jitter_s=0.01),
}


@given(rate_traces(), PROCESSES, st.integers(0, 2**32 - 1))
def test_expansion_puts_every_count_into_its_own_window(rates, process, seed):
    """Law: counting the expansion over the same windows gives the counts back."""
    name, cv = process
    trace = expand(rates, name, seed=seed, cv=cv)
    assert np.all(np.diff(trace.arrival_s) >= 0)
    assert trace.duration_s == rates.end_s
    back = trace.rates(rates.window_s, start_s=rates.start_s)
    busy = rates.select([s for s, row in zip(rates.services, rates.counts(), strict=True) if row.any()])
    assert back.services == busy.services
    dense = rates.counts()[[rates.services.index(service) for service in busy.services]]
    if dense.size:
        np.testing.assert_array_equal(back.counts(), dense)


def test_even_expansion_is_evenly_spaced():
    rates = RateTrace.from_counts([0.0, 60.0], ["a"], [[4, 0]], window_s=60.0)
    assert expand(rates, "even", seed=0).arrival_s.tolist() == [7.5, 22.5, 37.5, 52.5]


@pytest.mark.parametrize("cv", [0.2, 1.0, 3.0])
def test_gamma_expansion_of_large_counts_has_the_burstiness_asked_for(cv):
    rates = RateTrace.from_counts(np.arange(20) * 60.0, ["a"], [[3000] * 20], window_s=60.0)
    assert burstiness_cv(expand(rates, "gamma", cv=cv, seed=1))["a"] == pytest.approx(cv, rel=0.05)


def test_poisson_expansion_takes_counts_as_means():
    rates = RateTrace.from_counts(np.arange(400.0), ["a"], [[25] * 400], window_s=1.0)
    counts = expand(rates, "poisson", seed=1).rates(1.0).counts()[0]
    assert counts.mean() == pytest.approx(25, rel=0.03)
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.25)


def test_expanding_silence_gives_silence():
    rates = RateTrace.from_counts([0.0, 60.0], ["a"], [[0, 0]], window_s=60.0)
    trace = expand(rates, "gamma", cv=2.0, seed=0)
    assert (len(trace), trace.duration_s) == (0, 120.0)


@pytest.mark.parametrize(("process", "cv"), [("burst", None), ("gamma", None), ("gamma", 0.0), ("uniform", 2.0)])
def test_an_unknown_process_or_a_misplaced_cv_is_refused(process, cv):
    rates = RateTrace.from_counts([0.0], ["a"], [[1]], window_s=60.0)
    with pytest.raises(InvalidInput, match=r"process|cv"):
        expand(rates, process, seed=0, cv=cv)


@pytest.mark.parametrize("name", LOADS)
def test_the_same_seed_gives_the_same_trace_and_another_seed_another(name):
    def make(seed):
        return synthesise({name: LOADS[name]}, duration_s=50, seed=seed)

    assert make(1) == make(1)
    assert make(1) != make(2)


@pytest.mark.parametrize("name", LOADS)
def test_a_service_does_not_change_when_others_join(name):
    alone = synthesise({name: LOADS[name]}, duration_s=50, seed=1)
    together = synthesise(LOADS, duration_s=50, seed=1).select([name])
    assert together.arrival_s.tolist() == alone.arrival_s.tolist()


@pytest.mark.parametrize("name", LOADS)
def test_arrivals_lie_within_the_duration_at_the_rate_asked_for(name):
    trace = synthesise({name: LOADS[name]}, duration_s=500, seed=3)
    assert trace.duration_s == 500
    assert np.all((trace.arrival_s >= 0) & (trace.arrival_s < 500))
    assert len(trace) == pytest.approx(20_000, rel=0.1)


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 4.0])
def test_gamma_load_has_the_burstiness_asked_for(cv):
    trace = synthesise({"a": Gamma(rate_rps=100, cv=cv)}, duration_s=1000, seed=1)
    assert burstiness_cv(trace)["a"] == pytest.approx(cv, rel=0.05, abs=1e-9)


def test_gamma_load_is_stationary_from_the_start():
    """The mean number of requests in a short first window is rate times window, whatever the burstiness."""
    generator = np.random.default_rng(1)
    for cv in (0.0, 0.5, 3.0):
        load = Gamma(rate_rps=1.0, cv=cv)
        counts = [load.arrivals(2.0, generator).size for _ in range(4000)]
        assert np.mean(counts) == pytest.approx(2.0, abs=5 * np.std(counts) / math.sqrt(4000) + 1e-9)


def test_diurnal_load_follows_its_wave():
    load = Diurnal(mean_rps=100, amplitude_ratio=0.9, period_s=400)
    counts = synthesise({"a": load}, duration_s=400, seed=1).rates(100.0).counts()[0]
    expected = [100 * 100 * (1 + sign * 0.9 * 2 / math.pi) for sign in (1, 1, -1, -1)]
    np.testing.assert_allclose(counts, expected, rtol=0.06)


def test_each_stream_sends_its_frames_in_time():
    trace = synthesise({"cam": Streams(streams=3, fps=20, jitter_s=0.004)}, duration_s=30, seed=1)
    frame = trace.frame
    assert sorted(frame["stream"].unique()) == ["cam-0", "cam-1", "cam-2"]
    for _, frames in frame.groupby("stream"):
        assert len(frames) in (599, 600)
        assert np.abs(np.diff(frames["arrival_s"]) - 0.05).max() <= 2 * 0.004 + 1e-9


def test_streams_without_jitter_are_exactly_periodic():
    trace = synthesise({"cam": Streams(streams=1, fps=10)}, duration_s=10, seed=1)
    np.testing.assert_allclose(np.diff(trace.arrival_s), 0.1, atol=1e-9)


def test_no_load_and_a_rate_of_zero_give_silence():
    assert synthesise({}, duration_s=10, seed=1).duration_s == 10
    loads = {"a": Poisson(rate_rps=0), "b": Gamma(rate_rps=0, cv=2), "c": Streams(streams=0, fps=10)}
    assert len(synthesise(loads, duration_s=10, seed=1)) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: Poisson(rate_rps=-1),
        lambda: Poisson(rate_rps=math.inf),
        lambda: Gamma(rate_rps=1, cv=-0.1),
        lambda: Gamma(rate_rps=1, cv=math.nan),
        lambda: Diurnal(mean_rps=1, amplitude_ratio=1.5),
        lambda: Diurnal(mean_rps=1, period_s=0),
        lambda: Streams(streams=-1, fps=10),
        lambda: Streams(streams=1, fps=0),
        lambda: synthesise({}, duration_s=0, seed=1),
        lambda: synthesise({"a b": Poisson(rate_rps=1)}, duration_s=10, seed=1),
        lambda: synthesise({"a": Poisson(rate_rps=1e9)}, duration_s=10, seed=1),
        lambda: synthesise({"a": Streams(streams=10**6, fps=1000)}, duration_s=10, seed=1),
    ],
)
def test_an_impossible_load_is_refused(make):
    with pytest.raises(InvalidInput):
        make()
