from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from plans.interrupts import interrupts_held

BLOCKED = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))"


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
