"""The folder in which a process keeps what must survive it, used by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from executor.errors import StateNotStored
from plans.errors import InvalidInput

__all__ = ["locked_folder", "made_folder", "storing"]

_FLAG = "--state-dir"
_MAKE_ROOM = "make room there, and try again"
_REMEDY = "name a folder that this user may make and write"


def made_folder(path: Path) -> Path:
    """Return ``path``, which is made when missing.

    Raises:
        InvalidInput: It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(path, error) from error
    return path


@contextlib.contextmanager
def locked_folder(path: Path, role: str) -> Iterator[Path]:
    """Hold ``path``, which is made when missing, for the one ``role`` ("agent" or "gateway") that may work in it.

    The lock ends with the process, however that ends.

    Raises:
        InvalidInput: It cannot be made or written, or another process of that role holds it.
    """
    try:
        descriptor = os.open(made_folder(path) / f"{role}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            expected = f"a folder that no other {role} uses"
            remedy = f"stop the {role} that runs with it, or name another folder"
            raise InvalidInput.of(expected, where=_FLAG, found=path, remedy=remedy) from error
        yield path
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses while ``path`` is written into `StateNotStored`."""
    try:
        yield
    except OSError as error:
        raise StateNotStored(f"{path} cannot be written: {error.strerror or error}; {_MAKE_ROOM}") from error
    except InvalidInput as error:
        found = "; ".join(fault.found for fault in error.faults)
        raise StateNotStored(f"{path} cannot be written: {found}; {_MAKE_ROOM}") from error


def _unusable(path: Path, error: OSError) -> InvalidInput:
    found = f"{path} ({error.strerror})"
    return InvalidInput.of("a folder that can be made and written", where=_FLAG, found=found, remedy=_REMEDY)
