"""Which processor cores a process runs on, what it does at low priority, and whether the cores may fall asleep."""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from plans.errors import InvalidInput

__all__ = [
    "at_low_priority",
    "core_of_process",
    "cores_awake",
    "cores_of",
    "lower_priority",
    "own_cores",
    "pin_process",
]

_STEP = 10
"""By how much nicer threads are that nobody waits for: they get a tenth of the processor time of others beside them."""

_WAKING = Path("/dev/cpu_dma_latency")
"""Takes the microseconds that a core may need to wake up, in force until it is closed (power/pm_qos_interface)."""

_Result = TypeVar("_Result")


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
    cores = _usable_cores()
    if len(cores) < device_count * threads:
        raise InvalidInput.of(
            f"at least {device_count * threads}: {threads} threads for each of {device_count} devices",
            where="--pin-cores",
            found=f"{len(cores)} cores",
            remedy="use fewer threads, or leave workers unpinned",
        )
    return cores


def _usable_cores() -> tuple[int, ...]:
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


def core_of_process(index: int, count: int) -> int:
    """Return the core of process ``index`` of ``count``, each with its own: the last ones, since workers get the first.

    Raises:
        InvalidInput: This process may use fewer than ``count`` cores, or the operating system cannot tell.
    """
    cores = _usable_cores()
    if len(cores) < count:
        raise InvalidInput.of(
            f"at least {count}: one for each process",
            where="--pin-cores",
            found=f"{len(cores)} cores",
            remedy="run fewer processes, or leave them unpinned",
        )
    return cores[-1 - index]


def pin_process(cores: tuple[int, ...]) -> None:
    """Keep every thread of this process, and those it will start, on ``cores``. Linux only."""
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # a thread that has just ended
            os.sched_setaffinity(int(task.name), cores)


def lower_priority() -> None:
    """Let this thread, and those it will start, step back behind threads of the usual priority. Linux only.

    Without privileges a thread cannot be raised again: call it in one that ends.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _STEP)  # 19 at most


def at_low_priority(act: Callable[[], _Result]) -> _Result:
    """Return what ``act`` returns, or raise what it raises, from a thread of low priority."""
    with ThreadPoolExecutor(max_workers=1, initializer=lower_priority) as thread:
        return thread.submit(act).result()


@contextlib.contextmanager
def cores_awake(switch: Path = _WAKING) -> Iterator[None]:
    """Keep every core of this machine from falling asleep inside the block; the kernel ends it with the process, too.

    Raises:
        InvalidInput: The kernel has no such switch, or this process may not use it.
    """
    try:
        held = switch.open("r+b", buffering=0)
    except OSError as error:
        raise InvalidInput.of(
            f"{switch}, open for writing",
            where="--keep-awake",
            found=error.strerror or str(error),
            remedy="run as root, or let this user write to it; or leave the option out",
        ) from error
    with held:
        held.write(struct.pack("=i", 0))
        yield
