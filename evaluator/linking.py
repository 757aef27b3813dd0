"""Which sources the compiled simulator comes from, and its entry points; how it is compiled: `profiles.linking`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from numba.core import event

from plans import dispatch
from profiles.linking import Part, digest_of, entry_point_of, on_compilation

__all__ = ["COMPILED_MODULES", "Part", "entry_point", "on_compilation", "source_digest", "working_clock"]

COMPILED_MODULES: Final = (
    "access",
    "agenda",
    "batching",
    "bundles",
    "calls",
    "extras",
    "failures",
    "generation",
    "iterations",
    "kernel",
    "linking",
    "memory",
    "operations",
    "ordered",
    "queues",
    "recording",
    "routing",
    "rules",
    "single_pass_kernel",
    "state",
)
"""Every module of this package that compiled code comes from."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


@functools.cache
def source_digest() -> str:
    """Return what changes with any source that compiled code comes from."""
    folder = Path(__file__).parent
    return digest_of([Path(dispatch.__file__), *(folder / f"{name}.py" for name in COMPILED_MODULES)])


def entry_point(*names: object) -> Callable[[_Function], _Function]:
    """Return a decorator that compiles a function for Python to call: see `profiles.linking.entry_point_of`."""
    return entry_point_of(*names, source_digest())


@contextmanager
def working_clock() -> Iterator[Callable[[], float]]:
    """Yield a clock, in seconds, that stands still while something is compiled, which is done once on a machine."""
    compiling = event.TimingListener()  # type: ignore[no-untyped-call]  # numba's
    with event.install_listener("numba:compile", compiling):
        yield lambda: time.perf_counter() - (compiling.duration if compiling.done else 0.0)
