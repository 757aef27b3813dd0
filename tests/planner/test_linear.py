from __future__ import annotations

import numpy as np
import pytest

from planner.linear import LinearModel, ModelBuilder


def knapsack() -> LinearModel:
    """max 5a + 4b + 3c, 2a + 3b + c <= 5, 4a + b + 2c <= 11, c >= 1; c continuous."""
    builder = ModelBuilder()
    whole = builder.add_variables(["a", "b"], upper=np.array([3.0, np.inf]), integer=True)
    part = builder.add_variables(["c[node-a/0]"], upper=np.array([4.0]), integer=False)
    columns = np.concatenate([whole, part])
    builder.add_row("first", columns, [2.0, 3.0, 1.0], upper=5.0)
    builder.add_row("second", columns, [4.0, 1.0, 2.0], upper=11.0)
    builder.add_row("third", part, [1.0], lower=1.0)
    return builder.build().with_objective(np.array([5.0, 4.0, 3.0]), maximise=True)


@pytest.mark.parametrize(
    ("values", "violation"),
    [
        ([2.0, 0.0, 1.0], 0.0),
        ([2.0, 0.0, 0.0], 1.0),
        ([-0.5, 0.0, 1.0], 0.5),
        ([3.5, 0.0, 1.0], 5.0),
        ([0.25, 0.0, 1.0], 0.25),
    ],
    ids=["feasible", "row below", "bound", "row above", "fraction"],
)
def test_the_violation_is_that_of_the_worst_broken_promise(values: list[float], violation: float) -> None:
    assert knapsack().violation(np.array(values)) == pytest.approx(violation)


def test_the_relaxation_forgets_integrality_only() -> None:
    assert knapsack().relaxed().violation(np.array([0.25, 0.0, 1.0])) == 0.0


def test_a_row_can_be_added_without_touching_the_model() -> None:
    model = knapsack()
    more = model.with_row("fourth", np.array([0.0, 1.0, 0.0]), lower=1.0)
    values = np.array([0.0, 0.0, 1.0])
    assert more.violation(values) == 1.0
    assert model.violation(values) == 0.0


def test_zero_coefficients_are_not_stored() -> None:
    builder = ModelBuilder()
    columns = builder.add_variables(["a", "b"], upper=np.ones(2), integer=False)
    builder.add_row("row", columns, [0.0, 1.0], upper=1.0)
    assert builder.build().column_of.tolist() == [1]


def test_lp_text_states_the_whole_model() -> None:
    assert knapsack().lp_text() == (
        "Maximize\n objective: 5 a + 4 b + 3 c(node~a#0)\nSubject To\n"
        " first: 2 a + 3 b + 1 c(node~a#0) <= 5\n second: 4 a + 1 b + 2 c(node~a#0) <= 11\n"
        " third: 1 c(node~a#0) >= 1\nBounds\n 0 <= a <= 3\n 0 <= b\n 0 <= c(node~a#0) <= 4\nGenerals\n a\n b\nEnd\n"
    )


def test_no_line_of_lp_text_is_too_long_for_its_readers() -> None:
    builder = ModelBuilder()
    columns = builder.add_variables([f"a_rather_long_name_{i}" for i in range(60)], upper=np.ones(60), integer=True)
    builder.add_row("row", columns, np.arange(60) - 30.5, lower=-1.0, upper=1.0)
    text = builder.build().with_objective(np.ones(60), maximise=False).lp_text()
    assert max(map(len, text.splitlines())) <= 255
    assert text.count("row_at_least:") == 1
