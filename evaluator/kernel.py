"""The loops over time.

Groups touch each other only where a request chooses between them (and in workflows and plan changes), so mostly there
is no queue of events at all: each group is brought up to date when a request that concerns it enters. What a group does
then is the same, in the same order, as if all events had been processed in the order of their times.

The entry points are cached on disk under a digest of every source file that they are compiled from: numba itself looks
at the file of the entry point alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

from evaluator.access import floats
from evaluator.batching import advance_group
from evaluator.routing import ENTRY, arrive
from evaluator.state import NOWHERE
from plans import dispatch

__all__ = ["DONE", "POOL_FULL", "advance", "source_digest"]

DONE = 0
POOL_FULL = 1

_COMPILED = (
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
    "memory",
    "operations",
    "ordered",
    "queues",
    "recording",
    "routing",
    "rules",
    "state",
)
"""Every module that compiled code may come from."""


def source_digest() -> int:
    """Return a number that changes with any source that the entry points are compiled from."""
    folder = Path(__file__).parent
    found = hashlib.sha256(Path(dispatch.__file__).read_bytes())
    for name in _COMPILED:
        path = folder / f"{name}.py"
        found.update(path.read_bytes())
    return int.from_bytes(found.digest()[:7], "big")


def _entry_point(digest: int) -> Callable[..., int]:
    @numba.njit(cache=True, nogil=True)
    def advance(world: Any, until_s: float, priority: int) -> int:
        digest  # noqa: B018 - a variable of the closure is part of the key of the cache
        w = world[0]
        arrival_s = floats(w.arrival_s, w.request_count)
        while w.cursor < w.request_count:
            now = arrival_s[w.cursor] + w.overhead_s
            if now > until_s or (now == until_s and priority <= ENTRY):
                break
            if w.free == NOWHERE:
                return POOL_FULL
            arrive(w, w.cursor, now)
            w.cursor += 1
        for g in range(w.group_count):
            advance_group(w, g, until_s, priority)
        return DONE

    return advance


advance = _entry_point(source_digest())
"""Process every event before (until_s, priority).

Args:
    w: The world.
    until_s: Seconds.
    priority: Of events at that very time those with a smaller priority are processed.

Returns:
    `DONE`; or `POOL_FULL`: grow the pool and call again.
"""
