"""When a polish ends, and what it found."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Pairs", "PolishLimits", "PolishOutcome"]

Pairs = tuple[tuple[int, int], ...]
"""A placement without rates: sorted (group, option) pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolishLimits:
    """When the search ends: after ``time_s`` seconds, or ``moves`` moves and simulations (None: no such limit)."""

    time_s: float
    moves: int | None = None
    seed: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PolishOutcome:
    """What the search found.

    Attributes:
        pairs: The best placement.
        start_score: What the start was worth before the judge, as a share of the most that there is to have.
        score: The same of ``pairs``; never less.
        candidates: Placements that were simulated.
        moves: Moves that were made, with the simulations beside them.
    """

    pairs: Pairs
    start_score: float
    score: float
    candidates: int
    moves: int
