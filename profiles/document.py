"""The profile document: how long one model takes on one GPU type, by batch and parallelism (one JSON file each)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from plans.cluster import Name
from plans.documents import FORMAT_VERSION, Document
from plans.units import Bytes, PositiveSeconds, Seconds

__all__ = ["LatencyStatistics", "Profile", "ProfileMeta", "Row", "Source"]

Source = Literal["measured", "imported", "modelled"]
"""Where the numbers come from: this project's profiler, another tool's measurements, or an analytical model."""


class LatencyStatistics(Document):
    """The latency of one batch from start to end, seconds. Only ``mean`` is required; percentiles never fall."""

    mean: PositiveSeconds
    p50: PositiveSeconds | None = None
    p95: PositiveSeconds | None = None
    p99: PositiveSeconds | None = None

    @field_validator("p95", "p99")
    @classmethod
    def _ordered(cls, value: float | None, info: ValidationInfo) -> float | None:
        for name in ("p50", "p95"):
            limit: float | None = info.data.get(name)
            if value is not None and limit is not None and value < limit:
                raise ValueError(f"at least {name} = {limit:.6g}")
        return value

    @property
    def has_percentiles(self) -> bool:
        """Whether any percentile is stated."""
        return not (self.p50 is None and self.p95 is None and self.p99 is None)


class Row(Document):
    """One point of the grid.

    Attributes:
        tp: Tensor parallelism: GPUs per pipeline stage.
        pp: Pipeline parallelism: number of stages.
        batch: Items in the batch.
        concurrency: Batches in flight at once while this was measured.
        input_tokens: Tokens of a prompt, or None where that means nothing.
        output_tokens: Tokens generated, or None where that means nothing.
        latency_s: One batch from start to end, seconds.
        stage_latency_s: Seconds that the batch holds each pipeline stage; shape (pp,).
        weight_bytes: Bytes of weights on each GPU of a stage; shape (pp,).
        peak_bytes: Highest bytes in use on each GPU of a stage, weights included; shape (pp,).
        load_s: Seconds from the request to weights on the device.
        first_inference_s: Seconds of the first inference after a load.
        samples: Number of batches that were timed; 0 where it is not known.
    """

    tp: int = Field(default=1, ge=1, le=1024)
    pp: int = Field(default=1, ge=1, le=1024)
    batch: int = Field(ge=1, le=4096)
    concurrency: int = Field(default=1, ge=1)
    input_tokens: int | None = Field(default=None, ge=1)
    output_tokens: int | None = Field(default=None, ge=1)
    latency_s: LatencyStatistics
    stage_latency_s: tuple[PositiveSeconds, ...]
    weight_bytes: tuple[Bytes, ...]
    peak_bytes: tuple[Bytes, ...]
    load_s: Seconds = 0.0
    first_inference_s: Seconds = 0.0
    samples: int = Field(default=0, ge=0)

    @field_validator("stage_latency_s", "weight_bytes", "peak_bytes")
    @classmethod
    def _one_per_stage(cls, values: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        stages = info.data.get("pp")
        if stages is not None and len(values) != stages:
            raise ValueError(f"one entry per pipeline stage (pp = {stages}), not {len(values)}")
        return values

    @field_validator("peak_bytes")
    @classmethod
    def _holds_the_weights(cls, peaks: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        weights = info.data.get("weight_bytes")
        for stage, (peak, weight) in enumerate(zip(peaks, weights or (), strict=False)):
            if peak < weight:
                raise ValueError(f"at least the weights of stage {stage}, {weight} bytes, not {peak}")
        return peaks

    @property
    def key(self) -> tuple[int, int, int, int, int | None, int | None]:
        """What tells the row from the others of its profile."""
        return self.tp, self.pp, self.batch, self.concurrency, self.input_tokens, self.output_tokens


class ProfileMeta(Document):
    """How the numbers came about; every field is free text and may be empty."""

    device_name: str = ""
    driver: str = ""
    torch: str = ""
    dtype: str = ""
    input: str = ""
    measured_at: str = ""
    tool_version: str = ""


class Profile(Document):
    """All that is known about one model on one GPU type."""

    format_version: str = FORMAT_VERSION
    model: Name
    gpu_type: Name
    source: Source
    meta: ProfileMeta = ProfileMeta()
    rows: tuple[Row, ...] = Field(min_length=1)

    @field_validator("rows")
    @classmethod
    def _rows_differ(cls, rows: tuple[Row, ...]) -> tuple[Row, ...]:
        seen: dict[object, int] = {}
        for position, row in enumerate(rows):
            first = seen.setdefault(row.key, position)
            if first != position:
                what = "tp, pp, batch, concurrency, input_tokens and output_tokens"
                raise ValueError(f"rows that differ in {what}: rows[{position}] repeats rows[{first}]")
        return rows
