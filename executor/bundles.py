"""Multi-frame: frames of one stream gather at their replica and enter its queue together, as one *bundle*.

The evaluator simulates the same rules (docs/evaluator.md). A bundle enters when it is full, or when waiting longer
would be late: at the deadline of its first frame less the latency of the largest batch. It has the deadline of its
first frame. That is the earliest one where all have as long; where a client gives a later frame less time, that one's
counts. No clock here: requests and the time go in, what enters the queue comes out.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass

from executor.dispatcher import Waiting, goes_before
from executor.state import ReplicaKey

__all__ = ["Bundles", "Gathered"]

_Place = tuple[ReplicaKey, str]
"""A stream at a replica."""


@dataclass(slots=True)
class Gathered:
    """How much gathers for one replica: frames, their items, and bytes of their inputs."""

    frames: int = 0
    items: int = 0
    payload_bytes: int = 0


@dataclass(slots=True)
class _Bundle:
    """Frames that gather, at least one; the bundle enters ``ahead_s`` before the deadline of the first."""

    frames: list[Waiting]
    ahead_s: float


class Bundles:
    """The frames of one group's replicas that gather."""

    def __init__(self) -> None:
        self._gathering: dict[_Place, _Bundle] = {}
        self._gathered: dict[ReplicaKey, Gathered] = {}
        self._due: list[tuple[float, int, _Place, int]] = []  # a heap; stale entries are passed over
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
        if most <= 1 or frame.deadline_s - largest_s <= now_s:
            return frame  # it cannot wait, and the others of its stream need not be late with it
        bundle = self._gathering.setdefault(place, _Bundle([], largest_s))
        is_soonest = all(frame.deadline_s < one.deadline_s for one in bundle.frames)
        bundle.frames.append(frame)
        self._count(frame, 1)
        if is_soonest:
            self._set_due(place, bundle)
        if len(bundle.frames) == 1 or sum(one.items for one in bundle.frames) < most:
            return None
        return Waiting.bundle(self._taken(place))

    def remove(self, frame: Waiting) -> bool:
        """Take ``frame`` out of its bundle; False when it does not gather any more. Cost is linear in the bundles."""
        for place, bundle in self._gathering.items():
            left = [one for one in bundle.frames if one.number != frame.number]
            if len(left) == len(bundle.frames):
                continue
            self._count(frame, -1)
            was_first = bundle.frames[0].number == frame.number
            bundle.frames = left
            if not left:
                del self._gathering[place]
            elif was_first:
                self._set_due(place, bundle)
            return True
        return False

    def due(self, now_s: float) -> list[Waiting]:
        """Return the bundles whose time has come; they gather no more."""
        found = []
        while self._due and (self._due[0][0] <= now_s or self._is_stale()):
            stale = self._is_stale()
            _, _, place, _ = heapq.heappop(self._due)
            if not stale:
                found.append(Waiting.bundle(self._taken(place)))
        return found

    def next_s(self) -> float | None:
        """Return when the next bundle's time comes; None when none gathers."""
        while self._due and self._is_stale():
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else None

    def close(self, key: ReplicaKey | None = None) -> list[Waiting]:
        """Return every frame that gathers for ``key``, or for all replicas, and forget them."""
        places = [place for place in self._gathering if key in (None, place[0])]
        return [frame for place in places for frame in self._taken(place)]

    def gathered(self, key: ReplicaKey) -> Gathered:
        """Return how much gathers for ``key``."""
        return self._gathered.get(key) or Gathered()

    def items_before(self, request: Waiting) -> int:
        """Return the items that gather for the replica of ``request`` and go before it.

        Cost is linear in the frames.
        """
        bundles = (bundle.frames for place, bundle in self._gathering.items() if place[0] == request.key)
        return sum(one.items for frames in bundles if goes_before(Waiting.bundle(frames), request) for one in frames)

    def _set_due(self, place: _Place, bundle: _Bundle) -> None:
        """Note when a bundle with another first or soonest frame must enter."""
        soonest_s = min(frame.deadline_s for frame in bundle.frames)
        entry = (soonest_s - bundle.ahead_s, next(self._order), place, bundle.frames[0].number)
        heapq.heappush(self._due, entry)

    def _taken(self, place: _Place) -> list[Waiting]:
        """Return the frames of a bundle, and forget it."""
        frames = self._gathering.pop(place).frames
        for frame in frames:
            self._count(frame, -1)
        return frames

    def _count(self, frame: Waiting, sign: int) -> None:
        gathered = self._gathered.setdefault(frame.key, Gathered())
        gathered.frames += sign
        gathered.items += sign * frame.items
        gathered.payload_bytes += sign * frame.payload_bytes
        if not gathered.frames:
            del self._gathered[frame.key]

    def _is_stale(self) -> bool:
        _, _, place, number = self._due[0]
        bundle = self._gathering.get(place)
        return bundle is None or bundle.frames[0].number != number
