"""The single pass against a plain loop over the same document, and its laws."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluator.scenario import compile_replicas
from evaluator.single_pass import (
    Hosts,
    SinglePassTrace,
    compile_hosts,
    count_good,
    run_single_pass,
)
from plans.dispatch import next_replica
from plans.errors import InvalidInput
from plans.plan import Group, LoadoutEntry, Plan, Route, SolverReport
from plans.service import LatencyService, LatencySlo, Services, Variant


def make_hosts(rows, stage_s, deadline_s, weight=None):
    """Rows are, per service, (group, option) pairs."""
    most = max(1, *map(len, rows))
    shape = (len(rows), most)
    group, option = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32)
    for service, row in enumerate(rows):
        for position, (g, o) in enumerate(row):
            group[service, position], option[service, position] = g, o
    return Hosts(
        count=np.array([len(row) for row in rows], dtype=np.int32),
        group=group,
        option=option,
        weight=np.ones(shape) if weight is None else np.asarray(weight, dtype=np.float64),
        stage_s=np.asarray(stage_s, dtype=np.float64),
        deadline_s=np.asarray(deadline_s, dtype=np.float64),
        groups=1 + max((g for row in rows for g, _ in row), default=0),
    )


def walk(clocks, latencies, entry_s):
    ends, end = [], entry_s
    for clock, latency in zip(clocks, latencies, strict=True):
        end = max(end, clock) + latency
        ends.append(end)
    return ends


def naive(hosts, arrival_s, service, routing, overhead_s, response_s, margin_s):
    """Sections 4, 7 and 13 of docs/evaluator.md, request by request."""
    stages = hosts.stage_s.shape[1]
    clocks = [[0.0] * stages for _ in range(hosts.groups)]
    credit = [np.zeros(count) for count in hosts.count]
    turn = [0] * len(hosts.count)
    fate = []
    for now, s in zip(arrival_s.tolist(), service.tolist(), strict=True):
        places = [(int(hosts.group[s, h]), hosts.stage_s[hosts.option[s, h]].tolist()) for h in range(hosts.count[s])]
        if not places:
            fate.append((False, None, -1))
            continue
        entry_s = now + overhead_s
        if routing == "earliest-free":
            chosen = min(range(len(places)), key=lambda h: (clocks[places[h][0]][-1], h))
        elif routing == "least-finish":
            chosen = min(range(len(places)), key=lambda h: (walk(clocks[places[h][0]], places[h][1], entry_s)[-1], h))
        elif routing == "round-robin":
            chosen = turn[s] % len(places)
            turn[s] += 1
        else:
            chosen = next_replica(hosts.weight[s, : len(places)], credit[s])
        group, latencies = places[chosen]
        ends = walk(clocks[group], latencies, entry_s)
        good = ends[-1] + response_s + margin_s <= now + float(hosts.deadline_s[s])
        fate.append((good, ends[-1] + response_s, chosen))
        if good:
            clocks[group] = ends
    return fate


RUNS = st.sampled_from(
    [(1, "earliest-free"), (3, "least-finish"), (3, "weighted"), (3, "round-robin"), (10, "earliest-free")]
)
"""Stages and policies to try together: every pair more is a kernel more to compile."""


@st.composite
def scenarios(draw, stages=3):
    services, groups = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    options = draw(st.integers(1, 5))
    # Whole numbers of eighths: ties happen, and sums are exact.
    eighths = st.integers(0, 8).map(lambda value: value / 8)
    stage_s = [[draw(eighths) for _ in range(stages)] for _ in range(options)]
    rows = [
        [(g, draw(st.integers(0, options - 1))) for g in range(groups) if draw(st.booleans())] for _ in range(services)
    ]
    deadline_s = [draw(st.integers(1, 40)) / 8 for _ in range(services)]
    gaps = draw(st.lists(st.integers(0, 6), max_size=60))
    arrival_s = np.cumsum(np.array(gaps, dtype=np.float64)) / 8
    service = np.array(draw(st.lists(st.integers(0, services - 1), min_size=len(gaps), max_size=len(gaps))), dtype=int)
    weight = [[draw(st.integers(1, 4)) for _ in range(max(1, *map(len, rows)))] for _ in range(services)]
    return make_hosts(rows, stage_s, deadline_s, weight), arrival_s, service


@settings(max_examples=80, deadline=None)
@given(st.data(), RUNS, st.sampled_from([(0, 0, 0), (0.125, 0.25, 0.125)]))
def test_every_request_fares_as_in_the_plain_loop(data, run, times):
    """Bit for bit: acceptance, finish and host of every request."""
    stages, routing = run
    hosts, arrival_s, service = data.draw(scenarios(stages))
    overhead_s, response_s, margin_s = times
    found = run_single_pass(
        hosts, arrival_s, service, routing=routing, overhead_s=overhead_s, response_s=response_s, margin_s=margin_s
    )
    expected = naive(hosts, arrival_s, service, routing, *times)
    assert [bool(each) for each in found.accepted] == [good for good, _, _ in expected]
    assert found.host.tolist() == [host for _, _, host in expected]
    for finish_s, (_, wanted_s, _) in zip(found.finish_s.tolist(), expected, strict=True):
        assert np.isnan(finish_s) if wanted_s is None else finish_s == wanted_s


@settings(max_examples=40, deadline=None)
@given(scenarios(), st.sampled_from(["least-finish", "weighted"]))
def test_counting_agrees_with_recording(scenario, routing):
    """Offered = accepted + dropped per service, whichever kernel counts."""
    hosts, arrival_s, service = scenario
    for margin_s in (0.0, 0.125):
        recorded = run_single_pass(hosts, arrival_s, service, routing=routing, margin_s=margin_s)
        trace = SinglePassTrace.whole(arrival_s, service)
        counted = count_good(hosts, trace, routing=routing, margin_s=margin_s)
        assert counted.tolist() == np.bincount(service[recorded.accepted], minlength=len(hosts.count)).tolist()
        assert (counted <= trace.offered(len(hosts.count))[0]).all()


@settings(max_examples=40, deadline=None)
@given(scenarios(), st.integers(1, 8))
def test_a_lone_service_on_a_lone_group_loses_nothing_by_a_looser_deadline(scenario, more):
    """First come, first served with equal requests: what is accepted only grows with the deadline."""
    hosts, arrival_s, _ = scenario
    alone = make_hosts([[(0, 0)]], hosts.stage_s, [hosts.deadline_s[0]])
    looser = make_hosts([[(0, 0)]], hosts.stage_s, [hosts.deadline_s[0] + more / 8])
    trace = SinglePassTrace.whole(arrival_s, np.zeros(len(arrival_s), dtype=int))
    assert count_good(looser, trace)[0] >= count_good(alone, trace)[0]


@settings(max_examples=30, deadline=None)
@given(scenarios())
def test_stages_are_held_for_what_was_accepted_and_no_more(scenario):
    hosts, arrival_s, service = scenario
    found = run_single_pass(hosts, arrival_s, service)
    busy_s = np.zeros_like(found.busy_s)
    for s, host in zip(service[found.accepted], found.host[found.accepted], strict=True):
        busy_s[hosts.group[s, host]] += hosts.stage_s[hosts.option[s, host]]
    assert found.busy_s == pytest.approx(busy_s)


def test_blocks_start_idle_and_add_up():
    hosts = make_hosts([[(0, 0)]], [[1.0]], [1.5])
    two = SinglePassTrace(
        arrival_s=np.array([0.0, 0.6, 0.0, 0.2]),
        service=np.zeros(4, dtype=np.int32),
        first=np.array([0, 2, 4], dtype=np.int64),
    )
    # 0.6 would end at 2.0, within 2.1; 0.2 would end at 2.0, after 1.7.
    assert count_good(hosts, two).tolist() == [3]
    assert two.offered(1).tolist() == [[2], [2]]


def test_many_blocks_count_what_each_of_them_counts():
    hosts = make_hosts([[(0, 0), (1, 0)], [(1, 1)]], [[0.5, 0.3], [0.2, 0.9]], [2.0, 3.0])
    trace = many_blocks()
    parts = [slice(*bounds) for bounds in pairwise(trace.first)]
    alone = [count_good(hosts, SinglePassTrace.whole(trace.arrival_s[part], trace.service[part])) for part in parts]
    assert count_good(hosts, trace).tolist() == sum(alone).tolist()


def many_blocks(blocks=12, requests=40):
    generator = np.random.default_rng(1)
    arrival_s = np.concatenate([np.sort(generator.random(requests)) * 20 for _ in range(blocks)])
    service = generator.integers(0, 2, blocks * requests).astype(np.int32)
    return SinglePassTrace(
        arrival_s=arrival_s, service=service, first=np.arange(0, blocks * requests + 1, requests, dtype=np.int64)
    )


def test_a_policy_of_the_event_mode_alone_is_refused():
    hosts = make_hosts([[(0, 0)]], [[1.0]], [2.0])
    with pytest.raises(InvalidInput, match="earliest-free"):
        count_good(hosts, many_blocks(), routing="shortest-queue")


def plan_of(weights):
    entries = [
        LoadoutEntry(
            service="a", variant="m", max_batch=2, rate_rps=1.0, memory_bytes=(1,), deadline_s=1.0,
            stage_latency_s=((latency_s,), (2 * latency_s,)),
        )
        for latency_s in (0.1, 0.2)
    ]  # fmt: skip
    groups = tuple(
        Group(id=f"node/{position}", node="node", gpus=(position,), loadout=(entry,))
        for position, entry in enumerate(entries)
    )
    routes = tuple(
        Route(group=group.id, weight=weight) for group, weight in zip(groups, weights, strict=True) if weight
    )
    solver = SolverReport(name="x", status="feasible", objective=0, bound=0, gap=0, wall_s=0, seed=0)
    return Plan(solver=solver, groups=groups, routes={"a": routes})


def services_of(*names):
    return Services(
        services=tuple(
            LatencyService(name=name, slo=LatencySlo(deadline_s=1.0), variants=(Variant(model="m"),)) for name in names
        )
    )


def test_a_plan_is_compiled_with_batches_of_one_and_without_what_gets_no_requests():
    both = compile_hosts(plan_of([0.5, 0.5]), services_of("b", "a"))
    assert both.count.tolist() == [0, 2]
    assert both.stage_s[both.option[1]].tolist() == [[0.1], [0.2]]
    assert compile_hosts(plan_of([0, 1.0]), services_of("a")).count.tolist() == [1]


def test_a_plan_of_unknown_services_is_refused():
    with pytest.raises(InvalidInput, match="'a'"):
        compile_hosts(plan_of([0.5, 0.5]), services_of("b"))


def test_a_plan_of_unknown_variants_is_refused():
    plan, services = plan_of([0.5, 0.5]), services_of("a")
    entry = plan.groups[0].loadout[0]
    group = plan.groups[0].model_copy(update={"loadout": (entry.model_copy(update={"variant": "other"}),)})
    edited = plan.model_copy(update={"groups": (group, *plan.groups[1:])})
    with pytest.raises(InvalidInput, match=rf"a\.variant: found 'other', expected one of {entry.variant}"):
        compile_hosts(edited, services)
    with pytest.raises(InvalidInput, match=r"a\.variant: found 'other'"):
        compile_replicas(edited, services)
