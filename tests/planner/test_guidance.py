from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.backend import Budget, Solution, solver
from planner.formulation import Formulation
from planner.guidance import Guidance, guidance_of
from planner.objective import tiers, with_kept
from planner.space import PlanningSpace, build_space
from tests.planner.problems import generated


def relaxed(space: PlanningSpace, *, prices: bool = True) -> tuple[Guidance, Solution, Formulation]:
    over = Formulation(space, space.classes)
    model = with_kept(over, tiers(space)[0], ()).relaxed()
    answer = solver("highs").solve(model, Budget(time_limit_s=10))
    assert isinstance(answer, Solution)
    return guidance_of(over, model, answer if prices else replace(answer, prices=None)), answer, over


@pytest.mark.parametrize("seed", range(4))
def test_prices_bound_the_relaxation_as_its_optimum_does(seed: int) -> None:
    """Strong duality: prices times limits, and what variables earn beyond them at their bounds, are the optimum."""
    space = build_space(generated(seed, services=6, nodes=4, load=3.0))
    model = with_kept(Formulation(space, space.classes), tiers(space)[0], ()).relaxed()
    answer = solver("highs").solve(model, Budget(time_limit_s=10))
    assert isinstance(answer, Solution)
    assert answer.prices is not None
    priced = np.bincount(model.column_of, model.value_of * answer.prices[model.row_of], minlength=len(model.variables))
    reduced = model.objective - priced
    limits = np.where(answer.prices > 0, model.row_upper, model.row_lower)
    paid = answer.prices != 0
    ends = np.where(reduced > 1e-9, model.upper, model.lower)
    dual = float(answer.prices[paid] @ limits[paid]) + float(reduced @ ends)
    assert dual == pytest.approx(answer.objective, rel=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), load=st.floats(0.5, 5.0))
def test_what_the_relaxation_uses_is_drawn_every_time_and_loses_nothing(seed: int, load: float) -> None:
    space = build_space(generated(seed, services=5, nodes=3, load=load))
    guidance, answer, over = relaxed(space)
    used = {int(over.pair_option[pair]) for pair in np.flatnonzero(answer.values[over.share] > 1e-6)}
    assert guidance.used == used
    drawn = guidance.draw(np.random.default_rng(seed))
    assert used <= drawn <= used | set(guidance.promising)
    assert len(drawn - used) <= 10


def test_promising_options_are_of_many_services_and_the_first_are_used_ones() -> None:
    space = build_space(generated(2, services=9, nodes=4, load=3.0, batches=(1, 2, 4, 8, 16)))
    guidance, _, _ = relaxed(space)
    services = [int(space.service_of[option]) for option in guidance.promising]
    assert len(set(guidance.promising)) == len(guidance.promising) <= 40
    assert max(services.count(service) for service in set(services)) <= 4
    assert set(guidance.promising[:2]) & guidance.used


def test_without_prices_only_what_is_used_is_known() -> None:
    space = build_space(generated(2, services=5, nodes=3, load=3.0))
    guidance, _, _ = relaxed(space, prices=False)
    assert guidance.used
    assert guidance.promising == ()
    assert guidance.draw(np.random.default_rng(0)) == guidance.used
    assert guidance.with_used([0]).used == guidance.used | {0}
