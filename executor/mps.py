"""Whether NVIDIA's Multi-Process Service shares the GPUs of this machine among processes.

With its control daemon, kernels of several workers on one GPU run side by side; without it they take turns. Nothing
here starts or stops it, and workers need no setting: CUDA finds the daemon by itself.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["mps_is_running"]

_PIPES = "/tmp/nvidia-mps"  # noqa: S108 - where CUDA itself looks by default


def mps_is_running(pipes: Path | None = None) -> bool:
    """Return whether the control daemon of the folder ``pipes`` lives; by default of the one that CUDA uses.

    CUDA's own variable ``CUDA_MPS_PIPE_DIRECTORY`` names that folder where it is not the default.
    """
    folder = pipes or Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", _PIPES))
    try:
        process = int((folder / "nvidia-cuda-mps-control.pid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return False
    return Path(f"/proc/{process}").exists()
