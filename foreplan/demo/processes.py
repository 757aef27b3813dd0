"""Agents and gateways as child processes that are gone when the block ends, however it ends."""

from __future__ import annotations

import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from plans.errors import RemoteFailure

__all__ = ["ChildProcesses"]

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0


class ChildProcesses:
    """A context in which ``foreplan`` commands run in the background; their logs go to ``log_dir``."""

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []

    def __enter__(self) -> Self:
        self._log_dir.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ask every process to stop, newest first, and kill what does not within ten seconds."""
        for _, process in reversed(self._running):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        for _, process in reversed(self._running):
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()

    def start(self, name: str, arguments: Sequence[str]) -> None:
        """Start ``foreplan ARGUMENTS`` and return once it says on stdout that it is ready.

        Raises:
            RemoteFailure: It ended, or said nothing within a minute; with the end of its log.
        """
        log = self._log_dir / f"{name}.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(  # noqa: S603 - our own program with our own arguments
                [sys.executable, "-P", "-m", "foreplan", *arguments],  # -P: modules do not come from the folder
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stream,
                start_new_session=True,  # Ctrl-C reaches us alone; we stop the others in order
            )
        self._running.append((name, process))
        line = _first_line(process, _START_TIMEOUT_S)
        if not line:
            # Its stdout closes a moment before it can be waited for.
            ended = None if line is None else process.wait(_STOP_TIMEOUT_S)
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            state = "did not get ready within a minute" if ended is None else f"ended with exit code {ended}"
            raise RemoteFailure(name, f"{state}: {' / '.join(lines[-5:]) or 'no log'} (see {log})", retryable=False)


def _first_line(process: subprocess.Popen[bytes], timeout_s: float) -> bytes | None:
    """Wait for the first line of the process's stdout: empty when it ends without one, None when the time is up."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline() if selector.select(timeout_s) else None
