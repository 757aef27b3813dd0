"""Multi-frame: frames of one stream gather at their replica and enter its queue together, as one *bundle*.

The evaluator simulates the same rules (docs/evaluator.md). A bundle enters when it is full, or when waiting longer
would be late: at the deadline of its first frame less the latency of the largest batch. It has the deadline of its
first frame. No clock here: requests and the time go in, what enters the queue comes out.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools

from executor.dispatcher import Waiting
from executor.state import ReplicaKey

__all__ = ["Bundles"]


class Bundles:
    """The frames of one group's replicas that gather."""

    def __init__(self) -> None:
        self._gathering: dict[tuple[ReplicaKey, str], list[Waiting]] = {}
        self._due: list[tuple[float, int, tuple[ReplicaKey, str], int]] = []  # a heap; stale entries are passed over
        self._order = itertools.count()

    def add(self, frame: Waiting, stream: str, *, most: int, largest_s: float, now_s: float) -> Waiting | None:
        """Let ``frame`` join the bundle of its stream; return what is to be queued now, if anything.

        Args:
            frame: The frame.
            stream: Which stream it is of.
            most: Frames of a full bundle, at least 1.
            largest_s: Latency of the largest batch.
            now_s: The time, on the clock of the deadlines.
        """
        place = (frame.key, stream)
        frames = self._gathering.get(place)
        if frames is None:
            flush_s = frame.deadline_s - largest_s
            if most <= 1 or flush_s <= now_s:
                return frame
            self._gathering[place] = [frame]
            heapq.heappush(self._due, (flush_s, next(self._order), place, frame.number))
            return None
        frames.append(frame)
        if sum(one.items for one in frames) < most:
            return None
        return _bundle(self._gathering.pop(place))

    def due(self, now_s: float) -> list[Waiting]:
        """Return the bundles whose time has come; they gather no more."""
        found = []
        while self._due and (self._due[0][0] <= now_s or self._is_stale()):
            stale = self._is_stale()
            _, _, place, _ = heapq.heappop(self._due)
            if not stale:
                found.append(_bundle(self._gathering.pop(place)))
        return found

    def next_s(self) -> float | None:
        """Return when the next bundle's time comes; None when none gathers."""
        while self._due and self._is_stale():
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else None

    def close(self, key: ReplicaKey | None = None) -> list[Waiting]:
        """Return every frame that gathers for ``key``, or for all replicas, and forget them."""
        places = [place for place in self._gathering if key in (None, place[0])]
        return [frame for place in places for frame in self._gathering.pop(place)]

    def count(self, key: ReplicaKey) -> int:
        """Return how many frames gather for ``key``."""
        return sum(len(frames) for place, frames in self._gathering.items() if place[0] == key)

    def _is_stale(self) -> bool:
        _, _, place, number = self._due[0]
        frames = self._gathering.get(place)
        return frames is None or frames[0].number != number


def _bundle(frames: list[Waiting]) -> Waiting:
    if len(frames) == 1:
        return frames[0]
    return dataclasses.replace(
        frames[0],
        items=sum(frame.items for frame in frames),
        payload_bytes=sum(frame.payload_bytes for frame in frames),
        frames=tuple(frames),
    )
