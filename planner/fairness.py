"""Objectives on the served shares of services, as linear rows with variables of their own.

Source of the ordered objective: W. Ogryczak and T. Sliwinski, "On solving linear programs with the ordered weighted
averaging objective", Eur. J. Oper. Res. 148, 2003: the sum of the k smallest of u is max k t - sum of d with
d >= t - u, d >= 0; maximising these sums for k = 1, 2, ... one after the other is lexicographic max-min fairness,
whether or not the attainable set is convex.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from planner.linear import Floats, Integers, ModelBuilder
from planner.utility import Curve, curve_of

if TYPE_CHECKING:
    from planner.formulation import Formulation
    from planner.space import PlanningSpace

__all__ = ["FairRows", "curves", "fair_levels", "fair_sum", "sum_of_least", "wanted_services"]

_EVERY_LEVEL = 8
"""Services up to which every level of max-min fairness is an objective; beyond, the levels double."""


def wanted_services(space: PlanningSpace) -> Integers:
    """Return the services (positions) that are asked for at all; the others have no share to be served."""
    return np.flatnonzero(space.offered_rps > 0)


def fair_levels(services: int) -> tuple[int, ...]:
    """Return how many of the least served shares are summed, level by level."""
    levels = list(range(1, min(services, _EVERY_LEVEL) + 1))
    while levels and levels[-1] * 2 <= services:
        levels.append(levels[-1] * 2)
    return tuple(dict.fromkeys([*levels, services])) if services else ()


def curves(space: PlanningSpace) -> tuple[Curve, ...]:
    """Return the utility curve of every service."""
    settings = space.problem.settings
    return tuple(curve_of(settings, service.slo.attainment) for service in space.problem.services.services)


def sum_of_least(shares: Floats, level: int) -> float:
    """Return the sum of the ``level`` smallest of ``shares``."""
    return float(np.sort(shares)[:level].sum())


def fair_sum(shares: Floats) -> float:
    """Return sum + n (min - max + 1), Faro's fair-sum; 0 without services."""
    if not len(shares):
        return 0.0
    return float(shares.sum() + len(shares) * (shares.min() - shares.max() + 1.0))


@dataclass(slots=True)
class FairRows:
    """Adds what the chosen objective needs to ``builder``, and remembers the variables."""

    formulation: Formulation
    builder: ModelBuilder
    levels: dict[int, tuple[int, Integers]] = field(default_factory=dict)
    """Per level the columns of t and of d."""
    range_: tuple[int, int, int] | None = None
    """Columns of the least and the greatest served share, and of the constant 1."""
    pieces: dict[int, tuple[Integers, Integers]] = field(default_factory=dict)
    """Per service the columns of its curve's segments, and of the switches at their starts."""

    def add(self) -> None:
        """Add the rows of the objective that the settings ask for."""
        objective = self.formulation.space.problem.settings.objective
        if objective == "max-min":
            self._ordered()
        elif objective == "fair-sum":
            self._range()
        elif objective == "utility":
            self._curves()

    def _ordered(self) -> None:
        """(5.7) d[k, s] >= t[k] - z[s] / d[s]; the sum of the k least shares is the most of k t[k] - sum of d[k, s]."""
        space = self.formulation.space
        wanted = wanted_services(space)
        for level in fair_levels(len(wanted)):
            (t,) = self.builder.add_variables([f"level[{level}]"], upper=np.ones(1), integer=False)
            names = [f"short[{level},{space.names[service]}]" for service in wanted]
            short = self.builder.add_variables(names, upper=np.ones(len(wanted)), integer=False)
            for service, column in zip(wanted, short, strict=True):
                values = [1.0, -1.0, 1.0 / float(space.offered_rps[service])]
                columns = [int(column), int(t), int(self.formulation.served[service])]
                self.builder.add_row(f"short.{level}.{space.names[service]}", columns, values, lower=0.0)
            self.levels[level] = (int(t), short)

    def _range(self) -> None:
        """(5.8) m <= z[s] / d[s] <= M for every s; fair-sum is the sum of the shares + n (m - M + 1)."""
        space = self.formulation.space
        least, most, one = self.builder.add_variables(["least", "most", "one"], upper=np.ones(3), integer=False)
        self.builder.add_row("one", [int(one)], [1.0], lower=1.0)
        for service in wanted_services(space):
            share = 1.0 / float(space.offered_rps[service])
            column, name = int(self.formulation.served[service]), space.names[service]
            self.builder.add_row(f"least.{name}", [column, int(least)], [share, -1.0], lower=0.0)
            self.builder.add_row(f"most.{name}", [column, int(most)], [share, -1.0], upper=0.0)
        self.range_ = (int(least), int(most), int(one))

    def _curves(self) -> None:
        """(5.9) z[s] / d[s] = sum over i of e[s, i]; utility = sum over i of slope[i] e[s, i] + jump[i] b[s, i].

        With e[s, i] <= width[i], e[s, i] >= width[i] b[s, j] for i < j, and e[s, i] <= width[i] b[s, j] from i = j up
        to the next switch. The switch b[s, j] stands where the curve jumps or grows steeper: only there could a later
        piece be worth more than the one before it. Pieces that grow less steep behind it wait for it as well: they may
        be worth more than those before it.
        """
        space = self.formulation.space
        shapes = curves(space)
        for service in wanted_services(space):
            name, segments = space.names[service], shapes[service].segments()
            widths = np.array([width for width, _, _ in segments])
            pieces = self.builder.add_variables(
                [f"piece[{name},{i}]" for i in range(len(segments))], upper=widths, integer=False
            )
            columns = np.append(pieces, self.formulation.served[service])
            values = np.append(np.ones(len(pieces)), -1.0 / float(space.offered_rps[service]))
            self.builder.add_row(f"curve.{name}", columns, values, lower=0.0, upper=0.0)
            self.pieces[int(service)] = (pieces, self._switches(name, segments, pieces))

    def _switches(self, name: str, segments: tuple[tuple[float, float, float], ...], pieces: Integers) -> Integers:
        switched = [
            index
            for index, (_, slope, jump) in enumerate(segments)
            if jump > 0 or (index > 0 and slope > segments[index - 1][1] + 1e-12)
        ]
        columns = np.full(len(segments), -1, dtype=np.int64)
        columns[switched] = self.builder.add_variables(
            [f"switch[{name},{index}]" for index in switched], upper=np.ones(len(switched)), integer=True
        )
        bounds = [0, *switched, len(segments)]
        for start, index, end in zip(bounds, switched, bounds[2:], strict=False):
            switch = int(columns[index])
            for after in range(index, end):
                if (width := segments[after][0]) > 0:
                    row = f"opens.{name}.{after}"
                    self.builder.add_row(row, [int(pieces[after]), switch], [1.0, -width], upper=0.0)
            for before in range(start, index):
                row = f"fills.{name}.{before}.{index}"
                self.builder.add_row(row, [int(pieces[before]), switch], [1.0, -segments[before][0]], lower=0.0)
        return columns

    @property
    def integers(self) -> Integers:
        """The columns that must stay integer even where every replica is fixed, for a utility to mean what it says."""
        found = [switches[switches >= 0] for _, switches in self.pieces.values()]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def ordered(self, level: int, size: int) -> Floats:
        """Return the coefficients of the sum of the ``level`` least shares, shape (size,)."""
        t, short = self.levels[level]
        dense = np.zeros(size)
        dense[t] = level
        dense[short] = -1.0
        return dense

    def fair_sum(self, size: int) -> Floats:
        """Return the coefficients of fair-sum, shape (size,)."""
        space = self.formulation.space
        wanted = wanted_services(space)
        dense = np.zeros(size)
        if self.range_ is not None:
            dense[self.formulation.served[wanted]] = 1.0 / space.offered_rps[wanted]
            dense[list(self.range_)] = len(wanted) * np.array([1.0, -1.0, 1.0])
        return dense

    def utility(self, size: int) -> Floats:
        """Return the coefficients of the weighted sum of utilities, shape (size,)."""
        space = self.formulation.space
        shapes = curves(space)
        dense = np.zeros(size)
        for service, (pieces, switches) in self.pieces.items():
            weight = float(space.weight[service])
            for piece, switch, (_, slope, jump) in zip(pieces, switches, shapes[service].segments(), strict=True):
                dense[piece] = weight * slope
                if switch >= 0:
                    dense[switch] = weight * jump
        return dense

    def complete(self, values: Floats) -> None:
        """Fill in the variables that fit the served rates in ``values``, shape (variable,), at their best."""
        space = self.formulation.space
        wanted = wanted_services(space)
        shares = values[self.formulation.served[wanted]] / space.offered_rps[wanted]
        for level, (t, short) in self.levels.items():
            values[t] = float(np.sort(shares)[level - 1])
            values[short] = np.maximum(0.0, values[t] - shares)
        if self.range_ is not None:
            values[list(self.range_)] = (
                float(shares.min(initial=1.0)),
                float(shares.max(initial=0.0)),
                1.0,
            )
        shapes = curves(space)
        for service, (pieces, switches) in self.pieces.items():
            left = float(values[self.formulation.served[service]] / space.offered_rps[service])
            reached = True
            for piece, switch, (width, _, _) in zip(pieces, switches, shapes[service].segments(), strict=True):
                if switch >= 0:
                    values[switch] = float(reached)
                values[piece] = min(left, width) if switch < 0 or reached else 0.0
                left -= values[piece]
                reached = reached and values[piece] >= width - 1e-12
