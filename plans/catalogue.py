"""The catalogue of GPU types: memory, bandwidths and peak rates from public datasheets (``plans/gpu_types.yaml``)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Annotated

from pydantic import Field

from plans.documents import Document, parse_document
from plans.units import Bytes, BytesPerSecond

__all__ = ["CatalogueEntry", "catalogue"]

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class CatalogueEntry(Document):
    """What a vendor's datasheet says of one GPU type.

    Attributes:
        vendor: Who makes it.
        memory: Bytes of device memory.
        memory_bandwidth: Of that memory, bytes per second.
        host_bandwidth: To the host, one direction, bytes per second.
        interconnect: Between GPUs of a node, both directions together, bytes per second; None where there is only PCIe.
        power_w: Board power, watts.
        flops_per_s: Peak rate by type of number, dense; ``fp32`` is always there.
        source: Address of the datasheet.
        note: What a reader of the datasheet should know, such as that a rate was halved because it is stated with
            sparsity; may be empty.
    """

    vendor: str
    memory: Bytes
    memory_bandwidth: BytesPerSecond
    host_bandwidth: BytesPerSecond
    interconnect: BytesPerSecond | None = None
    power_w: Rate
    flops_per_s: Mapping[str, Rate]
    source: str = Field(pattern=r"^https://[^\s]+$")
    note: str = ""


class _Catalogue(Document):
    entries: Mapping[str, CatalogueEntry]


@cache
def catalogue() -> Mapping[str, CatalogueEntry]:
    """Return every GPU type of the catalogue by name."""
    text = files("plans").joinpath("gpu_types.yaml").read_text(encoding="utf-8")
    indented = "".join(f"  {line}\n" for line in text.splitlines())
    return parse_document(f"entries:\n{indented}", _Catalogue, where="plans/gpu_types.yaml").entries
