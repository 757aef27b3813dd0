"""A scorer made of any simulator, candidate by candidate in the interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from planner.arranged import Arrangement, Operation
from planner.linear import Floats, Integers
from planner.worth import Worth, worth_of_block

__all__ = ["SimulatedScorer"]

_LEAST_BLOCKS = 3
"""Blocks that a candidate is given at least: fewer say nothing about how much blocks differ."""
_WORK = 100_000
"""Requests simulated after which a walk returns."""


class SimulatedScorer:
    """A scorer made of any simulator: slower than a compiled one, and as general as its simulator.

    Attributes:
        name: See `Scorer`, and so the others.
    """

    def __init__(
        self,
        name: str,
        worth: Worth,
        offered: Integers,
        simulated_s: float,
        simulate: Callable[[Arrangement, int], Integers],
        *,
        work: int | None = None,
    ) -> None:
        """Take the objective, and a function from an arrangement and a block to what `Scorer.good` tells of it.

        A walk returns once ``work`` requests are simulated, a number that suits a fast simulator unless given.
        """
        self._work = _WORK if work is None else work
        self.name = name
        self.offered = offered
        self.simulated_s = simulated_s
        self.score: Floats = np.zeros(len(offered))
        self._worth = worth
        self._simulate = simulate
        best = np.zeros(offered.shape[1])
        np.maximum.at(best, worth.service_of, worth.value)
        self._most = offered * best
        self._turn = 0

    def settle(self, arrangement: Arrangement, mark: int | None) -> None:
        """See `Scorer`."""
        self._take(arrangement, *self._race(arrangement, -math.inf))

    def glance(self, arrangement: Arrangement, mark: int | None) -> None:
        """See `Scorer`."""
        _, served, ran = self._race(arrangement, math.inf)
        self._aim(arrangement, served, ran)

    def walk(self, arrangement: Arrangement, temperature: float, moves: int) -> tuple[int, int]:
        """See `Scorer`."""
        made = tried = work = 0
        while made < moves and work < self._work:
            made += 1
            mark = arrangement.mark
            needed = temperature * math.log(1.0 - arrangement.draw())
            if arrangement.operate(Operation.SMALL):
                tried += 1
                score, served, ran = self._race(arrangement, needed)
                work += int(self.offered[ran].sum())
                if len(ran) == len(self.score) and float((score - self.score).sum()) >= needed:
                    self._take(arrangement, score, served, ran)
                    continue
            arrangement.operate(Operation.ROLLBACK, mark)
        return made, tried

    def standing(self, arrangement: Arrangement) -> object:
        """See `Scorer`."""
        return self.score.copy(), arrangement.now.lost.copy(), arrangement.now.worth.copy()

    def resume(self, arrangement: Arrangement, standing: object) -> None:
        """See `Scorer`."""
        assert isinstance(standing, tuple)
        self.score, arrangement.now.lost[:], arrangement.now.worth[:] = standing
        arrangement.operate(Operation.AIM)

    def good(self, arrangement: Arrangement) -> Integers:
        """See `Scorer`."""
        found: Integers = np.sum([self._simulate(arrangement, block) for block in range(len(self.score))], axis=0)
        return found

    def _race(self, arrangement: Arrangement, needed: float) -> tuple[Floats, Floats, list[int]]:
        """Return score per block, value served per service and replica, and the blocks that were run."""
        now, blocks = arrangement.now, len(self.score)
        value = self._worth.value[now.option]
        served = np.zeros(now.option.shape)
        score = np.zeros(blocks)
        ran: list[int] = []
        gains: list[float] = []
        self._turn += 1
        for turn in range(blocks):
            block = (self._turn + turn) % blocks
            good = self._simulate(arrangement, block)
            served += good * value
            score[block] = worth_of_block(
                self._worth, good.sum(axis=1), (good * value).sum(axis=1), self.offered[block]
            )
            ran.append(block)
            gains.append(float(score[block] - self.score[block]))
            if _LEAST_BLOCKS <= len(ran) < blocks and _beaten(gains, needed / blocks):
                break
        return score, served, ran

    def _take(self, arrangement: Arrangement, score: Floats, served: Floats, ran: list[int]) -> None:
        self.score = score
        now = arrangement.now
        now.worth[:] = 0.0
        for service in range(len(now.replicas)):
            replicas = range(now.replicas[service])
            now.worth[now.slot[service, replicas], service] = served[service, replicas]
        self._aim(arrangement, served, ran)

    def _aim(self, arrangement: Arrangement, served: Floats, ran: list[int]) -> None:
        arrangement.now.lost[:] = np.maximum(self._most[ran].sum(axis=0) - served.sum(axis=1), 0.0)
        arrangement.operate(Operation.AIM)


def _beaten(gains: list[float], needed: float) -> bool:
    """Say whether a mean gain of ``needed`` lies more than two standard errors above that of ``gains``."""
    count = len(gains)
    mean = math.fsum(gains) / count
    spread = math.fsum((gain - mean) ** 2 for gain in gains)
    return mean + 2.0 * math.sqrt(spread / count / max(count - 1, 1)) < needed
