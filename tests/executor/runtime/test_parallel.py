"""Models over several processes on this CPU give what one process gives."""

from __future__ import annotations

import numpy as np
import pytest

from executor.runtime.parallel import ParallelTorchRuntime, cut
from executor.runtime.protocol import InvalidTensor, UnknownVariant
from executor.runtime.torch_runtime import TorchRuntime
from plans.errors import InvalidInput

TOLERANCE = 1e-4
"""Largest relative error of outputs against a single process, in fp32."""


@pytest.fixture(params=[(2, 1), (1, 2)], ids=["tp2", "pp2"], scope="module")
def runtime(request):
    tp, pp = request.param
    made = ParallelTorchRuntime(["cpu", "cpu"], tp=tp, pp=pp)
    yield made
    made.close()


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert np.abs(found[name] - array).max() <= TOLERANCE * np.abs(array).max()


def test_what_cannot_be_done_is_refused_and_the_ranks_live_on(runtime):
    with pytest.raises(UnknownVariant, match="resnet-19"):
        runtime.load("resnet-19", 1)
    with pytest.raises(InvalidInput, match=r"segformer-b0: (tp|pp)"):
        runtime.load("segformer-b0", 1)
    with pytest.raises(InvalidInput, match="at least 1"):
        runtime.load("llama-tiny", 0)
    model = runtime.load("llama-tiny", 2)
    with pytest.raises(InvalidTensor, match="token 1024"):
        model.run({"input_ids": np.full((1, 16), 1024)})
    with pytest.raises(InvalidTensor, match="batch of 1 to 2"):
        model.run(model.example(3))
    assert model.run(model.example(2))["logits"].shape == (2, 1, 1024)


@pytest.mark.parametrize("name", ["bert-tiny-16", "llama-tiny", "resnet-18"])
def test_outputs_equal_those_of_one_process(runtime, name):
    if name == "resnet-18" and runtime.tp > 1:
        pytest.skip("convolutions are not sharded")
    single = TorchRuntime().load(name, 4)
    model = runtime.load(name, 4)
    for batch in (1, 4):
        inputs = single.example(batch, seed=batch)
        assert_same(model.run(inputs), single.run(inputs))
    assert model.inputs == single.inputs
    assert model.outputs == single.outputs
    assert len(model.stage_weight_bytes) == runtime.pp
    assert model.weight_bytes >= single.weight_bytes
    assert all(time > 0 for time in model.stage_run_s())
    model.close()


def test_batches_that_follow_each_other_come_out_in_order(runtime):
    single, model = TorchRuntime().load("bert-tiny-16", 4), runtime.load("bert-tiny-16", 4)
    inputs = [single.example(1 + seed % 4, seed=seed) for seed in range(12)]
    futures = [model.submit(each) for each in inputs]
    for each, future in zip(inputs, futures, strict=True):
        assert_same(future.result(timeout=60), single.run(each))
    model.close()


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(InvalidInput, match="3 heads over 2 GPUs"):
        cut(TorchRuntime(), "vit-tiny", 2, 1)


def test_more_stages_than_parts_are_refused():
    with pytest.raises(InvalidInput, match="at most 4 stages"):
        cut(TorchRuntime(), "bert-tiny-16", 1, 5)


def test_as_many_devices_as_ranks_are_wanted():
    with pytest.raises(InvalidInput, match="1 devices for tp = 2, pp = 1"):
        ParallelTorchRuntime(["cpu"], tp=2, pp=1)
