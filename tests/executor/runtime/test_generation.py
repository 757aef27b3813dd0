from __future__ import annotations

import random
from itertools import count

import pytest
import torch

from executor.runtime.generation import KvMemory, kv_bytes_per_token
from executor.runtime.generation_engine import GenerationEngine
from executor.runtime.protocol import InvalidTensor, OutOfDeviceMemory
from executor.runtime.torch_runtime import GeneratingModel, TorchRuntime
from plans.errors import InvalidInput
from profiles.group import Grid, Point, Series
from profiles.profiler import StopRule, profile_group

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> GeneratingModel:
    loaded = TorchRuntime().load("llama-tiny", 4)
    assert isinstance(loaded, GeneratingModel)
    return loaded


@pytest.fixture(scope="module")
def module():
    built, _, _ = TorchRuntime().build("llama-tiny")
    return built.eval().requires_grad_(False)


def by_transformers(module, prompt: list[int], new_tokens: int) -> tuple[int, ...]:
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        answer = module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
        )
    return tuple(answer[0, len(prompt) :].tolist())


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1024) for _ in range(rng.choice([1, 4, 13, 40, 77]))] for _ in range(count)]


def finish(engine: GenerationEngine):
    steps, finished = [], {}
    while not engine.is_idle:
        steps.append(engine.step())
        finished |= {one.number: one for one in steps[-1].finished}
    return steps, finished


def test_a_single_sequence_equals_transformers_own_generation(model, module):
    engine = model.engine(kv_tokens=200, max_batch=4)
    number = engine.add(prompts(3)[2], 20)
    _, finished = finish(engine)
    assert finished[number].tokens == by_transformers(module, prompts(3)[2], 20)


def test_a_batch_of_mixed_lengths_gives_each_what_it_gets_alone(model, module):
    engine = model.engine(kv_tokens=1000, max_batch=8)
    wanted = [(prompt, 1 + 3 * place) for place, prompt in enumerate(prompts(8))]
    numbers = [engine.add(prompt, new) for prompt, new in wanted]
    steps, finished = finish(engine)
    assert len(steps[0].produced) == 8  # one prefill for all
    for number, (prompt, new) in zip(numbers, wanted, strict=True):
        assert finished[number].tokens == by_transformers(module, prompt, new)


def test_a_prefill_of_many_tokens_goes_in_several_passes(model, module, monkeypatch):
    monkeypatch.setattr("executor.runtime.generation._PACKED_TOKENS", 50)
    engine = model.engine(kv_tokens=1000, max_batch=8)
    numbers = [engine.add(prompt, 2) for prompt in prompts(8)]
    steps, finished = finish(engine)
    assert len(steps) == 2
    for number, prompt in zip(numbers, prompts(8), strict=True):
        assert finished[number].tokens == by_transformers(module, prompt, 2)


def test_sequences_that_lose_their_memory_are_computed_again_to_the_same_tokens(model, module):
    engine = model.engine(kv_tokens=110, max_batch=8)
    wanted = [(prompt, 25) for prompt in prompts(6, seed=3)]
    numbers = [engine.add(prompt, new) for prompt, new in wanted]
    steps, finished = finish(engine)
    assert any(step.preempted for step in steps)
    for number, (prompt, new) in zip(numbers, wanted, strict=True):
        assert finished[number].tokens == by_transformers(module, prompt, new)


def test_newcomers_join_between_two_iterations(model, module):
    engine = model.engine(kv_tokens=500, max_batch=4)
    first = engine.add(prompts(3)[1], 6)
    engine.step()
    engine.step()
    second = engine.add(prompts(3)[2], 6)
    assert [number for number, _ in engine.step().produced] == [second]
    assert [number for number, _ in engine.step().produced] == [first, second]
    _, finished = finish(engine)
    assert finished[second].tokens == by_transformers(module, prompts(3)[2], 6)


def test_times_are_from_entry_to_first_token_and_per_token_after_it(model):
    """The clock ticks once a second: entry 0, turn 1, first token 2; turns and tokens 3 to 6 make two more."""
    ticks = count()
    engine = GenerationEngine(model.sequences(50), kv_tokens=50, max_batch=1, clock=lambda: float(next(ticks)))
    engine.add([1, 2, 3], 3)
    engine.add([4], 1)
    _, finished = finish(engine)
    assert (finished[0].ttft_s, finished[0].tpot_s) == (3.0, 2.0)
    assert (finished[1].ttft_s, finished[1].tpot_s) == (8.0, 0.0)


def test_memory_of_what_is_over_is_used_again(model):
    engine = model.engine(kv_tokens=50, max_batch=1)
    for _ in range(3):
        engine.add(list(range(40)), 10)
    _, finished = finish(engine)
    assert [len(one.tokens) for one in finished.values()] == [10, 10, 10]


def test_memory_that_grows_keeps_what_it_holds(model):
    sequences, larger = model.sequences(12), model.sequences(40)
    first = [each.prefill([(7, range(10))]) for each in (sequences, larger)]
    sequences.hold(40)
    sequences.hold(20)
    assert [*first[0], *[sequences.decode([7])[0] for _ in range(20)]] == [
        *first[1],
        *[larger.decode([7])[0] for _ in range(20)],
    ]


def test_what_memory_does_not_hold_or_nobody_began_is_refused(model):
    sequences = model.sequences(12)
    with pytest.raises(InvalidTensor, match="at most 12"):
        sequences.prefill([(1, range(13))])
    with pytest.raises(InvalidTensor, match="prefilled"):
        sequences.decode([1])
    with pytest.raises(InvalidTensor, match="from 0 to 1023"):
        sequences.prefill([(1, [1024])])
    sequences.prefill([(1, range(12))])
    with pytest.raises(InvalidTensor, match="at most 0"):
        sequences.decode([1])
    sequences.free([1, 2])
    sequences.prefill([(1, range(12))])


def test_a_stop_token_ends_a_sequence_early(model, module):
    expected = by_transformers(module, [5, 6, 7], 20)
    stop = expected[4]
    engine = model.engine(kv_tokens=100, max_batch=1, stop_tokens=[stop])
    engine.add([5, 6, 7], 20)
    _, finished = finish(engine)
    assert finished[0].tokens == expected[: expected.index(stop) + 1]


def test_a_sequence_that_would_be_late_is_given_up(model):
    engine = model.engine(kv_tokens=100, max_batch=1, prefill_s=lambda tokens: 60.0)
    late = engine.add([1], 2, ttft_s=1.0)
    patient = engine.add([1], 1)
    step = engine.step()
    assert step.dropped == (late,)
    assert [one.number for one in step.finished] == [patient]
    assert engine.is_idle


def test_every_fault_of_a_sequence_is_named_at_once(model):
    engine = model.engine(kv_tokens=100, max_batch=1)
    with pytest.raises(InvalidInput) as caught:
        engine.add([0, 1024], 2000)
    assert [fault.found for fault in caught.value.faults] == ["tokens from 0 to 1024", "2002", "2002"]
    with pytest.raises(InvalidInput, match="no token"):
        engine.add([], 0)
    assert engine.is_idle


def test_an_engine_needs_memory_and_a_batch(model):
    with pytest.raises(InvalidInput, match="kv_tokens"):
        model.engine(kv_tokens=0, max_batch=1)
    with pytest.raises(InvalidInput, match="max_batch"):
        model.engine(kv_tokens=10, max_batch=0)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_memory_of_a_token_is_a_key_and_a_value_in_every_layer(module, dtype, size):
    """llama-tiny: 4 layers, 2 key-value heads of 128 / 4 = 32 numbers."""
    assert kv_bytes_per_token(module.config, dtype) == 2 * 4 * 2 * 32 * size
    assert KvMemory(module.config, 3, CPU, dtype).data.nbytes == 3 * kv_bytes_per_token(module.config, dtype)


def test_half_precision_generates(module):
    loaded = TorchRuntime(dtype="bf16").load("llama-tiny", 1)
    assert isinstance(loaded, GeneratingModel)
    engine = loaded.engine(kv_tokens=50, max_batch=2)
    engine.add([1, 2, 3], 4)
    engine.add([9], 4)
    _, finished = finish(engine)
    assert [len(finished[number].tokens) for number in (0, 1)] == [4, 4]


def test_the_profiler_measures_prefill_and_decode(model):
    series = (Series(phase="prefill", input_tokens=16), Series(phase="decode", input_tokens=32), Series())
    profile = profile_group(
        model.as_group(),
        model="llama-tiny",
        gpu_type="cpu",
        grid=Grid(batches=(1, 2), series=series),
        stop=StopRule(point_s=0.02, max_samples=3, warmup_runs=0),
    )
    assert [(row.phase, row.batch, row.input_tokens) for row in profile.rows] == [
        ("prefill", 1, 16),
        ("prefill", 2, 16),
        ("decode", 1, 32),
        ("decode", 2, 32),
        ("whole", 1, None),
        ("whole", 2, None),
    ]
    assert profile.kv_bytes_per_token == 2048
    decode = next(row for row in profile.rows if row.phase == "decode" and row.batch == 2)
    assert decode.activation_bytes[0] >= 2 * 32 * 2048


@pytest.mark.parametrize("series", [Series(phase="prefill"), Series(phase="decode", input_tokens=2000)])
def test_a_phase_needs_tokens_that_the_model_can_hold(model, series):
    with pytest.raises(InvalidInput, match="1 to 1024 tokens in"):
        model.as_group().prepare(Point(series=series, batch=1))


def test_key_value_memory_that_does_not_fit_is_named(model, monkeypatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("executor.runtime.generation.torch.zeros", full)
    with pytest.raises(OutOfDeviceMemory, match="llama-tiny does not fit on the device at batch 4"):
        model.engine(kv_tokens=10, max_batch=1)
