"""Burst-aware polish: search over the partition of GPUs and the loadouts with simulated goodput as the score.

A fluid model sees rates. Bursts and tight deadlines make groups that several services share worth more than it knows,
and only a simulation tells how much. The search starts from the fluid plan, from every uniform partition of the GPUs
filled greedily by simulated loss (selective replication after AlpaServe, OSDI 2023, section 5), and from mixtures of
them; anneals the best of them (S. Kirkpatrick et al., Science 220, 1983) with small moves on loadouts and large ones
that cut GPUs anew and refill them (P. Shaw, CP 1998); and ends with a full comparison of the best of each stage. All
candidates see the same arrivals, in blocks from several resampled traces, because search on one trace fits its
accidents; a candidate is given up as soon as the blocks run so far make it improbable that it is wanted.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from planner.arrangement import Arrangement
from planner.linear import Floats
from planner.polish_moves import Insight, Moves
from planner.scoring import Heat, Scorer
from planner.space import PlanningSpace

__all__ = ["Pairs", "PolishLimits", "PolishOutcome", "polish"]

Pairs = tuple[tuple[int, int], ...]
"""A placement without rates: sorted (group, option) pairs."""

_STARTS_SHARE, _TRIALS_SHARE = 0.15, 0.35
"""Shares of the budget for making starts, and for annealing several of them a little."""
_TRIALS = 4
_HOT, _COLD = 1e-3, 3e-5
"""First and last temperature, as a share of all value offered."""
_LARGE_SHARE = 0.03
_DESCENT_MOVES = 60
_FILL_ROUNDS = 64
_ROUNDING = 1e-12
_LEAST_BLOCKS = 3
"""Blocks that a candidate is given at least: fewer say nothing about how much blocks differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolishLimits:
    """When the search ends: after ``time_s`` seconds, or ``candidates`` simulations (None: no such limit)."""

    time_s: float
    candidates: int | None = None
    seed: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PolishOutcome:
    """What the search found.

    Attributes:
        pairs: The best placement.
        start_score: Share of the offered value that the start served in time before the judge, in [0, 1].
        score: The same of ``pairs``; never less.
        candidates: Placements that were simulated.
    """

    pairs: Pairs
    start_score: float
    score: float
    candidates: int


def polish(
    space: PlanningSpace,
    start: Pairs,
    scorer: Scorer,
    judge: Scorer,
    value: Floats,
    options: tuple[int, ...],
    limits: PolishLimits,
    clock: Callable[[], float],
    others: tuple[Pairs, ...] = (),
) -> PolishOutcome:
    """Return the best placement found, never worse than ``start`` in the eyes of ``judge``.

    The same arguments give the same answer as long as the limit that strikes is that of candidates.

    Args:
        space: The planning space.
        start: Where to start from, and what to fall back on.
        scorer: The simulation that guides the search.
        judge: The simulation that chooses among the best of each stage, on arrivals that the search has not seen.
        value: Shape (option,): what a request served in time counts, above 0.
        options: The options that may be placed, besides those of ``start``.
        limits: When to end.
        clock: Monotonic clock, seconds.
        others: Other placements to start from, which need not be good.
    """
    known = {*options, *(option for pairs in (start, *others) for _, option in pairs)}
    return _Polish(space, start, scorer, value, known, limits, clock).run(judge, others)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Score:
    """A placement simulated in full: the value served per block, and in all."""

    block_value: Floats
    total: float

    @classmethod
    def of(cls, heat: Heat) -> _Score:
        return cls(block_value=heat.value, total=float(heat.value.sum()))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A placement worth keeping."""

    pairs: Pairs
    total: float


class _Polish:
    def __init__(
        self,
        space: PlanningSpace,
        start: Pairs,
        scorer: Scorer,
        value: Floats,
        options: set[int],
        limits: PolishLimits,
        clock: Callable[[], float],
    ) -> None:
        self._space = space
        self._start = start
        self._scorer = scorer
        self._value = value
        self._limits = limits
        self._clock = clock
        self._began_s = clock()
        self._random = random.Random(limits.seed)
        self._now = Arrangement(space, options)
        self._insight = Insight(self._now, value)
        self._moves = Moves(self._now, self._insight, self._random)
        self._best = np.zeros(len(space.names))
        np.maximum.at(self._best, space.service_of, value)
        offered = scorer.offered
        self._most = offered * self._best
        self._offered_value = max(float(self._most.sum()), 1e-300)
        self._blocks = len(offered)
        self._nothing = np.zeros(self._blocks)
        self._candidates = 0
        self._idle = 0
        self._score = _Score(block_value=self._nothing, total=0.0)

    def run(self, judge: Scorer, others: tuple[Pairs, ...]) -> PolishOutcome:
        self._now.restore(self._start)
        start = self._settle()
        if not self._moves.kinds:
            score = self._judged(self._start, judge)
            return PolishOutcome(pairs=self._start, start_score=score, score=score, candidates=self._candidates)
        starts = sorted((start, *self._others(others), *self._starts()), key=lambda found: -found.total)
        trials = []
        for position, found in enumerate(starts[:_TRIALS]):
            upto = _STARTS_SHARE + _TRIALS_SHARE * (position + 1) / len(starts[:_TRIALS])
            trials.append(self._anneal(found, upto, _HOT, 3 * _COLD))
        last = self._anneal(max(trials, key=lambda found: found.total), 1.0, _HOT / 2, _COLD)
        finalists = [start.pairs, *dict.fromkeys(each.pairs for each in (starts[0], *trials, last))]
        scores = [self._judged(pairs, judge) for pairs in finalists]
        best = max(range(len(scores)), key=lambda position: (scores[position], -position))
        return PolishOutcome(
            pairs=finalists[best], start_score=scores[0], score=scores[best], candidates=self._candidates
        )

    def _judged(self, pairs: Pairs, judge: Scorer) -> float:
        """Return the share of the offered value that ``pairs`` serve in the eyes of ``judge``."""
        self._now.restore(pairs)
        offered = judge.offered
        nothing = np.zeros(len(offered))
        heat = judge.race(
            self._now.deployment, self._value, rival=nothing, needed=-math.inf, start=0, least=len(offered)
        )
        return float(heat.value.sum()) / max(float((offered * self._best).sum()), 1e-300)

    def _spent(self) -> float:
        """Return the share of the budget that is gone."""
        spent = (self._clock() - self._began_s) / self._limits.time_s
        if self._limits.candidates is not None:
            # Draws that lead to no candidate count too: where nothing can be changed, the search ends all the same.
            spent = max(spent, (self._candidates + self._idle) / self._limits.candidates)
        return spent

    def _simulate(self, rival: Floats, needed: float) -> Heat:
        self._candidates += 1
        start = self._random.randrange(self._blocks)
        return self._scorer.race(
            self._now.deployment, self._value, rival=rival, needed=needed, start=start, least=_LEAST_BLOCKS
        )

    def _settle(self) -> _Found:
        """Simulate what stands in full and make it the current state, which is not undone any more."""
        self._take(self._simulate(self._nothing, -math.inf))
        self._now.forget()
        return self._snapshot()

    def _take(self, heat: Heat) -> None:
        """Make ``heat``, of what stands and in full, the score to beat."""
        self._score = _Score.of(heat)
        self._insight.update(heat.good, self._most.sum(axis=0))

    def _snapshot(self) -> _Found:
        return _Found(pairs=self._now.pairs(), total=self._score.total)

    def _others(self, others: tuple[Pairs, ...]) -> Iterator[_Found]:
        for pairs in others:
            self._now.restore(pairs)
            if self._now.complete():
                yield self._settle()

    def _starts(self) -> Iterator[_Found]:
        """Yield uniform partitions, one per kind of group, then mixtures, while the budget for starts lasts."""
        gpu_types = sorted({kind[0] for kind in self._moves.kinds})
        shapes = sorted({kind[1:] for kind in self._moves.kinds}, key=lambda shape: (-shape[0] * shape[1], shape))
        plans: list[dict[str, list[tuple[int, int]]]] = [{each: [shape] for each in gpu_types} for shape in shapes]
        while plans or self._spent() < _STARTS_SHARE:
            if self._spent() >= 1.0:
                return
            mixture = plans.pop(0) if plans else {each: [self._random.choice(shapes)] for each in gpu_types}
            found = self._uniform(mixture)
            if found is not None:
                yield found

    def _uniform(self, shapes: dict[str, list[tuple[int, int]]]) -> _Found | None:
        """Cut every GPU type into groups of its shape and fill them by simulated loss."""
        now = self._now
        for slot in list(now.loadouts):
            now.close(slot)
        slots: list[int] = []
        for kind in self._moves.kinds:
            if kind[1:] in shapes[kind[0]]:
                slots += self._moves.open_all(kind)
        self._fill(slots)
        if not slots or not self._moves.complete():
            self._idle += 1
            return None
        return self._settle()

    def _fill(self, slots: list[int]) -> None:
        """Add what loses most, round after round, until nothing that loses fits any more."""
        for _ in range(_FILL_ROUNDS):
            heat = self._simulate(self._nothing, math.inf)
            ran = heat.value > 0
            share = self._most[ran].sum(axis=0) if ran.any() else self._most[:3].sum(axis=0)
            self._insight.update(heat.good, share)
            if not self._moves.admit_wanting(slots):
                return

    def _anneal(self, start: _Found, until: float, hot: float, cold: float) -> _Found:
        """Anneal from ``start`` until the share ``until`` of the budget is spent; return the best met on the way."""
        self._now.restore(start.pairs)
        best = self._settle()
        began = self._spent()
        span = max(until - began, 1e-9)
        while (spent := self._spent()) < until and best.total < self._offered_value * (1 - _ROUNDING):
            temperature = hot * (cold / hot) ** ((spent - began) / span) * self._offered_value
            if self._random.random() < _LARGE_SHARE:
                self._large(temperature)
            else:
                self._small(temperature)
            self._now.forget()
            if self._score.total > best.total:
                best = self._snapshot()
        return best

    def _small(self, temperature: float) -> None:
        """Try one small move."""
        mark = self._now.mark()
        needed = temperature * math.log(1.0 - self._random.random())
        if self._moves.small() and self._now.complete():
            heat = self._simulate(self._score.block_value, needed)
            if heat.blocks == self._blocks and float(heat.value.sum()) - self._score.total >= needed:
                self._take(heat)
                return
        else:
            self._idle += 1
        self._now.rollback(mark)

    def _large(self, temperature: float) -> None:
        """Cut some GPUs anew, refill them, descend a little, and keep the result when it is good enough."""
        before, lost, mark = self._score, self._insight.saved(), self._now.mark()
        slots = self._moves.large()
        if slots:
            self._fill(slots)
            if self._moves.complete():
                self._take(self._simulate(self._nothing, -math.inf))
                for _ in range(_DESCENT_MOVES):
                    self._small(0.0)
                if self._score.total - before.total >= temperature * math.log(1.0 - self._random.random()):
                    return
        else:
            self._idle += 1
        self._now.rollback(mark)
        self._score = before
        self._insight.load(lost)
