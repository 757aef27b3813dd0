"""What is in the log of a test and was put there by it."""

from __future__ import annotations

import logging

import pytest

__all__ = ["errors_logged"]


def errors_logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the errors in the log, but for those of gRPC about calls of an event loop that an earlier test closed."""
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    return [
        f"{record.getMessage()}\n{record.exc_text or ''}"
        for record in errors
        if "PollerCompletionQueue" not in record.getMessage()
    ]
