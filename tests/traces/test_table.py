import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans.errors import InvalidInput
from tests.traces.strategies import request_traces
from traces.table import RequestTrace


def trace_of(arrival_s, service="a", duration_s=None, **columns):
    services = service if isinstance(service, list) else [service] * len(arrival_s)
    frame = pd.DataFrame({"arrival_s": arrival_s, "service": pd.Series(services, dtype="str"), **columns})
    return RequestTrace(frame, duration_s=duration_s)


def fields_of(call):
    with pytest.raises(InvalidInput) as caught:
        call()
    return [fault.field for fault in caught.value.faults]


def test_all_faults_of_a_table_are_reported_at_once():
    frame = pd.DataFrame(
        {"arrival_s": [0.0, -1.0, math.nan], "service": ["a", "b c", None], "size_bytes": [1, 2.5, -1]}
    )
    assert fields_of(lambda: RequestTrace(frame)) == [
        "arrival_s[1]",
        "arrival_s[2]",
        "service[1]",
        "service[2]",
        "size_bytes[1]",
        "size_bytes[2]",
    ]


def test_missing_and_unknown_columns_are_named():
    assert fields_of(lambda: RequestTrace(pd.DataFrame({"arrival_s": [0.0], "model": ["a"]}))) == ["service", "model"]


def test_many_bad_rows_are_shown_in_part_and_counted():
    frame = pd.DataFrame({"arrival_s": [-1.0] * 50, "service": ["a"] * 50})
    with pytest.raises(InvalidInput, match="45 more such rows"):
        RequestTrace(frame)


def test_arrivals_out_of_order_are_refused_with_the_row():
    with pytest.raises(InvalidInput, match=r"arrival_s\[2\]: found 1.0 after 2.0"):
        trace_of([0.0, 2.0, 1.0])


@pytest.mark.parametrize("duration_s", [4.9, math.inf, math.nan])
def test_a_duration_before_the_last_arrival_or_not_finite_is_refused(duration_s):
    assert fields_of(lambda: trace_of([5.0], duration_s=duration_s)) == ["duration_s"]


def test_true_is_no_number():
    assert fields_of(lambda: RequestTrace(pd.DataFrame({"arrival_s": [True], "service": ["a"]}))) == ["arrival_s[0]"]


def test_a_trace_is_frozen_and_its_frame_is_a_copy():
    trace = trace_of([1.0, 2.0])
    with pytest.raises(dataclasses.FrozenInstanceError):
        trace.duration_s = 3.0
    with pytest.raises(ValueError, match="read-only"):
        trace.arrival_s[0] = 9.0
    frame = trace.frame
    frame.loc[0, "arrival_s"] = 9.0
    assert list(trace.arrival_s) == [1.0, 2.0]


def test_the_frame_given_may_change_afterwards():
    frame = pd.DataFrame({"arrival_s": [1.0], "service": ["a"]})
    trace = RequestTrace(frame)
    frame.loc[0, "arrival_s"] = 5.0
    assert list(trace.arrival_s) == [1.0]


def test_codes_point_into_the_sorted_services():
    trace = trace_of([0.0, 1.0, 2.0], ["b", "a", "b"])
    assert trace.services == ("a", "b")
    assert list(trace.codes) == [1, 0, 1]


def test_numbers_are_nan_where_a_request_says_nothing():
    trace = trace_of([0.0, 1.0], input_tokens=[7, None])
    np.testing.assert_array_equal(trace.numbers("input_tokens"), [7.0, np.nan])
    np.testing.assert_array_equal(trace.numbers("output_tokens"), [np.nan, np.nan])


@given(request_traces(), st.floats(0.3, 1e6))
def test_rates_count_every_request_once(trace, window_s):
    """Law: the counts over all windows sum to the number of requests, per service."""
    rates = trace.rates(max(window_s, trace.duration_s / 1000))
    if len(trace):
        np.testing.assert_array_equal(rates.counts().sum(axis=1), np.bincount(trace.codes))
        assert rates.end_s >= trace.duration_s * (1 - 1e-9)
    else:
        assert len(rates) == 0


def test_a_request_on_the_edge_of_a_window_counts_in_the_window_that_starts_there():
    assert trace_of([0.0, 60.0], duration_s=60.0).rates(60.0).counts().tolist() == [[1, 1]]


def test_rates_from_a_later_start_leave_out_what_came_before():
    rates = trace_of([10.0, 100.0, 119.0], duration_s=240.0).rates(60.0, start_s=60.0)
    assert rates.start_s == 60.0
    assert rates.counts().tolist() == [[2, 0, 0]]


def test_silence_at_the_end_is_counted_as_windows():
    assert trace_of([1.0], duration_s=300.0).rates(60.0).counts().tolist() == [[1, 0, 0, 0, 0]]


def test_a_window_so_short_that_the_counts_would_not_fit_is_refused():
    with pytest.raises(InvalidInput, match="longer windows"):
        trace_of([1e9]).rates(1e-3)


@given(request_traces(), st.floats(0, 1e6), st.floats(0.1, 1e6))
def test_two_adjacent_windows_hold_what_their_union_holds(trace, start_s, length_s):
    middle_s, end_s = start_s + length_s / 2, start_s + length_s
    if not start_s < middle_s < end_s:
        return
    parts = [trace.window(start_s, middle_s, rebase=False), trace.window(middle_s, end_s, rebase=False)]
    assert RequestTrace.merge(parts) == trace.window(start_s, end_s, rebase=False)


def test_a_window_covers_its_whole_length_from_zero():
    part = trace_of([1.0, 2.0, 3.0, 9.0]).window(2.0, 8.0)
    assert list(part.arrival_s) == [0.0, 1.0]
    assert part.duration_s == 6.0


@pytest.mark.parametrize(("start_s", "end_s"), [(2.0, 2.0), (3.0, 2.0), (-1.0, 2.0), (math.nan, 2.0)])
def test_an_empty_or_negative_window_is_refused(start_s, end_s):
    assert fields_of(lambda: trace_of([1.0]).window(start_s, end_s)) == ["window"]


@given(request_traces(), st.integers(0, 2**32 - 1))
def test_scaling_by_one_changes_nothing(trace, seed):
    assert trace.scaled(1.0, seed) == trace


@given(request_traces(), st.floats(0, 4), st.integers(0, 2**32 - 1))
def test_scaling_keeps_each_request_floor_or_ceil_times(trace, factor, seed):
    """Law: floor(f) n <= requests of a service <= ceil(f) n, over the same duration."""
    scaled = trace.scaled(factor, seed)
    assert scaled.duration_s == trace.duration_s
    for service in trace.services:
        requests = int((trace.frame["service"] == service).sum())
        kept = int((scaled.frame["service"] == service).sum())
        assert math.floor(factor) * requests <= kept <= math.ceil(factor) * requests


def test_scaling_has_the_rate_asked_for_on_average():
    trace = trace_of(np.arange(20_000) / 100)
    assert len(trace.scaled(0.3, 1)) == pytest.approx(6000, rel=0.05)
    assert len(trace.scaled(2.5, 1)) == pytest.approx(50_000, rel=0.05)


def test_the_same_seed_scales_alike_and_another_does_not():
    trace = trace_of(np.arange(100.0))
    assert trace.scaled(0.5, 1) == trace.scaled(0.5, 1)
    assert trace.scaled(0.5, 1) != trace.scaled(0.5, 2)


@pytest.mark.parametrize("factor", [-0.1, math.inf, math.nan])
def test_an_impossible_factor_is_refused(factor):
    assert fields_of(lambda: trace_of([1.0]).scaled(factor, 0)) == ["rate_factor"]


def test_renaming_two_services_alike_makes_them_one():
    trace = trace_of([0.0, 1.0, 2.0], ["a", "b", "c"]).rename({"a": "x", "b": "x"})
    assert trace.services == ("c", "x")
    assert list(trace.frame["service"]) == ["x", "x", "c"]


def test_selecting_or_renaming_an_unknown_service_is_refused():
    trace = trace_of([0.0])
    assert fields_of(lambda: trace.select(["z"])) == ["service"]
    assert fields_of(lambda: trace.rename({"z": "a"})) == ["service"]


@given(request_traces())
def test_selecting_each_service_and_merging_gives_the_trace_back(trace):
    merged = RequestTrace.merge(trace.select([service]) for service in trace.services)
    assert len(merged) == len(trace)
    assert merged.arrival_s.tolist() == trace.arrival_s.tolist()
    assert sorted(merged.frame["service"]) == sorted(trace.frame["service"])


@given(request_traces(), request_traces())
def test_concatenation_adds_durations_and_keeps_every_request(first, second):
    both = RequestTrace.concat([first, second])
    assert len(both) == len(first) + len(second)
    assert both.duration_s == first.duration_s + second.duration_s
    assert both.arrival_s[: len(first)].tolist() == first.arrival_s.tolist()


def test_merging_keeps_columns_that_only_one_trace_has():
    merged = RequestTrace.merge([trace_of([1.0], input_tokens=[5]), trace_of([0.0], "b")])
    np.testing.assert_array_equal(merged.numbers("input_tokens"), [np.nan, 5.0])


def test_merging_nothing_is_an_empty_trace():
    assert len(RequestTrace.merge([])) == 0
    assert RequestTrace.concat([]).duration_s == 0.0


@given(request_traces(), st.randoms(use_true_random=False))
def test_sorting_brings_rows_in_any_order_into_the_order_of_arrival(trace, random):
    order = list(range(len(trace)))
    random.shuffle(order)
    shuffled = RequestTrace.sorting(trace.frame.iloc[order], duration_s=trace.duration_s)
    assert shuffled.arrival_s.tolist() == trace.arrival_s.tolist()


def test_a_trace_says_what_it_holds_and_equals_only_traces():
    trace = trace_of([1.0, 2.0])
    assert repr(trace) == "RequestTrace(2 requests, 1 services, 2 s)"
    assert trace != "trace"
    assert trace != trace_of([1.0, 2.0], duration_s=3.0)


def test_copies_spread_over_the_gap_that_follows_their_original():
    scaled = trace_of([0.0, 10.0, 20.0], duration_s=30.0).scaled(3.0, 1)
    assert scaled.rates(10.0).counts().tolist() == [[3, 3, 3]]
    assert len(set(scaled.arrival_s)) == 9
    assert {0.0, 10.0, 20.0} < set(scaled.arrival_s)
