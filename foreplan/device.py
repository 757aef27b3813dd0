"""Where and how models run while they are measured."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Device", "processor_name"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Where and how models run: the arguments of the runtime, and the name in cluster.yaml.

    ``compiled`` runs batches by torch.compile, ``cuda_graphs`` replays CUDA graphs; both on one device. ``tp``
    and ``pp`` are tensor and pipeline parallelism: a group of tp x pp devices from ``device`` on.
    """

    gpu_type: str
    device: str = "cpu"
    dtype: str = "fp32"
    threads: int = 1
    model_dir: Path | None = None
    seed: int = 0
    tp: int = 1
    pp: int = 1
    compiled: bool = False
    cuda_graphs: bool = False

    @property
    def devices(self) -> tuple[str, ...]:
        """The torch devices of the group."""
        count = self.tp * self.pp
        return (self.device,) * count if self.index is None else tuple(f"cuda:{self.index + n}" for n in range(count))

    @property
    def index(self) -> int | None:
        """Number of the GPU, or None for a CPU."""
        return None if self.device == "cpu" else int(self.device.partition(":")[2] or 0)


def processor_name() -> str:
    """Return the processor's name as the operating system gives it, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
