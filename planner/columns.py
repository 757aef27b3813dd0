"""Column generation over loadouts: the search for problems whose groups are too many for one model.

docs/formulation.md, section 9. The loop over the objectives is that of the direct search (`planner.lexicographic`);
what differs is how one objective is solved: prices and a bound from a relaxation, loadouts by pricing, whole counts by
diving, rates by a linear program, groups by mapping, and a local search that frees a few groups at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np

from planner.backend import Budget
from planner.board import Board
from planner.formulation import Formulation
from planner.greedy import add_minimum, fill
from planner.lexicographic import LARGEST_EXACT_MODEL, LEAST_RELAXATION_S, Search
from planner.linear import Floats
from planner.linking import Linking
from planner.mapping import map_loadouts
from planner.master import Column, Master, MasterSolution, Network, converge
from planner.neighbourhood import cells
from planner.objective import Kept, Objective, with_kept
from planner.rates import Loadout, best_shares
from planner.regroup import decided_anew, left_to
from planner.rounding import dive
from planner.space import Placed, Placement, PlanningSpace
from planner.tier import Tier

__all__ = ["ColumnSearch"]

_FORESEEING = 0.35
"""Share of an objective's time that first prices may take."""

_LEAST_FORESEEING = 0.02
"""Share of the whole time limit that they may take in any case, so that no objective is left without a bound."""

_CONVERGING = 0.5
"""Share of an objective's time by whose end column generation stops."""

_DIVING = 0.75
"""Share by whose end the dive stops."""

_FREED_PAIRS = 120
"""Pairs of group and option that one step of the local search decides about."""

_OPTIONS_PER_GROUP = 20
"""Options that are considered anew for a freed group: those worth most per share at the prices."""

_NODES_PER_STEP = 50
"""Nodes of the search tree of one step."""

_STALLED_STEPS = 60
"""Steps of the local search without a gain after which an objective is left as it is."""


class ColumnSearch(Search):
    """The lexicographic search by column generation."""

    def __init__(
        self,
        space: PlanningSpace,
        clock: Callable[[], float],
        ends_at_s: float,
        *,
        known: Placement | None = None,
        finish: bool = True,
    ) -> None:
        """Prepare; with ``finish`` a gap that is left on a small problem goes on to the exact model."""
        super().__init__(space, clock, ends_at_s, known=known)
        self._finish = finish
        self._joined = Formulation(space, space.classes, loadouts=False)
        self._network: Network | None = None
        self._pair_of: dict[tuple[int, int], int] = {
            pair: index
            for index, pair in enumerate(
                zip(self._joined.pair_class.tolist(), self._joined.pair_option.tolist(), strict=True)
            )
        }
        self._class_of = np.zeros(len(space.groups), dtype=np.int64)
        for place, each in enumerate(space.classes):
            self._class_of[np.array(each.members)] = place
        self._cells: tuple[tuple[int, ...], ...] | None = None
        self._columns: dict[tuple[int, tuple[int, ...], tuple[float, ...]], Column] = {}

    def best_rates(
        self, pairs: list[tuple[int, int]], objective: Objective, kept: tuple[Kept, ...]
    ) -> Placement | None:
        """Return ``pairs`` with the rates best for ``objective``; groups of one loadout get the same."""
        if not self._alike():
            return super().best_rates(pairs, objective, kept)
        of_group: dict[int, list[int]] = {}
        for group, option in pairs:
            of_group.setdefault(group, []).append(self._pair_of[int(self._class_of[group]), option])
        loadouts = {group: (int(self._class_of[group]), tuple(sorted(mine))) for group, mine in of_group.items()}
        linking = self._linking(objective, kept)
        found = best_shares(self._space, linking, Counter(loadouts.values()), self._left_s())
        if found is None:
            return None
        shares, _ = found
        return tuple(
            sorted(
                Placed(group, int(linking.pair_option[pair]), float(share))
                for group, loadout in loadouts.items()
                for pair, share in zip(loadout[1], shares[loadout], strict=True)
            )
        )

    def _alike(self) -> bool:
        """Whether every row holds for classes exactly as for their groups, so that rates can be found over classes."""
        requirements = self._space.requirements
        return not (requirements.calls or requirements.blocks or len(self._joined.fair.integers))

    def _linking(self, objective: Objective, kept: tuple[Kept, ...]) -> Linking:
        return Linking.of(self._joined, with_kept(self._joined, objective, kept))

    def _left_s(self) -> float:
        return max(1.0, self._ends_at_s - self._clock())

    def _solve_tier(self, tier: Tier) -> bool:
        """Improve ``tier`` by columns, and by the exact model where that is small; True when proven infeasible."""
        self._generate(tier)
        small = self._space.pair_count <= LARGEST_EXACT_MODEL
        if self._finish and small and not self._closed(tier):
            return super()._solve_tier(tier)
        return False

    def _generate(self, tier: Tier) -> None:
        """Improve ``tier`` by column generation."""
        if tier.best is not None:
            self._offer(tier, self.best_rates([(p.group, p.option) for p in tier.best], tier.objective, tier.kept))
        if self._closed(tier):
            return
        started_s = self._clock()
        linking = self._linking(tier.objective, tier.kept)
        if not self._prices_anything(linking):
            tier.open = not self._closed(tier)
            return
        if self._network is None:
            self._network = Network.of(self._space, linking)
        cap = self._space.share_cap[linking.pair_option] if len(linking.pair_option) else np.zeros(0)
        master = Master(self._space, linking, self._network, cap)
        for column in (*self._columns_of(tier.best), *self._columns.values()):
            master.add(column)

        def until(share: float) -> float:
            return started_s + share * max(0.0, tier.ends_at_s - started_s)

        sign = 1.0 if tier.objective.maximise else -1.0
        least_s = max(LEAST_RELAXATION_S, _LEAST_FORESEEING * self._settings.time_limit_s)
        master.foresee(max(least_s, until(_FORESEEING) - self._clock()))
        tier.tighten(sign * master.bound)
        solution = converge(master, self._clock, until(_CONVERGING), gap=self._settings.gap / 4)
        tier.tighten(sign * master.bound)
        if solution is not None:
            self._columns.update(
                (column.key, column)
                for column, count in zip(master.columns, solution.counts, strict=False)  # newer ones have no count
                if count > 1e-9
            )
            counts = dive(master, solution, self._clock, until(_DIVING))
            self._offer(tier, self._placement(tier, linking, counts))
            self._regroup(tier, linking, solution)
        tier.open = not self._closed(tier)

    def _prices_anything(self, linking: Linking) -> bool:
        """Whether the objective tells classes apart at all: bytes moved do not, the mapping sees to these."""
        return bool(
            linking.static_objective.any()
            or (linking.entry_row < 0).any()
            or any(objective for objective, _, _ in linking.use)
        )

    def _columns_of(self, placement: Placement | None) -> list[Column]:
        """Return the loadouts of ``placement`` with their shares."""
        groups: dict[int, list[tuple[int, float]]] = {}
        for placed in placement or ():
            place = int(self._class_of[placed.group])
            groups.setdefault(placed.group, []).append((self._pair_of[place, placed.option], placed.share))
        found = []
        for group, members in groups.items():
            members.sort()
            found.append(
                Column(
                    place=int(self._class_of[group]),
                    pairs=tuple(pair for pair, _ in members),
                    shares=tuple(share for _, share in members),
                )
            )
        return list({column.key: column for column in found}.values())

    def _placement(self, tier: Tier, linking: Linking, counts: Mapping[Column, int]) -> Placement | None:
        """Return the groups, with the best rates, that stand for whole ``counts`` of columns."""
        loadouts: Counter[Loadout] = Counter()
        shares: dict[Loadout, Floats] = {}
        for column, count in counts.items():
            loadout = (column.place, column.pairs)
            given = shares.get(loadout, 0.0) * loadouts[loadout] + np.array(column.shares) * count
            loadouts[loadout] += count
            shares[loadout] = given / loadouts[loadout]
        mapped = map_loadouts(self._space, linking.pair_option, loadouts, shares)
        board = Board(self._space)
        for placed in mapped:
            share = min(placed.share, max(board.compute_left[placed.group], 0.0), board.wanted_share(placed.option))
            board.place(placed.group, placed.option, share)
        add_minimum(board)
        decided = board.running()
        if self._clock() < tier.ends_at_s:
            fill(board)
        filled = self.best_rates(board.running(), tier.objective, tier.kept)
        # What is filled in knows nothing of the rows that join groups and may break them.
        return filled or self.best_rates(decided, tier.objective, tier.kept)

    def _regroup(self, tier: Tier, linking: Linking, solution: MasterSolution) -> None:
        """Free a few groups at a time, those that earn least for what their GPUs cost first, and decide them anew."""
        if tier.best is None or not self._separable():
            return
        worth, _, _ = linking.values(solution.duals)
        generator = np.random.default_rng(self._settings.seed)
        stalled = 0
        while stalled < _STALLED_STEPS and self._clock() < tier.ends_at_s and not self._closed(tier):
            best = tier.best
            freed = self._freed(tier.best, linking, solution, generator)
            rest = left_to(self._space, (placed for placed in tier.best if placed.group not in set(freed)))
            found = decided_anew(
                self._space,
                tier.best,
                tier.objective,
                tier.kept,
                freed,
                {group: self._promising_options(group, worth, rest) for group in freed},
                self._local_solver,
                Budget(
                    time_limit_s=max(0.05, tier.ends_at_s - self._clock()),
                    gap=1e-3,
                    seed=self._settings.seed,
                    node_limit=_NODES_PER_STEP,
                ),
            )
            self._offer(tier, found)
            stalled = stalled + 1 if tier.best is best else 0
            if len(freed) == len(self._space.groups) and stalled:
                break

    def _separable(self) -> bool:
        """Whether some groups can be decided anew given what the rest serves: no row names more than that."""
        requirements = self._space.requirements
        joined = requirements.spreads or requirements.couplings or requirements.least_rps.any()
        return self._alike() and not joined and not self._space.requirements.keeps_idle_replicas

    def _freed(
        self, placement: Placement, linking: Linking, solution: MasterSolution, generator: np.random.Generator
    ) -> list[int]:
        """Return the groups of some cells: the first drawn by what they earn too little, the others at random."""
        if self._cells is None:
            self._cells = cells(self._space)
        short = self._shortfall(placement, linking, solution)
        chance = short + 0.05 * short.mean() + 1e-12
        order = generator.choice(
            len(self._cells), size=min(12, len(self._cells)), replace=False, p=chance / chance.sum()
        )
        freed: list[int] = []
        for index in order:
            cell = self._cells[index]
            if freed and (len(freed) + len(cell)) * _OPTIONS_PER_GROUP > _FREED_PAIRS * 2:
                break
            freed.extend(cell)
        return freed

    def _shortfall(self, placement: Placement, linking: Linking, solution: MasterSolution) -> Floats:
        """Return, per cell, by how much its groups earn less than their GPUs cost at the prices of ``solution``."""
        assert self._network is not None
        assert self._cells is not None
        share, run, use = linking.values(solution.duals)
        rent = np.zeros(len(self._space.classes))
        for capacity, dual in zip(self._network.capacities, solution.capacity_duals, strict=True):
            rent += max(0.0, float(dual)) * capacity.coefficients
        cell_of = np.zeros(len(self._space.groups), dtype=np.int64)
        for index, cell in enumerate(self._cells):
            cell_of[list(cell)] = index
        gpus = np.zeros(len(self._cells))
        earned = np.zeros(len(self._cells))
        for index, cell in enumerate(self._cells):
            places = self._class_of[list(cell)]
            gpus[index] = max(
                float(rent[place])
                * len({gpu for g in cell for gpu in self._space.groups[g].gpus})
                / self._space.classes[place].gpus
                for place in places
            )
        used = set()
        for placed in placement:
            place = int(self._class_of[placed.group])
            pair = self._pair_of[place, placed.option]
            earned[cell_of[placed.group]] += share[pair] * placed.share + run[pair]
            if placed.group not in used:
                used.add(placed.group)
                earned[cell_of[placed.group]] += use[place]
        return np.maximum(gpus - earned, 0.0)

    def _promising_options(self, group: int, worth: Floats, rest: PlanningSpace) -> list[int]:
        """Return the options of a group that are worth most per share, one per service with demand left."""
        assert self._network is not None
        place = int(self._class_of[group])
        start = int(self._network.starts[place])
        of = self._network.priced[place]
        value = worth[start : start + len(of.options)]
        able = np.flatnonzero((rest.share_cap[of.options] > 1e-6) & (value > 0))
        ranked = able[np.argsort(-value[able], kind="stable")]
        chosen: list[int] = []
        seen: Counter[int] = Counter()
        for index in ranked:
            service = int(of.service[index])
            if seen[service] < 2:
                seen[service] += 1
                chosen.append(int(of.options[index]))
            if len(chosen) == _OPTIONS_PER_GROUP:
                break
        return chosen
