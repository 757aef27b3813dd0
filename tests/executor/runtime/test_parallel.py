"""Models over several processes on this CPU give what one process gives."""

from __future__ import annotations

import numpy as np
import pytest

from executor.runtime.parallel import ParallelTorchRuntime
from executor.runtime.protocol import DevicesLost, InvalidTensor, UnknownVariant
from executor.runtime.stage_model import cut
from executor.runtime.torch_runtime import TorchRuntime
from plans.errors import InvalidInput

TOLERANCE = 1e-4
"""Largest relative error of outputs against a single process, in fp32."""


@pytest.fixture(scope="module")
def two():
    made = ParallelTorchRuntime(["cpu", "cpu"])
    yield made
    made.close()


class Shaped:
    """The runtime, loading in one shape."""

    def __init__(self, runtime, shape):
        self.runtime, (self.tp, self.pp) = runtime, shape

    def load(self, variant, max_batch):
        return self.runtime.load(variant, max_batch, (self.tp, self.pp))


@pytest.fixture(params=[(2, 1), (1, 2)], ids=["tp2", "pp2"])
def runtime(request, two):
    return Shaped(two, request.param)


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


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (0, 2), (-1, -2)])
def test_a_shape_that_does_not_take_all_devices_is_refused(two, shape):
    with pytest.raises(InvalidInput, match=r"expected tp x pp = 2 devices"):
        two.load("llama-tiny", 1, shape)


def test_two_shapes_of_two_models_run_side_by_side(two):
    single = {name: TorchRuntime().load(name, 2) for name in ("llama-tiny", "bert-tiny-16")}
    models = {
        "llama-tiny": two.load("llama-tiny", 2, (2, 1)),
        "bert-tiny-16": two.load("bert-tiny-16", 2, (1, 2)),
    }
    turns = [(name, models[name].submit(single[name].example(2, seed)), seed) for seed in range(4) for name in models]
    for name, answer, seed in turns:
        assert_same(answer.result(timeout=60), single[name].run(single[name].example(2, seed)))
    for model in models.values():
        model.close()


def test_a_rank_that_ends_loses_the_group(two):
    """The last test of the module: nothing can be run afterwards."""
    model = two.load("llama-tiny", 1, (1, 2))
    two._ranks[0].kill()
    two._ranks[0].wait()
    with pytest.raises(DevicesLost, match="rank"):
        model.run(model.example(1))
