"""Which processor cores a worker runs on, so that workers do not disturb each other's latencies."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from plans.errors import InvalidInput

__all__ = ["cores_of", "own_cores", "pin_process"]


def cores_of(devices: tuple[int, ...], threads: int, cores: tuple[int, ...]) -> tuple[int, ...]:
    """Return the cores of a worker that owns ``devices``: ``threads`` for each, from device x threads on in ``cores``.

    Workers that own different devices share no core.
    """
    return tuple(core for device in devices for core in cores[device * threads : (device + 1) * threads])


def own_cores(device_count: int, threads: int) -> tuple[int, ...]:
    """Return the cores that this process may use, sorted.

    Raises:
        InvalidInput: They are fewer than ``threads`` for each of ``device_count`` devices, or the operating system
            cannot tell.
    """
    cores = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()
    if len(cores) < device_count * threads:
        raise InvalidInput.of(
            f"at least {device_count * threads}: {threads} threads for each of {device_count} devices",
            field="pin_cores",
            found=f"{len(cores)} cores",
            remedy="use fewer threads, or leave workers unpinned",
        )
    return cores


def pin_process(cores: tuple[int, ...]) -> None:
    """Keep every thread of this process, and those it will start, on ``cores``. Linux only."""
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # a thread that has just ended
            os.sched_setaffinity(int(task.name), cores)
