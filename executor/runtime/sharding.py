"""Tensor parallelism: which linear layers of a model are cut along which side, and the cutting.

The plan of Megatron-LM (Shoeybi et al., 2019, section 3): the projections into heads and into the inner layer by
column, those back by row, so that each block needs two sums over the GPUs. The cutting and the sums are torch's
(`torch.distributed.tensor.parallel`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from plans.errors import InvalidInput

__all__ = ["check_shardable", "shard", "sharded_layers"]

_ENCODER = (r".*\.(query|key|value|intermediate\.dense)", r".*\.output\.dense")
_PLANS: Mapping[str, tuple[str, str]] = {
    "BertForSequenceClassification": _ENCODER,
    "LlamaForCausalLM": (r".*\.(q_proj|k_proj|v_proj|gate_proj|up_proj)", r".*\.(o_proj|down_proj)"),
    "ViTForImageClassification": (r".*\.(q_proj|k_proj|v_proj|fc1)", r".*\.(o_proj|fc2)"),
    "YolosForObjectDetection": _ENCODER,
}
"""By family: names of the linear layers cut by column and by row."""


def check_shardable(model: nn.Module, ways: int, name: str) -> None:
    """Check that `shard` can cut ``model`` over ``ways`` GPUs.

    Raises:
        InvalidInput: Models of this family cannot be cut, or its heads do not divide by the GPUs.
    """
    family = type(model).__name__
    if family not in _PLANS:
        raise InvalidInput.of(
            f"a model that can be tensor parallel: {', '.join(sorted(_PLANS))}",
            where=name,
            field="tp",
            found=family,
            remedy="plan it with tp = 1",
        )
    config: Any = model.config
    heads = {config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)}
    if any(count % ways for count in heads):
        found = f"{' and '.join(map(str, sorted(heads)))} heads over {ways} GPUs"
        raise InvalidInput.of("heads that divide by the GPUs", where=name, field="tp", found=found)


def sharded_layers(model: nn.Module) -> dict[str, tuple[nn.Linear, bool]]:
    """Return the layers that `shard` cuts, by path, each with whether it is cut by column."""
    by_column, by_row = (re.compile(pattern) for pattern in _PLANS[type(model).__name__])
    return {
        path: (module, by_column.fullmatch(path) is not None)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and (by_column.fullmatch(path) or by_row.fullmatch(path))
    }


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Cut ``model``, which every rank of ``mesh`` holds in full, in place; each keeps its part."""
    plan: dict[str, Any] = {
        path: ColwiseParallel() if is_by_column else RowwiseParallel()
        for path, (_, is_by_column) in sharded_layers(model).items()
    }
    parallelize_module(model, mesh, plan)
