"""What devices say of their memory and load: NVML on NVIDIA GPUs, nothing elsewhere."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["DeviceReading", "device_readings"]

_log = logging.getLogger("executor.agent")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReading:
    """One GPU now.

    Attributes:
        used_bytes: In use by whomever.
        total_bytes: In all.
        utilisation: Share of the last moment that it worked, 0 to 1.
        power_w: What it draws, watts; None where it does not say.
    """

    used_bytes: int
    total_bytes: int
    utilisation: float
    power_w: float | None = None


def device_readings(device: str, count: int) -> tuple[DeviceReading, ...]:
    """Return a reading of each of the first ``count`` devices of the kind ``device``.

    Empty for a kind that cannot be asked (``cpu``), without the package nvidia-ml-py, and where NVML does not answer:
    what cannot be told is not reported, rather than reported as 0.
    """
    if device != "cuda":
        return ()
    with _nvml() as nvml:
        if nvml is None:
            return ()
        try:
            return tuple(_reading(nvml, index) for index in range(min(count, nvml.nvmlDeviceGetCount())))
        except nvml.NVMLError as error:
            _log.warning("event=nvml_failed problem=%r", str(error))
            return ()


def _reading(nvml: Any, index: int) -> DeviceReading:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return DeviceReading(
        used_bytes=int(memory.used),
        total_bytes=int(memory.total),
        utilisation=nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        power_w=_power_w(nvml, handle),
    )


def _power_w(nvml: Any, handle: Any) -> float | None:
    try:
        return float(nvml.nvmlDeviceGetPowerUsage(handle)) / 1000
    except nvml.NVMLError:  # virtual GPUs and some old ones do not measure it
        return None


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        yield None
        return
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        _log.debug("event=no_nvml problem=%r", str(error))
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()
