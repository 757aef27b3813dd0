"""The loadout of one group that is worth most at given prices: exact, compiled, and with a proven bound.

A loadout is a set of options of different services that fit a group's memory on every stage and do not block each
other; the group's compute goes to them by value per share, each up to its cap, so at most one is filled in part. Value
is linear: so much per share of compute, and a fixed amount (negative: a price) for running at all. That is a knapsack
with two resources and a choice per service: (9.3) of docs/formulation.md. It is solved by depth-first branch and
bound over the options in order of value per share, in which filling compute greedily is optimal. The bound of a node is
the least over a fixed set of multipliers (mu, lambda) of

    value so far + mu (memory left) + lambda (compute left) + sum over services of their best gain at (mu, lambda),

(9.4), which is Lagrangian duality and holds for any multipliers of at least 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from planner.linear import Floats, Integers

__all__ = ["ClassOptions", "Priced", "best_loadout", "compile_pricing"]

_DEEPEST = 512
"""Most options of one loadout that are considered."""

_Gains = tuple[Floats, Floats, Floats]
"""Value per share, value of running, cap."""

_Limits = tuple[Floats, Floats, Floats, Integers, int]
"""Memory, charged hold, slack, service, number of services."""

_RATIOS = (0.0, 0.4, 0.8, 1.0, 1.25, 2.0, 5.0)
"""Multipliers of the bound, relative to those that are best at the root."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassOptions:
    """What may run on a group of one class, as arrays over its options.

    Attributes:
        options: Shape (option,): positions in the catalogue.
        service: Shape (option,).
        memory: Shape (option, stage): share of each stage GPU's usable memory.
        cap: Shape (option,): compute share that serves the whole demand, at most 1.
        hold_s: Shape (option,): charged hold, that is f h of (3.3).
        slack_s: Shape (option,).
        least: Shape (option,): compute share that it must have where it runs. The search does not count with it, so
            value and bound are those of a relaxation; the shares are then lifted to it.
    """

    options: Integers
    service: Integers
    memory: Floats
    cap: Floats
    hold_s: Floats
    slack_s: Floats
    least: Floats

    def only(self, chosen: Integers) -> ClassOptions:
        """Return the options at the positions ``chosen``."""
        return ClassOptions(
            options=self.options[chosen],
            service=self.service[chosen],
            memory=self.memory[chosen],
            cap=self.cap[chosen],
            hold_s=self.hold_s[chosen],
            slack_s=self.slack_s[chosen],
            least=self.least[chosen],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """The best loadout found: positions in the class's options, compute shares, value, and a bound on any value."""

    chosen: Integers
    share: Floats
    value: float
    bound: float


def best_loadout(
    of: ClassOptions,
    value: Floats,
    fixed: Floats,
    *,
    barred: NDArray[np.bool_] | None = None,
    floor: float = 0.0,
    tolerance: float = 0.0,
    node_limit: int = 20_000,
    cap: Floats | None = None,
) -> Priced:
    """Return a loadout of the highest value, and a bound that no loadout exceeds.

    Args:
        of: The options.
        value: Shape (option,): value of a whole share of compute.
        fixed: Shape (option,): value of running at all.
        barred: Shape (service,): services to leave out.
        floor: Value below which loadouts are of no interest; the bound is at least this.
        tolerance: Relative distance between value and bound at which the search may stop.
        node_limit: Nodes of the search tree after which the best found is returned; the bound holds all the same.
        cap: Shape (option,): caps in place of the class's own.
    """
    caps = of.cap if cap is None else np.minimum(of.cap, cap)
    best_case = np.maximum(value, 0.0) * caps + fixed
    worth = best_case > 1e-12
    if barred is not None:
        worth &= ~barred[of.service]
    items = np.flatnonzero(worth)
    if not len(items):
        return Priced(chosen=items, share=np.zeros(0), value=0.0, bound=max(floor, 0.0))
    order = items[np.lexsort((items, -np.maximum(value[items], 0.0)))]
    _, number = np.unique(of.service[order], return_inverse=True)
    service, services = number.astype(np.int64), int(number.max()) + 1
    memory = np.ascontiguousarray(of.memory[order])
    mean_memory = np.ascontiguousarray(memory.mean(axis=1))
    gains: _Gains = (np.maximum(value[order], 0.0), fixed[order], np.where(value[order] > 0, caps[order], 0.0))
    limits: _Limits = (memory, of.hold_s[order], of.slack_s[order], service, services)
    mu, price = _multipliers(gains, mean_memory, service, services)
    mus, prices = _around(mu, price)
    sums = _suffixes(gains, mean_memory, service, services, mus, prices)
    start, best = _first_loadout(gains, limits, mean_memory, mus, prices)
    inside, found, bound = _search(
        gains, limits, mus, prices, sums, start, best, float(floor), float(tolerance), int(node_limit)
    )
    chosen = np.flatnonzero(inside)
    amounts = gains[2][chosen]
    share = np.minimum(amounts, np.maximum(1.0 - (np.cumsum(amounts) - amounts), 0.0))
    return Priced(
        chosen=order[chosen],
        share=_lifted(share, of.least[order[chosen]]),
        value=float(found),
        bound=max(float(bound), float(found), floor),
    )


def compile_pricing() -> None:
    """Load the compiled code, or compile it where an installation has not done so yet, which takes some seconds."""
    of = ClassOptions(
        options=np.arange(2),
        service=np.arange(2),
        memory=np.full((2, 1), 0.6),
        cap=np.ones(2),
        hold_s=np.zeros(2),
        slack_s=np.ones(2),
        least=np.zeros(2),
    )
    best_loadout(of, np.array([1.0, 2.0]), np.zeros(2))


def _lifted(share: Floats, least: Floats) -> Floats:
    """Return ``share`` with at least ``least`` each; what that takes beyond the whole comes off the last that can."""
    lifted = np.maximum(share, least)
    over = float(lifted.sum()) - 1.0
    for index in range(len(lifted) - 1, -1, -1):
        if over <= 0:
            break
        cut = min(over, float(lifted[index] - least[index]))
        lifted[index] -= cut
        over -= cut
    return lifted


def _around(mu: float, price: float) -> tuple[Floats, Floats]:
    """Return the pairs of multipliers that nodes are bounded with: the best at the root first."""
    least = 1e-3 * (mu + price)
    grid = [(max(mu, least) * i, max(price, least) * j) for i in _RATIOS for j in _RATIOS]
    grid[0] = (mu, price)
    pairs = np.array(grid)
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])


def _first_loadout(
    gains: _Gains,
    limits: _Limits,
    mean_memory: Floats,
    mus: Floats,
    prices: Floats,
) -> tuple[NDArray[np.bool_], float]:
    """Return the best of a few greedy loadouts: by gain at several multipliers, and by value per share."""
    value, fixed, cap = gains
    count = len(_RATIOS)
    orders = [np.arange(len(value))]
    for k in (0, 3 * count + 3, count + 3, 5 * count + 3, 2 * count + 5):
        gain = np.maximum(value - prices[k], 0.0) * cap + fixed - mus[k] * mean_memory
        orders.append(np.argsort(-gain, kind="stable"))
    loadouts = [_greedy(order, gains, limits) for order in orders]
    inside, total = max(loadouts, key=lambda loadout: float(loadout[1]))
    return inside, float(total)


@numba.njit(cache=True)
def _lagrangian(value, fixed, cap, mean_memory, service, services, mu, price):  # type: ignore[no-untyped-def]
    """Return mu + price + the sum over services of the best gain of one option, at least 0."""
    best = np.zeros(services)
    for item in range(len(value)):
        gain = max(value[item] - price, 0.0) * cap[item] + fixed[item] - mu * mean_memory[item]
        if gain > best[service[item]]:
            best[service[item]] = gain
    return mu + price + best.sum()


@numba.njit(cache=True)
def _best_price(value, fixed, cap, mean_memory, service, services, mu, most):  # type: ignore[no-untyped-def]
    """Return the compute price that minimises the Lagrangian at ``mu``: ternary search on a convex function."""
    low, high = 0.0, most
    for _ in range(16):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if _lagrangian(value, fixed, cap, mean_memory, service, services, mu, left) <= _lagrangian(
            value, fixed, cap, mean_memory, service, services, mu, right
        ):
            high = right
        else:
            low = left
    return (low + high) / 2


@numba.njit(cache=True)
def _multipliers(gains, mean_memory, service, services):  # type: ignore[no-untyped-def]
    """Return the (mu, price) that about minimise the Lagrangian at the root."""
    value, fixed, cap = gains
    most = value.max()
    total = (value * cap + fixed).max() * 4.0 + most
    low, high = 0.0, total
    for _ in range(12):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        at_left = _lagrangian(
            value,
            fixed,
            cap,
            mean_memory,
            service,
            services,
            left,
            _best_price(value, fixed, cap, mean_memory, service, services, left, most),
        )
        at_right = _lagrangian(
            value,
            fixed,
            cap,
            mean_memory,
            service,
            services,
            right,
            _best_price(value, fixed, cap, mean_memory, service, services, right, most),
        )
        if at_left <= at_right:
            high = right
        else:
            low = left
    mu = (low + high) / 2
    return mu, _best_price(value, fixed, cap, mean_memory, service, services, mu, most)


@numba.njit(cache=True)
def _suffixes(gains, mean_memory, service, services, mus, prices):  # type: ignore[no-untyped-def]
    """Return, per pair of multipliers and position, the best gains of the services among the options from there on."""
    value, fixed, cap = gains
    count = len(value)
    sums = np.zeros((count + 1, len(mus)))
    best = np.zeros((services, len(mus)))
    for item in range(count - 1, -1, -1):
        mine = service[item]
        for k in range(len(mus)):
            gain = max(value[item] - prices[k], 0.0) * cap[item] + fixed[item] - mus[k] * mean_memory[item]
            sums[item, k] = sums[item + 1, k]
            if gain > best[mine, k]:
                sums[item, k] += gain - best[mine, k]
                best[mine, k] = gain
    return sums


@numba.njit(cache=True)
def _fits(item, memory, used, service, taken, hold_s, slack_s, longest_s, least_slack_s):  # type: ignore[no-untyped-def]
    """Whether an option can join a loadout: its service is not there yet, memory suffices, nobody blocks anybody."""
    if taken[service[item]] or hold_s[item] > least_slack_s or longest_s > slack_s[item]:
        return False
    for stage in range(memory.shape[1]):  # noqa: SIM110 - compiled code knows no generators
        if used[stage] + memory[item, stage] > 1.0 + 1e-9:
            return False
    return True


@numba.njit(cache=True)
def _greedy(order, gains, limits):  # type: ignore[no-untyped-def]
    """Take options in ``order`` as far as they fit; return which, with compute then given by value per share."""
    value, fixed, cap = gains
    memory, hold_s, slack_s, service, services = limits
    taken = np.zeros(services, dtype=np.bool_)
    used = np.zeros(memory.shape[1])
    inside = np.zeros(len(value), dtype=np.bool_)
    longest_s, least_slack_s = 0.0, np.inf
    wanted = 0.0
    for item in order:
        if wanted >= 1.0 and fixed[item] <= 0:
            continue
        if _fits(item, memory, used, service, taken, hold_s, slack_s, longest_s, least_slack_s):
            inside[item] = True
            taken[service[item]] = True
            used += memory[item]
            longest_s = max(longest_s, hold_s[item])
            least_slack_s = min(least_slack_s, slack_s[item])
            wanted += cap[item]
    left, total = 1.0, 0.0
    for item in range(len(value)):
        if inside[item]:
            given = min(left, cap[item])
            if value[item] * given + fixed[item] <= 0.0:
                inside[item] = False
            else:
                left -= given
                total += value[item] * given + fixed[item]
    return inside, total


@numba.njit(cache=True)
def _search(  # type: ignore[no-untyped-def]
    gains, limits, mus, prices, sums, start, best, floor, tolerance, node_limit
):
    """Branch and bound from the loadout ``start`` of value ``best``; return what is inside, its value and the bound."""
    value, fixed, cap = gains
    memory, hold_s, slack_s, service, services = limits
    count, stages = memory.shape
    best_value = best
    best_inside = start.copy()
    taken = np.zeros(services, dtype=np.bool_)
    used = np.zeros((_DEEPEST + 1, stages))
    left = np.ones(_DEEPEST + 1)
    total_at = np.zeros(_DEEPEST + 1)
    longest = np.zeros(_DEEPEST + 1)
    least_slack = np.full(_DEEPEST + 1, np.inf)
    position = np.zeros(_DEEPEST + 1, dtype=np.int64)
    chosen = np.zeros(_DEEPEST, dtype=np.int64)
    depth, nodes, pruned = 0, 0, 0.0
    stopped = False
    while depth >= 0:
        item = position[depth]
        room = 1.0
        for stage in range(stages):
            room -= used[depth, stage] / stages
        ub = np.inf
        for k in range(len(mus)):
            ub = min(ub, mus[k] * room + prices[k] * left[depth] + sums[item, k])
        ub += total_at[depth]
        nodes += 1
        if nodes > node_limit:
            stopped = True
        target = max(best_value, floor)
        if stopped or item >= count or depth >= _DEEPEST or ub <= target + tolerance * abs(target) + 1e-12:
            if item < count:
                pruned = max(pruned, ub)
            depth -= 1
            if depth >= 0:
                taken[service[chosen[depth]]] = False
            continue
        position[depth] = item + 1
        if not _fits(item, memory, used[depth], service, taken, hold_s, slack_s, longest[depth], least_slack[depth]):
            continue
        given = min(left[depth], cap[item])
        gain = value[item] * given + fixed[item]
        if gain <= 0.0:
            continue
        chosen[depth] = item
        taken[service[item]] = True
        used[depth + 1] = used[depth] + memory[item]
        left[depth + 1] = left[depth] - given
        total_at[depth + 1] = total_at[depth] + gain
        longest[depth + 1] = max(longest[depth], hold_s[item])
        least_slack[depth + 1] = min(least_slack[depth], slack_s[item])
        position[depth + 1] = item + 1
        depth += 1
        if total_at[depth] > best_value:
            best_value = total_at[depth]
            best_inside[:] = False
            for level in range(depth):
                best_inside[chosen[level]] = True
    return best_inside, best_value, max(best_value, pruned)
