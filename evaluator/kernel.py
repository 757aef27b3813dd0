"""The loops over time.

Groups touch each other only where a request chooses between them (and in workflows and plan changes), so mostly there
is no queue of events at all: each group is brought up to date when a request that concerns it enters. What a group does
then is the same, in the same order, as if all events had been processed in the order of their times.
"""

from __future__ import annotations

from typing import Any, Final

from evaluator.access import floats
from evaluator.batching import advance_group
from evaluator.linking import entry_point
from evaluator.routing import ENTRY, arrive
from evaluator.state import NOWHERE

__all__ = ["DONE", "POOL_FULL", "advance", "advance_featured"]

DONE = 0
POOL_FULL = 1


def _advance(world: Any, until_s: float, priority: int) -> int:
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


advance: Final = entry_point("plain")(_advance)
"""Process every event before (until_s, priority).

Args:
    world: Shape (1,), of `evaluator.state.WORLD`.
    until_s: Seconds.
    priority: Of events at that very time those with a smaller priority are processed.

Returns:
    `DONE`; or `POOL_FULL`: grow the pool and call again.
"""

advance_featured: Final = entry_point("featured")(_advance)
"""The same for `evaluator.state.FEATURED_WORLD`."""
