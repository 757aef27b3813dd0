"""Who answers Ctrl-C while processes are started, and what else ends a command as it does."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Coroutine, Iterator
from multiprocessing import resource_tracker
from typing import Any, TypeVar

__all__ = ["interrupts_held", "run_until_told"]

_Result = TypeVar("_Result")


@contextlib.contextmanager
def interrupts_held(*others: signal.Signals) -> Iterator[None]:
    """Hold back SIGINT, and ``others``, here for a moment, and for ever in processes that are started meanwhile."""
    resource_tracker.ensure_running()  # its start would let Ctrl-C through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *others})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_until_told(main: Coroutine[Any, Any, _Result]) -> _Result:
    """Run ``main`` as `asyncio.run` does, and let SIGTERM and SIGHUP end it like Ctrl-C: it takes back what it began.

    One that the process was told to ignore (``nohup``) stays ignored. In the main thread only.

    Raises:
        KeyboardInterrupt: It was told to end.
    """
    told: list[int] = []

    async def heard() -> _Result:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def end(number: int) -> None:
            told.append(number)
            task.cancel()

        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, end, number)
        return await main

    try:
        return asyncio.run(heard())
    except asyncio.CancelledError:
        if told:
            raise KeyboardInterrupt from None
        raise
