from __future__ import annotations

import pytest
import torch

from executor.runtime.host_cache import CachingTorchRuntime
from executor.runtime.precision import cast
from executor.runtime.registry import REGISTRY
from executor.runtime.torch_runtime import TorchRuntime


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frequencies_of_positions_stay_exact_and_all_weights_become_half(dtype: torch.dtype) -> None:
    plain, half = REGISTRY["llama-tiny"].build(), cast(REGISTRY["llama-tiny"].build(), dtype)
    assert {weight.dtype for weight in half.parameters()} == {dtype}
    found, expected = dict(half.named_buffers()), dict(plain.named_buffers())
    assert found.keys() == expected.keys() != set()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_statistics_that_are_kept_with_the_weights_become_half_too() -> None:
    module = cast(REGISTRY["mobilenet-v2-0.35"].build(), torch.bfloat16)
    kinds = {buffer.dtype for buffer in module.buffers() if buffer.is_floating_point()}
    assert kinds == {torch.bfloat16}


def test_models_are_loaded_so_with_and_without_a_cache() -> None:
    cached = CachingTorchRuntime("cpu", "bf16", 1, None, budget_bytes=10**9)
    for runtime in (TorchRuntime(dtype="bf16"), cached):
        model = runtime.load("llama-tiny", 1)
        computed = [buffer for buffer in model._module.buffers() if buffer.is_floating_point()]
        assert computed
        assert {buffer.dtype for buffer in computed} == {torch.float32}
        assert model.run(model.example(1))["logits"].shape == (1, 1, 1024)
