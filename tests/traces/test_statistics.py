import itertools
import statistics

import numpy as np
import pandas as pd
import pytest
from hypothesis import given

from tests.traces.strategies import rate_traces, request_traces
from traces.statistics import burstiness_cv, describe, describe_rates, dispersion_index
from traces.synthesis import Gamma, Poisson, Streams, synthesise
from traces.table import RequestTrace


def naive_cv(trace, service):
    times = [t for t, name in zip(trace.arrival_s, trace.frame["service"], strict=True) if name == service]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    if len(gaps) < 2 or statistics.fmean(gaps) == 0:
        return None
    return statistics.pstdev(gaps) / statistics.fmean(gaps)


@given(request_traces())
def test_burstiness_agrees_with_a_loop_over_the_gaps(trace):
    cv = burstiness_cv(trace)
    for service in trace.services:
        expected = naive_cv(trace, service)
        assert (service in cv) == (expected is not None)
        if expected is not None:
            assert cv[service] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_too_few_requests_and_requests_all_at_once_show_no_burstiness():
    frame = pd.DataFrame({"arrival_s": [0.0, 1.0, 2.0, 2.0, 2.0], "service": ["a", "a", "b", "b", "b"]})
    assert burstiness_cv(RequestTrace(frame)) == {}


@given(request_traces())
def test_requests_of_all_services_add_up(trace):
    described = describe(trace, window_s=max(60.0, trace.duration_s / 100))
    assert [row.service for row in described] == list(trace.services)
    assert sum(row.requests for row in described) == len(trace)
    for row in described:
        assert row.mean_rps is None or row.mean_rps * trace.duration_s == pytest.approx(row.requests)


def test_poisson_load_looks_like_poisson_and_bursts_do_not():
    loads = {"bursty": Gamma(rate_rps=50, cv=4), "poisson": Poisson(rate_rps=50)}
    bursty, poisson = describe(synthesise(loads, duration_s=1000, seed=1), window_s=5)
    assert poisson.gap_cv == pytest.approx(1.0, rel=0.05)
    assert poisson.dispersion == pytest.approx(1.0, abs=0.3)
    assert bursty.gap_cv == pytest.approx(4.0, rel=0.1)
    assert bursty.dispersion is not None
    assert bursty.dispersion > 8
    assert (poisson.streams, bursty.streams) == (None, None)


def test_streams_are_counted_and_the_peak_is_the_busiest_window():
    trace = synthesise({"cam": Streams(streams=3, fps=10), "web": Poisson(rate_rps=1)}, duration_s=20, seed=1)
    camera, web = describe(trace, window_s=10)
    assert camera.streams == 3
    assert camera.peak_rps == pytest.approx(30, rel=0.05)
    assert web.streams is None


@given(rate_traces())
def test_statistics_of_counts_agree_with_the_counts(trace):
    for row, counts in zip(describe_rates(trace), trace.counts(), strict=True):
        assert row.requests == counts.sum()
        assert row.peak_rps * trace.window_s == pytest.approx(counts.max())
        assert row.gap_cv is None


@pytest.mark.parametrize(("counts", "expected"), [([0, 0], None), ([5], None), ([2, 2, 2], 0.0), ([0, 4], 2.0)])
def test_the_index_of_dispersion_is_variance_over_mean(counts, expected):
    assert dispersion_index(np.array(counts)) == expected


@pytest.mark.parametrize("duration_s", [0.5, 10.0, 60.0, 90.0])
def test_the_peak_is_no_less_than_the_mean_where_the_trace_ends_within_a_window(duration_s):
    trace = synthesise({"web": Poisson(rate_rps=40)}, duration_s=duration_s, seed=1)
    (web,) = describe(trace, window_s=60)
    assert web.peak_rps >= web.mean_rps > 0
