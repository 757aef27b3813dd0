from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.runtime.group_runtime import TorchGroupRuntime
from executor.runtime.protocol import GeneratesTokens, OutOfDeviceMemory
from executor.runtime.residency import Residency
from executor.runtime.swapping import SwappingTorchRuntime
from executor.runtime.torch_runtime import TorchRuntime
from plans.errors import InvalidInput

NAMES = ("bert-tiny-16", "mobilenet-v2-0.35", "mobilenet-v2-0.5")


@pytest.fixture(scope="module")
def sizes() -> dict[str, int]:
    return {name: TorchRuntime().load(name, 2).weight_bytes for name in (*NAMES, "llama-tiny")}


def runtime(device_bytes: int, budget_bytes: int = 2**30) -> SwappingTorchRuntime:
    return SwappingTorchRuntime("cpu", "fp32", 1, None, budget_bytes=budget_bytes, device_bytes=device_bytes)


def test_models_take_turns_and_answer_as_they_do_alone(sizes):
    """Any two of the three fit, all three do not."""
    together = runtime(sum(sizes[name] for name in NAMES) - 1)
    models = [together.load(name, 2) for name in NAMES]
    alone = [TorchRuntime().load(name, 2) for name in NAMES]
    for turn in range(3):
        for swapped, single in zip(models, alone, strict=True):
            inputs = single.example(2, seed=turn)
            wanted = single.run(inputs)
            for name, array in swapped.run(inputs).items():
                assert np.array_equal(array, wanted[name])
            assert together.residency.held_bytes <= together.residency.limit_bytes
            assert swapped.last_swap_s > 0  # in a circle the next one is always the one that left last
            swapped.run(inputs)
            assert swapped.last_swap_s == 0


def test_a_host_cache_without_room_only_makes_swaps_slower(sizes):
    tight = runtime(max(sizes.values()), budget_bytes=1)
    first, second = (tight.load(name, 1) for name in NAMES[:2])
    inputs = first.example(1)
    before = first.run(inputs)
    second.run(second.example(1))
    assert all(np.array_equal(array, before[name]) for name, array in first.run(inputs).items())


def test_what_cannot_fit_alone_is_refused(sizes):
    with pytest.raises(OutOfDeviceMemory, match="bert-tiny-16 needs"):
        runtime(sizes["bert-tiny-16"] - 1).load("bert-tiny-16", 1)


def test_a_closed_model_gives_its_place_back(sizes):
    held = runtime(max(sizes.values()))
    model = held.load(NAMES[0], 1)
    assert held.residency.held_bytes == sizes[NAMES[0]]
    model.close()
    model.close()
    assert held.residency.held_bytes == 0


def test_a_model_that_generates_stays_with_its_memory(sizes):
    kv_bytes = 100 * 2048
    held = runtime(sizes["llama-tiny"] + kv_bytes + sizes["mobilenet-v2-0.5"])
    llama, small, other = (held.load(name, 1) for name in ("llama-tiny", "mobilenet-v2-0.35", "mobilenet-v2-0.5"))
    assert isinstance(llama, GeneratesTokens)
    assert not isinstance(small, GeneratesTokens)
    sequences = llama.sequences(100)
    first = sequences.prefill([(1, range(20))])
    for model in (small, other, small):
        model.run(model.example(1))
    alone = TorchRuntime().load("llama-tiny", 1).sequences(100)
    assert first == alone.prefill([(1, range(20))])
    assert sequences.decode([1]) == alone.decode([1])
    with pytest.raises(OutOfDeviceMemory):
        held.load("bert-base", 1)
    llama.widen(2)
    assert llama.run(llama.example(2))["logits"].shape == (2, 1, 1024)


def test_key_value_memory_that_grows_counts_and_is_refused_beyond_the_limit(sizes):
    token_bytes = 2048
    held = runtime(sizes["llama-tiny"] + 400 * token_bytes)
    sequences = held.load("llama-tiny", 1).sequences(100)
    sequences.hold(50)
    assert held.residency.held_bytes == sizes["llama-tiny"] + 100 * token_bytes
    sequences.hold(400)
    assert held.residency.held_bytes == held.residency.limit_bytes
    first = sequences.prefill([(1, range(300))])
    with pytest.raises(OutOfDeviceMemory, match="llama-tiny needs"):
        sequences.hold(401)
    alone = TorchRuntime().load("llama-tiny", 1).sequences(400)
    assert first == alone.prefill([(1, range(300))])
    assert sequences.decode([1]) == alone.decode([1])


def test_batches_go_on_while_another_model_is_loaded(sizes):
    together = runtime(sizes[NAMES[0]] + sizes[NAMES[1]])
    model = together.load(NAMES[0], 1)
    inputs = model.example(1)
    wanted = model.run(inputs)
    loading = threading.Thread(target=lambda: together.load(NAMES[2], 1))
    loading.start()
    while loading.is_alive():
        assert all(np.array_equal(array, wanted[name]) for name, array in model.run(inputs).items())
    loading.join()


@pytest.mark.parametrize(
    "wrong", [{"devices": ("cpu", "cpu")}, {"compiled": True}, {"host_cache_bytes": 0}, {"device_bytes": -1}]
)
def test_swapping_where_it_cannot_be_is_refused(wrong):
    settings = {"devices": ("cpu",), "host_cache_bytes": 2**20, "device_bytes": 2**20} | wrong
    with pytest.raises(InvalidInput):
        TorchGroupRuntime(**settings)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 60)), max_size=30))
def test_what_is_here_never_exceeds_the_limit_and_the_longest_unused_goes(requests):
    """Against a list in the order of use."""
    residency: Residency[int] = Residency(100)
    naive: list[tuple[int, int]] = []
    for name, size in requests:
        known = dict(naive).get(name)
        if known is not None:
            residency.use(name)
            naive.remove((name, known))
            naive.append((name, known))
            continue
        leaving = residency.leavers(size)
        expected = []
        while sum(each for _, each in naive) + size > 100:
            expected.append(naive.pop(0)[0])
        assert leaving == tuple(expected)
        for other in leaving:
            residency.leave(other)
        residency.enter(name, size)
        naive.append((name, size))
        assert residency.held_bytes == sum(each for _, each in naive) <= 100


def test_what_is_pinned_never_goes():
    residency: Residency[str] = Residency(100)
    residency.enter("stays", 60, pinned=True)
    residency.enter("goes", 30)
    assert residency.leavers(41) is None
    assert residency.leavers(40) == ("goes",)
    assert residency.leavers(70, "stays") == ()
    assert residency.leavers(71, "stays") == ("goes",)
    assert residency.leavers(101, "stays") is None
