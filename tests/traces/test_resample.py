"""Resampled arrivals: what stays, what moves, and what is refused."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans.errors import InvalidInput
from traces.resample import block_bootstrap, with_burstiness
from traces.statistics import burstiness_cv
from traces.synthesis import Gamma, Poisson, Streams, synthesise
from traces.table import RequestTrace

TRACE = synthesise({"a": Poisson(rate_rps=20), "b": Gamma(rate_rps=10, cv=3)}, duration_s=100, seed=1)


@pytest.mark.parametrize("block_s", [0, -1, float("inf"), float("nan")])
def test_a_block_without_length_is_refused(block_s):
    with pytest.raises(InvalidInput, match="block"):
        block_bootstrap(TRACE, block_s=block_s, seed=1)


def test_a_trace_without_length_cannot_be_resampled():
    empty = RequestTrace(pd.DataFrame({"arrival_s": [], "service": []}))
    with pytest.raises(InvalidInput, match="some length"):
        block_bootstrap(empty, block_s=1, seed=1)


@given(st.integers(0, 1000), st.floats(0.5, 200))
def test_a_resampled_trace_has_the_same_length_and_only_requests_of_the_original(seed, block_s):
    """Every gap within a block is a gap of the original (round the end)."""
    found = block_bootstrap(TRACE, block_s=block_s, seed=seed)
    assert found.duration_s == TRACE.duration_s
    assert set(found.services) <= set(TRACE.services)
    assert np.all(found.arrival_s <= TRACE.duration_s)


def test_the_same_seed_gives_the_same_arrivals_and_another_seed_others():
    first = block_bootstrap(TRACE, block_s=5, seed=3)
    assert first == block_bootstrap(TRACE, block_s=5, seed=3)
    assert first != block_bootstrap(TRACE, block_s=5, seed=4)


def test_over_many_seeds_the_rate_is_that_of_the_trace():
    counts = [len(block_bootstrap(TRACE, block_s=5, seed=seed)) for seed in range(200)]
    assert np.mean(counts) == pytest.approx(len(TRACE), rel=0.02)


def test_one_block_as_long_as_the_trace_is_the_trace_turned_round():
    found = block_bootstrap(TRACE, block_s=1e9, seed=5)
    assert sorted(found.frame["service"]) == sorted(TRACE.frame["service"])


def test_burstiness_changes_and_counts_per_window_stay():
    calm, wild = (with_burstiness(TRACE, cv, window_s=25, seed=2) for cv in (0.3, 4.0))
    for found in (calm, wild):
        assert np.array_equal(found.rates(25).counts(), TRACE.rates(25).counts())
        assert found.frame["service"].value_counts().to_dict() == TRACE.frame["service"].value_counts().to_dict()
    assert burstiness_cv(calm)["a"] < 0.6 < 2 < burstiness_cv(wild)["a"]


def test_frames_of_streams_stay_where_they_are():
    trace = synthesise({"video": Streams(streams=3, fps=5), "a": Poisson(rate_rps=5)}, duration_s=20, seed=1)
    found = with_burstiness(trace, 3.0, window_s=10, seed=1)
    assert found.select(["video"]).frame.equals(trace.select(["video"]).frame)
    assert not found.select(["a"]).frame.equals(trace.select(["a"]).frame)
