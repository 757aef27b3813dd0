from __future__ import annotations

import contextlib
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from executor.runtime.group_runtime import TorchGroupRuntime
from executor.runtime.host_cache import CachingTorchRuntime, HostCache, placed_copy, size_bytes
from executor.runtime.torch_runtime import TorchRuntime
from plans.errors import InvalidInput
from tests.executor.runtime.contract import RuntimeContract

LARGE = 2**30


def caching(budget_bytes: int = LARGE, device: str = "cpu") -> CachingTorchRuntime:
    return CachingTorchRuntime(device, "fp32", 1, None, budget_bytes=budget_bytes)


class TestCachingTorchRuntime(RuntimeContract):
    @pytest.fixture(scope="class")
    @classmethod
    def runtime(cls) -> CachingTorchRuntime:
        return caching()

    @pytest.fixture(scope="class", params=["bert-tiny-16"])
    @classmethod
    def variant(cls, request: pytest.FixtureRequest) -> str:
        return str(request.param)


@given(
    st.integers(0, 60), st.lists(st.tuples(st.sampled_from("abcde"), st.integers(1, 12), st.booleans()), max_size=30)
)
def test_law_the_budget_holds_and_what_is_kept_is_what_was_used_last(
    budget: int, steps: list[tuple[str, int, bool]]
) -> None:
    cache = HostCache(4 * budget)
    expected: list[tuple[str, int]] = []  # the one used last at the end
    for name, width, put in steps:
        mine = [(kept, size) for kept, size in expected if kept == name]
        if put:
            module = torch.nn.Linear(width, 1, bias=False)
            assert cache.put(name, (module, (), ())) is (width <= budget)
            expected = [one for one in expected if one not in mine]
            if width <= budget:
                expected.append((name, width))
                while sum(size for _, size in expected) > budget:
                    expected.pop(0)
        else:
            assert (cache.get(name) is not None) is bool(mine)
            expected = [one for one in expected if one not in mine] + mine
        assert cache.held_bytes == 4 * sum(size for _, size in expected)


def test_a_variant_loaded_before_is_not_built_again_and_answers_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = caching()
    built: list[str] = []
    build = TorchRuntime.build

    def counted(self: TorchRuntime, variant: str) -> object:
        built.append(variant)
        return build(self, variant)

    monkeypatch.setattr(TorchRuntime, "build", counted)
    first = runtime.load("bert-tiny-16", 2)
    inputs = first.example(1)
    wanted = first.run(inputs)["logits"]
    del first
    again = runtime.load("bert-tiny-16", 4)
    np.testing.assert_array_equal(again.run(inputs)["logits"], wanted)
    assert again.max_batch == 4
    assert built == ["bert-tiny-16"]


def test_beyond_the_budget_a_variant_is_built_again() -> None:
    runtime = caching(budget_bytes=1)
    runtime.load("bert-tiny-16", 1)
    assert runtime.cache.get("bert-tiny-16") is None
    assert runtime.cache.held_bytes == 0


def test_a_placed_copy_shares_nothing_with_the_original_and_answers_the_same() -> None:
    module, _, _ = TorchRuntime().build("llama-tiny")
    module.eval().requires_grad_(False)
    copied = placed_copy(module, torch.device("cpu"))
    theirs = {tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    assert not theirs & {tensor.data_ptr() for tensor in (*copied.parameters(), *copied.buffers())}
    assert size_bytes(copied) == size_bytes(module)
    tokens = torch.arange(8).reshape(1, 8)
    with torch.inference_mode():
        wanted = module(input_ids=tokens)["logits"]
        for parameter in module.parameters():
            parameter.zero_()
        torch.testing.assert_close(copied(input_ids=tokens)["logits"], wanted, rtol=0, atol=0)


def test_tied_weights_stay_tied_in_a_copy() -> None:
    tied = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)])
    tied[1].weight = tied[0].weight
    copied = placed_copy(tied, torch.device("cpu"))
    assert copied[1].weight is copied[0].weight
    assert size_bytes(copied) == size_bytes(tied)


def test_a_group_runtime_keeps_weights_where_it_is_told_a_budget(tmp_path: Path) -> None:
    assert isinstance(TorchGroupRuntime(host_cache_bytes=10)._single, CachingTorchRuntime)
    assert not isinstance(TorchGroupRuntime()._single, CachingTorchRuntime)
    with pytest.raises(InvalidInput, match="at least 1 byte"):
        caching(budget_bytes=0)


@pytest.mark.gpu
def test_on_a_gpu_the_kept_weights_are_pinned_and_the_model_runs_from_a_copy() -> None:
    runtime = caching(device="cuda")
    first = runtime.load("bert-tiny-16", 2)
    inputs = first.example(2)
    wanted = first.run(inputs)["logits"]
    kept = runtime.cache.get("bert-tiny-16")
    assert kept is not None
    assert all(parameter.is_pinned() for parameter in kept[0].parameters())
    del first
    np.testing.assert_array_equal(runtime.load("bert-tiny-16", 2).run(inputs)["logits"], wanted)


def test_threads_may_share_a_cache() -> None:
    """Loads have their own thread, and batches read a model anew that did not fit: each puts while the other gets."""
    recipes = [(torch.nn.Linear(4, 4, bias=False), (), ()) for _ in range(60)]
    cache = HostCache(64 * 40)

    def use(step: int) -> None:
        for number in range(0, 4000 * step, step):
            name = number % 60
            if cache.get(f"v{name}") is None:
                cache.put(f"v{name}", recipes[name])

    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as threads:
            list(threads.map(use, (1, 7, 11)))
    finally:
        sys.setswitchinterval(before_s)
    assert cache.held_bytes == 64 * 40


def test_threads_build_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load and a swap at once would draw their weights from one generator, each other ones than alone."""
    both, met = threading.Barrier(2), []
    build = TorchRuntime.build

    def watched(self: TorchRuntime, variant: str) -> object:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.2)
            met.append(variant)
        return build(self, variant)

    monkeypatch.setattr(TorchRuntime, "build", watched)
    runtime = caching(1)
    with ThreadPoolExecutor(2) as threads:
        assert len(list(threads.map(runtime.host_recipe, ["bert-tiny-16", "mobilenet-v2-0.35"]))) == 2
    assert met == []
