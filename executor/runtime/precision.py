"""The type of number that a model computes in."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["cast"]


def cast(module: Any, dtype: torch.dtype) -> Any:
    """Give ``module`` weights and kept buffers of ``dtype``, in place, and return it.

    Buffers that are computed rather than kept with the weights stay as exact as they are: the frequencies of rotary
    positions, in half precision, would put distant tokens at wrong places.
    """
    kept = module.state_dict().keys()
    computed = {name: buffer for name, buffer in module.named_buffers() if name not in kept}
    module = module.to(dtype=dtype)
    for name, buffer in computed.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, buffer)
    return module
