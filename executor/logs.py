"""Log lines of the executor's processes: one ``key=value`` line each, on standard error."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

__all__ = ["LOG_FORMAT", "configure_logging", "log_failure"]

_log = logging.getLogger("executor")

LOG_FORMAT = "time=%(asctime)s.%(msecs)03d level=%(levelname)s logger=%(name)s process=%(process)d %(message)s"
"""Every line starts with these; messages of the executor are ``event=… key=value …``."""


def configure_logging(level: str = "INFO") -> None:
    """Send this process's log to standard error, from ``level`` on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(LOG_FORMAT, datefmt="%Y-%m-%dT%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def log_failure(task: asyncio.Task[Any]) -> None:
    """Log why ``task``, which nobody waits for, ended with an exception; a callback for when it is done."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("event=bug task=%r", task.get_name(), exc_info=error)
