"""The rows that join groups, apart from what one group may run: the input of column generation.

`Formulation` without loadouts states them as for any other model; here they are taken apart into the coefficients of a
class's variables, which columns are priced with, and the variables that belong to no class, which the master keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.formulation import Formulation
from planner.linear import Floats, Integers, LinearModel
from planner.space import PlanningSpace

__all__ = ["Capacity", "Linking", "NodeKind", "capacity_of", "node_kinds"]

_DEMAND = "demand."
_GPUS = "gpus."


@dataclass(frozen=True, slots=True, kw_only=True)
class Linking:
    """``lower <= sum of columns + statics <= upper`` per row, in a model that maximises.

    Attributes:
        rows: Names, shape (row,).
        lower: Shape (row,).
        upper: Shape (row,).
        static_lower: Shape (static,): variables of no class.
        static_upper: Shape (static,).
        static_objective: Shape (static,).
        wastes: How many of the statics, the last ones, take what is supplied beyond a demand.
        static_row: Shape (entry,): non-zeros of the statics.
        static_of: Shape (entry,).
        static_value: Shape (entry,).
        use: Coefficients of y per class, as (objective, rows, values).
        entry_pair: Shape (entry,): non-zeros of x and a: the pair that they belong to, not falling.
        entry_row: Shape (entry,): the row, or -1 for the objective.
        entry_run: Shape (entry,): coefficient of x.
        entry_share: Shape (entry,): coefficient of a.
        first: Shape (pair + 1,): where the entries of each pair start.
        pair_class: Shape (pair,).
        pair_option: Shape (pair,).
    """

    rows: tuple[str, ...]
    lower: Floats
    upper: Floats
    static_lower: Floats
    static_upper: Floats
    static_objective: Floats
    wastes: int = 0
    static_row: Integers
    static_of: Integers
    static_value: Floats
    use: tuple[tuple[float, Integers, Floats], ...]
    entry_pair: Integers
    entry_row: Integers
    entry_run: Floats
    entry_share: Floats
    first: Integers
    pair_class: Integers
    pair_option: Integers

    @classmethod
    def of(cls, formulation: Formulation, model: LinearModel) -> Linking:
        """Take ``model``, made from a ``formulation`` without loadouts, apart.

        Rows that count GPUs of a type are left out, as `Capacity` states them more tightly; rows of one pair are too,
        as no loadout breaks them. What a service is given
        beyond its demand may be wasted, at the price of the best that it could count for, which changes no optimum
        and spares the master columns that hit every demand exactly.
        """
        sign = 1.0 if model.maximise else -1.0
        keep = np.array([not name.startswith(_GPUS) for name in model.rows], dtype=bool) & ~_of_one_pair(
            formulation, model
        )
        renumbered = np.cumsum(keep) - 1
        inside = keep[model.row_of] if len(model.rows) else np.zeros(0, dtype=bool)
        row = renumbered[model.row_of[inside]]
        column = model.column_of[inside]
        value = model.value_of[inside]
        rows = tuple(name for name, kept in zip(model.rows, keep, strict=True) if kept)
        objective = sign * model.objective

        kind = np.zeros(len(model.variables), dtype=np.int64)
        place = np.full(len(model.variables), -1, dtype=np.int64)
        for number, columns in ((1, formulation.use), (2, formulation.run), (3, formulation.share)):
            kind[columns] = number
            place[columns] = np.arange(len(columns))
        statics = np.flatnonzero(kind == 0)
        static_place = np.full(len(model.variables), -1, dtype=np.int64)
        static_place[statics] = np.arange(len(statics))

        rated = np.flatnonzero(objective[formulation.share])
        ran = np.flatnonzero(objective[formulation.run])
        in_pairs = (kind[column] == 2) | (kind[column] == 3)
        entry_pair = np.concatenate([place[column[in_pairs]], rated, ran])
        entry_row = np.concatenate([row[in_pairs], np.full(len(rated) + len(ran), -1, dtype=np.int64)])
        is_run = kind[column[in_pairs]] == 2
        entry_run = np.concatenate(
            [np.where(is_run, value[in_pairs], 0.0), np.zeros(len(rated)), objective[formulation.run[ran]]]
        )
        entry_share = np.concatenate(
            [np.where(is_run, 0.0, value[in_pairs]), objective[formulation.share[rated]], np.zeros(len(ran))]
        )
        order = np.lexsort((entry_row, entry_pair))
        pairs = len(formulation.pair_option)
        use = []
        of_use = kind[column] == 1
        for index, each in enumerate(formulation.use):
            mine = of_use & (place[column] == index)
            use.append((float(objective[each]), row[mine], value[mine]))
        static_entries = kind[column] == 0
        linking = cls(
            rows=rows,
            lower=model.row_lower[keep],
            upper=model.row_upper[keep],
            static_lower=model.lower[statics],
            static_upper=model.upper[statics],
            static_objective=objective[statics],
            static_row=row[static_entries],
            static_of=static_place[column[static_entries]],
            static_value=value[static_entries],
            use=tuple(use),
            entry_pair=entry_pair[order],
            entry_row=entry_row[order],
            entry_run=entry_run[order],
            entry_share=entry_share[order],
            first=np.searchsorted(entry_pair[order], np.arange(pairs + 1)),
            pair_class=formulation.pair_class,
            pair_option=formulation.pair_option,
        )
        return linking._with_waste(formulation.space)

    def _with_waste(self, space: PlanningSpace) -> Linking:
        """Add a static per demand row that takes what is supplied beyond the demand."""
        position = {f"{_DEMAND}{name}": service for service, name in enumerate(space.names)}
        demand = {index: name for index, name in enumerate(self.rows) if name in position}
        rate = space.sustained_rps[self.pair_option[self.entry_pair]] if len(self.entry_pair) else np.zeros(0)
        service = space.service_of[self.pair_option[self.entry_pair]] if len(self.entry_pair) else np.zeros(0)
        per_rps = np.divide(self.entry_share, rate, out=np.zeros_like(rate), where=rate > 0)
        worth = np.zeros(len(space.names))
        counted = self.entry_row == -1
        np.maximum.at(worth, service[counted].astype(np.int64), per_rps[counted])
        lost: dict[tuple[int, int], float] = {}
        at_least = np.isfinite(self.lower) & ~np.isfinite(self.upper)
        for index in np.flatnonzero((self.entry_row >= 0) & (self.entry_share > 0)):
            row = int(self.entry_row[index])
            if at_least[row]:
                key = (row, int(service[index]))
                lost[key] = max(lost.get(key, 0.0), float(per_rps[index]))
        first = len(self.static_lower)
        wastes = {position[name]: (first + order, row) for order, (row, name) in enumerate(sorted(demand.items()))}
        extra_row = [row for _, row in wastes.values()]
        extra_of = [column for column, _ in wastes.values()]
        extra_value = [-1.0] * len(wastes)
        for (row, owner), most in lost.items():
            if owner in wastes:
                extra_row.append(row)
                extra_of.append(wastes[owner][0])
                extra_value.append(-most)
        objective = np.zeros(len(wastes))
        for owner, (column, _) in wastes.items():
            objective[column - first] = -worth[owner]
        return Linking(
            **{name: getattr(self, name) for name in _UNCHANGED},
            static_lower=np.concatenate([self.static_lower, np.zeros(len(wastes))]),
            static_upper=np.concatenate([self.static_upper, np.full(len(wastes), np.inf)]),
            static_objective=np.concatenate([self.static_objective, objective]),
            wastes=len(wastes),
            static_row=np.concatenate([self.static_row, np.array(extra_row, dtype=np.int64)]),
            static_of=np.concatenate([self.static_of, np.array(extra_of, dtype=np.int64)]),
            static_value=np.concatenate([self.static_value, np.array(extra_value)]),
        )

    @property
    def lifted_rows(self) -> Integers:
        """Rows that ask for at least something: columns may be missing that satisfy them."""
        asks = np.isfinite(self.lower) & (self.lower != self.upper)
        found: Integers = np.flatnonzero(asks)
        return found

    @property
    def reach(self) -> Floats:
        """How far each static may go, shape (static,); 0 where nothing bounds it."""
        return np.where(np.isfinite(self.static_upper), self.static_upper, 0.0)

    def scaled(self, scale: Floats) -> Floats:
        """Return ``scale``, shape (row,), where it is above 0, and elsewhere the largest activity of a static, or 1."""
        filled = scale.copy()
        reach = np.where(self.reach > 0, self.reach, 1.0)
        empty = scale <= 0
        np.maximum.at(
            filled, self.static_row, np.abs(self.static_value) * reach[self.static_of] * empty[self.static_row]
        )
        filled[filled <= 0] = 1.0
        return filled

    def values(self, duals: Floats) -> tuple[Floats, Floats, Floats]:
        """Return what a share and a running option, shape (pair,), and a group in use, shape (class,), are worth.

        Args:
            duals: Shape (row,): the price of each row, positive where more activity costs.
        """
        price = np.where(self.entry_row >= 0, -duals[self.entry_row] if len(duals) else 0.0, 1.0)
        pairs = len(self.pair_option)
        share: Floats = np.bincount(self.entry_pair, self.entry_share * price, minlength=pairs).astype(np.float64)
        run: Floats = np.bincount(self.entry_pair, self.entry_run * price, minlength=pairs).astype(np.float64)
        use = np.array([objective - float(duals[rows] @ values) for objective, rows, values in self.use])
        return share, run, use

    def column(self, place: int, pairs: Integers, shares: Floats) -> tuple[float, Integers, Floats]:
        """Return the objective, rows and coefficients of a group of class ``place`` that runs ``pairs``."""
        objective, use_rows, use_values = self.use[place]
        at = np.concatenate([np.arange(self.first[pair], self.first[pair + 1]) for pair in pairs] or [np.zeros(0, int)])
        share = np.repeat(shares, self.first[pairs + 1] - self.first[pairs])
        amounts = self.entry_run[at] + self.entry_share[at] * share
        rows = self.entry_row[at]
        objective += float(amounts[rows < 0].sum())
        inside = rows >= 0
        touched, where = np.unique(np.concatenate([rows[inside], use_rows]), return_inverse=True)
        every: Floats = np.concatenate([amounts[inside], use_values])
        summed: Floats = np.bincount(where, every, minlength=len(touched)).astype(np.float64)
        return objective, touched, summed


def _of_one_pair(formulation: Formulation, model: LinearModel) -> NDArray[np.bool_]:
    """Return which rows name one pair alone: least shares (4.12), which every priced loadout keeps."""
    pair = np.full(len(model.variables), -1, dtype=np.int64)
    for columns in (formulation.run, formulation.share):
        pair[columns] = np.arange(len(columns))
    lowest = np.full(len(model.rows), np.iinfo(np.int64).max)
    highest = np.full(len(model.rows), -2, dtype=np.int64)
    np.minimum.at(lowest, model.row_of, pair[model.column_of])
    np.maximum.at(highest, model.row_of, pair[model.column_of])
    least = model.row_lower == 0.0
    alone: NDArray[np.bool_] = (lowest == highest) & (lowest >= 0) & least & ~np.isfinite(model.row_upper)
    return alone


_UNCHANGED = (
    "rows", "lower", "upper", "use", "entry_pair", "entry_row", "entry_run", "entry_share", "first", "pair_class",
    "pair_option",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeKind:
    """Nodes that are cut alike: their number, their GPUs, and their tiles as (class, first GPU, size), by end.

    ``scattered`` are tiles (class, GPUs) of the running plan that are not consecutive.
    """

    count: int
    gpus: int
    tiles: tuple[tuple[int, int, int], ...]
    scattered: tuple[tuple[int, tuple[int, ...]], ...]

    def best(self, worth: Sequence[float]) -> float:
        """Return the most that one such node is worth when a tile of class c is worth ``worth[c]``.

        Exact for consecutive tiles (weighted interval scheduling), an upper bound when some are scattered.
        """
        if self.scattered:
            price = [0.0] * self.gpus
            for place, first, size in self.tiles:
                for gpu in range(first, first + size):
                    price[gpu] = max(price[gpu], worth[place] / size)
            for place, gpus in self.scattered:
                for gpu in gpus:
                    price[gpu] = max(price[gpu], worth[place] / len(gpus))
            return sum(price)
        best = [0.0] * (self.gpus + 1)
        at = 0
        for end in range(1, self.gpus + 1):
            best[end] = best[end - 1]
            while at < len(self.tiles) and self.tiles[at][1] + self.tiles[at][2] == end:
                place, first, _ = self.tiles[at]
                best[end] = max(best[end], best[first] + worth[place])
                at += 1
        return best[-1]


def node_kinds(space: PlanningSpace) -> tuple[NodeKind, ...]:
    """Return the kinds of nodes of ``space``, in the order of their first nodes."""
    class_of = np.zeros(len(space.groups), dtype=np.int64)
    for place, each in enumerate(space.classes):
        class_of[np.array(each.members)] = place
    tiles: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
    for position, group in enumerate(space.groups):
        tiles.setdefault(group.node, []).append((int(class_of[position]), group.gpus))
    size = {node.name: node.gpus.count for node in space.problem.cluster.nodes}
    counts: dict[tuple[int, tuple[tuple[int, tuple[int, ...]], ...]], int] = {}
    for name, found in tiles.items():
        key = (size[name], tuple(sorted(found, key=lambda tile: (max(tile[1]), tile))))
        counts[key] = counts.get(key, 0) + 1
    return tuple(
        NodeKind(
            count=count,
            gpus=gpus,
            tiles=tuple((place, each[0], len(each)) for place, each in cut if each[-1] - each[0] == len(each) - 1),
            scattered=tuple((place, each) for place, each in cut if each[-1] - each[0] != len(each) - 1),
        )
        for (gpus, cut), count in counts.items()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """``sum over classes of coefficients[c] y[c] <= limit``: (9.2)."""

    coefficients: Floats
    limit: float


def capacity_of(space: PlanningSpace, kinds: Sequence[NodeKind]) -> tuple[Capacity, ...]:
    """Return what the GPUs of ``kinds`` allow together: no more aligned tiles of any size than there are.

    A tile counts for the aligned tiles of k GPUs that lie inside it. One row for each k and each set of node kinds that
    is all that some class stands on; and one for the members of each class.
    """
    spans: dict[int, set[int]] = {}
    inside: dict[tuple[int, int], int] = {}
    sizes = sorted({each.gpus for each in space.classes})
    for number, kind in enumerate(kinds):
        cut = [(place, tuple(range(first, first + size))) for place, first, size in kind.tiles]
        for place, gpus in (*cut, *kind.scattered):
            spans.setdefault(place, set()).add(number)
            for size in sizes:
                whole = sum(
                    set(range(first, first + size)) <= set(gpus) for first in range(0, kind.gpus - size + 1, size)
                )
                inside[place, size] = min(inside.get((place, size), whole), whole)
    rows: dict[tuple[bytes, float], Capacity] = {}
    for span in sorted({tuple(sorted(each)) for each in spans.values()}):
        members = [place for place, each in spans.items() if each <= set(span)]
        for size in sizes:
            coefficients = np.zeros(len(space.classes))
            for place in members:
                coefficients[place] = inside[place, size]
            limit = float(sum(kinds[number].count * (kinds[number].gpus // size) for number in span))
            if coefficients.any():
                rows.setdefault((coefficients.tobytes(), limit), Capacity(coefficients=coefficients, limit=limit))
    for place, each in enumerate(space.classes):
        coefficients = np.zeros(len(space.classes))
        coefficients[place] = 1.0
        rows.setdefault(
            (coefficients.tobytes(), float(each.count)), Capacity(coefficients=coefficients, limit=float(each.count))
        )
    return tuple(rows.values())
