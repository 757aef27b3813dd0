"""The inner loop of the polish, compiled: the planner's moves joined with the evaluator's single pass.

A move is drawn, made, checked, simulated on the arrivals that it concerns, and kept or undone without the interpreter.
Only the groups that a move touches, and those that their services choose among, are simulated again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import evaluator.single_pass_local
from evaluator.single_pass_local import Clocks, Standing, Traffic, clocks_of, serve_again, standing_of
from planner.arranged import Arrangement, Operation, source_digest
from planner.layout import LOGGED, Layout, inner, keeps, rollback, touches
from planner.moves import aim, draw, small
from planner.worth import Worth, worth_of_block
from profiles.linking import entry_point_of

__all__ = ["CompiledScorer"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_SETTLE, _GLANCE, _WALK = range(3)
_EVERYTHING = -1
_LEAST_BLOCKS = 3
_WORK = 500_000
"""Requests simulated after which a walk returns, which takes a fraction of a second."""
_PASSED_OVER = 16
"""Requests that a move does not concern, which take as long as one that it does."""


class _Ledger(NamedTuple):
    """What is known of the standing arrangement per block, and room for a candidate.

    Attributes:
        offered: Shape (block, service): requests.
        most: Shape (block, service): what they count when all are served in time at the best accuracy.
        good: Shape (block, service): requests served in time.
        value: Shape (block, service): what they count.
        score: Shape (block,).
        trial_good: The same of a candidate, and so the next two.
        trial_value: See there.
        trial_score: See there.
        chooses: Shape (service,): see `serve_again`.
        within: Shape (slot,): see there.
        changed: Shape (request, 4): see there.
    """

    offered: Integers
    most: Floats
    good: Integers
    value: Floats
    score: Floats
    trial_good: Integers
    trial_value: Floats
    trial_score: Floats
    chooses: NDArray[np.bool_]
    within: NDArray[np.bool_]
    changed: NDArray[np.int32]


@inner
def _concern(w: Layout, k: _Ledger, mark: int) -> None:
    """Mark the services on groups that changed, and all of their groups; everything without a mark."""
    everything = mark < 0
    k.chooses[:] = everything
    k.within[:] = everything
    if everything:
        return
    for at in range(mark, w.tally[LOGGED]):
        slot, service = touches(w, at)
        k.within[slot] = True
        if service >= 0:
            k.chooses[service] = True
    for slot in range(len(k.within)):
        if k.within[slot]:
            for tenant in range(w.tenants[slot]):
                k.chooses[w.tenant[slot, tenant]] = True
    for service in range(len(k.chooses)):
        if k.chooses[service]:
            for replica in range(w.replicas[service]):
                k.within[w.slot[service, replica]] = True


@inner
def _race(
    w: Layout, worth: Worth, t: Traffic, s: Standing, c: Clocks, k: _Ledger, mark: int, needed: float
) -> tuple[int, int, float, int]:
    """Simulate what stands block by block; return blocks run, the first, the gain over the standing and the changes.

    Given up after some blocks when the mean gain per block plus two standard errors is below the share of ``needed``
    per block: the paired test of common random numbers.
    """
    _concern(w, k, mark)
    blocks = len(k.score)
    start = min(int(draw(w) * blocks), blocks - 1)
    total, squares, changes = 0.0, 0.0, 0
    for ran in range(1, blocks + 1):
        b = (start + ran - 1) % blocks
        good, value = k.trial_good[b], k.trial_value[b]
        good[:] = k.good[b]
        value[:] = k.value[b]
        changes = serve_again(
            t, s, c, b, w.replicas, w.slot, w.option, k.chooses, k.within, worth.value, good, value, k.changed, changes
        )
        k.trial_score[b] = worth_of_block(worth, good, value, k.offered[b])
        gain = k.trial_score[b] - k.score[b]
        total += gain
        squares += gain * gain
        if _LEAST_BLOCKS <= ran < blocks:
            mean = total / ran
            error = np.sqrt(max(squares / ran - mean * mean, 0.0) / (ran - 1))
            if mean + 2.0 * error < needed / blocks:
                return ran, start, total, changes
    return blocks, start, total, changes


@inner
def _commit(w: Layout, worth: Worth, t: Traffic, s: Standing, k: _Ledger, changes: int) -> None:
    """Let the candidate stand."""
    for change in range(changes):
        i = k.changed[change, 0]
        service = t.service[i]
        if s.good[i]:
            w.worth[s.slot[i], service] -= worth.value[s.option[i]]
        s.slot[i], s.option[i], s.good[i] = k.changed[change, 1], k.changed[change, 2], k.changed[change, 3] > 0
        if s.good[i]:
            w.worth[s.slot[i], service] += worth.value[s.option[i]]
    k.good[:] = k.trial_good
    k.value[:] = k.trial_value
    k.score[:] = k.trial_score
    _see(w, k, len(k.score), 0)


@inner
def _see(w: Layout, k: _Ledger, ran: int, start: int) -> None:
    """Tell the layout what services lost in the candidate's blocks."""
    w.lost[:] = 0.0
    for turn in range(ran):
        b = (start + turn) % len(k.score)
        for service in range(len(w.lost)):
            w.lost[service] += max(k.most[b, service] - k.trial_value[b, service], 0.0)
    aim(w)


@inner
def _forget_all(w: Layout, s: Standing, k: _Ledger) -> None:
    s.slot[:] = -1
    s.good[:] = False
    k.good[:] = 0
    k.value[:] = 0.0
    k.score[:] = 0.0
    w.worth[:] = 0.0


@entry_point_of(source_digest([Path(__file__), Path(evaluator.single_pass_local.__file__)]), error_model="numpy")
def _search(
    w: Any,
    worth: Worth,
    t: Traffic,
    s: Standing,
    c: Clocks,
    k: _Ledger,
    what: int,
    mark: int,
    temperature: float,
    moves: int,
) -> tuple[int, int]:
    if what == _WALK:
        made = tried = work = 0
        while made < moves and work < _WORK:
            made += 1
            before = w.tally[LOGGED]
            needed = temperature * np.log(1.0 - draw(w))
            if small(w) and keeps(w):
                tried += 1
                ran, start, gain, changes = _race(w, worth, t, s, c, k, before, needed)
                work += changes + len(t.service) * ran // (_PASSED_OVER * len(k.score))
                if ran == len(k.score) and gain >= needed:
                    _commit(w, worth, t, s, k, changes)
                    continue
            rollback(w, before)
        return made, tried
    if what == _SETTLE and mark < 0:
        _forget_all(w, s, k)
    needed = np.inf if what == _GLANCE else -np.inf
    ran, start, gain, changes = _race(w, worth, t, s, c, k, mark, needed)
    if what == _SETTLE:
        _commit(w, worth, t, s, k, changes)
    else:
        _see(w, k, ran, start)
    return 0, ran


class CompiledScorer:
    """Scores by the single pass over what a move concerns; see `planner.Scorer`.

    Where not every service chooses anew, requests of the others keep to the groups that they went to: `settle` without
    a mark puts that right.
    """

    def __init__(self, worth: Worth, traffic: Traffic, offered: Integers, simulated_s: float, slots: int) -> None:
        """Take the objective, the arrivals with what may serve them, and the GPUs of the cluster."""
        batches = traffic.stage_s.shape[1] > 1
        self.name = f"single pass (admission at arrival, {'batches' if batches else 'no batching'})"
        self.offered = offered
        self.simulated_s = simulated_s
        blocks, services = offered.shape
        best = np.zeros(services)
        np.maximum.at(best, worth.service_of, worth.value)
        self._worth = worth
        self._traffic = traffic
        self._standing = standing_of(len(traffic.arrival_s))
        self._clocks = clocks_of(slots, traffic.stage_s.shape[2])
        self._ledger = _Ledger(
            offered=offered,
            most=offered * best,
            good=np.zeros((blocks, services), dtype=np.int64),
            value=np.zeros((blocks, services)),
            score=np.zeros(blocks),
            trial_good=np.zeros((blocks, services), dtype=np.int64),
            trial_value=np.zeros((blocks, services)),
            trial_score=np.zeros(blocks),
            chooses=np.zeros(services, dtype=np.bool_),
            within=np.zeros(slots, dtype=np.bool_),
            changed=np.zeros((len(traffic.arrival_s), 4), dtype=np.int32),
        )

    @property
    def score(self) -> Floats:
        """See `planner.Scorer`."""
        return self._ledger.score

    def settle(self, arrangement: Arrangement, mark: int | None) -> None:
        """See `planner.Scorer`."""
        self._run(arrangement, _SETTLE, _EVERYTHING if mark is None else mark)

    def glance(self, arrangement: Arrangement, mark: int | None) -> None:
        """See `planner.Scorer`."""
        self._run(arrangement, _GLANCE, _EVERYTHING if mark is None else mark)

    def walk(self, arrangement: Arrangement, temperature: float, moves: int) -> tuple[int, int]:
        """See `planner.Scorer`."""
        return self._run(arrangement, _WALK, 0, temperature, moves)

    def standing(self, arrangement: Arrangement) -> object:
        """See `planner.Scorer`."""
        return [array.copy() for array in self._kept(arrangement)]

    def resume(self, arrangement: Arrangement, standing: object) -> None:
        """See `planner.Scorer`."""
        assert isinstance(standing, list)
        for array, kept in zip(self._kept(arrangement), standing, strict=True):
            array[:] = kept
        arrangement.operate(Operation.AIM)

    def good(self, arrangement: Arrangement) -> Integers:
        """See `planner.Scorer`; what was simulated stands afterwards."""
        self.settle(arrangement, None)
        found: Integers = np.zeros(arrangement.now.slot.shape, dtype=np.int64)
        traffic = self._traffic
        counted = np.repeat(traffic.counted, np.diff(traffic.first)) <= np.arange(len(traffic.service))
        served_in_time = self._standing.good & counted
        slot, service = self._standing.slot[served_in_time], traffic.service[served_in_time]
        served = np.zeros(arrangement.now.worth.shape, dtype=np.int64)
        np.add.at(served, (slot, service), 1)
        for name, count in enumerate(arrangement.now.replicas):
            found[name, :count] = served[arrangement.now.slot[name, :count], name]
        return found

    def _kept(self, arrangement: Arrangement) -> list[NDArray[Any]]:
        ledger = self._ledger
        return [*self._standing, ledger.good, ledger.value, ledger.score, arrangement.now.lost, arrangement.now.worth]

    def _run(
        self, arrangement: Arrangement, what: int, mark: int, temperature: float = 0.0, moves: int = 0
    ) -> tuple[int, int]:
        return _search(
            arrangement.handle,
            self._worth,
            self._traffic,
            self._standing,
            self._clocks,
            self._ledger,
            what,
            mark,
            temperature,
            moves,
        )
