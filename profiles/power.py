"""Energy that a GPU has taken, from NVIDIA's management library where it is there."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

__all__ = ["nvml_energy_j"]


def nvml_energy_j(index: int, library: Any = None) -> Callable[[], float | None]:
    """Return a function that reads the energy of GPU ``index`` since its driver was loaded, joules, or None.

    It returns None always where the ``nvidia-ml-py`` package, the driver, or the counter (Volta and later) is missing.

    Args:
        index: The device, as NVML numbers them.
        library: The ``pynvml`` module; None looks for it.
    """
    if library is None:
        try:
            library = import_module("pynvml")
        except ImportError:
            return lambda: None
    try:
        library.nvmlInit()
        handle = library.nvmlDeviceGetHandleByIndex(index)
        library.nvmlDeviceGetTotalEnergyConsumption(handle)
    except library.NVMLError:
        return lambda: None

    def read() -> float | None:
        try:
            return float(library.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000  # it counts millijoules
        except library.NVMLError:
            return None

    return read
