"""How much memory of this process a piece of work takes, as the operating system sees it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import psutil

__all__ = ["resident_growth_bytes"]

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def resident_growth_bytes(action: Callable[[], object]) -> int:
    """Run ``action`` once and return by how many bytes the resident set grew at its peak.

    On Linux the kernel keeps the peak itself (``VmHWM``, set back through ``clear_refs``: proc(5)); elsewhere the
    resident set after the work stands for it. What earlier work left with the allocator is given back first where the C
    library can do that (``malloc_trim``), because memory that is used again does not show.
    """
    _give_back_freed_memory()
    before = psutil.Process().memory_info().rss
    tracked = _reset_peak()
    action()
    after: int = (_peak_bytes() if tracked else None) or psutil.Process().memory_info().rss
    return max(0, after - before)


def _give_back_freed_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl and macOS do not
    if trim is not None:
        trim(0)


def _reset_peak() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:  # not Linux, or not allowed in this container
        return False
    return True


def _peak_bytes() -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
