"""Models over several processes on this CPU give what one process gives."""

from __future__ import annotations

import numpy as np
import pytest

from executor.runtime.generation_engine import GenerationEngine
from executor.runtime.parallel import ParallelTorchRuntime
from executor.runtime.protocol import DevicesLost, GeneratesTokens, InvalidTensor, UnknownVariant
from executor.runtime.stage_model import cut
from executor.runtime.torch_runtime import TorchRuntime
from plans.errors import InvalidInput
from profiles.group import Point, Series

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


PROMPTS = [[(7 * position + 31 * row) % 1024 for position in range(5 + row)] for row in range(4)]


def generated(sequences, *, kv_tokens):
    """Generate for all prompts, two at a time; return the answers, and how often memory ran out."""
    engine = GenerationEngine(sequences, kv_tokens=kv_tokens, max_batch=2)
    numbers = [engine.add(prompt, 6) for prompt in PROMPTS]
    answers, preempted = {}, 0
    while not engine.is_idle:
        step = engine.step()
        preempted += len(step.preempted)
        answers |= {one.number: one.tokens for one in step.finished}
    return [answers[number] for number in numbers], preempted


@pytest.mark.parametrize("kv_tokens", [200, 18], ids=["room for all", "memory that runs out"])
def test_tensor_parallel_ranks_generate_the_tokens_of_one_process(two, kv_tokens):
    single, model = TorchRuntime().load("llama-tiny", 2), two.load("llama-tiny", 2, (2, 1))
    assert isinstance(model, GeneratesTokens)
    assert model.generation == single.generation
    wanted, preempted = generated(single.sequences(kv_tokens), kv_tokens=kv_tokens)
    assert generated(model.sequences(kv_tokens), kv_tokens=kv_tokens) == (wanted, preempted)
    assert (preempted > 0) == (kv_tokens == 18)
    model.close()


def test_ranks_that_generate_refuse_what_one_process_refuses_and_go_on(two):
    single, model = (
        runtime.load("llama-tiny", 1, *shape) for runtime, shape in ((TorchRuntime(), ()), (two, [(2, 1)]))
    )
    with pytest.raises(InvalidInput, match="at least 1"):
        model.sequences(0)
    one, several = single.sequences(8), model.sequences(8)
    for refused in (
        lambda runner: runner.prefill([(1, (1024,))]),
        lambda runner: runner.prefill([(1, (1,) * 9)]),
        lambda runner: runner.decode([1]),
    ):
        problems = []
        for runner in (one, several):
            with pytest.raises(InvalidTensor) as caught:
                refused(runner)
            problems.append(str(caught.value))
        assert problems[0] == problems[1]
    found = []
    for runner in (one, several):
        tokens = runner.prefill([(1, (1, 2, 3, 4, 5, 6, 7))]) + runner.decode([1])
        runner.hold(16)
        tokens += runner.decode([1])
        runner.free([1])
        found.append(tokens + runner.prefill([(2, (9,) * 15)]))
    assert found[0] == found[1]
    model.close()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_ranks_run_a_phase_again_and_again_with_the_result_of_one_process(two, phase):
    single, model = TorchRuntime().load("llama-tiny", 2), two.load("llama-tiny", 2, (2, 1))
    point = Point(batch=2, series=Series(phase=phase, input_tokens=9))
    one, several = single.as_group().prepare(point), model.phase_pass(phase, 2, 9)
    assert [several() for _ in range(2)] == [one() for _ in range(2)]
    assert 2 * several.kv_bytes == one.kv_bytes
    model.close()


def test_a_pipeline_does_not_generate(two):
    model = two.load("llama-tiny", 1, (1, 2))
    assert not isinstance(model, GeneratesTokens)
    model.close()


def test_a_rank_that_ends_loses_the_group(two):
    """The last test of the module: nothing can be run afterwards."""
    model = two.load("llama-tiny", 1, (1, 2))
    two._ranks[0].kill()
    two._ranks[0].wait()
    with pytest.raises(DevicesLost, match="rank"):
        model.run(model.example(1))
