from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from executor.runtime import quick_weights
from executor.runtime.memory import LiveTensors
from executor.runtime.precision import cast
from executor.runtime.quick_weights import drawn_llama
from executor.runtime.torch_runtime import DTYPES, TorchRuntime

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 64,
}  # fmt: skip


class HostTensors(LiveTensors):
    """Counts those with data alone."""

    def _hold(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        if storage.device.type != "meta":
            super()._hold(storage, given)


def drawn(seed: int = 0, **more: object) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return drawn_llama(**SHAPE, **more).eval()


def test_the_same_seed_gives_the_same_weights_and_another_gives_others() -> None:
    first, again, other = (drawn(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_weights_are_distributed_as_transformers_draws_them() -> None:
    expected = LlamaForCausalLM(LlamaConfig(**SHAPE)).state_dict()
    found = drawn().state_dict()
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert weight.shape == expected[name].shape
        if weight.dim() == 1:
            assert torch.equal(weight, expected[name])
        else:
            assert float(weight.std()) == pytest.approx(0.02, rel=0.1)


def test_it_answers_as_a_model_that_transformers_built_with_these_weights() -> None:
    model, plain = drawn(), LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    plain.load_state_dict(model.state_dict())
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_tied_weights_stay_one_and_a_model_beyond_the_tape_has_no_two_equal_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quick_weights, "_DRAWN", 1009)
    model = drawn(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    rows = model.model.embed_tokens.weight
    assert len(torch.unique(rows, dim=0)) == len(rows)


def test_nothing_is_drawn_where_only_the_shape_is_wanted() -> None:
    before = torch.get_rng_state()
    with torch.device("meta"):
        model = drawn_llama(**SHAPE)
    assert all(weight.is_meta for weight in model.parameters())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_held_in_half_precision_are_those_of_a_cast(dtype: str) -> None:
    found, expected = drawn(dtype=DTYPES[dtype]), cast(drawn(), DTYPES[dtype])
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(weight, expected.state_dict()[name]) for name, weight in found.state_dict().items())
    assert found.model.rotary_emb.inv_freq.dtype == torch.float32
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(found(input_ids=ids).logits, expected(input_ids=ids).logits)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_building_holds_each_weight_once_and_in_the_type_that_is_wanted(
    monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(quick_weights, "_DRAWN", 1009)
    with HostTensors() as tensors:
        module = cast(TorchRuntime(dtype=dtype).build("llama-tiny")[0], DTYPES[dtype])
    weight_bytes = sum(weight.numel() * weight.element_size() for weight in module.parameters())
    assert weight_bytes <= tensors.peak_bytes < 1.1 * weight_bytes
