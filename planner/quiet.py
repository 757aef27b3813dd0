"""Keeping solvers off standard output, which belongs to the answer.

HiGHS prints a debugging line with a plain ``printf`` whatever its logging options say (HiGHS in OR-Tools 9.15,
``HighsMipSolverData::transformNewIntegerFeasibleSolution``), which would break ``--json``.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["output_to_stderr"]


@contextmanager
def output_to_stderr() -> Iterator[None]:
    """Send what native code writes to file descriptor 1 to file descriptor 2 instead, for the whole process."""
    sys.stdout.flush()
    c_library = ctypes.CDLL(None)
    c_library.fflush(None)
    saved = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        c_library.fflush(None)
        os.dup2(saved, 1)
        os.close(saved)
