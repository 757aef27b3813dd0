from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from planner.accuracy_scaling import Client, Mapping, ScaledVariant, assign_clients, time_left_s
from plans.errors import InvalidInput


def variants(count: int, batches: tuple[int, ...] = (1, 4)) -> list[ScaledVariant]:
    return [
        ScaledVariant(
            name=f"v{index}",
            accuracy=round(0.5 + 0.1 * index, 2),
            latency_s=tuple((batch, 0.01 * (index + 1) * (1 + 0.3 * (batch - 1))) for batch in batches),
        )
        for index in range(count)
    ]


def clients(count: int, kinds: int, seed: int) -> list[Client]:
    rng = np.random.default_rng(seed)
    return [
        Client(
            name=f"c{index}",
            fps=float(rng.choice([10, 25, 40])),
            left_s=tuple(float(rng.uniform(0.02, 0.15)) for _ in range(kinds)),
        )
        for index in range(count)
    ]


def behind_networks(count: int, kinds: int, seed: int) -> list[Client]:
    """Return clients whose frames grow with the variant, each with a bandwidth of its own."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        fps, bandwidth = float(rng.choice([5, 10, 25])), float(rng.uniform(2e6, 2e7))
        left_s = tuple(time_left_s(0.25, 20_000 + 5_000 * kind, bandwidth, fps, 0.01) for kind in range(kinds))
        found.append(Client(name=f"c{index}", fps=fps, left_s=left_s))
    return found


def assert_sound(found: Mapping, wanted: list[Client], models: list[ScaledVariant]) -> None:
    by_name = {client.name: client for client in wanted}
    accuracy = 0.0
    for kind, served in zip(found.gpus, found.clients, strict=True):
        if kind is None:
            assert served == ()
            continue
        index = next(i for i, model in enumerate(models) if model.name == kind[0])
        latency_s = dict(models[index].latency_s)[kind[1]]
        assert sum(by_name[name].fps for name in served) < kind[1] / latency_s
        assert all(2 * latency_s <= by_name[name].left_s[index] for name in served)
        accuracy += models[index].accuracy * sum(by_name[name].fps for name in served)
    names = [name for served in found.clients for name in served]
    assert sorted([*names, *found.dropped]) == sorted(by_name)
    assert found.accuracy == pytest.approx(accuracy)
    assert found.bound >= found.accuracy - 1e-9


def enumerated(wanted: list[Client], models: list[ScaledVariant], gpus: int) -> float:
    kinds = [(index, b, s) for index, model in enumerate(models) for b, s in model.latency_s]
    best = 0.0
    for chosen in itertools.combinations_with_replacement(kinds, gpus):
        for places in itertools.product(range(-1, gpus), repeat=len(wanted)):
            loads = [0.0] * gpus
            value = 0.0
            for client, place in zip(wanted, places, strict=True):
                if place >= 0:
                    index, _, latency_s = chosen[place]
                    if 2 * latency_s > client.left_s[index]:
                        value = -1.0
                        break
                    loads[place] += client.fps
                    value += client.fps * models[index].accuracy
            if value > best and all(load < b / s for load, (_, b, s) in zip(loads, chosen, strict=True)):
                best = value
    return best


@pytest.mark.parametrize("seed", range(4))
def test_brute_force_agrees_on_tiny_cases(seed: int) -> None:
    models, wanted = variants(2), clients(5, 2, seed)
    found = assign_clients(wanted, models, 2, time_limit_s=20.0)
    assert_sound(found, wanted, models)
    assert found.accuracy == pytest.approx(enumerated(wanted, models, 2))


@pytest.mark.parametrize("make", [clients, behind_networks])
def test_larger_cases_are_sound_and_within_a_hundredth(make: Callable[[int, int, int], list[Client]]) -> None:
    models, wanted = variants(8, (1, 2, 4, 8)), make(16, 8, 5)
    found = assign_clients(wanted, models, 3, time_limit_s=20.0)
    assert_sound(found, wanted, models)
    assert found.gap <= 0.01


@pytest.mark.parametrize("seed", range(2))
def test_times_without_structure_are_solved_to_a_thousandth(seed: int) -> None:
    models, wanted = variants(12, (1, 2, 4, 8)), clients(24, 12, seed)
    found = assign_clients(wanted, models, 4, time_limit_s=60.0)
    assert_sound(found, wanted, models)
    assert found.gap <= 1e-3


@pytest.mark.parametrize("seed", range(6))
def test_no_mapping_beats_the_bound_of_a_short_search(seed: int) -> None:
    models, wanted = variants(4, (1, 2, 4)), clients(12, 4, seed)
    short = assign_clients(wanted, models, 3, time_limit_s=0.05)
    long = assign_clients(wanted, models, 3, time_limit_s=1.0, seed=2)
    assert short.bound >= long.accuracy - 1e-9
    assert long.bound >= short.accuracy - 1e-9


def test_clients_that_nothing_serves_leave_every_gpu_idle() -> None:
    found = assign_clients([Client(name="c", fps=5.0, left_s=(0.0, 0.0))], variants(2), 2)
    assert found.gpus == (None, None)
    assert found.dropped == ("c",)
    assert (found.accuracy, found.gap) == (0.0, 0.0)


def test_out_of_time_the_mapping_is_still_sound() -> None:
    models, wanted = variants(8, (1, 2, 4, 8)), clients(24, 8, 5)
    found = assign_clients(wanted, models, 4, time_limit_s=1e-6)
    assert_sound(found, wanted, models)


def test_a_client_that_cannot_be_served_is_named_and_blocks_nobody() -> None:
    models = variants(2)
    easy = Client(name="easy", fps=10.0, left_s=(0.2, 0.2))
    hopeless = Client(name="hopeless", fps=10.0, left_s=(0.0, 0.0))
    found = assign_clients([hopeless, easy], models, 1, time_limit_s=20.0)
    assert found.dropped == ("hopeless",)
    assert found.accuracy == pytest.approx(10.0 * 0.6)  # the better variant, as if the other were not there


def test_a_rate_equal_to_the_throughput_is_too_much() -> None:
    model = ScaledVariant(name="v", accuracy=1.0, latency_s=((1, 0.1),))
    assert assign_clients([Client(name="c", fps=10.0, left_s=(1.0,))], [model], 1).dropped == ("c",)
    assert assign_clients([Client(name="c", fps=9.9, left_s=(1.0,))], [model], 1).dropped == ()


def test_the_network_takes_its_time_and_may_take_all() -> None:
    assert time_left_s(0.1, 1000.0, 50_000.0, fps=10.0, overhead_s=0.01) == pytest.approx(0.07)
    assert time_left_s(0.1, 1000.0, 9_000.0, fps=10.0) == 0.0


def test_times_that_do_not_match_the_variants_are_an_error() -> None:
    with pytest.raises(InvalidInput, match="each of 2 variants"):
        assign_clients([Client(name="c", fps=1.0, left_s=(1.0,))], variants(2), 1)
