"""Patterns of one GPU in Jellyfish's problem: a kind (variant, batch) with the whole clients that it serves.

docs/formulation.md, section 11. A linear program chooses fractions of patterns; its prices lead to further patterns,
each the exact optimum of a knapsack over the clients of one kind. The bound that results cuts no client in pieces
within a GPU, which the relaxation (11.1) to (11.4) does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numba
import numpy as np
from numpy.typing import NDArray

from planner.linear import Floats, Integers
from planner.program import LinearProgram

__all__ = ["Kinds", "Pattern", "PatternMaster", "best_patterns", "reachable_fps"]

_NODES = 20_000
"""Nodes of the search tree of one knapsack, after which its linear relaxation stands for its bound."""

_SMOOTHING = 0.7
"""Weight of the prices with the best bound so far in those that are priced with (Wentges 1997)."""

_PER_ROUND = 24
"""Patterns that one round adds at most: those of highest reduced profit."""

_ROUNDING = 1e-7
"""Relative rounding by which a bound is widened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kinds:
    """What a GPU may run, and for whom.

    Attributes:
        accuracy: Shape (kind,), in [0, 1].
        throughput: Shape (kind,): frames per second that the clients of a GPU may reach together.
        eligible: Shape (kind, client).
        fps: Shape (client,): frames per second.
    """

    accuracy: Floats
    throughput: Floats
    eligible: NDArray[np.bool_]
    fps: Floats

    @property
    def able(self) -> NDArray[np.bool_]:
        """Shape (kind, client): which kinds may serve which clients, were there no others."""
        return self.eligible & (self.fps[None, :] <= self.throughput[:, None])

    def value(self, kind: int, clients: Sequence[int]) -> float:
        """Return the accuracy summed over the frames per second of ``clients``."""
        return float(self.accuracy[kind] * self.fps[list(clients)].sum())


@dataclass(frozen=True, slots=True, order=True)
class Pattern:
    """A kind and the clients, rising, that one GPU serves with it."""

    kind: int
    clients: tuple[int, ...]


def best_patterns(kinds: Kinds, prices: Floats) -> tuple[NDArray[np.bool_], Floats, Floats]:
    """Return per kind the clients worth most at ``prices``, their worth, and a bound on the worth of any.

    Args:
        kinds: What may run.
        prices: Shape (client,): what serving a client costs, at least 0.

    Returns:
        Arrays of shape (kind, client), (kind,) and (kind,).
    """
    profit = kinds.accuracy[:, None] * kinds.fps[None, :] - prices[None, :]
    able = kinds.able & (profit > 1e-12)
    order = np.argsort(np.where(able, -profit / kinds.fps[None, :], np.inf), axis=1, kind="stable")
    chosen, value, bound = _priced(profit, order, able.sum(axis=1), kinds.fps, kinds.throughput, _NODES)
    return chosen, value, bound


def reachable_fps(kinds: Kinds) -> Floats:
    """Return per kind a bound on the frames per second that whole clients of one GPU reach, shape (kind,).

    With rates of 25 and 30 a throughput of 54 serves no more than 50, by however many GPUs it is multiplied.
    """
    ones = Kinds(
        accuracy=np.ones(len(kinds.accuracy)),
        throughput=kinds.throughput,
        eligible=kinds.eligible,
        fps=kinds.fps,
    )
    _, _, most = best_patterns(ones, np.zeros(len(kinds.fps)))
    return np.minimum(most * (1 + _ROUNDING), kinds.throughput)


@dataclass(slots=True)
class PatternMaster:
    """The linear program over patterns: (11.5) to (11.7).

    Attributes:
        kinds: What a GPU may run.
        gpus: How many there are.
        patterns: The patterns so far.
        bound: Proven bound on any mapping; infinite before the first round.
        prices: Shape (client,): the prices of that bound.
    """

    kinds: Kinds
    gpus: int
    patterns: list[Pattern] = field(default_factory=list)
    bound: float = np.inf
    prices: Floats = field(init=False)
    _known: set[Pattern] = field(default_factory=set)
    _program: LinearProgram = field(init=False)

    def __post_init__(self) -> None:
        """Start without patterns."""
        clients = len(self.kinds.fps)
        empty = np.zeros(0)
        self._program = LinearProgram(
            np.full(clients + 1, -np.inf),
            np.append(np.ones(clients), float(self.gpus)),
            empty,
            empty,
            empty,
            np.zeros(0, dtype=np.int64),
            np.zeros(0, dtype=np.int64),
            empty,
            row_scale=np.ones(clients + 1),
            objective_scale=float(self.kinds.fps.max()),
        )
        self.prices = np.zeros(clients)

    def add(self, pattern: Pattern) -> bool:
        """Add ``pattern``; False when it is there already."""
        if pattern in self._known or not pattern.clients:
            return False
        self._known.add(pattern)
        self.patterns.append(pattern)
        rows = [*pattern.clients, len(self.kinds.fps)]
        self._program.add_column(self.kinds.value(pattern.kind, pattern.clients), rows, [1.0] * len(rows))
        return True

    def converge(self, clock: Callable[[], float], ends_at_s: float, *, gap: float, value: float = 0.0) -> Floats:
        """Add patterns until the bound is within ``gap`` of the program or of ``value``, or time is over.

        Returns:
            The fraction of each pattern, shape (pattern,) of those in the last program.
        """
        fractions = np.zeros(0)
        smoothing = 0.0 if not self.prices.any() else _SMOOTHING
        while clock() < ends_at_s:
            found = self._program.solve(max(0.01, ends_at_s - clock()))
            if found is None:
                break
            fractions = found.values
            if self.bound <= (1 + gap) * max(found.objective, value):
                break
            duals = np.maximum(found.duals, 0.0)
            added = self._improve(duals, smoothing)
            if not added and smoothing == 0.0:
                break
            smoothing = _SMOOTHING if added else 0.0
        return fractions

    def _improve(self, duals: Floats, smoothing: float) -> int:
        """Price every kind, tighten the bound, and return how many patterns were added that gain at ``duals``."""
        prices = smoothing * self.prices + (1 - smoothing) * duals[:-1]
        chosen, _, worth = best_patterns(self.kinds, prices)
        bound = (float(prices.sum()) + self.gpus * max(0.0, float(worth.max()))) * (1 + _ROUNDING)
        if bound < self.bound:
            self.bound, self.prices = bound, prices
        rates = self.kinds.accuracy[:, None] * self.kinds.fps[None, :]
        reduced = np.sum((rates - duals[None, :-1]) * chosen, axis=1) - duals[-1]
        ranked = np.argsort(-reduced, kind="stable")[:_PER_ROUND]
        return sum(
            self.add(Pattern(int(kind), tuple(np.flatnonzero(chosen[kind]).tolist())))
            for kind in ranked
            if reduced[kind] > 1e-9 * max(self.bound, 1.0)
        )

    def rounded(self, fractions: Floats) -> list[Pattern]:
        """Return patterns of whole GPUs near ``fractions``, largest first, each without the clients of those before."""
        free = np.ones(len(self.kinds.fps), dtype=bool)
        chosen: list[Pattern] = []
        for index in np.argsort(-fractions, kind="stable")[: 4 * self.gpus]:
            pattern = self.patterns[index]
            clients = tuple(client for client in pattern.clients if free[client])
            if fractions[index] <= 1e-9 or len(chosen) == self.gpus:
                break
            # One that lost much to those before is worth less than another.
            if self.kinds.value(pattern.kind, clients) >= 0.5 * self.kinds.value(pattern.kind, pattern.clients):
                free[list(clients)] = False
                chosen.append(Pattern(pattern.kind, clients))
        return chosen

    def useful(self, value: float) -> Integers:
        """Return the kinds that a mapping of more than ``value`` may use, by the prices of the best bound.

        A mapping with a GPU of kind k reaches at most the bound less what k is worth less than the best kind: (11.8).
        """
        _, _, worth = best_patterns(self.kinds, self.prices)
        best = max(0.0, float(worth.max()))
        most = (float(self.prices.sum()) + (self.gpus - 1) * best + worth) * (1 + _ROUNDING)
        found: Integers = np.flatnonzero(most > value)
        return found


@numba.njit(cache=True)
def _priced(profit, order, able, fps, throughput, node_limit):  # type: ignore[no-untyped-def]
    """Solve the knapsack of every kind; return clients, worth and bound."""
    kinds, clients = profit.shape
    chosen = np.zeros((kinds, clients), dtype=np.bool_)
    value, bound = np.zeros(kinds), np.zeros(kinds)
    gain, size = np.zeros(clients), np.zeros(clients)
    for kind in range(kinds):
        count = able[kind]
        for position in range(count):
            gain[position] = profit[kind, order[kind, position]]
            size[position] = fps[order[kind, position]]
        inside, value[kind], bound[kind] = _knapsack(gain, size, count, throughput[kind], node_limit)
        for position in range(count):
            chosen[kind, order[kind, position]] = inside[position]
    return chosen, value, bound


@numba.njit(cache=True)
def _knapsack(profit, size, count, room, node_limit):  # type: ignore[no-untyped-def]
    """Fill ``room`` with the first ``count`` items, sorted by profit per size (Horowitz and Sahni 1974)."""
    inside, best_inside = np.zeros(count, dtype=np.bool_), np.zeros(count, dtype=np.bool_)
    value = best = 0.0
    left = room
    root = -1.0
    item = nodes = 0
    while True:
        bound = value + _relaxed(profit, size, item, count, left)
        if root < 0.0:
            root = bound
        nodes += 1
        if nodes > node_limit:
            return best_inside, best, root
        if bound > best * (1 + 1e-12) + 1e-12:
            while item < count and size[item] <= left:
                inside[item] = True
                left -= size[item]
                value += profit[item]
                item += 1
            item += 1
            if item < count:
                # One did not fit and is left out: look at the bound again.
                continue
            if value > best:
                best = value
                best_inside[:] = inside
        # Back to the last item inside; leave it out, with all after it.
        last = min(item, count) - 1
        while last >= 0 and not inside[last]:
            last -= 1
        if last < 0:
            return best_inside, best, best
        inside[last] = False
        left += size[last]
        value -= profit[last]
        item = last + 1


@numba.njit(cache=True)
def _relaxed(profit, size, item, count, room):  # type: ignore[no-untyped-def]
    """Return what items from ``item`` on are worth when the first that does not fit may be cut."""
    total = 0.0
    for other in range(item, count):
        if size[other] > room:
            return total + profit[other] * room / size[other]
        room -= size[other]
        total += profit[other]
    return total
