"""What devices say of their memory and load: NVML on NVIDIA GPUs, nothing elsewhere."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import os
from collections.abc import Callable, Iterator
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
        utilisation: Share of the last moment that it worked, 0 to 1; None where it does not say.
        power_w: What it draws, watts; None where it does not say.
    """

    used_bytes: int
    total_bytes: int
    utilisation: float | None
    power_w: float | None = None


def device_readings(device: str, count: int) -> tuple[DeviceReading, ...]:
    """Return a reading of each of the first ``count`` devices of the kind ``device``, in CUDA's order.

    NVML counts every GPU of the machine, CUDA those that its own variable ``CUDA_VISIBLE_DEVICES`` names where it is
    set: by index or by UUID, the beginning of which will do, up to the first that there is not.

    Empty for a kind that cannot be asked (``cpu``), without the package nvidia-ml-py, and where NVML does not answer:
    what cannot be told is not reported, rather than reported as 0.
    """
    if device != "cuda":
        return ()
    with _nvml() as nvml:
        if nvml is None:
            return ()
        try:
            handles = _visible(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
            return tuple(_reading(nvml, handle) for handle in handles[:count])
        except nvml.NVMLError as error:
            _log.warning("event=nvml_failed problem=%r", str(error))
            return ()


def _visible(nvml: Any, named: str | None) -> list[Any]:
    every = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    if named is None:
        return every
    found = (_handle(nvml, every, name.strip()) for name in named.split(","))
    return list(itertools.takewhile(lambda handle: handle is not None, found))


def _handle(nvml: Any, every: list[Any], name: str) -> Any:
    """Return the handle of what CUDA calls ``name``, None for nothing."""
    if name.isdecimal():
        return every[int(name)] if int(name) < len(every) else None
    if name.startswith("MIG-"):  # a part of a GPU: not among them
        try:
            return nvml.nvmlDeviceGetHandleByUUID(name)
        except nvml.NVMLError:
            return None
    return next((handle for handle in every if name and nvml.nvmlDeviceGetUUID(handle).startswith(name)), None)


def _reading(nvml: Any, handle: Any) -> DeviceReading:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return DeviceReading(
        used_bytes=int(memory.used),
        total_bytes=int(memory.total),
        utilisation=_told(nvml, lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100),
        power_w=_told(nvml, lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
    )


def _told(nvml: Any, ask: Callable[[], float]) -> float | None:
    try:
        return ask()
    except nvml.NVMLError:  # virtual GPUs, parts of one and some old ones do not measure it
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
