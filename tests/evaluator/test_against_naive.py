"""The compiled engine and the naive simulator, both written from docs/evaluator.md, say the same of every request."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from evaluator.single_pass import SINGLE_PASS_ROUTINGS, compile_hosts, run_single_pass
from plans import Plan, Services
from tests.evaluator import naive
from tests.evaluator.comparison import disagreements, naive_run
from tests.evaluator.naive_parts import NewPlan, Row, Scenario
from tests.evaluator.random_scenarios import FEATURES, Case, random_case
from tests.plans.strategies import cluster, entry, group, plan

SCENARIOS = 504


def cases_of(feature: str) -> dict[int, Case]:
    return {seed: random_case(seed) for seed in range(SCENARIOS) if FEATURES[seed % len(FEATURES)] == feature}


@pytest.mark.parametrize("feature", FEATURES)
def test_every_request_ends_as_in_the_naive_simulator(feature):
    """Law: outcome, reason, group, batch and finish of every request are those of the page, whoever reads it.

    So is how busy each group is, to the bit, and no group is busy for longer than the run.
    See `comparison.reduced` for a way from a failing seed to a small scenario.
    """
    cases = cases_of(feature)
    differing = {seed: found[:2] for seed, case in cases.items() if (found := disagreements(case))}
    assert not differing


def test_the_scenarios_reach_every_end():
    """Agreement says nothing about what never happens."""
    results = [end for feature in FEATURES for case in cases_of(feature).values() for end in naive_run(case) if end]
    reached = {end.reason or end.outcome for end in results}
    assert reached == {
        "good",
        "late",
        "in_flight",
        "deadline cannot be met",
        "gave way to a full batch",
        "not admitted",
        "larger than the KV memory",
        "no route",
        "lost with its node",
    }


def test_a_bundle_is_served_whole_when_the_next_plan_gathers_none():
    """Found by the scenarios above: the second frame was never heard of again."""

    def video(*batches: float, frames: int) -> Plan:
        one = entry("video", max_batch=len(batches), multi_frame=frames, stage_latency_s=tuple((b,) for b in batches))
        busy = entry("detect", max_batch=1, stage_latency_s=((1.0,),))
        return plan([group("node-0", (0,), [busy, one])])

    services = Services.model_validate(
        {
            "services": [
                {"name": "detect", "slo": {"deadline": 1.0}, "variants": [{"model": "detect-model"}]},
                {"name": "video", "class": "frequency", "slo": {"fps": 0.25}, "variants": [{"model": "video-model"}]},
            ]
        }
    )
    rows = [Row(arrival_s=0.0, name="detect")]
    rows += [Row(arrival_s=time_s, name="video", stream="s") for time_s in (0.0, 0.25)]
    told = Scenario(
        plan=video(0.5, 0.5, frames=2),
        services=services,
        rows=rows,
        cluster=cluster(),
        changes=[NewPlan(time_s=0.5, plan=video(0.5, 0.5, frames=1))],
    )
    case = Case(feature="", scenario=told, profiles=())
    assert [(end.outcome, end.finish_s, end.batch) for end in naive_run(case) if end] == [
        ("good", 1.0, 1),
        ("good", 1.5, 2),
        ("good", 1.5, 2),
    ]
    assert not disagreements(case)


def test_a_single_pass_ends_every_request_as_the_naive_simulator():
    """Law: the single-pass mode says what admission at arrival says in the event mode."""
    cases = [random_case(seed, "admission") for seed in range(5000, 5080)]
    compared = 0
    for case in cases:
        if case.scenario.routing not in SINGLE_PASS_ROUTINGS:
            continue
        told = dataclasses.replace(case.scenario, until_s=math.inf)
        known = {service.name: position for position, service in enumerate(told.services.services)}
        hosts = compile_hosts(told.plan, told.services)
        found = run_single_pass(
            hosts,
            np.array([row.arrival_s for row in told.rows]),
            np.array([known[row.name] for row in told.rows]),
            routing=told.routing,
            overhead_s=told.overhead_s,
            response_s=told.response_s,
            margin_s=told.admission_margin_s,
        )
        for number, (row, end) in enumerate(zip(told.rows, naive.run(told), strict=True)):
            assert found.accepted[number] == (end.finish_s is not None)
            if end.finish_s is not None:
                assert found.finish_s[number] == end.finish_s
                group = hosts.group[known[row.name], found.host[number]]
                assert told.plan.groups[group].id == end.group
                compared += 1
    assert compared > 500
