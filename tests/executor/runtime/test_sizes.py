from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from executor.admission import NodeFacts, placement_faults
from executor.runtime.cost import count_costs
from executor.runtime.registry import REGISTRY, architecture_of
from executor.runtime.sizes import sized_name, split_size
from executor.runtime.torch_runtime import TorchRuntime
from plans.errors import InvalidInput
from tests.executor.running_agent import desired, replica


@given(st.sampled_from(sorted(REGISTRY)), st.integers(1, 5000))
def test_a_sized_name_is_split_into_what_it_was_made_of(model: str, size: int) -> None:
    name = sized_name(model, size)
    expected = (name, None) if name in REGISTRY else (model, size)
    assert split_size(name, REGISTRY) == expected
    assert split_size(model, REGISTRY) == (model, None)


@pytest.mark.parametrize(
    "name", ["resnet-19-64", "resnet", "64", "-64", "", "resnet-18-", "resnet-18-064", "resnet-18-²"]
)
def test_names_of_no_model_at_a_size_are_unknown(name: str) -> None:
    assert split_size(name, REGISTRY) is None
    assert architecture_of(name) is None


@pytest.mark.parametrize("model", sorted(REGISTRY))
def test_every_model_has_variants_by_input_size_with_as_many_outputs(model: str) -> None:
    architecture = REGISTRY[model]
    size = architecture.sizes[2]
    found = architecture_of(sized_name(model, size))
    assert found is not None
    assert found[0] == model
    assert found[1].size == size
    assert found[1].outputs == architecture.outputs
    assert found[1].description != architecture.description
    assert architecture.size in architecture.sizes
    assert architecture_of(sized_name(model, architecture.size)) == (model, architecture)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit-tiny-100", "16 to 2048 in steps of 16"),
        ("resnet-18-48", "32 to 2048 in steps of 32"),
        ("bert-base-513", "1 to 512"),
        ("llama-tiny-4096", "1 to 1024"),
    ],
)
def test_a_size_that_a_model_cannot_have_is_refused_with_those_that_it_can(name: str, expected: str) -> None:
    with pytest.raises(InvalidInput, match=f"input size: found [0-9]+, expected {expected}"):
        TorchRuntime().load(name, 1)


@pytest.mark.parametrize(
    ("name", "shape"), [("mobilenet-v2-0.35-96", (3, 96, 96)), ("vit-tiny-32", (3, 32, 32)), ("bert-tiny-16-5", (5,))]
)
def test_a_variant_by_input_size_runs_and_costs_less(name: str, shape: tuple[int, ...]) -> None:
    model = TorchRuntime().load(name, 2)
    assert model.inputs[0].shape == shape
    assert {array.shape[0] for array in model.run(model.example(2)).values()} == {2}
    (own,), (smaller,) = count_costs(name.rpartition("-")[0], (1,)), count_costs(name, (1,))
    assert smaller.flops < own.flops


def test_a_convolutional_model_has_the_same_weights_at_every_size() -> None:
    own, small = (TorchRuntime().build(name)[0].state_dict() for name in ("mobilenet-v2-0.35", "mobilenet-v2-0.35-96"))
    assert all(torch.equal(own[name], small[name]) for name in own)


def test_a_local_model_runs_at_another_size_if_its_weights_are_not_made_for_one(tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path / "little")
    sizes = {"image_size": 32, "patch_size": 16, "hidden_size": 16, "intermediate_size": 16}
    fixed = ViTConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
    ViTForImageClassification(fixed).save_pretrained(tmp_path / "fixed")
    runtime = TorchRuntime(model_dir=tmp_path)
    assert runtime.load("little-64", 1).inputs[0].shape == (3, 64, 64)
    assert runtime.load("fixed-32", 1).inputs[0].shape == (3, 32, 32)
    with pytest.raises(InvalidInput, match="input size: found 64: Input image size"):
        runtime.load("fixed-64", 1)
    assert count_costs("little-64", (1,), model_dir=tmp_path)[0].flops > 0


def test_a_node_admits_what_it_has_at_another_size_and_nothing_else() -> None:
    facts = NodeFacts(node="node-a", device_count=1, memory_bytes=10**9, variants=("resnet-18",))
    assert placement_faults(desired(1, g0=[replica("a", "resnet-18-96")]), facts) == ()
    (fault,) = placement_faults(desired(1, g0=[replica("a", "resnet-50-96")]), facts)
    assert "'resnet-50-96', expected one of resnet-18" in str(fault)
