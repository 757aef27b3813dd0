"""What NVIDIA's management library tells where it is there: energy that a GPU has taken, and the driver."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

__all__ = ["nvml_driver", "nvml_energy_j"]


def nvml_energy_j(uuid: str, library: Any = None) -> Callable[[], float | None]:
    """Return a function that reads the energy of a GPU since its driver was loaded, joules, or None.

    It returns None always where the ``nvidia-ml-py`` package, the driver, or the counter (Volta and later) is missing.

    Args:
        uuid: The GPU's, with or without the ``GPU-`` before it: its number depends on ``CUDA_VISIBLE_DEVICES``.
        library: The ``pynvml`` module; None looks for it.
    """
    library = library or _library()
    if library is None:
        return lambda: None
    try:
        library.nvmlInit()
        handle = library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
        library.nvmlDeviceGetTotalEnergyConsumption(handle)
    except library.NVMLError:
        return lambda: None

    def read() -> float | None:
        try:
            return float(library.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000  # it counts millijoules
        except library.NVMLError:
            return None

    return read


def nvml_driver(library: Any = None) -> str:
    """Return the version of NVIDIA's driver, or nothing where nothing tells it; ``library`` as for `nvml_energy_j`."""
    library = library or _library()
    if library is None:
        return ""
    try:
        library.nvmlInit()
        return str(library.nvmlSystemGetDriverVersion())
    except library.NVMLError:
        return ""


def _library() -> Any:
    try:
        return import_module("pynvml")
    except ImportError:
        return None
