"""The runtime on a CUDA device: run with ``pytest -m gpu`` on a machine that has one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from executor.runtime.protocol import OutOfDeviceMemory
from executor.runtime.torch_runtime import DTYPES, GeneratingModel, TorchRuntime
from executor.runtime.transfer import DeviceTransfer
from tests.executor.runtime.contract import RuntimeContract

pytestmark = pytest.mark.gpu


class TestCudaRuntime(RuntimeContract):
    @pytest.fixture(scope="class")
    @classmethod
    def runtime(cls) -> TorchRuntime:
        return TorchRuntime("cuda")

    @pytest.fixture(scope="class", params=["bert-tiny-16", "mobilenet-v2-0.5"])
    @classmethod
    def variant(cls, request: pytest.FixtureRequest) -> str:
        return str(request.param)


def test_the_device_answers_as_the_processor_does():
    here, there = (TorchRuntime(device).load("resnet-18", 2) for device in ("cpu", "cuda"))
    inputs = here.example(2)
    expected, found = here.run(inputs)["logits"], there.run(inputs)["logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2 * float(np.abs(expected).max()))


@pytest.mark.parametrize("options", [{"cuda_graphs": True}, {"compiled": True}])
def test_an_accelerated_model_answers_as_the_plain_one(options):
    plain = TorchRuntime("cuda").load("bert-small-16", 4)
    quick = TorchRuntime("cuda", **options).load("bert-small-16", 4)
    for batch, seed in ((1, 0), (4, 1), (4, 2), (1, 3)):
        expected = plain.run(plain.example(batch, seed))["logits"]
        np.testing.assert_allclose(quick.run(quick.example(batch, seed))["logits"], expected, rtol=1e-2, atol=1e-3)


def test_what_graphs_work_in_counts_as_held_and_is_free_once_they_are_forgotten():
    runtime = TorchRuntime("cuda", cuda_graphs=True)
    model = runtime.load("resnet-18", 32)
    large = runtime.held_bytes(lambda: model.run(model.example(32)))
    model.forget_graphs()
    small = runtime.held_bytes(lambda: model.run(model.example(1)))
    assert model.weight_bytes < small < large


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_copies_keep_every_value_and_batches_in_a_row_do_not_mix(dtype):
    device = torch.device("cuda")
    transfer = DeviceTransfer(device, DTYPES[dtype])
    for turn in range(20):
        floats = np.full((4, 37_500), turn, dtype=np.float32)
        tokens = np.arange(turn, turn + 512, dtype=np.int64).reshape(4, 128)
        floats.setflags(write=False)
        moved = transfer.to_device({"x": floats, "tokens": tokens})
        assert (moved["x"].dtype, moved["tokens"].dtype) == (DTYPES[dtype], torch.int64)
        back = transfer.to_host({"x": moved["x"] * 2, "tokens": moved["tokens"]})
        np.testing.assert_array_equal(back["x"], floats * 2)
        np.testing.assert_array_equal(back["tokens"], tokens.astype(np.float32))


def test_a_model_that_does_not_fit_is_found_when_it_is_loaded():
    free_bytes = torch.cuda.mem_get_info()[0]
    holder = torch.empty(max(1, free_bytes - 2**26), dtype=torch.uint8, device="cuda")
    try:
        with pytest.raises(OutOfDeviceMemory, match="bert-large"):
            TorchRuntime("cuda").load("bert-large", 64)
    finally:
        del holder
        torch.cuda.empty_cache()


def test_generation_gives_the_tokens_of_the_processor():
    found = []
    for device in ("cpu", "cuda"):
        model = TorchRuntime(device).load("llama-tiny", 2)
        assert isinstance(model, GeneratingModel)
        engine = model.engine(kv_tokens=200, max_batch=3)
        for length in (1, 9, 30):
            engine.add([(31 * n) % 1024 for n in range(length)], 8)
        tokens = {}
        while not engine.is_idle:
            tokens |= {one.number: one.tokens for one in engine.step().finished}
        found.append(tokens)
    assert found[0] == found[1]
