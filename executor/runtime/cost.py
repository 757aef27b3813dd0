"""What a model costs on any device: operations and bytes, counted on tensors without data; and a device's rates."""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from transformers import BertConfig, BertModel

from executor.runtime.generation import can_generate
from executor.runtime.local_models import load_folder, quiet_transformers
from executor.runtime.memory import LiveTensors, keep_freed_memory
from executor.runtime.names import local_model, registered
from executor.runtime.protocol import TensorSpec
from executor.runtime.torch_runtime import DTYPES
from plans.errors import InvalidInput
from profiles.roofline import DeviceRates, Kind, ModelCost, Operation

__all__ = ["count_cost", "count_costs", "measure_rates"]

PROMPT_TOKENS = (128, 512, 2048)
"""Lengths of prompts that prefill is counted at."""

CONTEXT_TOKENS = (512, 2048, 8192)
"""Lengths of context that decode steps are counted at."""

_CONVOLUTIONS = {torch.ops.aten.convolution, torch.ops.aten._convolution}
_FEW_CHANNELS = 4
"""Up to this many input channels per group, a convolution is bound by moving data, as a depthwise one is."""


def count_costs(
    variant: str,
    batches: Iterable[int],
    *,
    dtype: str = "fp32",
    model_dir: Path | None = None,
    prompt_tokens: Sequence[int] = PROMPT_TOKENS,
    context_tokens: Sequence[int] = CONTEXT_TOKENS,
) -> tuple[ModelCost, ...]:
    """Return what each of ``batches`` costs for a model of the registry or of ``model_dir``; nothing is computed.

    A model that generates gives prefill at each of ``prompt_tokens`` and decode steps at each of ``context_tokens``, up
    to the longest that it can hold; any other model gives whole requests.

    Raises:
        UnknownVariant: Neither the registry nor the folder has the model.
        InvalidInput: The model's folder is damaged, ``dtype`` is unknown, a batch is below 1, or the module looks at
            values, which tensors without data cannot give.
    """
    if dtype not in DTYPES:
        raise InvalidInput.of("one of " + ", ".join(DTYPES), field="dtype", found=repr(dtype))
    grid = sorted(set(batches))
    if not grid or grid[0] < 1:
        raise InvalidInput.of("at least one batch, each at least 1", field="batches", found=grid)
    module, inputs = _meta_module(variant, model_dir)
    module = module.to(dtype=DTYPES[dtype]).eval().requires_grad_(False)
    try:
        if can_generate(module):
            return tuple(_count_phases(module, grid, DTYPES[dtype], prompt_tokens, context_tokens))
        return tuple(count_cost(module, inputs, batch, DTYPES[dtype]) for batch in grid)
    except (RuntimeError, NotImplementedError) as error:
        problem = str(error).splitlines()[0]
        remedy = "measure it with `profile run`"
        raise InvalidInput.of("a model that runs without data", where=variant, found=problem, remedy=remedy) from error


def _count_phases(
    module: Any, batches: Sequence[int], dtype: torch.dtype, prompts: Sequence[int], contexts: Sequence[int]
) -> Iterator[ModelCost]:
    config = module.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    kv_bytes = 2 * kv_heads * head * dtype.itemsize  # a key and a value, per layer and token
    layers = config.num_hidden_layers
    longest = config.max_position_embeddings
    for batch in batches:
        for tokens in sorted({min(count, longest) for count in prompts}):
            cost = _with_kv(_count_tokens(module, batch, tokens, dtype), tokens, layers * kv_bytes)
            yield replace(cost, phase="prefill", input_tokens=tokens)
        step = _count_tokens(module, batch, 1, dtype)
        for tokens in sorted({min(count, longest) for count in contexts}):
            # What a step does with the context beside its own token: two products with the cache, which is read once.
            flops = 4.0 * batch * tokens * config.num_attention_heads * head
            attention = Operation(kind="matmul", flops=flops, bytes=float(batch * tokens * kv_bytes), count=layers)
            cost = replace(step, operations=(*step.operations, attention), phase="decode", input_tokens=tokens)
            yield _with_kv(cost, tokens, layers * kv_bytes)


def _with_kv(cost: ModelCost, tokens: int, kv_bytes: int) -> ModelCost:
    """Return ``cost`` with the cache of ``tokens`` for each sequence among what is alive."""
    held = cost.activation_bytes + cost.batch * tokens * kv_bytes
    return replace(cost, activation_bytes=held, kv_bytes_per_token=kv_bytes)


def _count_tokens(module: torch.nn.Module, batch: int, tokens: int, dtype: torch.dtype) -> ModelCost:
    ids = torch.empty((batch, tokens), dtype=torch.int64, device="meta")
    return _count(module, {"input_ids": ids, "attention_mask": _whole_mask(batch, tokens, dtype)}, batch)


def _whole_mask(batch: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a mask in which a causal model does not look for padding, which it could not do without data."""
    return torch.empty((batch, 1, tokens, tokens), dtype=dtype, device="meta")


def _meta_module(variant: str, model_dir: Path | None) -> tuple[torch.nn.Module, Sequence[TensorSpec]]:
    local = local_model(variant, model_dir)
    if model_dir is not None and local is not None:
        with quiet_transformers():
            loaded, inputs, _ = load_folder(model_dir, *local)
        module: torch.nn.Module = loaded
        return module.to("meta"), inputs
    _, architecture = registered(variant, model_dir)
    with torch.device("meta"):
        return architecture.build(), architecture.inputs


def count_cost(module: torch.nn.Module, inputs: Sequence[TensorSpec], batch: int, dtype: torch.dtype) -> ModelCost:
    """Return what one batch of ``module``, which lives on the meta device, costs; see `count_costs`."""
    given = {}
    for spec in inputs:
        kind = dtype if spec.datatype.startswith("FP") else torch.int64
        given[spec.name] = torch.empty((batch, *spec.shape), dtype=kind, device="meta")
    if "logits_to_keep" in inspect.signature(module.forward).parameters:
        given["attention_mask"] = _whole_mask(batch, inputs[0].shape[-1], dtype)
    return _count(module, given, batch)


def _count(module: torch.nn.Module, given: Mapping[str, torch.Tensor], batch: int) -> ModelCost:
    operations, live = _Operations(), LiveTensors()
    # Inference mode would hide what composite operations are made of.
    with torch.no_grad(), live, operations:
        module(**given)
    counted = tuple(
        Operation(kind=kind, flops=flops, bytes=moved, count=count)
        for (kind, flops, moved), count in sorted(operations.counted.items())
    )
    weights = [*module.parameters(), *module.buffers()]
    return ModelCost(
        batch=batch,
        operations=counted,
        weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in weights),
        activation_bytes=live.peak_bytes,
    )


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations by kind, arithmetic and bytes; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted: Counter[tuple[Kind, float, float]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view or func._overloadpacket is torch.ops.aten._unsafe_view:
            return result
        # A look-up reads as much of its table as it returns.
        given = (args[1], result) if func._overloadpacket is torch.ops.aten.embedding else (args, kwargs, result)
        touched = [t for t in tree_iter(given) if isinstance(t, torch.Tensor)]
        moved = float(sum(t.numel() * t.element_size() for t in touched))
        formula = flop_registry.get(func._overloadpacket)
        flops = float(formula(*args, **(kwargs or {}), out_val=result)) if formula is not None else 0.0
        self.counted[_kind_of(func._overloadpacket, args, flops), flops, moved] += 1
        return result


def _kind_of(packet: Any, args: tuple[Any, ...], flops: float) -> Kind:
    if packet in _CONVOLUTIONS:
        return "depthwise" if args[1].shape[1] <= _FEW_CHANNELS and args[8] > 1 else "convolution"
    return "matmul" if flops else "other"


def measure_rates(gpu_type: str, dtype: str = "fp32", threads: int = 1, repeat: int = 15) -> DeviceRates:
    """Measure the rates of this processor in about a second: kernels of typical size, the best of ``repeat`` runs.

    It sets torch's threads and the C library's allocator as the runtime does, for the whole process.

    Raises:
        InvalidInput: ``dtype`` is unknown.
    """
    if dtype not in DTYPES:
        raise InvalidInput.of("one of " + ", ".join(DTYPES), field="dtype", found=repr(dtype))
    torch.set_num_threads(threads)
    keep_freed_memory()
    with torch.inference_mode():
        return _rates(gpu_type, dtype, repeat)


def _rates(gpu_type: str, dtype: str, repeat: int) -> DeviceRates:
    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=DTYPES[dtype])

    rows = ones(256, 768)
    # Weights in turn, as a model's layers come: from memory, not from the cache.
    weights = cycle([ones(768, 3072) for _ in range(6)])
    image, kernels = ones(2, 192, 28, 28), cycle([ones(192, 192, 3, 3) for _ in range(6)])
    thin = ones(192, 1, 3, 3)
    size = DTYPES[dtype].itemsize
    matmul_s = _least_s(lambda: rows @ next(weights), repeat)
    convolution_s = _least_s(lambda: functional.conv2d(image, next(kernels), padding=1), repeat)
    depthwise_s = _least_s(lambda: functional.conv2d(image, thin, padding=1, groups=192), repeat)
    bytes_per_s = _pass_bytes_per_s(ones(32, 64, 56, 56), repeat)
    return DeviceRates(
        gpu_type=gpu_type,
        dtype=dtype,
        flops_per_s={
            "matmul": 2 * 256 * 768 * 3072 / matmul_s,
            "convolution": 2 * 9 * 2 * 28 * 28 * 192 * 192 / convolution_s,
            "depthwise": 2 * 9 * 2 * 28 * 28 * 192 / depthwise_s,
        },
        bytes_per_s=bytes_per_s,
        cache_bytes_per_s=max(bytes_per_s, _pass_bytes_per_s(ones(1, 64, 56, 56), repeat)),
        cache_bytes=4 * 64 * 56 * 56 * size,
        operation_s=_operation_s(repeat),
        load_bytes_per_s=bytes_per_s,
        source=f"measured with {torch.get_num_threads()} threads",
    )


def _operation_s(repeat: int) -> float:
    """Return the time to start an operation with all that modules do around it: of a model where little else counts."""
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=1, intermediate_size=32, vocab_size=8)
    module: torch.nn.Module = BertModel(config)
    module.eval()
    tokens = torch.zeros((1, 2), dtype=torch.int64)
    operations = _Operations()
    with torch.no_grad(), operations:
        module(input_ids=tokens)
    return _least_s(lambda: module(input_ids=tokens), repeat) / operations.counted.total()


def _pass_bytes_per_s(values: torch.Tensor, repeat: int) -> float:
    """Return the bandwidth of what stands between the products: a sum, an activation and a normalisation in turn."""
    scale = torch.ones(values.shape[1], dtype=values.dtype)
    passes = (
        lambda: values + values,
        lambda: functional.gelu(values),
        lambda: functional.batch_norm(values, scale, scale, scale, scale),
    )
    total_s = sum(_least_s(each, repeat) for each in passes)
    return 7 * values.numel() * values.element_size() / total_s


def _least_s(action: Callable[[], object], repeat: int) -> float:
    for _ in range(3):
        action()
    samples = []
    for _ in range(repeat):
        start = time.perf_counter()
        action()
        samples.append(time.perf_counter() - start)
    return min(samples)
