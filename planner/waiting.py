"""How long a request waits on a group that several services share.

The wait in an M/G/1 queue served in order of arrival is a geometric sum of residual service times (V. E. Benes, *On
queues with Poisson arrivals*, Ann. Math. Stat. 28, 1957): with utilisation rho, W = R_1 + ... + R_N where
P(N = n) = (1 - rho) rho^n. The residual of a service that always takes h is uniform on [0, h]; over several services it
is a mixture, weighted by their shares of the utilisation. So a long batch of a neighbour shows in everybody's tail. The
sum is evaluated on a grid by the recursion of H. H. Panjer (*Recursive evaluation of a family of compound
distributions*, ASTIN Bulletin 12, 1981).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.linear import Floats

__all__ = ["WaitingTime", "waiting_time"]

_CELLS = 400
_TAIL = 1e-4
_SATURATED = 0.995


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingTime:
    """The distribution of a wait. ``cumulative[k]`` is the probability of at most ``k * cell_s`` seconds."""

    cell_s: float
    cumulative: Floats

    def exceeds(self, time_s: float, *, stretch: float = 1.0) -> float:
        """Return the probability of a wait of more than ``time_s``, when all waits are ``stretch`` times as long."""
        if time_s < 0:
            return 1.0
        if stretch <= 0:
            return 0.0
        cell = int(time_s / stretch / self.cell_s + 1e-9) if self.cell_s > 0 else len(self.cumulative) - 1
        return float(1.0 - self.cumulative[min(cell, len(self.cumulative) - 1)])

    def quantile_s(self, level: float, *, stretch: float = 1.0) -> float:
        """Return the ``level``-quantile in seconds, likewise; the end of the grid for levels beyond it."""
        cell = int(np.searchsorted(self.cumulative, level - 1e-12))
        return min(cell, len(self.cumulative) - 1) * self.cell_s * stretch


def waiting_time(holds_s: Sequence[float], utilisations: Sequence[float]) -> WaitingTime:
    """Return the wait on a group whose services hold it for ``holds_s`` at a time, ``utilisations`` of the time each.

    Utilisation in all counts as at most 0.995, so the answer is finite. Costs 400 squared operations.

    Args:
        holds_s: Seconds that a batch of each service holds the group, not negative.
        utilisations: Share of the time that each holds it, not negative.
    """
    hold_s, share = np.asarray(holds_s, dtype=np.float64), np.asarray(utilisations, dtype=np.float64)
    busy = float(share.sum())
    if busy <= 0 or hold_s.max(initial=0.0) <= 0:
        return WaitingTime(cell_s=0.0, cumulative=np.ones(1))
    weight = share / busy
    rho = min(busy, _SATURATED)
    mean_s = float(weight @ hold_s) / 2
    reach_s = float(hold_s.max()) + mean_s * math.log(_TAIL) / math.log(rho)
    cell_s = reach_s / _CELLS
    mass = _residual(hold_s, weight, cell_s)
    again = rho / (1.0 - rho * mass[0])
    wait = np.zeros(_CELLS + 1)
    wait[0] = (1.0 - rho) / (1.0 - rho * mass[0])
    for cell in range(1, _CELLS + 1):
        wait[cell] = again * float(mass[1 : cell + 1] @ wait[cell - 1 :: -1])
    cumulative = np.minimum(np.cumsum(wait), 1.0)
    return WaitingTime(cell_s=cell_s, cumulative=cumulative)


def _residual(hold_s: Floats, weight: Floats, cell_s: float) -> Floats:
    """Return the residual's mass on the grid; mass between two points goes to both so that the mean is kept.

    That is the second difference of the integral of the distribution, x^2 / 2h up to h and x - h/2 beyond.
    """
    x = np.arange(_CELLS + 2)[:, None] * cell_s
    h = np.maximum(hold_s, 1e-12)[None, :]
    integral = np.where(x < h, x * x / (2 * h), x - h / 2) @ weight / cell_s
    return np.concatenate([integral[1:2], integral[2:] - 2 * integral[1:-1] + integral[:-2]])
