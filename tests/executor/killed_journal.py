"""Writes to an agent's journal, each by a process that is killed (-9) at another step. Prints what was found, as JSON.

``python -m tests.executor.killed_journal FOLDER first|next``: a child process writes generation 2, over generation 1
with ``next``, and kills itself before or after a call into SQLite or the operating system: the next one each time,
until a child comes through.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from executor.journal import Journal
from tests.executor.running_agent import desired, replica

STEPS = {"close", "connect", "execute", "executescript", "fsync", "mkdir", "open", "replace", "unlink"}


def write_and_die(folder: Path, at: int) -> None:
    """Write generation 2, killed at the ``at``-th begin or end of a call."""
    calls = itertools.count()

    def step(_: FrameType, event: str, function: Any) -> None:
        if event in ("c_call", "c_return") and function.__name__ in STEPS and next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(step)
    Journal(folder).write(desired(2, g0=[replica("b")]))
    sys.setprofile(None)


def main() -> None:
    """Kill at every step, and say what was there afterwards."""
    root, begin = Path(sys.argv[1]), sys.argv[2]
    found = []
    for at in itertools.count():
        folder = root / str(at)
        if begin == "next":
            Journal(folder).write(desired(1, g0=[replica("a")]))
        child = os.fork()
        if child == 0:
            write_and_die(folder, at)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        state = Journal(folder).read()
        found.append(state.generation if state else 0)
        Journal(folder).write(desired(3))
        again = Journal(folder).read()
        assert again is not None
        assert again.generation == 3
        assert [path.name for path in folder.iterdir()] == ["journal.sqlite"]
        shutil.rmtree(folder)
        if status == 0:
            break
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
