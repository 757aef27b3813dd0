"""What CUDA says of the GPUs of this machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["GpuIdentity", "gpu_identity"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuIdentity:
    """Which GPU it is: its name, such as ``NVIDIA L4``, and its UUID, by which NVML knows it too."""

    name: str
    uuid: str


def gpu_identity(index: int) -> GpuIdentity:
    """Return which GPU it is that CUDA counts as ``index``; NVML counts those that are hidden from CUDA as well."""
    properties = torch.cuda.get_device_properties(index)
    return GpuIdentity(name=properties.name, uuid=str(properties.uuid))
