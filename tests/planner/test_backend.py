"""One contract for every solver."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.backend import Budget, InfeasibleModel, NothingFound, Solution, Solver, local_solver, solver
from planner.linear import LinearModel, ModelBuilder
from planner.pulp_backend import CbcSolver
from planner.settings import Backend
from tests.planner.test_linear import knapsack

BACKENDS: tuple[Backend, ...] = ("highs", "scip", "cbc")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Solver:
    return solver(request.param)


def hard(size: int = 60, seed: int = 0) -> LinearModel:
    """Return a market-split model, which no solver closes quickly."""
    rng = np.random.default_rng(seed)
    builder = ModelBuilder()
    columns = builder.add_variables([f"x{i}" for i in range(size)], upper=np.ones(size), integer=True)
    slack = builder.add_variables([f"s{i}" for i in range(12)], upper=np.full(6, 1e4).repeat(2), integer=False)
    for row in range(6):
        weights = rng.integers(0, 100, size).astype(float)
        pair = slack[2 * row : 2 * row + 2]
        target = float(weights.sum() // 2)
        builder.add_row(
            f"r{row}",
            np.concatenate([columns, pair]),
            np.concatenate([weights, [1.0, -1.0]]),
            lower=target,
            upper=target,
        )
    model = builder.build()
    objective = np.zeros(len(model.variables))
    objective[slack] = 1.0
    return model.with_objective(objective, maximise=False)


def test_the_optimum_is_found_and_proven(backend: Solver) -> None:
    answer = backend.solve(knapsack(), Budget(time_limit_s=10))
    assert isinstance(answer, Solution)
    assert answer.objective == pytest.approx(14.0)  # a = 1, b = 0, c = 3
    assert answer.bound == pytest.approx(14.0)
    # CBC now and then sits out its time limit although its log has the proof: seen twice, under coverage.
    assert answer.stopped in (("optimal", "limit") if isinstance(backend, CbcSolver) else ("optimal",))
    assert knapsack().violation(answer.values) < 1e-6


def test_minimising_is_as_good_as_maximising(backend: Solver) -> None:
    model = knapsack().with_objective(np.array([1.0, 1.0, 2.0]), maximise=False)
    answer = backend.solve(model, Budget(time_limit_s=10))
    assert isinstance(answer, Solution)
    assert answer.objective == pytest.approx(2.0)
    assert answer.bound == pytest.approx(2.0)


def test_a_contradiction_is_infeasible(backend: Solver) -> None:
    model = knapsack().with_row("never", np.array([1.0, 1.0, 1.0]), lower=100.0)
    assert isinstance(backend.solve(model, Budget(time_limit_s=10)), InfeasibleModel)


def test_integrality_alone_can_be_infeasible(backend: Solver) -> None:
    model = knapsack().with_row("half", np.array([1.0, 0.0, 0.0]), lower=0.4, upper=0.6)
    assert isinstance(backend.solve(model, Budget(time_limit_s=10)), InfeasibleModel)
    assert isinstance(backend.solve(model.relaxed(), Budget(time_limit_s=10)), Solution)


def test_a_model_without_variables_is_judged_by_its_rows(backend: Solver) -> None:
    empty = ModelBuilder()
    assert isinstance(backend.solve(empty.build(), Budget(time_limit_s=1)), Solution)
    empty.add_row("impossible", [], [], lower=1.0)
    assert isinstance(backend.solve(empty.build(), Budget(time_limit_s=1)), InfeasibleModel)


def test_out_of_time_is_a_result_with_an_honest_bound(backend: Solver) -> None:
    model = hard()
    answer = backend.solve(model, Budget(time_limit_s=0.3))
    if isinstance(answer, NothingFound):
        assert answer.bound is None or answer.bound <= 1e-6 + 1e4
    else:
        assert isinstance(answer, Solution)
        assert answer.stopped == "limit"
        assert answer.bound + 1e-6 >= 0.0
        assert answer.bound <= answer.objective
        assert model.violation(answer.values) < 1e-5


def test_a_hint_is_never_made_worse(backend: Solver) -> None:
    model = hard()
    hint = np.zeros(len(model.variables))
    activity = model.row_lower
    hint[-12::2] = activity  # all weight on the slack
    assert model.violation(hint) == 0.0
    answer = backend.solve(model, Budget(time_limit_s=0.5), hint)
    assert isinstance(answer, Solution)
    assert answer.objective <= model.objective_of(hint) + 1e-6


def test_nothing_reaches_standard_output(backend: Solver, capfd: pytest.CaptureFixture[str]) -> None:
    backend.solve(knapsack(), Budget(time_limit_s=10))
    assert capfd.readouterr().out == ""


def test_what_native_code_prints_is_discarded_and_nothing_else() -> None:
    script = (
        "import ctypes\nfrom planner.quiet import native_output_discarded\nprint('answer')\n"
        "with native_output_discarded():\n    ctypes.CDLL(None).puts(b'noise')\nprint('more')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "answer\nmore\n"
    assert done.stderr == ""


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_all_solvers_agree_on_random_models(seed: int) -> None:
    rng = np.random.default_rng(seed)
    builder = ModelBuilder()
    whole = builder.add_variables([f"x{i}" for i in range(5)], upper=np.full(5, 3.0), integer=True)
    part = builder.add_variables([f"y{i}" for i in range(3)], upper=np.full(3, 2.0), integer=False)
    columns = np.concatenate([whole, part])
    for row in range(4):
        builder.add_row(f"r{row}", columns, rng.uniform(0.1, 2.0, 8), upper=float(rng.uniform(2, 8)))
    model = builder.build().with_objective(rng.uniform(0.1, 3.0, 8), maximise=True)
    answers = [each.solve(model, Budget(time_limit_s=10)) for each in (*map(solver, BACKENDS), local_solver("highs"))]
    objectives = [answer.objective for answer in answers if isinstance(answer, Solution)]
    assert objectives == pytest.approx([objectives[0]] * 4, rel=1e-6)


def test_importing_the_planner_imports_no_solver() -> None:
    script = (
        "import sys, planner; print([name for name in ('ortools', 'pulp', 'torch', 'numba') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", ["highs", "scip"])
def test_prices_are_told_of_models_without_integers_only(name: Backend) -> None:
    assert getattr(solver(name).solve(knapsack(), Budget(time_limit_s=10)), "prices", None) is None
    relaxed = solver("highs").solve(knapsack().relaxed(), Budget(time_limit_s=10))
    assert isinstance(relaxed, Solution)
    assert relaxed.prices is not None
    assert relaxed.prices.shape == (len(knapsack().rows),)


def test_a_model_that_is_none_is_not_taken_for_one_without_answer() -> None:
    model = knapsack()
    broken = model.with_bounds(np.full(len(model.variables), np.nan), model.upper)
    with pytest.raises(Exception, match="NaN"):
        solver("highs").solve(broken, Budget(time_limit_s=1))


def test_a_cbc_that_dies_has_found_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulp.PULP_CBC_CMD, "pulp_cbc_path", "/bin/false")
    answer = CbcSolver().solve(knapsack(), Budget(time_limit_s=5.0))
    assert isinstance(answer, NothingFound)
    assert answer.detail.startswith("cbc failed")
