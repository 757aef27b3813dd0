"""How long a request would wait at each group, as a gateway expects it. No input or output here.

Agents report the wait of a group with every answer. Until the next report time passes, and the gateway itself sends
more there: both are counted, or else all requests between two reports would go to the group that looked best at the
first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

__all__ = ["GroupWaits"]


class GroupWaits:
    """When each group is expected to be done with what waits there.

    Args:
        clock: The time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._done_s: dict[str, float] = {}

    def note(self, group: str, wait_s: float) -> None:
        """Take in what an agent reported: the seconds until a request that arrives now would start."""
        self._done_s[group] = self._clock() + wait_s

    def sent(self, group: str, share_s: float) -> None:
        """Note that a request was sent which keeps the group busy for ``share_s`` seconds, its share of a batch."""
        self._done_s[group] = max(self._clock(), self._done_s.get(group, 0.0)) + share_s

    def wait_s(self, group: str) -> float:
        """Return the seconds until a request that is sent now would start; 0 for a group of which nothing is known."""
        return max(0.0, self._done_s.get(group, 0.0) - self._clock())

    def keep(self, groups: Collection[str]) -> None:
        """Forget every group but these."""
        self._done_s = {group: done_s for group, done_s in self._done_s.items() if group in groups}
