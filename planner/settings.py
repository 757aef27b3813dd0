"""How to plan: limits, margins and the solver to use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from plans.errors import Fault, InvalidInput

__all__ = ["Backend", "Blocking", "Settings"]

Backend = Literal["highs", "scip", "cbc"]
"""A solver: the first two through MathOpt, CBC through PuLP as the independent second opinion.

CP-SAT is not among them: it knows integers only, and MathOpt's rounding of the compute shares made it refuse models
and call feasible ones infeasible (OR-Tools 9.15).
"""

Blocking = Literal["strict", "expected", "none"]
"""How much of a batch that holds a stage a request is charged with: all of it, half (its mean residual), none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of one planning run.

    Attributes:
        seed: Seed of the solver.
        time_limit_s: Wall time for the whole solve, seconds; what is best by then is returned with its gap.
        backend: The solver.
        headroom_ratio: Share of every GPU's memory that is left free, in [0, 1).
        quantile: Quantile of the demand that is planned for, in (0, 1).
        max_utilisation: Highest utilisation that a group is planned for, in (0, 1].
        min_utilisation: Utilisation that an option is granted even when the tail bound allows less; a warning says so.
        blocking: See `Blocking`.
        tolerance: Share of an objective that may be given up for the objectives after it. It counts into the gap.
        gap: Relative gap at which an objective counts as solved.
        parallelisms: The (tp, pp) to consider; None is every one that the profiles offer.

    Raises:
        InvalidInput: With one fault for each value out of its range.
    """

    seed: int = 1
    time_limit_s: float = 10.0
    backend: Backend = "highs"
    headroom_ratio: float = 0.05
    quantile: float = 0.9
    max_utilisation: float = 0.9
    min_utilisation: float = 0.25
    blocking: Blocking = "expected"
    tolerance: float = 1e-4
    gap: float = 5e-4
    parallelisms: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        ranges = (
            ("seed", 0 <= self.seed < 2**31, "at least 0 and below 2^31"),
            ("time_limit_s", 0 < self.time_limit_s < float("inf"), "more than 0 seconds"),
            ("backend", self.backend in get_args(Backend), f"one of {', '.join(get_args(Backend))}"),
            ("headroom_ratio", 0 <= self.headroom_ratio < 1, "at least 0 and below 1"),
            ("quantile", 0 < self.quantile < 1, "between 0 and 1, both excluded"),
            ("max_utilisation", 0 < self.max_utilisation <= 1, "above 0 and at most 1"),
            ("min_utilisation", 0 < self.min_utilisation <= 1, "above 0 and at most max_utilisation"),
            ("min_utilisation", self.min_utilisation <= self.max_utilisation, f"at most {self.max_utilisation}"),
            ("blocking", self.blocking in get_args(Blocking), f"one of {', '.join(get_args(Blocking))}"),
            ("tolerance", 0 <= self.tolerance < 1, "at least 0 and below 1"),
            ("gap", 0 <= self.gap < 1, "at least 0 and below 1"),
            ("parallelisms", self.parallelisms is None or _positive(self.parallelisms), "pairs of at least 1"),
        )
        faults = [
            Fault(where="settings", field=field, found=repr(getattr(self, field)), expected=expected)
            for field, holds, expected in ranges
            if not holds
        ]
        if faults:
            raise InvalidInput(faults)

    @property
    def blocking_factor(self) -> float:
        """Share of a running batch that a request is charged with, in [0, 1]."""
        return {"strict": 1.0, "expected": 0.5, "none": 0.0}[self.blocking]


def _positive(parallelisms: tuple[tuple[int, int], ...]) -> bool:
    return bool(parallelisms) and all(tp >= 1 and pp >= 1 for tp, pp in parallelisms)
