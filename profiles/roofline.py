"""The roofline: what a batch must take at least, from its operations and the device's rates, without measuring it.

Each operation takes the longer of its arithmetic at the device's rate for that kind and of its bytes at the device's
bandwidth, plus the time to start it (Williams, Waterman, Patterson 2009, "Roofline: an insightful visual performance
model for multicore architectures", operation by operation). It counts what it is told and knows no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import Field, field_validator

from plans.catalogue import catalogue
from plans.cluster import Name
from plans.documents import FORMAT_VERSION, Document
from plans.errors import InvalidInput
from plans.units import Seconds
from profiles.document import LatencyStatistics, Phase, Profile, ProfileMeta, Row

__all__ = [
    "ROOFLINE_ERROR_RATIO",
    "DeviceRates",
    "Kind",
    "ModelCost",
    "Operation",
    "datasheet_rates",
    "latency_s",
    "modelled_profile",
]

Kind = Literal["matmul", "convolution", "depthwise", "other"]
"""What an operation does: dense products; convolutions; convolutions with few channels per group; all else."""

ROOFLINE_ERROR_RATIO = 1.0
"""How far a roofline may be from the truth, as a share of it: a factor of two. benchmarks/profile_roofline.py."""

REACHED_MATMUL, REACHED_CONVOLUTION, REACHED_BANDWIDTH = 0.6, 0.4, 0.75
"""Shares of a datasheet's peaks that are counted on. Conventions, not measurements."""

LAUNCH_S = 10e-6
"""Time to start one kernel from eager torch. A convention, not a measurement."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """Operations of one kind and size.

    Attributes:
        kind: What it does.
        flops: Floating-point operations of one of them; a multiplication with its addition counts as 2.
        bytes: Bytes that one reads and writes, each tensor once.
        count: How many of them there are.
    """

    kind: Kind
    flops: float
    bytes: float
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """What one batch of a model costs on any device.

    Attributes:
        batch: Items.
        operations: All operations of one batch, in any order.
        weight_bytes: Bytes of the weights.
        activation_bytes: Most bytes of other tensors that are alive at once.
        input_tokens: Tokens of each prompt, or of context where a step is decoded; None for models without tokens.
        phase: What was counted.
        kv_bytes_per_token: Bytes of key-value cache of one token, or None for models that keep none.
    """

    batch: int
    operations: tuple[Operation, ...]
    weight_bytes: int
    activation_bytes: int
    input_tokens: int | None = None
    phase: Phase = "whole"
    kv_bytes_per_token: int | None = None

    @property
    def flops(self) -> float:
        """Floating-point operations of the whole batch."""
        return sum(operation.flops * operation.count for operation in self.operations)

    @property
    def bytes(self) -> float:
        """Bytes that all operations read and write."""
        return sum(operation.bytes * operation.count for operation in self.operations)


class DeviceRates(Document):
    """What a device can do: measured on it, or taken from the catalogue.

    Attributes:
        gpu_type: The device.
        dtype: Type of number that the rates are for.
        flops_per_s: Arithmetic by kind of operation; every kind but ``other``, which is bound by its bytes.
        bytes_per_s: Bandwidth of the device's memory.
        cache_bytes_per_s: Bandwidth for operations whose bytes fit into the cache.
        cache_bytes: Size of that cache; 0 for none.
        operation_s: Time to start one operation.
        load_bytes_per_s: Bandwidth at which weights reach the device.
        source: Where the numbers come from.
    """

    format_version: str = FORMAT_VERSION
    gpu_type: Name
    dtype: str = "fp32"
    flops_per_s: Mapping[Kind, Positive]
    bytes_per_s: Positive
    cache_bytes_per_s: Positive
    cache_bytes: float = Field(ge=0)
    operation_s: Seconds
    load_bytes_per_s: Positive
    source: str

    @field_validator("flops_per_s")
    @classmethod
    def _every_kind(cls, rates: Mapping[Kind, float]) -> Mapping[Kind, float]:
        missing = [kind for kind in ("matmul", "convolution", "depthwise") if kind not in rates]
        if missing:
            raise ValueError(f"a rate for {', '.join(missing)}")
        return rates


def datasheet_rates(gpu_type: str, dtype: str = "fp16") -> DeviceRates:
    """Return the rates of a type of the catalogue: its peaks, times the shares that well-written kernels reach.

    Raises:
        InvalidInput: The catalogue has no such type, or no rate for ``dtype``.
    """
    entry = catalogue().get(gpu_type)
    if entry is None:
        like = [name for name in catalogue() if name.startswith(gpu_type.lower())]
        close = ", ".join(like or get_close_matches(gpu_type, catalogue(), n=3) or catalogue())
        remedy = "measure its rates there with `profile calibrate`, and pass them with --rates"
        raise InvalidInput.of(f"a type of the catalogue, such as {close}", found=repr(gpu_type), remedy=remedy)
    peak = entry.flops_per_s.get(dtype)
    if peak is None:
        known = ", ".join(entry.flops_per_s)
        raise InvalidInput.of(f"one of {known}", where=gpu_type, field="dtype", found=repr(dtype))
    plain = entry.flops_per_s["fp32"]
    bytes_per_s = REACHED_BANDWIDTH * entry.memory_bandwidth
    return DeviceRates(
        gpu_type=gpu_type,
        dtype=dtype,
        flops_per_s={
            "matmul": REACHED_MATMUL * peak,
            "convolution": REACHED_CONVOLUTION * peak,
            "depthwise": REACHED_CONVOLUTION * plain,
        },
        bytes_per_s=bytes_per_s,
        cache_bytes_per_s=bytes_per_s,
        cache_bytes=0.0,
        operation_s=LAUNCH_S,
        load_bytes_per_s=REACHED_BANDWIDTH * entry.host_bandwidth,
        source=entry.source,
    )


def latency_s(cost: ModelCost, rates: DeviceRates) -> float:
    """Return the seconds that one batch takes."""
    return sum(operation.count * _operation_s(operation, rates) for operation in cost.operations)


def _operation_s(operation: Operation, rates: DeviceRates) -> float:
    cached = operation.bytes <= rates.cache_bytes
    moving_s = operation.bytes / (rates.cache_bytes_per_s if cached else rates.bytes_per_s)
    rate = rates.flops_per_s.get(operation.kind)
    return rates.operation_s + max(moving_s, operation.flops / rate if rate else 0.0)


def modelled_profile(
    model: str,
    gpu_type: str,
    costs: Sequence[ModelCost],
    rates: DeviceRates,
    *,
    meta: ProfileMeta | None = None,
) -> Profile:
    """Return a profile with source ``modelled``, a row for each of ``costs``.

    Raises:
        InvalidInput: ``costs`` is empty.
    """
    if not costs:
        raise InvalidInput.of("at least one batch", where=model, field="costs", found="none")
    load_s = costs[0].weight_bytes / rates.load_bytes_per_s
    rows = []
    for cost in costs:
        mean_s = latency_s(cost, rates)
        rows.append(
            Row(
                batch=cost.batch,
                input_tokens=cost.input_tokens,
                phase=cost.phase,
                latency_s=LatencyStatistics(mean=mean_s),
                stage_latency_s=(mean_s,),
                weight_bytes=(cost.weight_bytes,),
                peak_bytes=(cost.weight_bytes + cost.activation_bytes,),
                load_s=load_s,
            )
        )
    return Profile(
        model=model,
        gpu_type=gpu_type,
        source="modelled",
        meta=meta or ProfileMeta(),
        rows=tuple(rows),
        error_ratio=ROOFLINE_ERROR_RATIO,
        kv_bytes_per_token=costs[0].kv_bytes_per_token,
    )
