"""Choices of kinds for all GPUs: no mapping of a choice exceeds its bound, and none is forgotten."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.backend import Budget, Solution, solver
from planner.client_models import counts_model, places_model
from planner.client_patterns import Kinds, PatternMaster, reachable_fps
from planner.kind_choices import promising_choices, whole_bounds
from planner.linear import LinearModel

GPUS = 2


def random_kinds(seed: int, *, kinds: int = 4, clients: int = 6) -> Kinds:
    rng = np.random.default_rng(seed)
    return Kinds(
        accuracy=rng.uniform(0.4, 0.9, kinds),
        throughput=rng.uniform(20.0, 70.0, kinds),
        eligible=rng.random((kinds, clients)) < 0.6,
        fps=rng.choice([5.0, 10.0, 12.5, 25.0, 30.0], clients),
    )


def best_of(kinds: Kinds, chosen: tuple[int, ...]) -> float:
    """Return the value of the best mapping with GPUs of the kinds ``chosen``, by enumeration of places."""
    best = 0.0
    options = [
        [-1, *(gpu for gpu, kind in enumerate(chosen) if kinds.eligible[kind, client])]
        for client in range(len(kinds.fps))
    ]
    for places in itertools.product(*options):
        served = [[client for client, place in enumerate(places) if place == gpu] for gpu in range(len(chosen))]
        if all(kinds.fps[each].sum() <= kinds.throughput[kind] for kind, each in zip(chosen, served, strict=True)):
            best = max(best, sum(kinds.value(kind, each) for kind, each in zip(chosen, served, strict=True)))
    return best


def every_choice(kinds: Kinds) -> list[tuple[int, ...]]:
    falling = np.argsort(-kinds.accuracy, kind="stable").tolist()
    return list(itertools.combinations_with_replacement(falling, GPUS))


def optimum(model: LinearModel) -> float:
    answer = solver("highs").solve(model, Budget(time_limit_s=20.0))
    assert isinstance(answer, Solution)
    return answer.objective


@pytest.mark.parametrize("most", [1, 3, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_every_choice_is_bounded_whether_it_is_listed_or_not(seed: int, most: int) -> None:
    """Law, whatever the prices: a listed choice reaches at most its bound, any other at most that of the others."""
    kinds = random_kinds(seed)
    best = {chosen: best_of(kinds, chosen) for chosen in every_choice(kinds)}
    prices = np.random.default_rng(seed).uniform(0.0, 10.0, len(kinds.fps))
    for value in (0.0, 0.9 * max(best.values()), max(best.values())):
        choices = promising_choices(kinds, GPUS, prices, value, most=most)
        assert len(choices.bound) <= most
        assert choices.others >= value
        assert (np.diff(choices.bound) <= 0).all()
        listed = dict(zip(map(tuple, choices.kinds.tolist()), choices.bound.tolist(), strict=True))
        assert listed.keys() <= best.keys()
        assert all(reached <= listed.get(chosen, choices.others) for chosen, reached in best.items())


def test_prices_of_the_patterns_leave_fewer_choices() -> None:
    kinds = random_kinds(3, kinds=8, clients=10)
    master = PatternMaster(kinds, GPUS)
    master.converge(lambda: 0.0, 1.0, gap=0.0)
    value = 0.95 * master.bound
    few = promising_choices(kinds, GPUS, master.prices, value, most=1000)
    many = promising_choices(kinds, GPUS, np.zeros(10), value, most=1000)
    assert 0 < len(few.bound) <= len(many.bound)
    assert few.others == many.others == value


@given(st.integers(0, 10_000))
def test_the_cuts_equal_the_linear_relaxation(seed: int) -> None:
    kinds = random_kinds(seed, clients=7)
    kinds = Kinds(
        accuracy=kinds.accuracy, throughput=reachable_fps(kinds), eligible=kinds.eligible & kinds.able, fps=kinds.fps
    )
    chosen = np.sort(np.random.default_rng(seed).integers(0, 4, 3))
    chosen = chosen[np.argsort(-kinds.accuracy[chosen], kind="stable")]
    model, _, _ = places_model(kinds, chosen)
    relaxed = optimum(model.relaxed()) if model.variables else 0.0
    assert whole_bounds(kinds, chosen[None, :])[0] == pytest.approx(relaxed, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_the_models_agree_with_enumeration(seed: int) -> None:
    """Whole clients on known GPUs are exact; counts with clients in pieces are a bound on every choice."""
    kinds = random_kinds(seed)
    best = {chosen: best_of(kinds, chosen) for chosen in every_choice(kinds)}
    for chosen, reached in best.items():
        model, gpu_of, client_of = places_model(kinds, np.array(chosen))
        assert optimum(model) == pytest.approx(reached)
        assert len(gpu_of) == len(client_of) == len(model.variables)
    assert optimum(counts_model(kinds, GPUS, np.arange(4))) >= max(best.values()) - 1e-6


def test_with_too_many_different_kinds_the_prices_alone_bound() -> None:
    kinds = random_kinds(1, kinds=11)
    falling = np.argsort(-kinds.accuracy, kind="stable")
    assert whole_bounds(kinds, falling[None, :]).tolist() == [np.inf]
    assert whole_bounds(kinds, falling[None, :10])[0] < np.inf
