from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from planner import Infeasible, NoPlanFound, Problem, Settings, Solved, solve
from planner.backend import Budget, Solution, solver
from planner.conflict import explain_infeasible, only
from planner.formulation import Formulation
from planner.greedy import greedy
from planner.space import build_space
from plans.service import Services, Spread
from tests.planner.problems import QUIET, cluster, demand, latency_service, problem, profile


def conflicts(*services, nodes: int = 2, profiles=None, **rates: float) -> tuple:  # type: ignore[no-untyped-def]
    wanted = problem(
        cluster(*((f"n{index}", "gpu", 1) for index in range(nodes))),
        list(services),
        profiles or [profile("m"), profile("fat", weights_gib=10.0)],
        demand(**rates),
    )
    result = solve(wanted)
    assert isinstance(result, Infeasible), result
    return result.conflicts


def test_a_service_that_cannot_have_its_replicas_alone_is_named_with_the_limit() -> None:
    (found,) = conflicts(latency_service("s", ("m", 1.0), min_replicas=3), latency_service("t", ("m", 1.0)), s=1.0)
    assert (found.service, found.field) == ("s", "min_replicas")
    assert "needs 3 replicas" in found.detail
    assert "at most 2 fit" in found.detail
    assert str(found).startswith("s.min_replicas: ")


def test_a_budget_below_the_minimum_replicas_is_named_beside_them() -> None:
    found = conflicts(latency_service("s", ("m", 1.0), min_replicas=2, max_gpus=1), s=1.0)
    assert {each.field: each.detail for each in found} == {
        "min_replicas": "needs 2 replicas; at most 1 fit beside the others named",
        "max_gpus": "max_gpus 1",
    }


def test_a_pin_that_leaves_too_few_devices_is_named() -> None:
    found = conflicts(latency_service("s", ("m", 1.0), min_replicas=2, pin=("n0",)), s=1.0)
    assert {each.field for each in found} == {"min_replicas", "pin"}
    assert any(each.detail == "pin n0" for each in found)


def test_a_deadline_that_nothing_meets_is_the_reason() -> None:
    (found,) = conflicts(latency_service("s", ("m", 1.0), min_replicas=1, deadline_s=0.001), s=1.0)
    assert "at most 0 fit" in found.detail
    assert "deadline" in found.detail


def test_services_that_exclude_each_other_are_named_together_and_nobody_else() -> None:
    found = conflicts(
        latency_service("easy", ("m", 1.0), min_replicas=1),
        latency_service("one", ("fat", 1.0), min_replicas=1, pin=("n0",)),
        latency_service("two", ("fat", 1.0), min_replicas=1, pin=("n0",)),
        easy=1.0,
    )
    assert {each.service for each in found} == {"one", "two"}
    assert {each.field for each in found} == {"min_replicas", "pin"}


def test_out_of_time_before_any_plan_is_neither_a_plan_nor_infeasible() -> None:
    # Twelve models fill four GPUs to the last byte: greedy fails, and no time is left to find out whether any fit.
    rng = np.random.default_rng(0)
    weights_gib = rng.uniform(2.5, 7.0, 12)
    weights_gib *= 60.0 / weights_gib.sum()
    wanted = problem(
        cluster(*((f"n{index}", "gpu", 1) for index in range(4))),
        [latency_service(f"s{index}", (f"m{index}", 1.0), min_replicas=1) for index in range(12)],
        [profile(f"m{index}", weights_gib=float(size), batches=(1,)) for index, size in enumerate(weights_gib)],
        demand(),
        settings=Settings(time_limit_s=1e-6),
    )
    assert greedy(build_space(wanted)) is None
    result = solve(wanted)
    assert isinstance(result, NoPlanFound)
    assert "did not suffice" in result.detail


def over_constrained(name: str) -> Problem:
    """Return an infeasible problem for each kind of limit."""
    fields: dict[str, object] = {"min_replicas": 2}
    settings = QUIET
    nodes = [("n0", "gpu", 1), ("n1", "gpu", 1)]
    rate = 1.0
    if name == "budget":
        fields["max_gpus"] = 1
    elif name == "forbid":
        fields["forbid"] = ("n1",)
    elif name == "accuracy":
        fields = {"min_accuracy": 0.8, "min_replicas": 1, "pin": ("n0",), "forbid": ("n0",)}
    elif name == "spread":
        fields = {"spread": Spread(over="node", min_domains=2), "pin": ("n0",)}
    elif name == "attainment":
        settings, rate = replace(QUIET, attainment=0.9), 1000.0
        fields = {}
    elif name == "loss":
        settings = replace(QUIET, attainment=0.9, keep_after_loss=0.9)
        fields = {"max_gpus": 1}
    services = [latency_service("s", ("m", 0.9), **fields), latency_service("t", ("m", 0.9))]
    return problem(cluster(*nodes), services, [profile("m")], demand(s=rate, t=1.0), settings=settings)


CASES = ("budget", "forbid", "accuracy", "spread", "attainment", "loss")


@pytest.mark.parametrize("name", CASES)
def test_the_set_conflicts_and_without_any_member_it_does_not(name: str) -> None:
    wanted = over_constrained(name)
    result = solve(wanted)
    assert isinstance(result, Infeasible)
    found = [(each.service, each.field) for each in result.conflicts]
    assert found

    def feasible(kept: list[tuple[str, str]]) -> bool:
        space = only(wanted, kept)
        answer = solver("scip").solve(Formulation(space, space.singles).model, Budget(time_limit_s=20))
        return isinstance(answer, Solution)

    assert not feasible(found)
    for member in found:
        assert feasible([each for each in found if each != member]), member


@pytest.mark.parametrize("name", ["budget", "attainment"])
def test_what_the_least_relaxation_leaves_can_be_planned(name: str) -> None:
    wanted = over_constrained(name)
    conflict, relaxation = explain_infeasible(wanted, clock=time.monotonic, time_limit_s=20.0)
    assert conflict
    assert relaxation
    services, settings = list(wanted.services.services), wanted.settings
    for each in relaxation:
        if each.field == "attainment":
            settings = replace(settings, attainment=each.possible)
        else:
            position = next(i for i, service in enumerate(services) if service.name == each.service)
            services[position] = services[position].model_copy(update={each.field: round(each.possible)})
    relaxed = replace(wanted, services=Services(services=tuple(services)), settings=settings)
    assert isinstance(solve(relaxed), Solved)


def test_the_relaxation_is_as_small_as_it_can_be() -> None:
    (step,) = explain_infeasible(over_constrained("budget"), clock=time.monotonic, time_limit_s=20.0)[1]
    # One replica of two less is half of what is asked; one GPU more is as much again as the budget.
    assert (step.field, step.stated, step.possible) == ("min_replicas", 2.0, 1.0)
    assert str(step) == "s.min_replicas: 2 -> 1"


def test_a_feasible_problem_has_nothing_to_relax() -> None:
    wanted = problem(cluster(("a", "gpu", 1)), [latency_service("s", ("m", 1.0))], [profile("m")], demand(s=1.0))
    assert explain_infeasible(wanted, clock=time.monotonic, time_limit_s=5.0) == ((), ())
