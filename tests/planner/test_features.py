"""Every feature of the model against enumeration, and against another solver."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner import Infeasible, Solved, solve
from tests.planner.brute_force import best_goodput
from tests.planner.problems import FEATURES, featured, generated

ENUMERATED = tuple(name for name in FEATURES if name not in ("cost", "scenarios"))


@pytest.mark.parametrize("feature", ENUMERATED)
@pytest.mark.parametrize("seed", range(2))
def test_brute_force_agrees_with_every_feature(feature: str, seed: int) -> None:
    shape = ({"services": 3, "nodes": 2}, {"services": 2, "nodes": 3})[seed]
    wanted = featured(generated(40 + seed, load=2.5, batches=(4,), **shape), feature)  # type: ignore[arg-type]
    best = best_goodput(wanted)
    result = solve(wanted)
    if best is None:
        assert isinstance(result, Infeasible)
        return
    assert isinstance(result, Solved)
    assert result.plan.solver.objective == pytest.approx(best, rel=1e-5, abs=1e-5)
    assert result.plan.solver.bound == pytest.approx(best, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("feature", FEATURES)
def test_highs_and_cbc_agree_on_every_feature(feature: str) -> None:
    wanted = featured(generated(70, services=3, nodes=3, gpus=1, load=4.0, batches=(2, 8)), feature)
    results = [solve(replace(wanted, settings=replace(wanted.settings, backend=name))) for name in ("highs", "cbc")]  # type: ignore[arg-type]
    assert type(results[0]) is type(results[1])
    plans = [result.plan for result in results if isinstance(result, Solved)]
    for plan in plans:
        assert plan.solver.gap <= 1e-5
    if plans:
        assert plans[0].solver.objective == pytest.approx(plans[1].solver.objective, rel=1e-5, abs=1e-6)
