"""What may be done to a run from outside, compiled: advance it in the order of events, stop groups, empty them."""

from __future__ import annotations

from typing import Any, Final

from evaluator.access import group_at, replica_at
from evaluator.batching import wake
from evaluator.failures import clear_group, restart_group, retry, stop_group
from evaluator.kernel import DONE, POOL_FULL
from evaluator.linking import entry_point
from evaluator.memory import compiled
from evaluator.ordered import run_ordered

__all__ = ["CLEAR", "REFRESH", "RESTART", "RETRY", "STOP", "advance_in_order", "operate"]

STOP: Final = 0
"""Stop a group."""
CLEAR: Final = 1
"""Take everything off a group; the slots are added to ``found``."""
RETRY: Final = 2
"""Let the request in a slot enter again, or fail."""
RESTART: Final = 3
"""Let a group start again."""
REFRESH: Final = 4
"""Let every group look again: its limits may have changed."""


@compiled
def _refresh(w: Any, now: float) -> None:
    for g in range(w.group_count):
        for r in range(group_at(w, g).first, group_at(w, g).last):
            if replica_at(w, r).queued > 0:
                wake(w, g, r, now)


@entry_point()
def advance_in_order(world: Any, until_s: float, priority: int) -> int:
    """Do what `evaluator.kernel.advance` does, for runs in which groups depend on each other."""
    return DONE if run_ordered(world[0], until_s, priority) else POOL_FULL


@entry_point()
def operate(world: Any, operation: int, item: int, now: float, found: int, count: int) -> int:
    """Do one of the operations above.

    Args:
        world: The world.
        operation: Which.
        item: The group or the slot that it is done to.
        now: The time.
        found: Address of an array of int32 with room for every slot.
        count: How much of it is used; for `RETRY`: how often a request may be retried.

    Returns:
        How much of ``found`` is used then.
    """
    w = world[0]
    if operation == STOP:
        stop_group(w, item, now)
    elif operation == CLEAR:
        return clear_group(w, item, found, count)
    elif operation == RETRY:
        retry(w, item, count, now)
    elif operation == RESTART:
        restart_group(w, item, now)
    else:
        _refresh(w, now)
    return count
