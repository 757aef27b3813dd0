"""A worker that is started with the agent, for the first group of device 0.

It tells which variants there are, and spares that group the wait for a process. Unused, it is ended after a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from executor.errors import WorkerGone, WorkerRefused
from executor.worker_link import WorkerLink, WorkerSettings

__all__ = ["SpareWorker"]

_log = logging.getLogger("executor.agent")

_DEVICE = 0
_IDLE_S = 30.0
"""How long it is kept for a group that may come."""


class SpareWorker:
    """Starts a worker, and hands it to the first group that can use it."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._starting: asyncio.Task[WorkerLink] | None = None
        self._variants: tuple[str, ...] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[WorkerLink]:
        """Start the worker, unless it runs or is being started."""
        if self._starting is None or (self._starting.done() and not _has_link(self._starting)):
            self._starting = asyncio.get_running_loop().create_task(self._start())
            self._starting.add_done_callback(_log_failure)
        return self._starting

    def learn(self, variants: tuple[str, ...]) -> None:
        """Note what another worker said of the variants."""
        self._variants = variants

    async def variants(self) -> tuple[str, ...]:
        """Return the variants that the runtime knows, asking a worker when none has told yet.

        Raises:
            WorkerRefused: The runtime could not be made; says why.
            WorkerGone: The worker ended during its start.
        """
        if self._variants is None:
            await asyncio.shield(self.start())
        return self._variants or ()

    async def take(self, gpus: tuple[int, ...]) -> WorkerLink | None:
        """Return the worker if it is one for the devices ``gpus`` and lives; the caller owns it then."""
        task = self._starting
        if task is None or gpus != (_DEVICE,):
            return None
        try:
            link = await asyncio.shield(task)
        except (WorkerGone, WorkerRefused):
            return None
        if self._starting is not task:  # another group was quicker
            return None
        self._starting = None
        if link.is_closed:
            await link.kill()  # its end may not have been seen yet, and nobody else will look
            return None
        return link

    async def close(self) -> None:
        """End the worker, if nobody took it."""
        if self._timer is not None:
            self._timer.cancel()
        if self._ending is not None:
            await self._ending
        await self._end()

    async def _start(self) -> WorkerLink:
        link = await WorkerLink.start(self._settings, (_DEVICE,), lambda reason: None)
        self._variants = link.variants
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_IDLE_S, self._end_unused)
        return link

    def _end_unused(self) -> None:
        self._timer = None
        self._ending = asyncio.get_running_loop().create_task(self._end())

    async def _end(self) -> None:
        task, self._starting = self._starting, None
        if task is None:
            return
        if _has_link(task):
            await task.result().stop()
            return
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, WorkerGone, WorkerRefused):
            await (await task).stop()


def _has_link(task: asyncio.Task[WorkerLink]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _log_failure(task: asyncio.Task[WorkerLink]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("event=runtime_not_started reason=%r", str(error))
