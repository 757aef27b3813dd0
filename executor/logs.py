"""Log lines of the executor's processes: one ``key=value`` line each, on standard error."""

from __future__ import annotations

import logging
import sys

__all__ = ["LOG_FORMAT", "configure_logging"]

LOG_FORMAT = "time=%(asctime)s.%(msecs)03d level=%(levelname)s logger=%(name)s process=%(process)d %(message)s"
"""Every line starts with these; messages of the executor are ``event=… key=value …``."""


def configure_logging(level: str = "INFO") -> None:
    """Send this process's log to standard error, from ``level`` on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(LOG_FORMAT, datefmt="%Y-%m-%dT%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
