"""Stages that generate: which layers each has, and pipelines over four ranks, of sharded stages and of small ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.runtime.generation_engine import GenerationEngine
from executor.runtime.generation_stage import stage_layers
from executor.runtime.parallel import ParallelTorchRuntime
from executor.runtime.protocol import DevicesLost
from executor.runtime.torch_runtime import TorchRuntime

PROMPTS = [[(7 * position + 31 * row) % 1024 for position in range(5 + row)] for row in range(2)]
KV_TOKENS = 14
"""Too few for the prompts to run to their ends together."""


@given(st.data(), st.integers(1, 40))
def test_every_layer_is_of_one_stage_in_order(data, layers):
    parts = layers + 2
    stages = data.draw(st.integers(1, parts))
    cuts = data.draw(st.sets(st.integers(1, parts - 1), min_size=stages - 1, max_size=stages - 1))
    edges = (0, *sorted(cuts), parts)
    found = [layer for stage in range(stages) for layer in stage_layers(edges, stage, layers)]
    assert found == list(range(layers))


def test_a_stage_that_only_embeds_or_finds_logits_has_no_layers():
    assert [list(stage_layers((0, 1, 3, 5, 6), stage, 4)) for stage in range(4)] == [[], [0, 1], [2, 3], []]


def generated(sequences):
    engine = GenerationEngine(sequences, kv_tokens=KV_TOKENS, max_batch=2)
    numbers = [engine.add(prompt, 3) for prompt in PROMPTS]
    answers, preempted = {}, 0
    while not engine.is_idle:
        step = engine.step()
        preempted += len(step.preempted)
        answers |= {one.number: one.tokens for one in step.finished}
    return [answers[number] for number in numbers], preempted


@pytest.fixture(scope="module")
def four():
    made = ParallelTorchRuntime(["cpu"] * 4)
    yield made
    made.close()


@pytest.mark.parametrize("shape", [(2, 2), (1, 4)], ids=["tp2 x pp2", "pp4"])
def test_four_ranks_generate_the_tokens_of_one_process(four, shape):
    wanted = generated(TorchRuntime().load("llama-tiny", 2).sequences(KV_TOKENS))
    model = four.load("llama-tiny", 2, shape)
    assert generated(model.sequences(KV_TOKENS)) == wanted
    assert wanted[1] > 0
    tp, pp = shape
    kv_bytes = model.phase_pass("decode", 2, 9).kv_bytes
    assert len(kv_bytes) == pp
    assert tp * sum(kv_bytes) == 2 * 9 * model.generation.kv_bytes_per_token
    model.close()


def test_a_rank_in_the_middle_that_ends_loses_the_group(four):
    """The last test of the module: nothing can be run afterwards."""
    sequences = four.load("llama-tiny", 1, (1, 4)).sequences(16)
    sequences.prefill([(1, (1, 2, 3))])
    middle = four._ranks[1]
    middle.kill()
    middle.wait()
    with pytest.raises(DevicesLost, match="rank"):
        sequences.decode([1])
