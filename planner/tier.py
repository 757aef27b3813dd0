"""One objective of the lexicographic search: its state while it is solved, and what comes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from planner.objective import Kept, Objective, gap_of
from planner.space import Placement

__all__ = ["Exhausted", "Outcome", "Tier", "TierOutcome", "Unsatisfiable"]


@dataclass(slots=True, kw_only=True)
class Tier:
    """State of one objective while it is solved."""

    objective: Objective
    kept: tuple[Kept, ...]
    best: Placement | None
    ends_at_s: float
    known_bound: float
    open: bool = False

    def tighten(self, bound: float | None) -> None:
        """Take ``bound`` when it is better than what is known."""
        if bound is not None and math.isfinite(bound):
            self.known_bound = min(self.known_bound, bound) if self.objective.maximise else max(self.known_bound, bound)

    def bound_for(self, value: float) -> float:
        """Return the bound, which by rounding may not be worse than ``value``."""
        return max(self.known_bound, value) if self.objective.maximise else min(self.known_bound, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class TierOutcome:
    """One objective: its value, its bound, and whether it was left with a gap."""

    objective: Objective
    value: float
    bound: float
    open: bool

    @property
    def gap(self) -> float:
        """Relative distance between value and bound."""
        return gap_of(self.value, self.bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The best placement found, and its certificate per objective."""

    placement: Placement
    tiers: tuple[TierOutcome, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsatisfiable:
    """Proven: no placement satisfies the constraints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exhausted:
    """No placement found in time, and no proof that there is none; a bound on the first objective, when known."""

    bound: float | None
