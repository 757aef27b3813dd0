from __future__ import annotations

import numpy as np

from planner import Infeasible, NoPlanFound, Settings, solve
from planner.greedy import greedy
from planner.space import build_space
from tests.planner.problems import cluster, demand, latency_service, problem, profile


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


def test_a_budget_below_the_minimum_replicas_is_named() -> None:
    (found,) = conflicts(latency_service("s", ("m", 1.0), min_replicas=2, max_gpus=1), s=1.0)
    assert "max_gpus 1" in found.detail
    assert "at most 1 fit" in found.detail


def test_a_pin_that_leaves_too_few_devices_is_named() -> None:
    (found,) = conflicts(latency_service("s", ("m", 1.0), min_replicas=2, pin=("n0",)), s=1.0)
    assert "pin n0" in found.detail


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
