import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans.errors import InvalidInput
from tests.traces.strategies import request_traces
from traces.demand import observed_demand
from traces.synthesis import Gamma, Poisson, Streams, synthesise
from traces.table import RequestTrace


def requests_at(arrival_s, duration_s, **columns):
    frame = pd.DataFrame({"arrival_s": arrival_s, "service": ["a"] * len(arrival_s), **columns})
    return RequestTrace(frame, duration_s=duration_s)


@given(request_traces(min_size=1).filter(lambda trace: trace.duration_s > 1), st.floats(0.01, 2.0))
def test_observed_rates_account_for_every_request(trace, share):
    """Law: sum over windows of mean rate times the window's length within the trace is the number of requests."""
    window_s = trace.duration_s * share
    demand = observed_demand(trace, window_s=window_s)
    for index, service in enumerate(trace.services):
        rates = demand.of(service).rate_rps
        lengths_s = [min(window_s, trace.duration_s - window * window_s) for window in range(len(rates))]
        seen = sum(rate.mean * length for rate, length in zip(rates, lengths_s, strict=True))
        assert seen == pytest.approx(int((trace.codes == index).sum()))


@given(request_traces(min_size=1).filter(lambda trace: trace.duration_s > 1))
def test_observed_quantiles_lie_between_nothing_and_all_requests_in_one_part(trace):
    demand = observed_demand(trace, window_s=trace.duration_s / 3)
    for service in demand.services:
        for rate in service.rate_rps:
            values = list(rate.quantiles.values())
            assert values == sorted(values)
            assert values[0] >= 0
            assert values[-1] <= 10 * rate.mean * (1 + 1e-9)


def test_quantiles_are_those_of_the_parts_of_a_window():
    arrival_s = [second + 0.5 for second in range(10) for _ in range(second)]
    demand = observed_demand(requests_at(arrival_s, 10.0), window_s=10.0, quantiles=(0.5, 0.9))
    rate = demand.services[0].rate_rps[0]
    assert rate.mean == 4.5
    assert rate.quantiles == {"0.5": 4.5, "0.9": pytest.approx(np.quantile(range(10), 0.9))}


def test_a_last_window_cut_short_counts_over_what_is_left_of_it():
    rates = observed_demand(requests_at([10.0, 70.0, 80.0], 90.0), window_s=60.0).services[0].rate_rps
    assert [rate.mean for rate in rates] == [pytest.approx(1 / 60), pytest.approx(2 / 30)]


def test_a_request_at_the_very_end_belongs_to_the_last_window():
    rates = observed_demand(requests_at([0.0, 60.0], None), window_s=60.0).services[0].rate_rps
    assert [rate.mean for rate in rates] == [pytest.approx(2 / 60)]


def test_burstiness_streams_and_tokens_come_from_the_trace():
    loads = {"cam": Streams(streams=3, fps=10), "web": Gamma(rate_rps=100, cv=3)}
    demand = observed_demand(synthesise(loads, duration_s=200, seed=1), window_s=100)
    assert demand.of("cam").streams == 3
    assert demand.of("web").streams is None
    assert demand.of("web").burstiness_cv == pytest.approx(3, rel=0.15)
    tokens = observed_demand(requests_at([0, 1, 2], 3, input_tokens=[10, None, 20]), window_s=3).services[0]
    assert (tokens.input_tokens, tokens.output_tokens) == (15.0, None)


def test_a_service_with_too_few_requests_to_show_burstiness_is_taken_as_poisson():
    assert observed_demand(requests_at([1.0], 60.0), window_s=60.0).services[0].burstiness_cv == 1.0


def test_without_levels_the_mean_stands_alone():
    trace = synthesise({"a": Poisson(rate_rps=10)}, duration_s=10, seed=1)
    assert observed_demand(trace, window_s=5, quantiles=()).services[0].rate_rps[0].quantiles == {}


@pytest.mark.parametrize(
    ("arrival_s", "duration_s", "options"),
    [
        ([], 60.0, {}),
        ([0.0], None, {}),
        ([1.0], 60.0, {"window_s": 0.0}),
        ([1.0], 60.0, {"quantiles": (1.0,)}),
        ([1.0], 60.0, {"sub_windows": 0}),
    ],
)
def test_a_trace_without_extent_and_impossible_arguments_are_refused(arrival_s, duration_s, options):
    with pytest.raises(InvalidInput):
        observed_demand(requests_at(arrival_s, duration_s), **{"window_s": 60.0, **options})
