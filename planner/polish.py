"""Burst-aware polish: search over the partition of GPUs and the loadouts with simulated worth as the score.

A fluid model sees rates. Bursts and tight deadlines make groups that several services share worth more than it knows,
and only a simulation tells how much. The search starts from the fluid plan, from every uniform partition of the GPUs
filled greedily by simulated loss (selective replication after AlpaServe, OSDI 2023, section 5), and from mixtures of
them; anneals the best of them (S. Kirkpatrick et al., Science 220, 1983) with small moves on loadouts, which run in
compiled code together with their simulation, and large ones that cut GPUs anew and refill them (P. Shaw, CP 1998); and
ends with a full comparison of the best of each stage. All candidates see the same arrivals, in blocks from several
resampled traces, because search on one trace fits its accidents.

The temperature follows the share of the moves that are gone, where a limit of moves is set: the same number of moves
then makes the same plan. Without one it follows the clock. The clock is looked at between calls of the scorer, each of
which ends after a stated amount of work, and part of the time is held back for the final comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from planner.arranged import Arrangement, Operation
from planner.linear import Integers
from planner.polish_limits import Pairs, PolishLimits, PolishOutcome
from planner.scoring import Scorer
from planner.space import PlanningSpace
from planner.worth import Worth, worth_of_block

__all__ = ["polish"]

_STARTS_SHARE, _TRIALS_SHARE = 0.15, 0.35
"""Shares of the budget for making starts, and for annealing several of them a little."""
_TRIALS, _MIXTURES = 4, 8
_HOT, _COLD = 1e-3, 3e-5
"""First and last temperature, as a share of the most that the arrivals could be worth."""
_WALK_MOVES, _DESCENT_MOVES = 32, 60
"""Small moves between two large ones, and after each."""
_FILL_ROUNDS = 64
_SETTLE_MOVES = 200
"""Moves after which what stands is simulated in full before it may count as the best."""
_FINALISTS, _FINAL_SHARE = 3, 0.4
"""Finalists that time is held back for, and the most of the time that is."""
_ROUNDING = 1e-12


def polish(
    space: PlanningSpace,
    start: Pairs,
    scorer: Scorer,
    judge: Scorer,
    worth: Worth,
    options: tuple[int, ...],
    limits: PolishLimits,
    clock: Callable[[], float],
    *,
    others: tuple[Pairs, ...] = (),
    allowed: Callable[[Pairs], bool] = lambda pairs: True,
) -> PolishOutcome:
    """Return the best placement found, never worse than ``start`` in the eyes of ``judge``.

    The same arguments give the same answer as long as the limit that strikes is that of moves.

    Args:
        space: The planning space.
        start: Where to start from, and what to fall back on.
        scorer: The simulation that guides the search.
        judge: The simulation that chooses among the best of each stage, on arrivals that the search has not seen.
        worth: What the simulations are worth.
        options: The options that may be placed, besides those of ``start``.
        limits: When to end.
        clock: Monotonic clock, seconds.
        others: Other placements to start from, which need not be good.
        allowed: Whether a placement may be the answer, beyond what every move keeps.
    """
    known = {*options, *(option for pairs in (start, *others) for _, option in pairs)}
    arrangement = Arrangement(space, known, limits.seed)
    search = _Polish(arrangement, scorer, worth, limits, clock)
    start_score = search.judged(start, judge)
    search.hold_back()
    best, score = start, start_score
    for position, pairs in enumerate(search.run(start, others)):
        if position and search.late():
            break
        if allowed(pairs) and (other := search.judged(pairs, judge)) > score:
            best, score = pairs, other
    return PolishOutcome(
        pairs=best,
        start_score=start_score,
        score=score,
        candidates=search.candidates,
        moves=search.moves,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A placement worth keeping, with its score."""

    pairs: Pairs
    total: float


class _Polish:
    def __init__(
        self, arrangement: Arrangement, scorer: Scorer, worth: Worth, limits: PolishLimits, clock: Callable[[], float]
    ) -> None:
        self._now = arrangement
        self._scorer = scorer
        self._worth = worth
        self._limits = limits
        self._clock = clock
        self._began_s = clock()
        self._most = _most(worth, scorer.offered)
        self._kinds = len(arrangement.now.kind_first) - 1
        self._search_s = limits.time_s
        self.candidates = 0
        self.moves = 0

    def run(self, start: Pairs, others: tuple[Pairs, ...]) -> list[Pairs]:
        """Return the best placement of each stage, the most promising first."""
        self._now.restore(start)
        starts = [self._settled()]
        if not self._kinds or not self._most:
            return []
        starts += self._others(others)
        starts += self._starts()
        starts.sort(key=lambda found: -found.total)
        trials = []
        for position, found in enumerate(starts[:_TRIALS]):
            upto = _STARTS_SHARE + _TRIALS_SHARE * (position + 1) / len(starts[:_TRIALS])
            trials.append(self._anneal(found, upto, _HOT, 3 * _COLD))
        last = self._anneal(max(trials, key=lambda found: found.total), 1.0, _HOT / 2, _COLD)
        finalists = sorted((last, *trials, starts[0]), key=lambda found: -found.total)
        return [pairs for pairs in dict.fromkeys(each.pairs for each in finalists) if pairs != start]

    def judged(self, pairs: Pairs, judge: Scorer) -> float:
        """Return what ``pairs`` are worth in the eyes of ``judge``, as a share of the most that there is to have."""
        self._now.restore(pairs)
        judge.settle(self._now, None)
        return float(judge.score.sum()) / max(_most(self._worth, judge.offered), 1e-300)

    def hold_back(self) -> None:
        """Keep time for finalists like the one that was just judged, when nothing else was done yet."""
        each_s = self._clock() - self._began_s
        self._search_s = self._limits.time_s - min(_FINALISTS * each_s, _FINAL_SHARE * self._limits.time_s)

    def late(self) -> bool:
        """Return whether all of the time is gone."""
        return self._clock() - self._began_s >= self._limits.time_s

    def _spent(self) -> float:
        """Return the share of the budget that is gone."""
        spent = (self._clock() - self._began_s) / self._search_s
        if self._limits.moves is None:
            return spent
        return self.moves / self._limits.moves if spent < 1.0 else 1.0

    def _total(self) -> float:
        return float(self._scorer.score.sum())

    def _settled(self) -> _Found:
        """Simulate what stands in full; it is not undone any more."""
        self._scorer.settle(self._now, None)
        self._count(1)
        self._now.forget()
        return _Found(pairs=self._now.pairs(), total=self._total())

    def _count(self, candidates: int, moves: int | None = None) -> None:
        self.candidates += candidates
        self.moves += candidates if moves is None else moves

    def _walk(self, temperature: float, moves: int) -> None:
        """Make small moves; fewer when the time is over."""
        while moves > 0:
            made, candidates = self._scorer.walk(self._now, temperature, moves)
            self._count(candidates, made)
            moves -= made
            if moves > 0 and self._spent() >= 1.0:
                return

    def _others(self, others: tuple[Pairs, ...]) -> Iterator[_Found]:
        for pairs in others:
            self._now.restore(pairs)
            if self._now.operate(Operation.KEEPS):
                yield self._settled()

    def _starts(self) -> Iterator[_Found]:
        """Yield uniform partitions, one per kind of group, then mixtures, while the budget for starts lasts."""
        shapes = self._now.shapes
        plans = [dict.fromkeys(shapes, shape) for shape in sorted({each for of in shapes.values() for each in of})]
        plans += [
            {gpu_type: of[int(self._now.draw() * len(of))] for gpu_type, of in shapes.items()} for _ in range(_MIXTURES)
        ]
        for plan in plans:
            if self._spent() >= _STARTS_SHARE:
                return
            found = self._uniform(plan)
            if found is not None:
                yield found

    def _uniform(self, shapes: dict[str, tuple[int, int]]) -> _Found | None:
        """Cut every GPU type into groups of its shape and fill them by simulated loss."""
        self._now.operate(Operation.CLEAR)
        opened = 0
        for number, (gpu_type, shape) in enumerate(self._now.kinds):
            if shapes[gpu_type] == shape:
                opened = self._now.operate(Operation.OPEN_ALL, number)
        self._fill(None, _STARTS_SHARE)
        if not opened or not self._now.operate(Operation.COMPLETE):
            return None
        return self._settled()

    def _fill(self, mark: int | None, until: float) -> None:
        """Add what loses most, round after round, until nothing that loses fits any more or the budget's share is."""
        for _ in range(_FILL_ROUNDS):
            self._scorer.glance(self._now, mark)
            self._count(1)
            if not self._now.operate(Operation.ADMIT_WANTING) or self._spent() >= until:
                return

    def _anneal(self, start: _Found, until: float, hot: float, cold: float) -> _Found:
        """Anneal from ``start`` until the share ``until`` of the budget is spent; return the best met on the way."""
        if self._spent() >= until:
            return start
        self._now.restore(start.pairs)
        best = self._settled()
        settled = self.moves
        began = self._spent()
        span = max(until - began, 1e-9)
        while (spent := self._spent()) < until and best.total < self._most * (1 - _ROUNDING):
            temperature = hot * (cold / hot) ** ((spent - began) / span) * self._most
            self._walk(temperature, _WALK_MOVES)
            self._large(temperature)
            self._now.forget()
            if self.moves - settled >= _SETTLE_MOVES and self._total() > best.total:
                best = max(best, self._settled(), key=lambda found: found.total)
                settled = self.moves
        return max(best, self._settled(), key=lambda found: found.total)

    def _large(self, temperature: float) -> None:
        """Cut some GPUs anew, refill them, descend a little, and keep the result when it is good enough."""
        self._now.forget()
        self._count(0, 1)
        before, standing = self._total(), self._scorer.standing(self._now)
        if self._now.operate(Operation.LARGE):
            self._fill(0, 1.0)
            if self._now.operate(Operation.COMPLETE):
                self._scorer.settle(self._now, 0)
                self._count(1)
                self._walk(0.0, _DESCENT_MOVES)
                if self._total() - before >= temperature * np.log(1.0 - self._now.draw()):
                    return
        self._now.operate(Operation.ROLLBACK, 0)
        self._scorer.resume(self._now, standing)


def _most(worth: Worth, offered: Integers) -> float:
    """Return what it would be worth to serve everything in time with the most accurate variants."""
    best = np.zeros(offered.shape[1])
    np.maximum.at(best, worth.service_of, worth.value)
    return float(sum(worth_of_block(worth, block, block * best, block) for block in offered))
