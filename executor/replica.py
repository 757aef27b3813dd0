"""The life of a replica, as a state machine without input or output.

::

    (new) -> LOADING -> STAGED -> SERVING -> DRAINING -> (gone)
                |                    ^
                +--------------------+   when it was committed before its load ended
                |
              FAILED -> LOADING          when it is tried again

A replica is *committed* once its generation is. A load that ends before the commit leads to STAGED, one that ends after
it straight to SERVING. A replica that leaves the plan, or whose stage is aborted, drains from whatever phase it is in.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass

from executor.state import DesiredReplica, Phase, ReplicaKey

__all__ = ["TRANSITIONS", "Event", "Replica", "advance"]


class Event(enum.Enum):
    """What can happen to a replica."""

    LOADED = "its model is loaded"
    LOAD_FAILED = "its model could not be loaded"
    WORKER_LOST = "its group's worker process ended"
    RETRIED = "its load is tried again"
    COMMITTED = "its generation was committed"
    RETIRED = "it left the plan"


TRANSITIONS: Mapping[tuple[Phase, Event], Phase] = {
    (Phase.LOADING, Event.LOADED): Phase.STAGED,  # SERVING when committed, see `advance`
    (Phase.LOADING, Event.LOAD_FAILED): Phase.FAILED,
    (Phase.LOADING, Event.WORKER_LOST): Phase.FAILED,
    (Phase.LOADING, Event.COMMITTED): Phase.LOADING,
    (Phase.LOADING, Event.RETIRED): Phase.DRAINING,
    (Phase.STAGED, Event.WORKER_LOST): Phase.FAILED,
    (Phase.STAGED, Event.COMMITTED): Phase.SERVING,
    (Phase.STAGED, Event.RETIRED): Phase.DRAINING,
    (Phase.SERVING, Event.WORKER_LOST): Phase.FAILED,
    (Phase.SERVING, Event.COMMITTED): Phase.SERVING,
    (Phase.SERVING, Event.RETIRED): Phase.DRAINING,
    (Phase.FAILED, Event.RETRIED): Phase.LOADING,
    (Phase.FAILED, Event.WORKER_LOST): Phase.FAILED,
    (Phase.FAILED, Event.COMMITTED): Phase.FAILED,
    (Phase.FAILED, Event.RETIRED): Phase.DRAINING,
    (Phase.DRAINING, Event.WORKER_LOST): Phase.DRAINING,
    (Phase.DRAINING, Event.RETIRED): Phase.DRAINING,
}
"""Every move that is possible. A pair that is missing is a bug of the caller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One replica of a node.

    Attributes:
        key: Which one.
        gpus: Devices of its group.
        settings: What it runs by.
        staged: What it will run by once the staged generation is committed; None when nothing is staged for it.
        earlier: What it ran by before a commit that can still be taken back; None when there is none.
        phase: Where it is in its life.
        committed: Whether a committed generation holds it.
        reason: Why it failed, or is not serving yet.
        drain_until_s: When draining ends even if requests still wait, seconds on the node's clock.
    """

    key: ReplicaKey
    gpus: tuple[int, ...]
    settings: DesiredReplica
    staged: DesiredReplica | None = None
    earlier: DesiredReplica | None = None
    phase: Phase = Phase.LOADING
    committed: bool = False
    reason: str = ""
    drain_until_s: float = 0.0

    @property
    def max_batch_needed(self) -> int:
        """Largest batch that it runs now, will run after the commit, or would run if that were taken back."""
        return max(settings.max_batch for settings in self._possible)

    @property
    def memory_bytes(self) -> tuple[int, ...]:
        """Bytes per GPU of the group that it needs now, after the commit, or if that were taken back."""
        return tuple(max(sizes) for sizes in zip(*(one.memory_bytes for one in self._possible), strict=True))

    @property
    def kv_bytes(self) -> int:
        """Key-value memory that it needs now, after the commit, or if that were taken back; 0 if it never generates."""
        return max(one.generation.kv_bytes if one.generation else 0 for one in self._possible)

    @property
    def shape(self) -> tuple[int, int]:
        """Tensor and pipeline parallelism that it is to have: after the commit, where a generation is staged."""
        return (self.staged or self.settings).shape

    @property
    def _possible(self) -> tuple[DesiredReplica, ...]:
        return tuple(one for one in (self.settings, self.staged, self.earlier) if one is not None)


def advance(replica: Replica, event: Event, reason: str = "") -> Replica:
    """Return ``replica`` after ``event``.

    Raises:
        ValueError: The event cannot happen in this phase.
    """
    if (replica.phase, event) not in TRANSITIONS:
        raise ValueError(f"{replica.key} is {replica.phase.value}: {event.value!r} cannot happen")
    phase = TRANSITIONS[replica.phase, event]
    committed = replica.committed or event is Event.COMMITTED
    if event is Event.LOADED and committed:
        phase = Phase.SERVING
    settings, staged, earlier = replica.settings, replica.staged, replica.earlier
    if event is Event.COMMITTED and staged is not None:
        settings, staged, earlier = staged, None, settings
    if event is Event.COMMITTED and phase in (Phase.FAILED, Phase.LOADING):
        reason = replica.reason
    return dataclasses.replace(
        replica, phase=phase, committed=committed, settings=settings, staged=staged, earlier=earlier, reason=reason
    )
