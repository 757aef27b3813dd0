"""Patterns of one GPU: knapsacks, the program over them, and what follows from its prices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.client_annealing import annealed
from planner.client_patterns import Kinds, Pattern, PatternMaster, best_patterns, reachable_fps


def random_kinds(seed: int, *, kinds: int = 3, clients: int = 6) -> Kinds:
    rng = np.random.default_rng(seed)
    return Kinds(
        accuracy=rng.uniform(0.4, 0.9, kinds),
        throughput=rng.uniform(20.0, 70.0, kinds),
        eligible=rng.random((kinds, clients)) < 0.7,
        fps=rng.choice([5.0, 10.0, 12.5, 25.0, 30.0], clients),
    )


def subsets(kinds: Kinds, kind: int) -> list[tuple[int, ...]]:
    able = np.flatnonzero(kinds.eligible[kind]).tolist()
    every = itertools.chain.from_iterable(itertools.combinations(able, size) for size in range(len(able) + 1))
    return [each for each in every if kinds.fps[list(each)].sum() <= kinds.throughput[kind]]


def best_mapping(kinds: Kinds, gpus: int) -> float:
    """Return the value of the best mapping, by enumeration over patterns."""
    best = {(): 0.0}
    for _ in range(gpus):
        grown = dict(best)
        for served, value in best.items():
            for kind in range(len(kinds.accuracy)):
                for pattern in subsets(kinds, kind):
                    if not set(pattern) & set(served):
                        key = tuple(sorted((*served, *pattern)))
                        grown[key] = max(grown.get(key, 0.0), value + kinds.value(kind, pattern))
        best = grown
    return max(best.values())


@given(st.integers(0, 10_000))
def test_of_every_kind_the_clients_worth_most_are_found(seed: int) -> None:
    kinds = random_kinds(seed)
    prices = np.random.default_rng(seed + 1).uniform(0.0, 15.0, len(kinds.fps))
    chosen, value, bound = best_patterns(kinds, prices)
    for kind in range(3):
        worth = {each: kinds.value(kind, each) - prices[list(each)].sum() for each in subsets(kinds, kind)}
        clients = tuple(np.flatnonzero(chosen[kind]).tolist())
        assert value[kind] == pytest.approx(max(worth.values()), abs=1e-9)
        assert bound[kind] == pytest.approx(value[kind], abs=1e-9)
        assert worth[clients] == pytest.approx(value[kind], abs=1e-9)


@given(st.integers(0, 10_000))
def test_reachable_rates_are_the_largest_sums_of_whole_clients(seed: int) -> None:
    kinds = random_kinds(seed)
    for kind, most in enumerate(reachable_fps(kinds)):
        assert most == pytest.approx(max(kinds.fps[list(each)].sum() for each in subsets(kinds, kind)), rel=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_the_bound_holds_after_every_round(seed: int) -> None:
    """Law: whatever the prices, the bound bounds the best mapping."""
    kinds, gpus = random_kinds(seed), 2
    best = best_mapping(kinds, gpus)
    for rounds in range(1, 12):
        master = PatternMaster(kinds, gpus)
        now = iter(range(1000))
        master.converge(lambda now=now: float(next(now)), float(rounds), gap=0.0)
        assert master.bound >= best - 1e-9
    assert master.bound < np.inf


@pytest.mark.parametrize("seed", range(8))
def test_kinds_that_are_left_out_are_in_no_better_mapping(seed: int) -> None:
    kinds, gpus = random_kinds(seed, kinds=4), 2
    best = best_mapping(kinds, gpus)
    master = PatternMaster(kinds, gpus)
    master.converge(lambda: 0.0, 1.0, gap=0.0)
    useful = master.useful(best * (1 - 1e-6))
    left = Kinds(
        accuracy=kinds.accuracy[useful],
        throughput=kinds.throughput[useful],
        eligible=kinds.eligible[useful],
        fps=kinds.fps,
    )
    assert best_mapping(left, gpus) == pytest.approx(best)


def test_rounding_serves_no_client_twice_and_uses_no_more_gpus_than_there_are() -> None:
    kinds = random_kinds(3, clients=8)
    master = PatternMaster(kinds, 2)
    fractions = master.converge(lambda: 0.0, 1.0, gap=0.0)
    rounded = master.rounded(fractions)
    served = [client for pattern in rounded for client in pattern.clients]
    assert 0 < len(rounded) <= 2
    assert len(served) == len(set(served))


@pytest.mark.parametrize("seed", range(8))
def test_a_walk_ends_in_a_sound_mapping_and_finds_the_best_of_a_tiny_one(seed: int) -> None:
    kinds, gpus = random_kinds(seed), 2
    every = np.arange(3)
    found, value = annealed(kinds, gpus, seed=seed, moves=20_000, allowed=every)
    served = [client for pattern in found for client in pattern.clients]
    assert len(served) == len(set(served))
    assert len(found) <= gpus
    assert all(pattern.clients in subsets(kinds, pattern.kind) for pattern in found)
    assert value == pytest.approx(best_mapping(kinds, gpus))


def test_a_walk_keeps_to_the_kinds_that_are_allowed_and_repeats_itself() -> None:
    kinds = random_kinds(5)
    first = annealed(kinds, 2, seed=4, moves=3_000, allowed=np.array([1]))
    assert {pattern.kind for pattern in first[0]} == {1}
    assert annealed(kinds, 2, seed=4, moves=3_000, allowed=np.array([1])) == first


def test_a_walk_never_ends_below_its_start() -> None:
    kinds = random_kinds(2)
    start = [Pattern(0, subsets(kinds, 0)[-1])]
    for seed in range(5):
        _, value = annealed(kinds, 2, seed=seed, moves=3, allowed=np.arange(3), start=start)
        assert value >= kinds.value(0, start[0].clients) - 1e-9
