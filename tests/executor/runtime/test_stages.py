"""Cutting models into stages: what cannot be cut, that nothing is lost, and that the cuts balance."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from executor.runtime.stages import balanced, evened_s, measured_s, parts_of
from executor.runtime.torch_runtime import TorchRuntime, random_inputs
from plans.errors import InvalidInput


def built(name):
    module, inputs, _ = TorchRuntime().build(name)
    vocabulary = int(getattr(module.config, "vocab_size", 0) or 0)
    example = next(iter(random_inputs(inputs, vocabulary, 2, 3).values()))
    return module.eval(), inputs[0].name, torch.from_numpy(example)


@pytest.mark.parametrize("name", ["segformer-b0", "deeplab-mobilenet-v2"])
def test_a_model_whose_parts_hand_over_more_than_one_tensor_cannot_be_cut(name):
    module, _, _ = TorchRuntime().build(name)
    with pytest.raises(InvalidInput, match=f"{name}: pp: .*plan it with pp = 1"):
        parts_of(module, name)


@pytest.mark.parametrize(
    "name", ["bert-tiny-16", "llama-tiny", "mobilenet-v2-0.35", "resnet-18", "vit-tiny", "yolos-tiny"]
)
def test_the_parts_one_after_the_other_are_the_model(name):
    module, argument, example = built(name)
    with torch.inference_mode():
        whole = module(**{argument: example})
        hidden = example
        for part in parts_of(module, name):
            hidden = part(hidden)
    for key, tensor in hidden.items():
        torch.testing.assert_close(tensor, whole[key], rtol=1e-5, atol=1e-6)


def test_no_weight_is_in_two_parts_of_an_untied_model_and_none_is_lost():
    module, _, _ = built("llama-tiny")
    held = [parameter for part in parts_of(module, "llama-tiny") for parameter in part.parameters()]
    assert len({id(parameter) for parameter in held}) == len(held)
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in module.parameters()}


def test_every_part_is_timed():
    module, _, example = built("bert-tiny-16")
    parts = parts_of(module, "bert-tiny-16")
    with torch.inference_mode():
        times = measured_s(parts, example, repeats=1)
    assert len(times) == len(parts)
    assert all(0 < time < 60 for time in times)


def test_layers_that_repeat_count_alike_so_that_chance_moves_no_cut():
    parts = parts_of(built("llama-tiny")[0], "llama-tiny")
    times = evened_s(parts, [0.1, 2.0, 5.0, 2.0, 2.2, 0.3])
    assert times == [0.1, 2.1, 2.1, 2.1, 2.1, 0.3]
    assert balanced(times, 2) == (0, 3, 6)


def test_more_stages_than_parts_are_refused():
    with pytest.raises(ValueError, match="2 parts cannot make 3 stages"):
        balanced([1.0, 1.0], 3)


@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=8), st.data())
def test_no_other_cut_has_a_faster_slowest_stage(times, data):
    """Law: brute force over all cuts finds none better; stages are consecutive, not empty, and complete."""
    stages = data.draw(st.integers(1, len(times)))
    edges = balanced(times, stages)
    assert edges[0] == 0
    assert edges[-1] == len(times)
    assert all(before < after for before, after in itertools.pairwise(edges))

    def slowest(cuts):
        return max(sum(times[start:end]) for start, end in itertools.pairwise(cuts))

    every = itertools.combinations(range(1, len(times)), stages - 1)
    assert slowest(edges) == pytest.approx(min(slowest((0, *cuts, len(times))) for cuts in every))
