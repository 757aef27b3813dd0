"""The restricted master: counts of loadouts per class of groups, by linear programming and column generation.

docs/formulation.md, section 9. GLOP keeps its basis from one solve to the next, so a solve after new columns is short.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from planner.linear import Floats, Integers
from planner.linking import Capacity, Linking, NodeKind, capacity_of, node_kinds
from planner.pricing import ClassOptions, best_loadout
from planner.program import LinearProgram, Optimum
from planner.space import PlanningSpace

__all__ = ["Column", "Master", "MasterSolution", "Network", "converge"]

_ROUNDS = 24
"""Loadouts of different services that one class is priced for at a time."""

_QUICK_NODES = 2_000
"""Nodes of the search tree for a loadout after the first of a class."""

_PRICE_TOLERANCE = 3e-4
"""Relative distance of the bound of a class from its best loadout at which pricing stops."""

_ROUNDING = 1e-6
"""Relative rounding that the objective of a linear relaxation is widened by before it counts as a bound."""

_SMOOTHING = 0.9
"""Weight of the prices with the best bound so far in those that are priced with (Wentges 1997)."""

_LESS_SMOOTHING = 0.3
"""What that weight loses in a round that gains nothing."""

_QUIET_ROUNDS = 8
"""Rounds that gain less than a tenth of the gap asked for, after which column generation ends."""

_SHORTFALL_PRICE = 20.0
"""Price, in units of the whole objective, of falling short of a row by about what one group does for it."""

_STALLED = 1e-5
"""Relative gain of a round that counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A loadout of one class: pairs of the formulation with the shares of compute that they are given."""

    place: int
    pairs: tuple[int, ...]
    shares: tuple[float, ...]

    @property
    def key(self) -> tuple[int, tuple[int, ...], tuple[float, ...]]:
        """What tells columns apart."""
        return (self.place, self.pairs, tuple(round(share, 9) for share in self.shares))


@dataclass(frozen=True, slots=True, kw_only=True)
class MasterSolution:
    """The optimum over the columns so far: counts, shape (column,), statics, the objective, and the rows' prices."""

    counts: Floats
    statics: Floats
    objective: float
    duals: Floats
    capacity_duals: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What does not change between objectives: nodes, what their GPUs allow, and the pricing arrays per class.

    ``starts`` has shape (class + 1,): the pairs of class c are those from ``starts[c]`` to ``starts[c + 1]``.
    """

    kinds: tuple[NodeKind, ...]
    capacities: tuple[Capacity, ...]
    priced: tuple[ClassOptions, ...]
    starts: Integers

    @classmethod
    def of(cls, space: PlanningSpace, linking: Linking) -> Network:
        """Return the network of ``space`` for the pairs of ``linking``."""
        starts = np.searchsorted(linking.pair_class, np.arange(len(space.classes) + 1))
        kinds = node_kinds(space)
        return cls(
            kinds=kinds,
            capacities=capacity_of(space, kinds),
            priced=tuple(
                _class_options(space, linking.pair_option[starts[place] : starts[place + 1]])
                for place in range(len(space.classes))
            ),
            starts=starts,
        )

    def rows_of(self, place: int) -> tuple[Integers, Floats]:
        """Return the capacities that a group of class ``place`` counts in, and its coefficients there."""
        amounts = np.array([each.coefficients[place] for each in self.capacities])
        rows = np.flatnonzero(amounts)
        return rows, amounts[rows]


def _class_options(space: PlanningSpace, options: Integers) -> ClassOptions:
    """Return the pricing arrays of the options of one class."""
    factor = space.problem.settings.blocking_factor
    stages = max((space.options[option].pp for option in options), default=1)
    return ClassOptions(
        options=options,
        service=space.service_of[options],
        memory=np.ascontiguousarray(space.memory[options, :stages]),
        cap=space.share_cap[options],
        hold_s=factor * space.hold_s[options],
        slack_s=space.slack_s[options],
        least=space.requirements.least_share[options],
    )


def _scales(linking: Linking, cap: Floats) -> tuple[Floats, float]:
    """Return about the largest activity of one group per row, shape (row,), and about the objective in all."""
    amount = np.abs(linking.entry_share) * cap[linking.entry_pair] + np.abs(linking.entry_run)
    inside = linking.entry_row >= 0
    scale = np.zeros(len(linking.rows))
    np.maximum.at(scale, linking.entry_row[inside], amount[inside])
    uses = max((abs(objective) for objective, _, _ in linking.use), default=0.0)
    objective = float(np.sum(np.abs(linking.static_objective) * linking.reach))
    return linking.scaled(scale), max(objective, float(amount[~inside].max(initial=0.0)), uses) or 1.0


class Master:
    """The master of one objective, over what is not decided yet: (9.1) and (9.2) of docs/formulation.md.

    Attributes:
        space: The planning space.
        linking: Rows and statics.
        columns: The columns so far.
        bound: The best proven bound on the objective, infinite before the first.
    """

    def __init__(self, space: PlanningSpace, linking: Linking, network: Network, cap: Floats) -> None:
        """Start without columns; ``cap``, shape (pair,), is the compute share that serves what demand is left.

        A row that asks for at least something may fall short, at a price that nothing is worth: so there is an optimum,
        and prices that lead to what is missing, before the first column that satisfies it.
        """
        self.space = space
        self.linking = linking
        self.columns: list[Column] = []
        self.bound = math.inf
        self._network = network
        self._cap = cap
        self._whole = True
        self._known: set[tuple[int, tuple[int, ...], tuple[float, ...]]] = set()
        self._stable: Floats | None = None
        self._row_scale, self._objective_scale = _scales(linking, cap)
        limits = np.array([each.limit for each in network.capacities])
        lifted, statics = linking.lifted_rows, len(linking.static_lower)
        self._first_column = statics + len(lifted)
        self._program = LinearProgram(
            np.concatenate([linking.lower, np.full(len(limits), -np.inf)]),
            np.concatenate([linking.upper, limits]),
            np.concatenate([linking.static_lower, np.zeros(len(lifted))]),
            np.concatenate([linking.static_upper, np.full(len(lifted), np.inf)]),
            np.concatenate([linking.static_objective, np.full(len(lifted), -_SHORTFALL_PRICE * self._objective_scale)]),
            np.concatenate([linking.static_row, lifted]),
            np.concatenate([linking.static_of, statics + np.arange(len(lifted))]),
            np.concatenate([linking.static_value, self._row_scale[lifted]]),
            row_scale=np.concatenate([self._row_scale, np.ones(len(limits))]),
            objective_scale=self._objective_scale,
        )

    def add(self, column: Column) -> bool:
        """Add ``column``; False when it is there already."""
        if column.key in self._known:
            return False
        self._known.add(column.key)
        objective, rows, values = self.linking.column(
            column.place, np.array(column.pairs, dtype=np.int64), np.array(column.shares)
        )
        counted, amounts = self._network.rows_of(column.place)
        self._program.add_column(
            objective,
            [*rows.tolist(), *(len(self.linking.rows) + counted).tolist()],
            [*values.tolist(), *amounts.tolist()],
        )
        self.columns.append(column)
        return True

    @property
    def limits(self) -> Floats:
        """What the capacities allow in all, shape (capacity,)."""
        return np.array([each.limit for each in self._network.capacities])

    def capacity_rows(self, place: int) -> tuple[Integers, Floats]:
        """Return the capacities that a group of class ``place`` counts in, and its coefficients there."""
        return self._network.rows_of(place)

    def restrict(self, lower: Floats, upper: Floats, limits: Floats, cap: Floats) -> None:
        """Set what is left of rows and capacities once some groups are decided, and the caps that follow from it."""
        self._program.set_rows(np.concatenate([lower, np.full(len(limits), -np.inf)]), np.concatenate([upper, limits]))
        self._cap = cap
        self._whole = False

    def solve(self, time_limit_s: float) -> MasterSolution | None:
        """Return the optimum over the columns so far; None when there is none in time."""
        found = self._program.solve(time_limit_s)
        if found is None:
            return None
        statics, rows = len(self.linking.static_lower), len(self.linking.rows)
        return MasterSolution(
            counts=found.values[self._first_column :],
            statics=found.values[:statics],
            objective=found.objective,
            duals=found.duals[:rows],
            capacity_duals=found.duals[rows:],
        )

    def foresee(self, time_limit_s: float) -> None:
        """Take first prices and a first bound from the relaxation."""
        found = self.relaxation(time_limit_s)
        if found is None:
            return
        link = self.linking
        rows = len(link.rows)
        self.bound = min(self.bound, found.objective + _ROUNDING * max(abs(found.objective), 1.0))
        # What rewards running at all is cheap in a real group with memory to spare, and dear in this relaxation.
        rewards = np.zeros(rows, dtype=bool)
        rewards[link.entry_row[(link.entry_row >= 0) & (link.entry_run != 0)]] = True
        self._stable = self._signed(np.where(rewards, np.maximum(found.duals[:rows], 0.0), found.duals[:rows]))

    def relaxation(self, time_limit_s: float, *, extra: Floats | None = None) -> Optimum | None:
        """Solve the relaxation in which a group runs any fraction of an option: (9.6).

        Args:
            time_limit_s: Seconds that it may take.
            extra: Shape (capacity,): what capacities allow beyond what there is.
        """
        link, network = self.linking, self._network
        pairs = np.flatnonzero(self._cap > 1e-9)
        rows, places, statics = len(link.rows), len(self.space.classes), len(link.static_lower)
        # Running without compute may be worth something of its own, for a minimum of replicas for example.
        idle = np.unique(link.entry_pair[link.entry_run != 0])
        counted = len(network.capacities)
        memory_row, compute_row = rows + counted, rows + counted + places
        uses = statics + np.arange(places)
        column = np.full(len(link.pair_option), -1, dtype=np.int64)
        column[pairs] = statics + places + np.arange(len(pairs))
        inside = (link.entry_row >= 0) & (column[link.entry_pair] >= 0)
        amounts = link.entry_share + link.entry_run / np.maximum(self._cap[link.entry_pair], 1e-9)
        memory = np.concatenate([np.zeros(0), *(each.memory.mean(axis=1) for each in network.priced)])
        first_idle = statics + places + len(pairs)
        rank = np.full(len(link.pair_option), -1, dtype=np.int64)
        rank[idle] = np.arange(len(idle))
        idles = (link.entry_row >= 0) & (rank[link.entry_pair] >= 0)
        entries = [
            (link.static_row, link.static_of, link.static_value),
            (link.entry_row[inside], column[link.entry_pair[inside]], amounts[inside]),
            (memory_row + link.pair_class[pairs], column[pairs], memory[pairs] / self._cap[pairs]),
            (compute_row + link.pair_class[pairs], column[pairs], np.ones(len(pairs))),
            (link.entry_row[idles], first_idle + rank[link.entry_pair[idles]], link.entry_run[idles]),
            (memory_row + link.pair_class[idle], first_idle + np.arange(len(idle)), memory[idle]),
            (memory_row + np.arange(places), uses, -np.ones(places)),
            (compute_row + np.arange(places), uses, -np.ones(places)),
        ]
        for place, (_, touched, values) in enumerate(link.use):
            at, coefficients = network.rows_of(place)
            entries.append((touched, np.full(len(touched), uses[place]), values))
            entries.append((rows + at, np.full(len(at), uses[place]), coefficients))
        objective = np.zeros(first_idle + len(idle))
        objective[:statics] = link.static_objective
        objective[uses] = [each[0] for each in link.use]
        counts = (link.entry_row < 0) & (column[link.entry_pair] >= 0)
        np.add.at(objective, column[link.entry_pair[counts]], amounts[counts])
        counts = (link.entry_row < 0) & (rank[link.entry_pair] >= 0)
        np.add.at(objective, first_idle + rank[link.entry_pair[counts]], link.entry_run[counts])
        limits = self.limits if extra is None else self.limits + extra
        program = LinearProgram(
            np.concatenate([link.lower, np.full(counted + 2 * places, -np.inf)]),
            np.concatenate([link.upper, limits, np.zeros(2 * places)]),
            np.concatenate([link.static_lower, np.zeros(places + len(pairs) + len(idle))]),
            np.concatenate([link.static_upper, np.full(places + len(pairs) + len(idle), np.inf)]),
            objective,
            np.concatenate([entry[0] for entry in entries]),
            np.concatenate([entry[1] for entry in entries]),
            np.concatenate([entry[2] for entry in entries]),
            row_scale=np.concatenate([self._row_scale, np.ones(counted + 2 * places)]),
            objective_scale=self._objective_scale,
        )
        return program.solve(time_limit_s)

    def improve(self, solution: MasterSolution, *, smoothing: float = _SMOOTHING) -> int:
        """Price every class, tighten the bound, and return how many columns were added that ``solution`` lacks."""
        duals = solution.duals
        if self._stable is not None and smoothing > 0:
            duals = smoothing * self._stable + (1 - smoothing) * duals
        duals = self._signed(duals)
        rent = np.zeros(len(self.space.classes))
        for capacity, dual in zip(self._network.capacities, solution.capacity_duals, strict=True):
            rent += max(0.0, float(dual)) * capacity.coefficients
        share, run, use = self.linking.values(duals)
        worth = np.zeros(len(self.space.classes))
        added = 0
        scale = max(1e-12, abs(solution.objective))
        for place in range(len(self.space.classes)):
            pairs = slice(int(self._network.starts[place]), int(self._network.starts[place + 1]))
            bound, found = self._price(place, share[pairs], run[pairs], float(use[place]), float(rent[place]))
            worth[place] = bound
            added += sum(self._reduced(each, solution, rent) > 1e-9 * scale and self.add(each) for each in found)
        # What is left after decisions bounds nothing but itself.
        if self._whole and (bound := self._lagrangian(duals, worth)) < self.bound:
            self.bound, self._stable = bound, duals
        return added

    def _reduced(self, column: Column, solution: MasterSolution, rent: Floats) -> float:
        """Return the reduced profit of ``column`` at the prices of ``solution``."""
        objective, rows, values = self.linking.column(
            column.place, np.array(column.pairs, dtype=np.int64), np.array(column.shares)
        )
        return objective - float(solution.duals[rows] @ values) - float(rent[column.place])

    def _price(self, place: int, share: Floats, run: Floats, use: float, rent: float) -> tuple[float, list[Column]]:
        """Return a bound on the worth of any loadout of a class, and loadouts of different services worth having."""
        of = self._network.priced[place]
        cap = self._cap[int(self._network.starts[place]) : int(self._network.starts[place + 1])]
        floor = max(0.0, rent - use)
        first = best_loadout(of, share, run, floor=floor, tolerance=_PRICE_TOLERANCE, cap=cap)
        if not len(first.chosen):
            return first.bound + use, []
        found = [self._column(place, first.chosen, first.share)]
        # Further loadouts need not be the best: of every service the densest options, and the best for their memory.
        amount = np.maximum(share, 0.0) * np.minimum(of.cap, cap) + run
        able = np.flatnonzero(amount > 0)
        dense = _first_of_each(able[np.argsort(-share[able], kind="stable")], of.service, 2)
        small = _first_of_each(able[np.argsort(-(amount / _occupied(of))[able], kind="stable")], of.service, 1)
        some = np.union1d(dense, small)
        fewer = of.only(some)
        barred = np.zeros(len(self.space.names), dtype=bool)
        barred[of.service[first.chosen]] = True
        while len(found) < _ROUNDS:
            best = best_loadout(
                fewer,
                share[some],
                run[some],
                barred=barred,
                floor=0.9 * floor,
                tolerance=0.01,
                node_limit=_QUICK_NODES,
                cap=cap[some],
            )
            if not len(best.chosen) or best.value <= 0.9 * floor:
                break
            found.append(self._column(place, some[best.chosen], best.share))
            barred[fewer.service[best.chosen]] = True
        return first.bound + use, found

    def _column(self, place: int, chosen: Integers, shares: Floats) -> Column:
        order = np.argsort(chosen)
        return Column(
            place=place,
            pairs=tuple((chosen[order] + int(self._network.starts[place])).tolist()),
            shares=tuple(shares[order].tolist()),
        )

    def _signed(self, duals: Floats) -> Floats:
        """Return ``duals`` with signs that weak duality asks for: none against a bound that is not there."""
        link = self.linking
        signed = np.where(np.isfinite(link.upper), duals, np.minimum(duals, 0.0))
        signed = np.where(np.isfinite(link.lower), signed, np.maximum(signed, 0.0))
        for _ in range(2):
            reduced = link.static_objective - np.bincount(
                link.static_of, link.static_value * signed[link.static_row], minlength=len(link.static_objective)
            )
            loose = np.flatnonzero((reduced > 0) & ~np.isfinite(link.static_upper))
            if not len(loose):
                break
            # A waste of -1 in its demand row: lowering that row's price removes the rounding.
            first = {
                int(column): int(row) for row, column in zip(link.static_row[::-1], link.static_of[::-1], strict=True)
            }
            for column in loose:
                signed[first[int(column)]] -= reduced[column]
        return signed

    def _lagrangian(self, duals: Floats, worth: Floats) -> float:
        """Return the Lagrangian bound at ``duals``: (9.5)."""
        link = self.linking
        limits = np.where(duals > 0, link.upper, link.lower)
        rows = float(np.sum(duals[duals != 0] * limits[duals != 0]))
        reduced = link.static_objective - np.bincount(
            link.static_of, link.static_value * duals[link.static_row], minlength=len(link.static_objective)
        )
        ends = np.where(reduced > 0, link.static_upper, link.static_lower)
        moved = np.flatnonzero(np.abs(reduced) > 1e-12)
        statics = float(np.sum(reduced[moved] * ends[moved]))
        positive = np.maximum(worth, 0.0).tolist()
        return rows + statics + sum(kind.count * kind.best(positive) for kind in self._network.kinds)


def _occupied(of: ClassOptions) -> Floats:
    """Return the mean memory of each option over its stages, shape (option,), above 0."""
    mean: Floats = np.maximum(of.memory.mean(axis=1), 1e-9)
    return mean


def _first_of_each(ranked: Integers, service: Integers, most: int) -> Integers:
    """Return ``ranked`` with at most the first ``most`` options of every service."""
    order = np.argsort(service[ranked], kind="stable")
    in_order = service[ranked][order]
    place = np.empty(len(ranked), dtype=np.int64)
    place[order] = np.arange(len(ranked)) - np.searchsorted(in_order, in_order)
    return ranked[place < most]


def converge(
    master: Master, clock: Callable[[], float], ends_at_s: float, *, gap: float, rounds: int = 10_000
) -> MasterSolution | None:
    """Generate columns until the bound is within ``gap``, nothing is added, or time or rounds are over.

    The first round prices at the prices foreseen; later ones lean on those with the best bound, less and less while
    that bound stays and nothing new comes of it.
    """
    solution = master.solve(ends_at_s - clock())
    smoothing = 1.0
    quiet = 0
    for _ in range(rounds):
        if solution is None or clock() >= ends_at_s or quiet > _QUIET_ROUNDS:
            break
        if master.bound - solution.objective <= gap * abs(solution.objective):
            break
        before = solution.objective
        added = master.improve(solution, smoothing=smoothing)
        if not added and smoothing == 0.0:
            break
        solution = master.solve(ends_at_s - clock()) or solution
        quiet = 0 if solution.objective - before > gap / 10 * abs(before) else quiet + 1
        gained = solution.objective - before > _STALLED * abs(before)
        smoothing = _SMOOTHING if added and gained else max(0.0, smoothing - _LESS_SMOOTHING)
    return solution
