import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans.errors import InvalidInput
from tests.traces.strategies import rate_traces
from traces.table import RateTrace


def rates_of(*counts, services=("a", "b", "c"), window_s=60.0, start_s=0.0):
    starts_s = start_s + np.arange(len(counts[0])) * window_s
    return RateTrace.from_counts(starts_s, services[: len(counts)], counts, window_s=window_s)


def faults_of(call):
    with pytest.raises(InvalidInput) as caught:
        call()
    return [str(fault) for fault in caught.value.faults]


def test_windows_off_the_grid_and_repeated_pairs_are_both_reported():
    frame = pd.DataFrame({"window_start_s": [0.0, 60.0, 60.0, 90.0], "service": ["a"] * 4, "count": [1, 2, 3, 4]})
    faults = faults_of(lambda: RateTrace(frame, 60.0))
    assert len(faults) == 2
    assert "row[3]" in faults[0]
    assert "60.0 s grid" in faults[0]
    assert "row[2]" in faults[1]
    assert "once per window" in faults[1]


@pytest.mark.parametrize("count", [-1, 0.5, math.nan, "many"])
def test_a_count_that_is_no_whole_number_is_refused(count):
    frame = pd.DataFrame({"window_start_s": [0.0], "service": ["a"], "count": [count]})
    assert "count[0]" in faults_of(lambda: RateTrace(frame, 60.0))[0]


@pytest.mark.parametrize("window_s", [0.0, -1.0, math.inf, math.nan])
def test_an_impossible_window_is_refused(window_s):
    frame = pd.DataFrame({"window_start_s": [0.0], "service": ["a"], "count": [1]})
    assert "window_s" in faults_of(lambda: RateTrace(frame, window_s))[0]


def test_a_rate_trace_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        rates_of([1]).window_s = 1.0


def test_rows_in_any_order_make_the_same_trace():
    trace = rates_of([1, 2, 3], [4, 5, 6])
    assert RateTrace(trace.frame.iloc[::-1], 60.0) == trace


def test_gaps_are_counted_and_stand_as_zero():
    frame = pd.DataFrame({"window_start_s": [60.0, 180.0, 180.0], "service": ["a", "a", "b"], "count": [1, 2, 3]})
    trace = RateTrace(frame, 60.0)
    assert (trace.windows, trace.gaps, trace.start_s, trace.end_s) == (3, 3, 60.0, 240.0)
    assert trace.counts().tolist() == [[1, 0, 2], [0, 0, 3]]


def test_an_empty_trace_has_no_windows():
    trace = RateTrace(pd.DataFrame({"window_start_s": [], "service": [], "count": []}), 60.0)
    assert (trace.windows, trace.duration_s, trace.services) == (0, 0.0, ())
    assert trace.counts().shape == (0, 0)


def test_a_grid_too_large_for_a_matrix_is_refused():
    frame = pd.DataFrame({"window_start_s": [0.0, 1e9], "service": ["a", "a"], "count": [1, 1]})
    assert "longer windows" in faults_of(RateTrace(frame, 1.0).counts)[0]


@given(rate_traces(), st.floats(0, 5))
def test_each_scaled_count_and_each_running_sum_is_within_one_of_the_exact_product(trace, factor):
    exact = trace.counts() * factor
    scaled = trace.scaled(factor).counts()
    assert np.all(np.abs(scaled - exact) < 1 + 1e-6)
    assert np.all(np.abs(scaled.cumsum(axis=1) - exact.cumsum(axis=1)) < 1 + 1e-6)


@given(rate_traces())
def test_scaling_by_one_changes_nothing_and_by_zero_leaves_silence(trace):
    assert trace.scaled(1.0) == trace
    assert trace.scaled(0.0).counts().sum() == 0


def test_scaling_services_apart_leaves_the_others_alone():
    assert rates_of([4, 4], [4, 4]).scaled({"a": 0.5}).counts().tolist() == [[2, 2], [4, 4]]


@pytest.mark.parametrize("factor", [-1.0, math.nan, {"z": 1.0}])
def test_an_impossible_factor_is_refused(factor):
    assert faults_of(lambda: rates_of([1]).scaled(factor))


@given(rate_traces(max_count=5000), st.floats(2.0, 100.0))
def test_a_capped_trace_never_exceeds_the_cap_and_a_low_one_is_untouched(trace, peak_rps):
    capped = trace.capped(peak_rps)
    limit = peak_rps * trace.window_s + 1e-6
    assert capped.counts().max(initial=0) <= limit
    for before, after in zip(trace.counts(), capped.counts(), strict=True):
        if before.max() <= limit:
            assert before.tolist() == after.tolist()


@pytest.mark.parametrize("peak_rps", [0.0, -1.0, math.nan, math.inf])
def test_a_cap_below_one_request_a_window_is_refused(peak_rps):
    assert "peak_rps" in faults_of(lambda: rates_of([1]).capped(peak_rps))[0]


def test_a_window_holds_only_whole_windows():
    trace = rates_of([1, 2, 3, 4])
    assert trace.window(60.0, 200.0).counts().tolist() == [[2, 3]]
    assert trace.window(60.0, 200.0).start_s == 0.0
    assert trace.window(60.0, 200.0, rebase=False).start_s == 60.0


def test_renaming_two_services_alike_adds_their_counts():
    trace = rates_of([1, 2], [10, 20], [5, 5]).rename({"a": "b"})
    assert trace.services == ("b", "c")
    assert trace.counts().tolist() == [[11, 22], [5, 5]]


def test_merging_adds_counts_and_concatenating_appends_them():
    first, second = rates_of([1, 2]), rates_of([10, 20, 30], start_s=0.0)
    assert RateTrace.merge([first, second]).counts().tolist() == [[11, 22, 30]]
    assert RateTrace.concat([first, second]).counts().tolist() == [[1, 2, 10, 20, 30]]


def test_traces_of_different_windows_do_not_merge():
    assert "one length" in faults_of(lambda: RateTrace.merge([rates_of([1]), rates_of([1], window_s=30.0)]))[0]
    assert "no trace" in faults_of(lambda: RateTrace.merge([]))[0]


def test_selecting_an_unknown_service_is_refused():
    assert "'z'" in faults_of(lambda: rates_of([1]).select(["z"]))[0]
    assert rates_of([1], [2]).select(["b"]).counts().tolist() == [[2]]


def test_a_trace_says_what_it_holds_and_equals_only_traces():
    trace = rates_of([1, 2])
    assert repr(trace) == "RateTrace(2 windows of 60 s, 1 services)"
    assert trace != "trace"
    assert trace != rates_of([1, 2], window_s=30.0)


def test_rounding_of_the_running_sum_costs_no_request():
    assert rates_of([1] * 10).scaled(0.1).counts().tolist() == [[0] * 9 + [1]]


def test_large_counts_are_scaled_to_the_last_request():
    assert rates_of([3 * 10**9] * 4).scaled(1 / 3).counts().tolist() == [[10**9] * 4]
