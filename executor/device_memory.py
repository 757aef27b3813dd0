"""What devices say of their memory and load: NVML on NVIDIA GPUs, nothing elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from executor.logs import log_failure

__all__ = ["DeviceReading", "DeviceWatch", "device_readings"]

_log = logging.getLogger("executor.agent")

_FRESH_S = 1.0
_PATIENCE_S = 0.2
"""Below what a gateway waits for an agent's state."""


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


class DeviceWatch:
    """Asks devices in a thread, for they take milliseconds, and at times seconds, to answer.

    Args:
        ask: Returns what they say now.
        clock: The time in seconds.
    """

    def __init__(
        self, ask: Callable[[], tuple[DeviceReading, ...]], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ask = ask
        self._clock = clock
        self._last: tuple[DeviceReading, ...] = ()
        self._fresh_until_s = -math.inf
        self._asking: asyncio.Task[None] | None = None

    async def readings(self) -> tuple[DeviceReading, ...]:
        """Return what the devices say, at most a second old; where they are slow to say it, what they said before."""
        if self._asking is None and self._clock() >= self._fresh_until_s:
            self._asking = asyncio.create_task(self._refresh(), name="devices")
            self._asking.add_done_callback(log_failure)
        if self._asking is not None:
            await asyncio.wait({self._asking}, timeout=_PATIENCE_S)
        return self._last

    async def _refresh(self) -> None:
        try:
            self._last = await asyncio.to_thread(self._ask)
            self._fresh_until_s = self._clock() + _FRESH_S
        finally:
            self._asking = None


def device_readings(device: str, count: int) -> tuple[DeviceReading, ...]:
    """Return a reading of each of the first ``count`` devices (``cuda``), or of one (``cuda:2``), in CUDA's order.

    NVML counts every GPU of the machine, CUDA those that its own variable ``CUDA_VISIBLE_DEVICES`` names where it is
    set: by index or by UUID, the beginning of which will do, up to the first that there is not.

    Empty for a kind that cannot be asked (``cpu``), without the package nvidia-ml-py, and where NVML does not answer:
    what cannot be told is not reported, rather than reported as 0.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return ()
    with _nvml() as nvml:
        if nvml is None:
            return ()
        try:
            handles = _visible(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
            chosen = handles[int(index) :][:1] if index else handles[:count]
            return tuple(_reading(nvml, handle) for handle in chosen)
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
