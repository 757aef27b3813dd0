from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluator import Settings, evaluate
from plans import InvalidInput, Services
from tests.evaluator import naive
from tests.plans.strategies import entry, group, plan
from traces.table import RequestTrace


def services_with(**deadlines):
    return Services.model_validate(
        {
            "services": [
                {"name": name, "slo": {"deadline": deadline}, "variants": [{"model": f"{name}-model", "accuracy": 0.5}]}
                for name, deadline in deadlines.items()
            ]
        }
    )


def trace_of(arrivals):
    return RequestTrace(pd.DataFrame(arrivals, columns=["arrival_s", "service"]))


def one_server(service_s, deadline_s, *, batches=1):
    rows = tuple((service_s * (1 + 0.25 * b),) for b in range(batches))
    return plan(
        [group("node-0", (0,), [entry("detect", max_batch=batches, deadline_s=deadline_s, stage_latency_s=rows)])]
    )


@st.composite
def scenarios(draw):
    """Draw a plan of up to three groups (some pipelined, some shared), deadlines, and arrivals."""
    deadlines = {name: draw(st.floats(0.03, 0.5)) for name in ("detect", "segment", "classify")}
    groups = []
    for index in range(draw(st.integers(1, 3))):
        pp = draw(st.sampled_from([1, 1, 2, 3]))
        entries = []
        for service in draw(st.lists(st.sampled_from(["detect", "segment"]), unique=True, min_size=1)):
            largest = draw(st.integers(1, 5))
            base = [draw(st.floats(0.005, 0.04)) for _ in range(pp)]
            slope = draw(st.floats(0.1, 1.0))
            rows = tuple(tuple(s * (1 + slope * b) for s in base) for b in range(largest))
            rate = draw(st.floats(1.0, 30.0))
            entries.append(entry(service, pp, pp, max_batch=largest, stage_latency_s=rows, rate_rps=rate))
        groups.append(group(f"node-{index}", tuple(range(pp)), entries, pp=pp))
    gaps = draw(st.lists(st.one_of(st.just(0.0), st.floats(0.0001, 0.05)), min_size=1, max_size=60))
    names = [draw(st.sampled_from(["detect", "detect", "segment", "classify"])) for _ in gaps]
    return plan(groups), deadlines, list(zip(np.cumsum(gaps).tolist(), names, strict=True))


@given(scenarios(), st.sampled_from([0.0, 0.003]))
@settings(max_examples=200, deadline=None)
def test_every_request_ends_as_in_the_naive_simulator(scenario, overhead_s):
    one, deadlines, arrivals = scenario
    services = services_with(**deadlines)
    result = evaluate(one, services, trace_of(arrivals), settings=Settings(overhead_s=overhead_s)).requests
    rows = [naive.Row(arrival_s=time, name=name) for time, name in arrivals]
    expected = naive.run(naive.Scenario(plan=one, services=services, rows=rows, overhead_s=overhead_s))
    for row, end in zip(result.itertuples(), expected, strict=True):
        assert (row.outcome, None if pd.isna(row.group) else row.group) == (end.outcome, end.group)
        if end.finish_s is None:
            assert row.reason == end.reason
            assert math.isnan(row.latency_s)
        else:
            assert row.latency_s == pytest.approx(end.finish_s - row.scheduled_s, abs=1e-12)
            assert row.batch_size == end.batch


@given(scenarios())
@settings(max_examples=50, deadline=None)
def test_requests_are_conserved_and_runs_repeat_bit_by_bit(scenario):
    """Law: offered = good + late + dropped + failed + in flight; the same input gives the same log."""
    one, deadlines, arrivals = scenario
    first, second = (evaluate(one, services_with(**deadlines), trace_of(arrivals)) for _ in range(2))
    pd.testing.assert_frame_equal(first.requests, second.requests)
    assert first.summary.requests == len(arrivals)
    assert sum(s.offered for s in first.summary.services) == len(arrivals)
    assert all(0 <= g.utilisation <= 1 + 1e-9 for g in first.summary.groups)


def test_a_server_with_deterministic_service_waits_as_pollaczek_and_khinchine_say():
    rng = np.random.default_rng(1)
    rho, service_s, requests = 0.7, 0.01, 400_000
    arrivals = np.cumsum(rng.exponential(service_s / rho, requests))
    trace = RequestTrace(pd.DataFrame({"arrival_s": arrivals, "service": "detect"}))
    result = evaluate(one_server(service_s, 1e6), services_with(detect=1e6), trace)
    wait_s = result.requests["latency_s"].mean() - service_s
    assert wait_s == pytest.approx(rho * service_s / (2 * (1 - rho)), rel=0.03)
    assert result.summary.groups[0].utilisation == pytest.approx(rho, rel=0.01)


def test_batches_form_under_load_and_not_without_it():
    """At 80 % of the capacity at the largest batch, free-running batching averages more than two."""
    rng = np.random.default_rng(2)
    one = one_server(0.01, 1.0, batches=8)
    capacity_rps = 8 / one.groups[0].loadout[0].batch_latency_s(8)
    for load, low, high in ((0.8, 2.0, 8.0), (0.05, 1.0, 1.2)):
        arrivals = np.cumsum(rng.exponential(1 / (load * capacity_rps), 20_000))
        trace = RequestTrace(pd.DataFrame({"arrival_s": arrivals, "service": "detect"}))
        mean_batch = evaluate(one, services_with(detect=1.0), trace).summary.services[0].mean_batch
        assert low < mean_batch <= high


def test_overload_costs_the_excess_and_not_more():
    rng = np.random.default_rng(3)
    one = one_server(0.01, 0.1, batches=8)
    capacity_rps = 8 / one.groups[0].loadout[0].batch_latency_s(8)
    arrivals = np.cumsum(rng.exponential(1 / (3 * capacity_rps), 30_000))
    trace = RequestTrace(pd.DataFrame({"arrival_s": arrivals, "service": "detect"}))
    summary = evaluate(one, services_with(detect=0.1), trace).summary
    assert summary.goodput_rps > 0.9 * capacity_rps


def test_successive_batches_overlap_in_a_pipeline():
    stages = ((0.1, 0.1),)
    one = plan([group("node-0", (0, 1), [entry("detect", 2, 2, max_batch=1, stage_latency_s=stages)], pp=2)])
    result = evaluate(one, services_with(detect=1.0), trace_of([(0.0, "detect"), (0.0, "detect")]))
    assert result.requests["latency_s"].tolist() == pytest.approx([0.2, 0.3])


def test_a_service_without_route_fails_and_is_counted():
    result = evaluate(one_server(0.01, 1.0), services_with(detect=1.0, segment=1.0), trace_of([(0.0, "segment")]))
    assert result.summary.service("segment").failed == 1
    assert result.summary.service("detect").attainment is None
    assert result.requests["reason"].tolist() == ["no route"]


def test_names_and_numbers_that_make_no_sense_are_refused():
    one = one_server(0.01, 1.0)
    with pytest.raises(InvalidInput, match="'detect', expected a service"):
        evaluate(one, services_with(segment=1.0), trace_of([(0.0, "segment")]))
    with pytest.raises(InvalidInput, match="'segment', expected one of detect"):
        evaluate(one, services_with(detect=1.0), trace_of([(0.0, "segment")]))
    with pytest.raises(InvalidInput, match="at least 0 seconds"):
        evaluate(one, services_with(detect=1.0), trace_of([(0.0, "detect")]), settings=Settings(overhead_s=-1))
    with pytest.raises(InvalidInput, match="at least one request"):
        evaluate(one, services_with(detect=1.0), trace_of([]))


def test_an_answer_to_generation_may_take_as_long_as_its_tokens():
    services = Services.model_validate(
        {
            "services": [
                {
                    "name": "chat",
                    "class": "generation",
                    "slo": {"ttft": 0.1, "tpot": 0.1},
                    "variants": [{"model": "chat-model"}],
                }
            ]
        }
    )
    one = plan([group("node-0", (0,), [entry("chat", max_batch=1, deadline_s=1.0, stage_latency_s=((0.5,),))])])
    trace = RequestTrace(pd.DataFrame({"arrival_s": [0.0, 10.0], "service": "chat", "output_tokens": [1, 10]}))
    assert evaluate(one, services, trace).requests["outcome"].tolist() == ["dropped", "good"]
