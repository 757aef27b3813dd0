from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import pricing
from planner.pricing import ClassOptions, best_loadout, compile_pricing


def options_of(rng: np.random.Generator, count: int, services: int, stages: int) -> ClassOptions:
    service = rng.integers(0, services, count)
    return ClassOptions(
        options=np.arange(count),
        service=service,
        memory=rng.uniform(0.05, 0.9, (count, stages)) * rng.choice([0.3, 1.0], (count, 1)),
        cap=np.minimum(1.0, rng.uniform(0.05, 1.5, count)),
        hold_s=rng.uniform(0.0, 1.0, count),
        slack_s=rng.uniform(0.3, 2.0, count),
        least=np.where(rng.random(count) < 0.2, 0.01, 0.0),
    )


def feasible(of: ClassOptions, chosen: tuple[int, ...]) -> bool:
    if len({int(of.service[item]) for item in chosen}) < len(chosen):
        return False
    if (of.memory[list(chosen)].sum(axis=0) > 1.0 + 1e-9).any():
        return False
    return not any(of.hold_s[a] > of.slack_s[b] for a, b in itertools.permutations(chosen, 2))


def worth(of: ClassOptions, chosen: tuple[int, ...], value: np.ndarray, fixed: np.ndarray) -> float:
    left, total = 1.0, float(fixed[list(chosen)].sum())
    for item in sorted(chosen, key=lambda item: -value[item]):
        given_ = min(left, float(of.cap[item]))
        total += float(max(value[item], 0.0)) * given_
        left -= given_
    return total


def enumerated(of: ClassOptions, value: np.ndarray, fixed: np.ndarray) -> float:
    best = 0.0
    for size in range(1, len(value) + 1):
        sets = [chosen for chosen in itertools.combinations(range(len(value)), size) if feasible(of, chosen)]
        if not sets:
            break
        best = max(best, *(worth(of, chosen, value, fixed) for chosen in sets))
    return best


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 9), stages=st.integers(1, 3), fixed_cost=st.floats(-0.3, 0.2))
def test_pricing_equals_enumeration(seed: int, count: int, stages: int, fixed_cost: float) -> None:
    """Law: the value found is the best over all loadouts (least shares left out), and the bound is not below it."""
    rng = np.random.default_rng(seed)
    of = options_of(rng, count, services=5, stages=stages)
    value = rng.uniform(-0.2, 3.0, count)
    fixed = np.where(rng.random(count) < 0.5, 0.0, fixed_cost)
    exact = enumerated(of, value, fixed)
    found = best_loadout(of, value, fixed)
    assert found.bound >= exact - 1e-9
    assert found.value == pytest.approx(exact, abs=1e-9)
    chosen = tuple(int(item) for item in found.chosen)
    assert feasible(of, chosen)
    assert found.share.sum() <= 1.0 + 1e-9
    assert (found.share <= np.maximum(of.cap, of.least)[found.chosen] + 1e-12).all()
    assert (found.share >= of.least[found.chosen]).all()
    if not of.least[found.chosen].any():
        assert found.value == pytest.approx(float((value[found.chosen] * found.share + fixed[found.chosen]).sum()))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), limit=st.integers(1, 50), tolerance=st.floats(0.0, 0.3))
def test_the_bound_holds_however_early_the_search_stops(seed: int, limit: int, tolerance: float) -> None:
    rng = np.random.default_rng(seed)
    of = options_of(rng, 9, services=9, stages=1)
    value = rng.uniform(0.1, 3.0, 9)
    fixed = np.zeros(9)
    hurried = best_loadout(of, value, fixed, node_limit=limit, tolerance=tolerance)
    assert hurried.bound >= enumerated(of, value, fixed) - 1e-9
    assert hurried.value <= hurried.bound


def test_barred_services_stay_out_and_caps_can_be_lowered() -> None:
    of = options_of(np.random.default_rng(3), 8, services=3, stages=1)
    value, fixed = np.full(8, 2.0), np.zeros(8)
    barred = np.array([True, False, False])
    assert not (of.service[best_loadout(of, value, fixed, barred=barred).chosen] == 0).any()
    lowered = best_loadout(of, value, fixed, cap=np.full(8, 0.01))
    assert lowered.value <= 3 * 0.02 + 1e-9
    assert best_loadout(of, value, fixed, barred=np.ones(3, dtype=bool)).value == 0.0


def test_at_most_one_option_is_filled_in_part() -> None:
    for seed in range(20):
        of = options_of(np.random.default_rng(seed), 12, services=12, stages=1)
        found = best_loadout(of, np.linspace(1.0, 2.0, 12), np.zeros(12))
        partial = (found.share > 1e-12) & (found.share < of.cap[found.chosen] - 1e-12)
        assert partial.sum() <= 1


def test_nothing_is_left_to_compile_once_pricing_is_compiled() -> None:
    compile_pricing()
    kernels = (pricing._search, pricing._greedy, pricing._suffixes, pricing._multipliers)
    before = [len(kernel.signatures) for kernel in kernels]
    of = options_of(np.random.default_rng(1), 9, services=5, stages=3)
    best_loadout(of, np.linspace(-0.2, 3.0, 9), np.zeros(9), barred=np.zeros(5, dtype=bool), floor=0.1, cap=of.cap / 2)
    assert [len(kernel.signatures) for kernel in kernels] == before
