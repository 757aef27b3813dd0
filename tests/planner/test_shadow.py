"""Prices of GPUs and of budgets are what solving again with one more says."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import pytest

from planner import Problem
from planner.backend import Budget, Solution, solver
from planner.formulation import Formulation
from planner.objective import GOODPUT, with_kept
from planner.shadow import shadow_prices
from planner.space import build_space
from planner.whynot import budget_price
from plans.cluster import Node, NodeGpus
from tests.planner.problems import generated

BUDGET = Budget(time_limit_s=20)


def relaxed(wanted: Problem) -> float:
    """Return the relaxation over classes, built from the documents."""
    space = build_space(wanted)
    model = with_kept(Formulation(space, space.classes), GOODPUT, ()).relaxed()
    answer = solver("scip").solve(model, BUDGET)
    assert isinstance(answer, Solution)
    return answer.objective


def with_one_more(wanted: Problem, gpu_type: str) -> Problem:
    """Return ``wanted`` with one more node of one GPU, in the cluster's document."""
    node = Node(name="another", gpus=NodeGpus(type=gpu_type, count=1))
    return replace(wanted, cluster=wanted.cluster.model_copy(update={"nodes": (*wanted.cluster.nodes, node)}))


@pytest.mark.parametrize("seed", range(6))
def test_a_gpu_of_each_type_is_worth_what_the_relaxation_gains_with_one_more_in_the_cluster(seed: int) -> None:
    wanted = generated(seed, services=3, nodes=3, types=2, load=(1.5, 4.0)[seed % 2])
    prices = shadow_prices(build_space(wanted), solver("highs"), time.monotonic, time.monotonic() + 10.0)
    assert set(prices) == set(wanted.cluster.gpu_types)
    base = relaxed(wanted)
    for gpu_type, price in prices.items():
        assert price == pytest.approx(relaxed(with_one_more(wanted, gpu_type)) - base, rel=1e-5, abs=1e-5)


def test_types_that_time_does_not_suffice_for_are_left_out() -> None:
    space = build_space(generated(1, services=3, nodes=3, types=2, load=4.0))
    for looks, priced in ((1, 0), (2, 1), (3, 2)):
        ticks = itertools.count()
        prices = shadow_prices(space, solver("highs"), lambda ticks=ticks: float(next(ticks)), looks - 0.5)  # type: ignore[misc]
        assert len(prices) == priced


@pytest.mark.parametrize("seed", range(4))
def test_a_gpu_of_a_budget_is_worth_what_the_relaxation_gains_with_a_larger_one(seed: int) -> None:
    wanted = generated(seed, services=3, nodes=4, load=4.0)
    services = list(wanted.services.services)
    services[0] = services[0].model_copy(update={"max_gpus": 1, "min_replicas": 0})
    tight = replace(wanted, services=wanted.services.model_copy(update={"services": tuple(services)}))
    services[0] = services[0].model_copy(update={"max_gpus": 2})
    loose = replace(wanted, services=wanted.services.model_copy(update={"services": tuple(services)}))
    price = budget_price(build_space(tight), 0, solver("highs"), BUDGET)
    assert price == pytest.approx(relaxed(loose) - relaxed(tight), rel=1e-5, abs=1e-5)
