"""Random weights of large models, drawn in seconds: transformers takes minutes to draw billions of numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

__all__ = ["drawn_llama"]

_DRAWN = 2**24 + 43
"""Numbers that are drawn; a larger model has them again and again. No product of a model's lengths divides it."""


def drawn_llama(dtype: torch.dtype = torch.float32, **shape: Any) -> Any:
    """Return a `LlamaForCausalLM` with weights from torch's generator, distributed as transformers would draw them.

    They are held as ``dtype`` from the start, with the values that a cast from fp32 would give. On the meta device,
    which is the default device when only the shape is wanted, nothing is drawn.
    """
    config = LlamaConfig(**shape)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.to(dtype)
    if torch.get_default_device().type == "meta":
        return model
    model.to_empty(device=torch.get_default_device())
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # what it holds is computed, not drawn
    model.tie_weights()
    _fill(model.parameters(), config.initializer_range)
    return model


def _fill(parameters: Iterable[torch.nn.Parameter], deviation: float) -> None:
    """Set scales of normalisations to 1 and write the drawn numbers over all else, as one endless tape."""
    weights = list(parameters)
    tape = torch.randn(min(_DRAWN, sum(weight.numel() for weight in weights))).mul_(deviation).to(weights[0].dtype)
    at = 0
    with torch.no_grad():
        for weight in weights:
            if weight.dim() == 1:
                weight.fill_(1.0)
                continue
            flat, start = weight.view(-1), 0
            while start < len(flat):
                length = min(len(flat) - start, len(tape) - at)
                flat[start : start + length] = tape[at : at + length]
                start, at = start + length, (at + length) % len(tape)
