"""How to plan: limits, margins and the solver to use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from plans.errors import Fault, InvalidInput

__all__ = ["Backend", "Blocking", "DropPenalty", "Fairness", "Method", "Minimised", "Settings", "UtilityCurve"]

Backend = Literal["highs", "scip", "cp-sat", "cbc"]
"""A solver: the first three through MathOpt, CBC through PuLP as the independent second opinion.

CP-SAT knows integers only: it decides those on a grid, and HiGHS the rest (`planner.cp_sat_backend`).
"""

Method = Literal["auto", "direct", "columns"]
"""How placements are searched: one model over groups, column generation over loadouts, or whichever suits the size."""

Fairness = Literal["goodput", "max-min", "fair-sum", "utility"]
"""The first objective: weighted goodput; the least served share, then the next; the sum of served shares with a bonus
for equal ones; the sum of utilities of the served shares. docs/formulation.md, section 5."""

UtilityCurve = Literal["linear", "step", "power"]
"""Utility of a served share: itself; 1 from the SLO's attainment on; a power of its ratio to the attainment."""

DropPenalty = Literal["none", "step", "linear"]
"""What dropping costs of a utility besides: nothing, steps, or a line through the knots of the steps."""

Minimised = Literal["gpus", "cost"]
"""What to minimise where an attainment is required: GPUs in use, or their cost."""

Blocking = Literal["strict", "expected", "none"]
"""How much of a batch that holds a stage a request is charged with: all of it, half (its mean residual), none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of one planning run.

    Attributes:
        seed: Seed of the solver.
        time_limit_s: Wall time for the whole solve, seconds; what is best by then is returned with its gap. Compiling
            the pricing of column generation, once per installation, does not count.
        backend: The solver.
        method: See `Method`.
        headroom_ratio: Share of every GPU's memory that is left free, in [0, 1).
        quantile: Quantile of the demand that is planned for, in (0, 1).
        max_utilisation: Highest utilisation that a group is planned for, in (0, 1].
        min_utilisation: Utilisation that an option is granted even when the tail bound allows less; a warning says so.
        blocking: See `Blocking`.
        tolerance: Share of an objective that may be given up for the objectives after it. It counts into the gap.
        gap: Relative gap at which an objective counts as solved.
        parallelisms: The (tp, pp) to consider; None is every one that the profiles offer.
        objective: See `Fairness`.
        utility: See `UtilityCurve`; counts only with the objective ``utility``.
        utility_exponent: Exponent of the curve ``power``, above 0.
        drop_penalty: See `DropPenalty`; counts only with the objective ``utility``.
        minimize: See `Minimised`; None maximises ``objective``.
        attainment: Share of every service's rate that has to be served, in (0, 1]; None asks for none.
        keep_after_loss: Share of every service's planned rate that the remaining nodes can serve when any one node is
            lost, in [0, 1]; 0 asks for nothing.
        scenarios: Demand scenarios over which goodput is averaged, with one placement; 0 plans for the quantile alone.

    Raises:
        InvalidInput: With one fault for each value out of its range.
    """

    seed: int = 1
    time_limit_s: float = 10.0
    backend: Backend = "highs"
    method: Method = "auto"
    headroom_ratio: float = 0.05
    quantile: float = 0.9
    max_utilisation: float = 0.9
    min_utilisation: float = 0.25
    blocking: Blocking = "expected"
    tolerance: float = 1e-4
    gap: float = 5e-4
    parallelisms: tuple[tuple[int, int], ...] | None = None
    objective: Fairness = "goodput"
    utility: UtilityCurve = "linear"
    utility_exponent: float = 4.0
    drop_penalty: DropPenalty = "none"
    minimize: Minimised | None = None
    attainment: float | None = None
    keep_after_loss: float = 0.0
    scenarios: int = 0

    def __post_init__(self) -> None:
        ranges = (
            ("seed", 0 <= self.seed < 2**31, "at least 0 and below 2^31"),
            ("time_limit_s", 0 < self.time_limit_s < float("inf"), "more than 0 seconds"),
            ("backend", self.backend in get_args(Backend), f"one of {', '.join(get_args(Backend))}"),
            ("method", self.method in get_args(Method), f"one of {', '.join(get_args(Method))}"),
            ("headroom_ratio", 0 <= self.headroom_ratio < 1, "at least 0 and below 1"),
            ("quantile", 0 < self.quantile < 1, "between 0 and 1, both excluded"),
            ("max_utilisation", 0 < self.max_utilisation <= 1, "above 0 and at most 1"),
            ("min_utilisation", 0 < self.min_utilisation <= 1, "above 0 and at most max_utilisation"),
            ("min_utilisation", self.min_utilisation <= self.max_utilisation, f"at most {self.max_utilisation}"),
            ("blocking", self.blocking in get_args(Blocking), f"one of {', '.join(get_args(Blocking))}"),
            ("tolerance", 0 <= self.tolerance < 1, "at least 0 and below 1"),
            ("gap", 0 <= self.gap < 1, "at least 0 and below 1"),
            ("parallelisms", self.parallelisms is None or _positive(self.parallelisms), "pairs of at least 1"),
            *self._of_objectives(),
        )
        faults = [
            Fault(where="settings", field=field, found=repr(getattr(self, field)), expected=expected)
            for field, holds, expected in ranges
            if not holds
        ]
        if faults:
            raise InvalidInput(faults)

    def _of_objectives(self) -> tuple[tuple[str, bool, str], ...]:
        plain = self.objective == "goodput" and self.minimize is None
        return (
            ("objective", self.objective in get_args(Fairness), f"one of {', '.join(get_args(Fairness))}"),
            ("utility", self.utility in get_args(UtilityCurve), f"one of {', '.join(get_args(UtilityCurve))}"),
            ("utility_exponent", 0 < self.utility_exponent < float("inf"), "above 0"),
            ("drop_penalty", self.drop_penalty in get_args(DropPenalty), f"one of {', '.join(get_args(DropPenalty))}"),
            ("minimize", self.minimize in (None, *get_args(Minimised)), f"one of {', '.join(get_args(Minimised))}"),
            ("minimize", self.minimize is None or self.attainment is not None, "an attainment to keep beside it"),
            ("attainment", self.attainment is None or 0 < self.attainment <= 1, "above 0 and at most 1"),
            ("keep_after_loss", 0 <= self.keep_after_loss <= 1, "at least 0 and at most 1"),
            ("scenarios", 0 <= self.scenarios <= 1000, "at least 0 and at most 1000"),
            ("scenarios", self.scenarios == 0 or plain, "0 unless goodput is the objective"),
        )

    @property
    def blocking_factor(self) -> float:
        """Share of a running batch that a request is charged with, in [0, 1]."""
        return {"strict": 1.0, "expected": 0.5, "none": 0.0}[self.blocking]


def _positive(parallelisms: tuple[tuple[int, int], ...]) -> bool:
    return bool(parallelisms) and all(tp >= 1 and pp >= 1 for tp, pp in parallelisms)
