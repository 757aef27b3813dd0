"""CP-SAT on a grid: what the grid may not lose, and the same optima as HiGHS."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.backend import Budget, InfeasibleModel, NothingFound, Solution, solver
from planner.cp_sat_backend import on_a_grid
from planner.linear import LinearModel, ModelBuilder
from planner.planning import exact_model
from tests.planner.test_columns import mixed


def agrees_with_highs(seed: int) -> None:
    model = exact_model(mixed(seed))
    ours, theirs = (solver(name).solve(model, Budget(time_limit_s=20.0)) for name in ("cp-sat", "highs"))
    assert type(ours) is type(theirs)
    if isinstance(ours, Solution) and isinstance(theirs, Solution):
        assert ours.objective == pytest.approx(theirs.objective, rel=1e-4, abs=1e-6)
        sign = 1.0 if model.maximise else -1.0
        assert sign * ours.bound >= sign * theirs.objective - 1e-6 * abs(theirs.objective)
        assert model.violation(ours.values) <= 1e-6


@pytest.mark.parametrize("seed", range(8))
def test_cp_sat_agrees_with_highs(seed: int) -> None:
    agrees_with_highs(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8, 60))
def test_cp_sat_agrees_with_highs_on_more_problems(seed: int) -> None:
    agrees_with_highs(seed)


def random_model(seed: int) -> tuple[LinearModel, np.ndarray]:
    """Return a model and a point that it allows."""
    rng = np.random.default_rng(seed)
    builder = ModelBuilder()
    upper = rng.uniform(0.5, 5.0, 6) * 10.0 ** rng.integers(-2, 4, 6)
    whole = builder.add_variables([f"n{i}" for i in range(3)], upper=np.ceil(upper[:3]), integer=True)
    parts = builder.add_variables([f"v{i}" for i in range(3)], upper=upper[3:], integer=False)
    point = np.concatenate([np.floor(rng.uniform(0, 1, 3) * np.ceil(upper[:3])), rng.uniform(0, 1, 3) * upper[3:]])
    columns = np.concatenate([whole, parts])
    for row in range(4):
        values = rng.normal(size=6) * 10.0 ** rng.integers(-3, 4, 6)
        activity = float(values @ point)
        lower = activity if row % 2 else -np.inf
        builder.add_row(f"r{row}", columns, values, lower=lower, upper=activity)
    return builder.build().with_objective(rng.normal(size=6), maximise=bool(seed % 2)), point


@given(seed=st.integers(0, 10**6))
def test_whatever_a_model_allows_is_allowed_on_the_grid_too(seed: int) -> None:
    """Law: so infeasibility on the grid is a proof, and its bound, widened, is one."""
    model, point = random_model(seed)
    gridded, step, widened = on_a_grid(model)
    on_grid = np.minimum(np.floor((point - model.lower) / step), gridded.upper)
    activity = np.zeros(len(gridded.rows))
    np.add.at(activity, gridded.row_of, gridded.value_of * on_grid[gridded.column_of])
    assert (activity >= gridded.row_lower).all()
    assert (activity <= gridded.row_upper).all()
    moved = model.objective_of(point) - gridded.objective_of(on_grid) - float(model.objective @ model.lower)
    assert abs(moved) <= widened * (1 + 1e-9) + 1e-9


def test_what_cannot_be_is_proven_and_what_has_no_bound_is_declined() -> None:
    builder = ModelBuilder()
    whole = builder.add_variables(["n"], upper=np.array([3.0]), integer=True)
    builder.add_row("half", whole, np.array([2.0]), lower=3.0, upper=3.0)
    assert isinstance(solver("cp-sat").solve(builder.build(), Budget(time_limit_s=5.0)), InfeasibleModel)
    builder.add_variables(["v"], upper=np.array([np.inf]), integer=False)
    assert isinstance(solver("cp-sat").solve(builder.build(), Budget(time_limit_s=5.0)), NothingFound)
