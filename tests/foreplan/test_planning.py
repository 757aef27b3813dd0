"""Plans as the program makes them: what they predict is what the simulator finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import evaluator
from executor.gateway import GatewayConfig
from foreplan import planning
from foreplan.planning import Inputs, make_plan
from foreplan.polish import PolishSettings
from planner import Problem, Solved, solve
from plans.plan import Plan
from tests.planner.problems import QUIET, featured, generated
from tests.planner.test_generation import chat


def made(wanted: Problem) -> Plan:
    inputs = Inputs(cluster=wanted.cluster, services=wanted.services, profiles=wanted.profiles, demand=wanted.demand)
    result = make_plan(inputs, QUIET)
    assert isinstance(result, Solved)
    return result.plan


def test_a_generation_service_is_predicted_by_simulating_its_tokens() -> None:
    wanted = chat(100, 0.5, 0.03, rate_rps=3.0)
    bound = solve(wanted)
    assert isinstance(bound, Solved)
    (found,), (theory,) = made(wanted).predicted, bound.plan.predicted
    assert found.attainment == pytest.approx(theory.attainment, abs=0.02)
    assert found.latency_s != theory.latency_s
    # A lone answer takes 20 ms and 99 steps of at least 12.3 ms; no more than the SLO leaves to all but a few.
    assert 0.02 + 99 * 0.0123 < found.latency_s.p50 < 0.5 + 99 * 0.03


def test_a_generation_service_of_unknown_tokens_keeps_the_bound() -> None:
    wanted = chat(100, 0.5, 0.03, rate_rps=3.0)
    (asked,) = wanted.demand.services
    demand = wanted.demand.model_copy(update={"services": (asked.model_copy(update={"output_tokens": None}),)})
    unknown = Problem(
        cluster=wanted.cluster,
        services=wanted.services,
        profiles=wanted.profiles,
        demand=demand,
        settings=wanted.settings,
    )
    bound = solve(unknown)
    assert isinstance(bound, Solved)
    assert made(unknown).predicted == bound.plan.predicted


def test_a_plan_carries_the_workflows_that_agents_shall_run() -> None:
    wanted = featured(generated(3), "workflow")
    assert wanted.services.workflows
    assert made(wanted).workflows == wanted.services.workflows


def test_predictions_are_routed_as_gateways_route_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """With polish and without: one plan has one story."""
    routings: list[str] = []
    simulate = evaluator.evaluate

    def noted(*documents: Any, settings: evaluator.Settings, **options: Any) -> evaluator.Evaluation:
        routings.append(settings.routing)
        return simulate(*documents, settings=settings, **options)

    monkeypatch.setattr(planning, "evaluate", noted)
    monkeypatch.setattr(evaluator, "evaluate", noted)
    wanted = generated(1, nodes=1, services=2)
    inputs = Inputs(cluster=wanted.cluster, services=wanted.services, profiles=wanted.profiles, demand=wanted.demand)
    result = make_plan(inputs, QUIET, PolishSettings(time_s=1e6, candidates=1, traces=3))
    assert isinstance(result, Solved)
    assert result.plan.polish is not None
    default = GatewayConfig(listen="127.0.0.1:0", state_dir=Path()).routing
    assert routings == [default] * 4  # the solver's plan, and the polished one on each trace kept out of the search
