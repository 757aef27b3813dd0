from __future__ import annotations

import pulp
import pytest

from planner import exact_model
from planner.backend import Budget, Solution, solver
from planner.export import mps_text
from tests.planner.problems import generated


def test_an_exported_model_has_the_same_optimum_in_another_solver(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = exact_model(generated(3, services=3, nodes=2, load=2.0))
    path = tmp_path / "model.mps"
    path.write_text(mps_text(model))
    _, problem = pulp.LpProblem.fromMPS(str(path))
    problem.solve(pulp.COIN_CMD(path=pulp.PULP_CBC_CMD.pulp_cbc_path, msg=False))
    answer = solver("highs").solve(model, Budget(time_limit_s=20))
    assert isinstance(answer, Solution)
    assert -pulp.value(problem.objective) == pytest.approx(answer.objective, rel=1e-6)
    assert f"* v0 {model.variables[0]}" in path.read_text()
