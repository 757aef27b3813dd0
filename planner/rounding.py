"""From fractional counts of loadouts to whole ones: diving, docs/formulation.md, section 9.

Whole parts are decided first; what they leave of demand, budgets and GPUs is a smaller problem of the same kind, for
which new loadouts are priced, and so on. When no part is whole the largest fractions are rounded up, where rows allow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from planner.linear import Floats
from planner.master import Column, Master, MasterSolution

__all__ = ["Decided", "dive"]

_ROUNDS_PER_STEP = 4
"""Rounds of pricing after each step of the dive."""

_ROUND_UP = 0.9
"""Fractions from which on counts are rounded up together."""

_BATCH = 0.03
"""Share of the fractional counts that are rounded up at least, when none is that large; more when time is short."""

_WHOLE = 1e-6
"""What a count may miss of a whole number by rounding."""


@dataclass(slots=True)
class Decided:
    """Groups that are decided: how often each column, and what that takes of rows, capacities and demand."""

    counts: Counter[Column]
    activity: Floats
    used: Floats
    supplied_rps: Floats


def dive(master: Master, solution: MasterSolution, clock: Callable[[], float], ends_at_s: float) -> Counter[Column]:
    """Return whole counts near ``solution``; feasible in capacities and upper limits, not always in lower ones."""
    link, space = master.linking, master.space
    limits = master.limits
    decided = Decided(
        counts=Counter(),
        activity=np.zeros(len(link.rows)),
        used=np.zeros(len(limits)),
        supplied_rps=np.zeros(len(space.names)),
    )
    current: MasterSolution | None = solution
    batch = _BATCH
    while current is not None:
        started_s = clock()
        late = started_s >= ends_at_s
        if not _decide(master, current, decided, 1.0 if late else batch) or late:
            break
        left = np.maximum(space.offered_rps - decided.supplied_rps, 0.0)
        options = link.pair_option
        cap = np.minimum(space.share_cap[options], left[space.service_of[options]] / space.sustained_rps[options])
        master.restrict(
            link.lower - decided.activity, link.upper - decided.activity, np.maximum(limits - decided.used, 0.0), cap
        )
        current = master.solve(ends_at_s - clock())
        for round_ in range(_ROUNDS_PER_STEP):
            if current is None or clock() >= ends_at_s or not master.improve(current, smoothing=0.5 * (round_ == 0)):
                break
            current = master.solve(ends_at_s - clock()) or current
        now = clock()
        steps_left = max(1.0, (ends_at_s - now) / max(now - started_s, 1e-9))
        batch = min(1.0, max(_BATCH, 2.0 / steps_left))
    return decided.counts


def _decide(master: Master, solution: MasterSolution, decided: Decided, batch: float) -> bool:
    """Take whole parts of ``solution`` into ``decided``, or else its largest fractions; False when there is none."""
    whole = np.floor(solution.counts + _WHOLE).astype(np.int64)
    taken = 0
    for index in np.flatnonzero(whole):
        taken += _take(master, master.columns[index], int(whole[index]), decided)
    if taken and batch < 1.0:
        return True
    rest = solution.counts - whole
    fractional = np.flatnonzero(rest > _WHOLE)
    order = fractional[np.argsort(-rest[fractional], kind="stable")]
    least = max(1, int(batch * len(order)))
    for index in order:
        if taken >= least and rest[index] < _ROUND_UP:
            break
        taken += _take(master, master.columns[index], 1, decided)
    return taken > 0


def _take(master: Master, column: Column, count: int, decided: Decided) -> int:
    """Decide up to ``count`` groups of ``column`` as far as capacities and upper limits allow; return how many."""
    link, space = master.linking, master.space
    pairs = np.array(column.pairs, dtype=np.int64)
    _, rows, values = link.column(column.place, pairs, np.array(column.shares))
    capacity_rows, amounts = master.capacity_rows(column.place)
    room = [float(count)]
    room += ((master.limits[capacity_rows] - decided.used[capacity_rows] + 1e-6) / amounts).tolist()
    strict = (values > 0) & np.isfinite(link.upper[rows]) & ~np.isfinite(link.lower[rows])
    room += (
        (link.upper[rows] - decided.activity[rows] + 1e-6 * np.abs(link.upper[rows]))[strict] / values[strict]
    ).tolist()
    number = int(max(0.0, min(room)))
    if number == 0:
        return 0
    options = link.pair_option[pairs]
    decided.counts[column] += number
    decided.activity[rows] += number * values
    decided.used[capacity_rows] += number * amounts
    np.add.at(
        decided.supplied_rps,
        space.service_of[options],
        number * np.array(column.shares) * space.sustained_rps[options],
    )
    return number
