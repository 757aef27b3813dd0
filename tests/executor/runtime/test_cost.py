from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from executor.runtime.cost import count_cost, count_costs, measure_rates
from executor.runtime.protocol import TensorSpec, UnknownVariant
from executor.runtime.registry import Architecture
from plans.errors import InvalidInput


class Small(torch.nn.Module):
    """One product, one convolution, one depthwise convolution and a view."""

    def __init__(self) -> None:
        super().__init__()
        self.full = torch.nn.Conv2d(8, 16, 3, bias=False)
        self.depthwise = torch.nn.Conv2d(16, 16, 3, groups=16, bias=False)
        self.head = torch.nn.Linear(16, 10, bias=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.depthwise(self.full(image)).flatten(1))


def test_arithmetic_and_bytes_are_those_of_a_count_by_hand() -> None:
    with torch.device("meta"):
        module = Small()
    counted = count_cost(module, (TensorSpec("image", "FP32", (8, 5, 5)),), 2, torch.float32)
    by_kind = {operation.kind: operation for operation in counted.operations}
    assert by_kind["convolution"].flops == 2 * 2 * 16 * 8 * 9 * 3 * 3
    assert by_kind["depthwise"].flops == 2 * 2 * 16 * 9
    assert by_kind["matmul"].flops == 2 * 2 * 16 * 10
    assert by_kind["convolution"].bytes == 4 * (2 * 8 * 25 + 16 * 8 * 9 + 2 * 16 * 9)
    assert counted.weight_bytes == 4 * (16 * 8 * 9 + 16 * 9 + 160)
    assert "other" not in by_kind  # the view costs nothing


def test_arithmetic_is_proportional_to_the_batch_and_half_the_bytes_do_for_half_the_width() -> None:
    one, four = count_costs("mobilenet-v2-0.5", (4, 1))
    assert (one.batch, four.batch) == (1, 4)
    assert four.flops == pytest.approx(4 * one.flops)
    assert four.activation_bytes > 3 * one.activation_bytes
    (half,) = count_costs("mobilenet-v2-0.5", (4,), dtype="bf16")
    assert half.flops == four.flops
    assert half.weight_bytes == pytest.approx(four.weight_bytes / 2, rel=0.01)


def test_a_look_up_does_not_read_the_whole_table() -> None:
    (cost,) = count_costs("bert-tiny-16", (1,))
    assert cost.bytes < 2 * cost.weight_bytes
    assert max(operation.bytes for operation in cost.operations) < 0.2 * cost.weight_bytes


def test_counting_allocates_nothing_of_the_models_size() -> None:
    before = torch.get_rng_state()
    count_costs("bert-tiny-16", (64,))
    assert torch.equal(before, torch.get_rng_state())


def test_an_unknown_model_number_or_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownVariant):
        count_costs("no-such-model", (1,), model_dir=tmp_path)
    with pytest.raises(InvalidInput, match="dtype"):
        count_costs("bert-tiny-16", (1,), dtype="fp12")
    with pytest.raises(InvalidInput, match="batches"):
        count_costs("bert-tiny-16", (0,))
    with pytest.raises(InvalidInput, match="dtype"):
        measure_rates("cpu", "fp12")


def test_measured_rates_are_those_of_a_real_processor() -> None:
    rates = measure_rates("cpu", repeat=2)
    assert rates.gpu_type == "cpu"
    assert all(1e7 < rate < 1e15 for rate in rates.flops_per_s.values())
    assert rates.load_bytes_per_s == rates.bytes_per_s > 1e7
    assert rates.bytes_per_s <= rates.cache_bytes_per_s
    assert 0 < rates.operation_s < 0.1


def test_a_model_that_generates_is_counted_by_phase() -> None:
    costs = count_costs("llama-tiny", (1, 2), prompt_tokens=(16, 64), context_tokens=(64, 512, 10**6))
    found = {(cost.phase, cost.batch, cost.input_tokens): cost for cost in costs}
    assert {key[2] for key in found if key[0] == "prefill"} == {16, 64}
    assert {key[2] for key in found if key[0] == "decode"} == {64, 512, 1024}  # what the model can hold
    kv_bytes = costs[0].kv_bytes_per_token
    assert kv_bytes == 4 * 2 * 2 * 32 * 4  # layers, key and value, heads, size of a head, bytes of a number
    longer, shorter = found["decode", 2, 512], found["decode", 2, 64]
    assert longer.bytes - shorter.bytes == 2 * (512 - 64) * kv_bytes
    assert longer.activation_bytes - shorter.activation_bytes == 2 * (512 - 64) * kv_bytes
    # All but attention is in proportion to the tokens.
    assert 4 <= found["prefill", 1, 64].flops / found["prefill", 1, 16].flops < 5


def test_a_causal_model_that_does_not_generate_here_is_counted_whole_and_without_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt")
    capfd.readouterr()
    (cost,) = count_costs("gpt", (3,), model_dir=tmp_path)
    assert (cost.phase, cost.batch, cost.input_tokens, cost.kv_bytes_per_token) == ("whole", 3, None, None)
    inner_weights = 2 * 12 * 32 * 32  # of each layer: 4 to and from the heads, 8 to and from the inner layer
    assert cost.flops > 2 * 3 * 128 * inner_weights
    assert capfd.readouterr() == ("", "")


def test_a_model_that_looks_at_values_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Looking(Small):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image if image.sum().item() else super().forward(image)

    looking = Architecture(
        build=Looking, inputs=(TensorSpec("image", "FP32", (8, 5, 5)),), outputs=(), description="looks at its input"
    )
    monkeypatch.setattr("executor.runtime.names.REGISTRY", {"looking": looking})
    with pytest.raises(InvalidInput, match="profile run"):
        count_costs("looking", (1,))
