"""Ctrl-C while processes are started: it is the starting one's to answer."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import FrameType

__all__ = ["interrupts_held", "terminations_as_interrupts"]


@contextlib.contextmanager
def interrupts_held(*others: signal.Signals) -> Iterator[None]:
    """Hold back SIGINT, and ``others``, here for a moment, and for ever in processes that are started meanwhile."""
    resource_tracker.ensure_running()  # its start would let Ctrl-C through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *others})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def terminations_as_interrupts() -> Iterator[None]:
    """Take SIGTERM for Ctrl-C inside the block, so that what has begun is taken back. In the main thread only."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
