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

__all__ = ["native_output_discarded"]


@contextmanager
def native_output_discarded() -> Iterator[None]:
    """Discard what native code writes to file descriptor 1 meanwhile, in the whole process."""
    sys.stdout.flush()
    c_library = ctypes.CDLL(None)
    c_library.fflush(None)
    saved = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        c_library.fflush(None)
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)
