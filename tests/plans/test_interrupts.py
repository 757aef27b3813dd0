from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest

from plans.interrupts import interrupts_held

BLOCKED = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))"


WAITING = """
import asyncio, signal, sys
from plans.interrupts import run_until_told
for name in sys.argv[1:]:
    signal.signal(signal.Signals[name], signal.SIG_IGN)
async def main():
    try:
        print("begun", flush=True)
        await asyncio.sleep(0.5 if "SIGHUP" in sys.argv else 60)
        print("ended")
    except asyncio.CancelledError:
        await asyncio.sleep(0)
        print("taken back")
        raise
try:
    run_until_told(main())
except KeyboardInterrupt:
    print("interrupted")
"""


def is_held() -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_what_is_started_inside_never_sees_an_interrupt_and_the_caller_does_again() -> None:
    with interrupts_held():
        inside = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=True)
        assert is_held()
    assert inside.stdout == "True\n"
    assert not is_held()


def test_an_error_inside_lets_interrupts_through_again() -> None:
    with pytest.raises(KeyError), interrupts_held():
        raise KeyError
    assert not is_held()


@pytest.mark.parametrize(
    ("ignored", "number", "said"),
    [
        ([], signal.SIGTERM, "taken back\ninterrupted\n"),
        ([], signal.SIGHUP, "taken back\ninterrupted\n"),
        ([], signal.SIGINT, "taken back\ninterrupted\n"),
        (["SIGINT"], signal.SIGTERM, "taken back\ninterrupted\n"),  # as in the background of a script
        (["SIGHUP"], signal.SIGHUP, "ended\n"),
    ],
)
def test_what_is_told_to_end_takes_back_what_it_began(
    ignored: Sequence[str], number: signal.Signals, said: str
) -> None:
    with subprocess.Popen([sys.executable, "-c", WAITING, *ignored], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        assert process.communicate(timeout=30)[0] == said
    assert process.returncode == 0
