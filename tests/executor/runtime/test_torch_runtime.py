from __future__ import annotations

import numpy as np
import pytest
import torch

from executor.runtime.memory import peak_tensor_bytes
from executor.runtime.protocol import InvalidTensor, OutOfDeviceMemory, UnknownVariant
from executor.runtime.torch_runtime import TorchRuntime
from plans.errors import InvalidInput
from tests.executor.runtime.contract import RuntimeContract


class TestTorchRuntime(RuntimeContract):
    @pytest.fixture(scope="class")
    @classmethod
    def runtime(cls) -> TorchRuntime:
        return TorchRuntime(threads=1)

    @pytest.fixture(scope="class", params=["bert-tiny-16", "mobilenet-v2-0.5"])
    @classmethod
    def variant(cls, request: pytest.FixtureRequest) -> str:
        return str(request.param)


def test_every_wrong_argument_is_named_at_once() -> None:
    with pytest.raises(InvalidInput) as caught:
        TorchRuntime(device="tpu", dtype="int4", threads=0)
    assert [fault.field for fault in caught.value.faults] == ["device", "dtype", "threads"]


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidInput, match="CUDA device that exists"):
        TorchRuntime(device="cuda:99")


def test_a_misspelt_variant_gets_a_suggestion() -> None:
    with pytest.raises(UnknownVariant, match="did you mean resnet-18"):
        TorchRuntime().load("resnet18", 1)


@pytest.mark.parametrize("token", [-1, 30522])
def test_a_token_outside_the_vocabulary_is_refused(token: int) -> None:
    model = TorchRuntime().load("bert-tiny-16", 1)
    inputs = model.example(1)
    inputs["input_ids"][0, 3] = token
    with pytest.raises(InvalidTensor, match=f"token {token}, expected tokens from 0 to 30521"):
        model.run(inputs)


def test_weights_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    models = [TorchRuntime(seed=seed).load("bert-tiny-16", 1) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(3), expected)
    first, again, other = (model.run(model.example(1))["logits"] for model in models)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_halves_the_weights_and_answers_in_fp32(dtype: str) -> None:
    full, half = (TorchRuntime(dtype=kind).load("bert-tiny-16", 2) for kind in ("fp32", dtype))
    floating_bytes = full.weight_bytes - half.weight_bytes
    assert floating_bytes == pytest.approx(full.weight_bytes / 2, rel=0.01)  # position ids stay INT64
    answer, expected = half.run(half.example(2))["logits"], full.run(full.example(2))["logits"]
    assert answer.dtype == np.float32
    assert answer == pytest.approx(expected, abs=0.05)


def test_threads_are_set_for_the_process() -> None:
    TorchRuntime(threads=2).load("bert-tiny-16", 1)
    assert torch.get_num_threads() == 2
    TorchRuntime(threads=1).load("bert-tiny-16", 1)
    assert torch.get_num_threads() == 1


def test_loading_writes_nothing_to_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    TorchRuntime().load("mobilenet-v2-0.5", 1)
    assert capfd.readouterr() == ("", "")


def test_loading_leaves_the_verbosity_of_transformers_as_it_was() -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    TorchRuntime().load("bert-tiny-16", 1)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_no_gradients_are_kept() -> None:
    model = TorchRuntime().load("bert-tiny-16", 1)
    assert not any(parameter.requires_grad for parameter in model._module.parameters())
    assert not model._module.training


def test_a_device_out_of_memory_is_named_with_model_and_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TorchRuntime().load("bert-tiny-16", 2)

    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(model._module, "forward", exhausted)
    with pytest.raises(
        OutOfDeviceMemory, match="bert-tiny-16 does not fit on the device at batch 2: CUDA out"
    ) as caught:
        model.run(model.example(2))
    assert isinstance(caught.value, MemoryError)


def test_peak_memory_is_that_of_the_activations() -> None:
    runtime = TorchRuntime()
    model = runtime.load("segformer-b0", 2)
    one, two = (peak_tensor_bytes(lambda batch=batch: model.run(model.example(batch))) for batch in (1, 2))
    assert one > 20 * 2**20  # the segmentation head holds four maps of 256 channels
    assert two == pytest.approx(2 * one, rel=0.05)
    assert runtime.peak_growth_bytes(lambda: model.run(model.example(1))) >= one


@pytest.mark.gpu
class TestTorchRuntimeOnGpu(RuntimeContract):
    @pytest.fixture(scope="class")
    @classmethod
    def runtime(cls) -> TorchRuntime:
        return TorchRuntime(device="cuda", threads=1)

    @pytest.fixture(scope="class", params=["bert-tiny-16", "mobilenet-v2-0.5"])
    @classmethod
    def variant(cls, request: pytest.FixtureRequest) -> str:
        return str(request.param)
