"""The profile document: how long one model takes on one GPU type, by batch and parallelism (one JSON file each)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from plans.cluster import Name
from plans.documents import Document
from plans.units import Bytes, PositiveSeconds, Seconds

__all__ = [
    "PROFILE_FORMAT_VERSION",
    "Accuracy",
    "LatencyStatistics",
    "Neighbour",
    "Origin",
    "Phase",
    "Profile",
    "ProfileMeta",
    "Row",
    "Source",
]

PROFILE_FORMAT_VERSION = "1.1"
"""1.1 added phases, interference, power, cold and warm loads, accuracy and where rows were imported from."""

Source = Literal["measured", "imported", "modelled"]
"""Where the numbers come from: this project's profiler, another tool's measurements, or an analytical model."""

Phase = Literal["whole", "prefill", "decode"]
"""What a row timed: the whole request; reading the prompts; or one decode step of every running sequence."""

Factor = Annotated[float, Field(ge=1.0, allow_inf_nan=False)]


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
        phase: ``whole``: the batch from start to end. ``prefill``: ``batch`` prompts of ``input_tokens`` each, up to
            the first token. ``decode``: one more token for each of ``batch`` running sequences, which hold
            ``input_tokens`` of context each.
        latency_s: One batch from start to end, seconds.
        stage_latency_s: Seconds that the batch holds each pipeline stage; shape (pp,).
        weight_bytes: Bytes of weights on each GPU of a stage; shape (pp,).
        peak_bytes: Highest bytes in use on each GPU of a stage, weights included; shape (pp,).
        load_s: Seconds from the request to weights on the device, as a plan should count on.
        load_cold_s: The same with the weights on disk and nothing cached; None where it was not measured.
        load_warm_s: The same with the weights in the host's memory; None where it was not measured.
        first_inference_s: Seconds of the first inference after a load.
        samples: Number of batches that were timed; 0 where it is not known.
        power_w: Mean power of all GPUs of the group while this was measured, watts; None where nothing tells it.
        origin: Position in the profile's ``origins`` of the file that the row was imported from, or None.
    """

    tp: int = Field(default=1, ge=1, le=1024)
    pp: int = Field(default=1, ge=1, le=1024)
    batch: int = Field(ge=1, le=4096)
    concurrency: int = Field(default=1, ge=1)
    input_tokens: int | None = Field(default=None, ge=1)
    output_tokens: int | None = Field(default=None, ge=1)
    phase: Phase = "whole"
    latency_s: LatencyStatistics
    stage_latency_s: tuple[PositiveSeconds, ...]
    weight_bytes: tuple[Bytes, ...]
    peak_bytes: tuple[Bytes, ...]
    load_s: Seconds = 0.0
    load_cold_s: Seconds | None = None
    load_warm_s: Seconds | None = None
    first_inference_s: Seconds = 0.0
    samples: int = Field(default=0, ge=0)
    power_w: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    origin: int | None = Field(default=None, ge=0)

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
    def key(self) -> tuple[str, int, int, int, int, int, int]:
        """What tells the row from the others of its profile, in an order to list them; no tokens count as 0."""
        tokens = self.input_tokens or 0, self.output_tokens or 0
        return self.phase, self.tp, self.pp, *tokens, self.concurrency, self.batch

    @property
    def activation_bytes(self) -> tuple[int, ...]:
        """Highest bytes in use beside the weights, on each GPU of a stage; shape (pp,)."""
        return tuple(peak - weight for peak, weight in zip(self.peak_bytes, self.weight_bytes, strict=True))


class ProfileMeta(Document):
    """How the numbers came about; every field is free text and may be empty.

    ``options`` are choices of the runtime that change speed, such as ``{"compile": "default", "cuda_graphs": "on"}``.
    """

    device_name: str = ""
    driver: str = ""
    torch: str = ""
    dtype: str = ""
    input: str = ""
    measured_at: str = ""
    tool_version: str = ""
    options: Mapping[str, str] = {}


class Neighbour(Document):
    """Slow-down beside another model on the same device, both always busy.

    Attributes:
        model: The other model.
        batch: Items per batch of the profiled model.
        neighbour_batch: Items per batch of the other.
        factor: Latency of a batch beside the other over that alone, at least 1.
    """

    model: Name
    batch: int = Field(ge=1)
    neighbour_batch: int = Field(ge=1)
    factor: Factor


class Accuracy(Document):
    """How often the model was right on a data set.

    Attributes:
        value: Share of items, in [0, 1].
        metric: What counts as right, such as ``top-1``.
        dataset: Where the items came from.
        samples: Number of items.
    """

    value: float = Field(ge=0, le=1)
    metric: str = "top-1"
    dataset: str = ""
    samples: int = Field(default=0, ge=0)


class Origin(Document):
    """A file of another tool that rows were imported from.

    Attributes:
        file: Name of the file.
        sha256: Digest of its content, in hexadecimal.
        tool: The tool that wrote it.
        tool_version: Its version, where the file says it.
        unit: Unit of time in the file.
        statistic: What the file's latency is: ``mean``, ``p50``, ...
    """

    file: str
    sha256: str = ""
    tool: str = ""
    tool_version: str = ""
    unit: str = ""
    statistic: str = ""


class Profile(Document):
    """All that is known about one model on one GPU type.

    Attributes:
        rows: The points of the grid, in any order, each key once.
        kv_bytes_per_token: Bytes of key-value cache that one token of one sequence takes, over all layers and all GPUs
            of a group together; None for models that keep none.
        interference: By number of batches of this model in flight on one device, each in a process of its own: latency
            of a batch over that alone. At least 1, never falls; one batch in flight is 1 and may be left out.
        neighbours: Slow-downs beside other models, pair by pair.
        error_ratio: How far the latencies may be from the truth, as a share of it, as said by what modelled them; None
            where nothing says it.
        accuracy: Measured accuracy, or None.
        origins: Files that rows were imported from.
    """

    format_version: str = PROFILE_FORMAT_VERSION
    model: Name
    gpu_type: Name
    source: Source
    meta: ProfileMeta = ProfileMeta()
    rows: tuple[Row, ...] = Field(min_length=1)
    kv_bytes_per_token: int | None = Field(default=None, ge=1)
    interference: Mapping[int, Factor] = {}
    neighbours: tuple[Neighbour, ...] = ()
    error_ratio: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    accuracy: Accuracy | None = None
    origins: tuple[Origin, ...] = Field(default=(), validate_default=True)

    @field_validator("rows")
    @classmethod
    def _rows_differ(cls, rows: tuple[Row, ...]) -> tuple[Row, ...]:
        seen: dict[object, int] = {}
        for position, row in enumerate(rows):
            first = seen.setdefault(row.key, position)
            if first != position:
                what = "phase, tp, pp, batch, concurrency, input_tokens and output_tokens"
                raise ValueError(f"rows that differ in {what}: rows[{position}] repeats rows[{first}]")
        return rows

    @field_validator("interference")
    @classmethod
    def _interference_never_falls(cls, factors: Mapping[int, float]) -> Mapping[int, float]:
        previous = 1.0
        for concurrency, factor in sorted(factors.items()):
            if concurrency < 1:
                raise ValueError(f"numbers of batches from 1, not {concurrency}")
            if concurrency == 1 and factor != 1.0:
                raise ValueError(f"1 for one batch in flight, not {factor:.6g}")
            if factor < previous:
                raise ValueError(f"factors that never fall: {factor:.6g} at {concurrency} follows {previous:.6g}")
            previous = factor
        return dict(sorted(factors.items()))

    @field_validator("origins")
    @classmethod
    def _origins_exist(cls, origins: tuple[Origin, ...], info: ValidationInfo) -> tuple[Origin, ...]:
        for position, row in enumerate(info.data.get("rows", ())):
            if row.origin is not None and row.origin >= len(origins):
                raise ValueError(f"an entry for rows[{position}].origin = {row.origin}, not {len(origins)} entries")
        return origins
