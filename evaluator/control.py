"""Policies that act while the simulation runs: what they see, and what they may answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from plans.errors import Fault, InvalidInput
from plans.plan import Plan

__all__ = ["Controller", "Observation", "ServiceObservation", "Turn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceObservation:
    """One service since the controller was last asked; a workflow counts as a service of its own.

    Attributes:
        arrived: Requests that were sent.
        good: Requests that ended in time.
        late: Requests that ended after their deadline.
        dropped: Requests that were given up.
        failed: Requests that failed.
        queued: Requests that wait in queues now.
    """

    arrived: int
    good: int
    late: int
    dropped: int
    failed: int
    queued: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What a controller is told.

    Attributes:
        now_s: The time.
        since_s: When it was last asked, 0 at first.
        plan: The plan in force.
        services: By name of the service or workflow.
        queued: Requests that wait, by id of the group.
        down: Nodes of which some device is known to have failed.
    """

    now_s: float
    since_s: float
    plan: Plan
    services: Mapping[str, ServiceObservation]
    queued: Mapping[str, int]
    down: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """An answer: the plan that shall run, and how long it took to find it.

    Attributes:
        plan: The new plan.
        solve_s: Seconds from the observation until the plan is known, as the simulation is to count them.

    Raises:
        InvalidInput: ``solve_s`` is negative or not finite.
    """

    plan: Plan
    solve_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.solve_s < math.inf:
            expected = "at least 0 seconds and finite"
            raise InvalidInput([Fault(where="controller", field="solve_s", found=str(self.solve_s), expected=expected)])


class Controller(Protocol):
    """Anything that looks at a running system every so often and may replace its plan."""

    def observe(self, observation: Observation) -> Turn | None:
        """Return a new plan, or None to leave things as they are."""
