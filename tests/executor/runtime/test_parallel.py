"""Models over several processes on this CPU give what one process gives."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import pytest
import torch

from executor.runtime import stage_model
from executor.runtime.generation_engine import GenerationEngine
from executor.runtime.mesh import Mesh
from executor.runtime.parallel import ParallelTorchRuntime
from executor.runtime.protocol import (
    DevicesLost,
    GeneratesTokens,
    InvalidTensor,
    OutOfDeviceMemory,
    UnknownVariant,
)
from executor.runtime.stage_model import _shard_bytes, cut
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
    model.widen(3)
    assert model.run(model.example(3))["logits"].shape == (3, 1, 1024)


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


LONG = (700, 3, 200, 400, 100, 600)
"""Lengths of prompts that a stage reads in four passes."""

WAIT_S = 60.0

PROMPTS = [[(7 * position + 31 * row) % 1024 for position in range(5 + row)] for row in range(4)]


def generated(sequences, *, kv_tokens, stop_tokens=()):
    """Generate for all prompts, two at a time; return the answers, and how often memory ran out."""
    engine = GenerationEngine(sequences, kv_tokens=kv_tokens, max_batch=2, stop_tokens=stop_tokens)
    numbers = [engine.add(prompt, 6) for prompt in PROMPTS]
    answers, preempted = {}, 0
    while not engine.is_idle:
        step = engine.step()
        preempted += len(step.preempted)
        answers |= {one.number: one.tokens for one in step.finished}
    return [answers[number] for number in numbers], preempted


@pytest.mark.parametrize("kv_tokens", [200, 18], ids=["room for all", "memory that runs out"])
def test_ranks_generate_the_tokens_of_one_process(runtime, kv_tokens):
    single, model = TorchRuntime().load("llama-tiny", 2), runtime.load("llama-tiny", 2)
    assert isinstance(model, GeneratesTokens)
    assert model.generation == single.generation
    wanted, preempted = generated(single.sequences(kv_tokens), kv_tokens=kv_tokens)
    assert generated(model.sequences(kv_tokens), kv_tokens=kv_tokens) == (wanted, preempted)
    assert (preempted > 0) == (kv_tokens == 18)
    model.close()


def test_sequences_of_a_pipeline_end_at_stop_tokens(two):
    single, model = TorchRuntime().load("llama-tiny", 2), two.load("llama-tiny", 2, (1, 2))
    wanted, _ = generated(single.sequences(200), kv_tokens=200)
    stopped = wanted[1][2]
    ended, _ = generated(model.sequences(200), kv_tokens=200, stop_tokens=[stopped])
    assert ended == [answer[: answer.index(stopped) + 1] if stopped in answer else answer for answer in wanted]
    model.close()


def test_ranks_that_generate_refuse_what_one_process_refuses_and_go_on(runtime):
    single, model = TorchRuntime().load("llama-tiny", 1), runtime.load("llama-tiny", 1)
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
def test_ranks_run_a_phase_again_and_again_with_the_result_of_one_process(runtime, phase):
    single, model = TorchRuntime().load("llama-tiny", 2), runtime.load("llama-tiny", 2)
    point = Point(batch=2, series=Series(phase=phase, input_tokens=9))
    one, several = single.as_group().prepare(point), model.phase_pass(phase, 2, 9)
    assert [several() for _ in range(2)] == [one() for _ in range(2)]
    assert len(several.kv_bytes) == runtime.pp
    assert runtime.tp * sum(several.kv_bytes) == one.kv_bytes
    if runtime.pp > 1:
        assert all(time > 0 for time in model.stage_run_s())
    model.close()


@pytest.mark.parametrize("fails", ["rank 0", "another"])
def test_memory_that_one_rank_cannot_have_no_rank_has_and_all_go_on(runtime, fails, monkeypatch):
    model = runtime.load("llama-tiny", 1)
    agreed = Mesh.agreed

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patched:
        if fails == "rank 0":
            patched.setattr("executor.runtime.generation.torch.zeros", full)
        else:
            patched.setattr(Mesh, "agreed", lambda mesh, holds: agreed(mesh, False))
        for ask in (lambda: model.sequences(64), lambda: model.phase_pass("prefill", 1, 64)):
            with pytest.raises(OutOfDeviceMemory, match="llama-tiny"):
                ask()
    assert len(model.sequences(64).prefill([(1, (1, 2, 3))])) == 1
    model.close()


def test_weights_that_one_device_cannot_hold_are_refused_and_the_ranks_live_on(runtime, monkeypatch):
    before = runtime.load("bert-tiny-16", 1)
    with monkeypatch.context() as patch:
        patch.setattr(stage_model, "free_bytes", lambda device: 1000)  # of rank 0; the other has room
        with pytest.raises(OutOfDeviceMemory, match=r"llama-tiny does not fit .* which has 1000 free"):
            runtime.load("llama-tiny", 1)
    after = runtime.load("llama-tiny", 1)
    for model in (before, after):
        model.run(model.example(1))


def test_the_bytes_that_a_device_must_hold_are_known_before_they_are_there(runtime, monkeypatch):
    asked = []

    def exactly(*arguments):
        asked.append(_shard_bytes(*arguments))
        return asked[-1]

    monkeypatch.setattr(stage_model, "_shard_bytes", exactly)
    model = runtime.load("llama-tiny", 1)
    assert asked == [model.stage_weight_bytes[0]]


def test_iterations_wait_for_the_batches_before_them_in_a_pipeline(two):
    single, model = TorchRuntime().load("llama-tiny", 4), two.load("llama-tiny", 4, (1, 2))
    one, several = single.sequences(100), model.sequences(100)
    inputs = [single.example(1 + seed % 4, seed=seed) for seed in range(6)]
    wanted = [one.prefill([(1, (3, 1, 4)), (2, (1, 5))])] + [one.decode([1, 2]) for _ in inputs]
    found = [several.prefill([(1, (3, 1, 4)), (2, (1, 5))])]
    futures = []
    for each in inputs:
        futures.append(model.submit(each))
        found.append(several.decode([1, 2]))
    assert found == wanted
    for each, future in zip(inputs, futures, strict=True):
        assert_same(future.result(timeout=60), single.run(each))
    model.close()


def test_prompts_of_many_tokens_go_through_a_pipeline_in_several_passes(two):
    single, model = TorchRuntime().load("llama-tiny", 4), two.load("llama-tiny", 4, (1, 2))
    contexts = [(row, [(7 * place + row) % 1024 for place in range(length)]) for row, length in enumerate(LONG)]
    one, several = single.sequences(sum(LONG) + 20), model.sequences(sum(LONG) + 20)
    assert several.prefill(contexts) == one.prefill(contexts)
    assert several.decode([0, 1]) == one.decode([0, 1])
    model.close()


def test_a_rank_that_ends_during_its_start_is_not_waited_for():
    found = []

    def start():
        try:
            ParallelTorchRuntime(["cpu", "cuda:99"])
        except DevicesLost as error:
            found.append(str(error))

    starting = threading.Thread(target=start, daemon=True)
    starting.start()
    starting.join(WAIT_S)
    assert found == ["rank 1 ended with exit code 1 during its start; what it wrote to stderr says why"]


def test_turns_are_taken_on_the_device_of_the_group_whatever_their_thread(two, monkeypatch):
    """CUDA begins each thread with device 0, on which shards of a model loaded there would be cut."""
    current = []

    @contextlib.contextmanager
    def on(device):
        current.append((str(device), threading.current_thread().name))
        yield
        current.append("left")

    def take_turn():
        with two.turn():
            current.append("turn")

    monkeypatch.setattr(two.world, "device", torch.device("cuda:3"))
    monkeypatch.setattr(torch.cuda, "device", on)
    loading = threading.Thread(target=take_turn, name="load")
    loading.start()
    loading.join()
    assert current == [("cuda:3", "load"), "turn", "left"]


def test_a_rank_that_ends_loses_the_group(two):
    """The last test of the module: nothing can be run afterwards."""
    found = []
    watch = threading.Thread(target=lambda: found.append(two.await_loss()), daemon=True)
    watch.start()
    model = two.load("llama-tiny", 1, (1, 2))
    sequences = model.sequences(8)
    sequences.prefill([(1, (1, 2, 3))])
    assert found == []
    two._ranks[0].kill()
    two._ranks[0].wait()
    watch.join(WAIT_S)
    assert isinstance(found[0], DevicesLost)
    with pytest.raises(DevicesLost, match="rank"):
        sequences.decode([1])
    with pytest.raises(DevicesLost, match="rank"):
        model.run(model.example(1))
