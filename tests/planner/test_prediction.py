from __future__ import annotations

import pytest

from evaluator import evaluate
from planner import Settings, Solved, solve
from tests.planner.problems import cluster, demand, latency_service, problem, profile
from traces.synthesis import Poisson, synthesise


def planned(rate_rps):
    """Plan two services onto one GPU, one with short batches and one with long ones; and simulate the plan."""
    wanted = problem(
        cluster(("a", "gpu", 1)),
        [latency_service("short", ("s", 1.0), deadline_s=0.5), latency_service("long", ("l", 1.0), deadline_s=2.0)],
        [profile("s", base_s=0.01, growth=0.2), profile("l", base_s=0.1, growth=0.4)],
        demand(short=rate_rps, long=rate_rps / 10),
        settings=Settings(blocking="strict"),
    )
    result = solve(wanted)
    assert isinstance(result, Solved)
    loads = {"short": Poisson(rate_rps=rate_rps), "long": Poisson(rate_rps=rate_rps / 10)}
    return result.plan, evaluate(result.plan, wanted.services, synthesise(loads, duration_s=600, seed=1)).summary


@pytest.mark.parametrize("rate_rps", [4.0, 6.0, 10.0])
def test_at_low_load_the_prediction_is_what_the_simulator_finds(rate_rps):
    plan, summary = planned(rate_rps)
    for prediction in plan.predicted:
        simulated = summary.service(prediction.service)
        assert prediction.attainment == pytest.approx(simulated.attainment, abs=0.01)
        assert prediction.latency_s.p99 == pytest.approx(simulated.latency_s.p99, rel=0.3)


@pytest.mark.parametrize("rate_rps", [30.0, 60.0, 100.0])
def test_under_load_the_prediction_errs_on_the_safe_side(rate_rps):
    """Batches grow with the queue, which the theory does not know: it may only be too pessimistic."""
    plan, summary = planned(rate_rps)
    for prediction in plan.predicted:
        simulated = summary.service(prediction.service)
        assert prediction.attainment <= simulated.attainment + 0.01
        assert prediction.latency_s.p99 >= 0.9 * simulated.latency_s.p99
