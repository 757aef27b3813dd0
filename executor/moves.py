"""Moves from one state to the next that are done whole: what is stored and what is known must not part."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

__all__ = ["WholeMoves"]


class WholeMoves:
    """Runs moves to their end even if those who asked for them are gone.

    Args:
        log: Where moves that end with an error are told of; their caller may not be there to hear it.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._under_way: set[asyncio.Task[None]] = set()

    async def run(self, move: Coroutine[Any, Any, None]) -> None:
        """Await ``move``; it goes on when the caller is cancelled."""
        task = asyncio.create_task(move)
        self._under_way.add(task)
        task.add_done_callback(self._ended)
        await asyncio.shield(task)

    async def wait(self) -> None:
        """Return when all that is under way has ended, however."""
        await asyncio.gather(*self._under_way, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.warning("event=move_refused reason=%r", str(error))
