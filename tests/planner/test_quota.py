from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.backend import Budget, Solution, solver
from planner.fairness import fair_sum
from planner.quota import Job, allocate, quota_model, utility_table
from plans.errors import InvalidInput


def jobs(count: int, quota: int, seed: int, load: float = 1.0) -> list[Job]:
    rng = np.random.default_rng(seed)
    work = rng.dirichlet(np.ones(count)) * quota * load
    found = []
    for index in range(count):
        request_s = float(rng.uniform(0.05, 0.3))
        rate, target_s = float(work[index] / request_s), request_s * float(rng.uniform(2, 6))
        found.append(Job(name=f"j{index}", rate_rps=rate, request_s=request_s, target_s=target_s))
    return found


def enumerated(table: np.ndarray, quota: int, goal: str) -> float:
    """Return the best value over every allocation with at least one replica each."""
    count = len(table)
    best = -np.inf
    for replicas in itertools.product(range(1, quota + 1), repeat=count):
        if sum(replicas) <= quota:
            utilities = table[range(count), list(replicas)]
            value = {"sum": utilities.sum(), "max-min": utilities.min(), "fair-sum": fair_sum(utilities)}[goal]
            best = max(best, float(value))
    return best


@pytest.mark.parametrize("goal", ["sum", "max-min", "fair-sum"])
@pytest.mark.parametrize("estimator", ["upper-bound", "mdc", "relaxed-mdc"])
@pytest.mark.parametrize("load", [0.5, 1.1])
def test_the_allocation_is_that_of_brute_force(goal: str, estimator: str, load: float) -> None:
    wanted = jobs(3, 9, seed=3, load=load)
    table = utility_table(wanted, 9, estimator=estimator)  # type: ignore[arg-type]
    found = allocate(wanted, table, 9, goal)  # type: ignore[arg-type]
    assert found.value == pytest.approx(enumerated(table, 9, goal), abs=1e-9)
    assert sum(found.replicas) <= 9
    assert found.utilities == tuple(table[range(3), list(found.replicas)])


@pytest.mark.parametrize("goal", ["sum", "max-min", "fair-sum"])
@pytest.mark.parametrize(("utility", "penalty"), [("power", "none"), ("step", "none"), ("power", "linear")])
def test_the_allocation_is_that_of_the_integer_program(goal: str, utility: str, penalty: str) -> None:
    for seed, load in ((1, 0.6), (2, 1.0)):
        wanted = jobs(10, 40, seed, load)
        table = utility_table(wanted, 40, utility=utility, penalty=penalty)  # type: ignore[arg-type]
        found = allocate(wanted, table, 40, goal)  # type: ignore[arg-type]
        answer = solver("scip").solve(quota_model(wanted, table, 40, goal), Budget(time_limit_s=30))  # type: ignore[arg-type]
        assert isinstance(answer, Solution)
        assert found.value == pytest.approx(answer.objective, abs=1e-6)


def test_without_presolve_highs_agrees_on_the_least_utility() -> None:
    # With its presolve it calls 0.365 optimal here; the greatest least utility is 1.
    wanted = jobs(10, 40, 1, 0.6)
    model = quota_model(wanted, utility_table(wanted, 40), 40, "max-min")
    answer = solver("highs", presolve=False).solve(model, Budget(time_limit_s=30))
    assert isinstance(answer, Solution)
    assert answer.objective == pytest.approx(1.0)


def test_of_equal_utilities_the_fewest_replicas_are_taken() -> None:
    wanted = jobs(4, 400, seed=1, load=0.02)
    table = utility_table(wanted, 400)
    found = allocate(wanted, table, 400)
    assert found.value == pytest.approx(4.0)
    for job, replicas, row in zip(wanted, found.replicas, table, strict=True):
        assert replicas == job.least or row[replicas - 1] < 1.0


def test_a_change_that_costs_more_than_it_gains_is_left() -> None:
    table = np.array([[0.0, 0.50, 0.55], [0.0, 0.50, 0.60]])
    wanted = [
        Job(name=name, rate_rps=1.0, request_s=1.0, target_s=1.0, current=current)
        for name, current in (("a", 2), ("b", 1))
    ]
    assert allocate(wanted, table, 3).replicas == (1, 2)
    assert allocate(wanted, table, 3, change_cost=0.01).replicas == (1, 2)
    assert allocate(wanted, table, 3, change_cost=0.1).replicas == (2, 1)


def test_a_weight_counts_in_the_sum() -> None:
    table = np.array([[0.0, 0.5, 0.9], [0.0, 0.5, 0.95]])
    plain = [Job(name=name, rate_rps=1.0, request_s=1.0, target_s=1.0) for name in "ab"]
    heavy = [Job(name="a", rate_rps=1.0, request_s=1.0, target_s=1.0, weight=3.0), plain[1]]
    assert allocate(plain, table, 3).replicas == (1, 2)
    assert allocate(heavy, table, 3).replicas == (2, 1)


def test_more_least_replicas_than_the_quota_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="at most the quota of 2"):
        allocate(jobs(3, 9, 1), np.zeros((3, 3)), 2)


@given(seed=st.integers(0, 10**6), quota=st.integers(3, 12), load=st.floats(0.1, 2.0))
def test_one_replica_more_never_loses(seed: int, quota: int, load: float) -> None:
    wanted = jobs(3, quota, seed, load)
    for goal in ("sum", "max-min", "fair-sum"):
        values = [allocate(wanted, utility_table(wanted, size), size, goal).value for size in (quota, quota + 1)]  # type: ignore[arg-type]
        assert values[1] >= values[0] - 1e-9
