"""Utility curves: what serving a share of a service's rate is worth, between 0 and 1.

A curve is piecewise linear in the served share, never falls, and may jump; at a jump the higher value holds. The drop
rate is one less the served share. docs/formulation.md, section 5, states the curves.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from planner.settings import DropPenalty, Settings, UtilityCurve

__all__ = ["Curve", "curve_of", "drop_penalty", "latency_utility", "utility_curve"]

_KNOTS = ((0.0, 0.0), (0.01, 0.25), (0.05, 0.5), (0.1, 1.0))
"""Drop rates beyond which the penalty steps up to the value beside; the linear penalty joins the same points."""

_POWER_PIECES = 16
"""Lines that stand for the power curve below the attainment: at most 0.006 above it for exponents up to 4."""

_ROUNDING = 1e-6
"""How far a served share may miss a jump by rounding."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Points (served share, utility), both never falling, from share 0 to share 1; two at one share are a jump."""

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        shares, values = [point[0] for point in self.points], [point[1] for point in self.points]
        if shares[0] != 0.0 or shares[-1] != 1.0 or shares != sorted(shares) or values != sorted(values):
            raise ValueError(f"points from share 0 to share 1 that never fall, not {self.points}")

    def at(self, share: float) -> float:
        """Return the utility of ``share`` in [0, 1]; one that misses a jump by rounding counts as having reached it."""
        share = min(1.0, max(0.0, share))
        reached = share + _ROUNDING
        best = max((value for point, value in self.points if point <= reached), default=0.0)
        for (left, low), (right, high) in itertools.pairwise(self.points):
            if left <= share < right:
                best = max(best, low + (high - low) * (share - left) / (right - left))
        return best

    def segments(self) -> tuple[tuple[float, float, float], ...]:
        """Return (width, slope, jump at its start) of every piece of positive width, in order of the share.

        A jump at share 1 comes last, as a piece of width 0.
        """
        found = []
        jump = self.points[0][1]
        for (left, low), (right, high) in itertools.pairwise(self.points):
            if right == left:
                jump += high - low
            else:
                found.append((right - left, (high - low) / (right - left), jump))
                jump = 0.0
        return (*found, (0.0, 0.0, jump)) if jump > 0 else tuple(found)


def curve_of(settings: Settings, attainment: float) -> Curve:
    """Return the curve that ``settings`` ask for, for a service whose SLO is ``attainment``."""
    return utility_curve(
        settings.utility, settings.drop_penalty, attainment=attainment, exponent=settings.utility_exponent
    )


def utility_curve(utility: UtilityCurve, penalty: DropPenalty, *, attainment: float, exponent: float) -> Curve:
    """Return utility times (1 - penalty) as a curve: (5.9) of docs/formulation.md.

    Args:
        utility: ``linear``, ``step`` (1 from ``attainment`` on) or ``power`` (to the ``exponent``, up to it).
        penalty: What dropping costs besides.
        attainment: Share of its requests that the service is to serve in time, in (0, 1].
        exponent: Exponent of the power curve, above 0.
    """
    grid = {0.0, 1.0, attainment, *(attainment * piece / _POWER_PIECES for piece in range(_POWER_PIECES))}
    grid |= {1.0 - drop for drop, _ in _KNOTS} if penalty != "none" else set()
    points: list[tuple[float, float]] = []
    for share in sorted(grid):
        below = _bare(utility, share, attainment, exponent, reached=False) * (
            1.0 - drop_penalty(penalty, 1.0 - share, beyond=True)
        )
        at = _bare(utility, share, attainment, exponent, reached=True) * (1.0 - drop_penalty(penalty, 1.0 - share))
        last = points[-1][1] if points else 0.0
        points.append((share, max(last, below) if points else max(0.0, min(below, at))))
        if at > points[-1][1]:
            points.append((share, at))
    return Curve(_thinned(points))


def drop_penalty(penalty: DropPenalty, drop: float, *, beyond: bool = False) -> float:
    """Return the share of a utility that a drop rate costs: Faro's phi, from its knots.

    The step is 0 up to a drop rate of 0.01, 0.25 up to 0.05, 0.5 up to 0.1 and 1 beyond. The linear one joins (0, 0),
    (0.01, 0.25), (0.05, 0.5) and (0.1, 1), and is 1 beyond. ``beyond`` asks for the value just above ``drop``.
    """
    if penalty == "none":
        return 0.0
    if penalty == "step":
        return max(
            (cost for knot, cost in _KNOTS[1:] if drop > knot + 1e-12 or (beyond and drop >= knot - 1e-12)), default=0.0
        )
    for (left, low), (right, high) in itertools.pairwise(_KNOTS):
        if drop <= right:
            return low + (high - low) * (drop - left) / (right - left)
    return 1.0


def latency_utility(utility: UtilityCurve, latency_s: float, target_s: float, exponent: float) -> float:
    """Return the utility of a latency against its target: 1 within it; beyond it 0, or min(1, (target / latency)^a).

    Args:
        utility: ``step``, or ``power`` for the relaxed curve; ``linear`` is the power with exponent 1.
        latency_s: Predicted percentile of the latency, seconds.
        target_s: The target, seconds.
        exponent: The exponent a.
    """
    if latency_s <= target_s:
        return 1.0
    if utility == "step":
        return 0.0
    power: float = (target_s / latency_s) ** (1.0 if utility == "linear" else exponent)
    return power


def _bare(utility: UtilityCurve, share: float, attainment: float, exponent: float, *, reached: bool) -> float:
    if utility == "linear":
        return share
    if share > attainment or (reached and share == attainment):
        return 1.0
    if utility == "step":
        return 0.0
    power: float = min(1.0, share / attainment) ** exponent
    return power


def _thinned(points: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Leave out points on the line between their neighbours."""
    kept = [points[0]]
    for point, after in zip(points[1:], [*points[2:], None], strict=True):
        before = kept[-1]
        straight = (
            after is not None
            and before[0] < point[0] < after[0]
            and abs((point[1] - before[1]) * (after[0] - point[0]) - (after[1] - point[1]) * (point[0] - before[0]))
            < 1e-12
        )
        if not straight:
            kept.append(point)
    return tuple(kept)
