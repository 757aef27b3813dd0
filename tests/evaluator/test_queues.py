"""The queues against sorted lists, whatever enters and leaves."""

from __future__ import annotations

import numba
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluator import Run, Settings
from evaluator.access import replica_at, slot_at
from evaluator.queues import enqueue, first_slot, pop, take_slot, withdraw
from evaluator.state import NOWHERE
from tests.evaluator.arrays import arrivals, deadlines, replicas

POP, WITHDRAW = -1.0, -2.0


@numba.njit
def _drive(world, operations, picks, left):
    """Do the operations (a key enters; POP; WITHDRAW: the ``picks``-th oldest leaves) and note who leaves."""
    w = world[0]
    count = 0
    slots = np.full(len(operations), -1)
    for step in range(len(operations)):
        if operations[step] == POP:
            if replica_at(w, 0).queued > 0:
                left[count] = slot_at(w, pop(w, 0)).position
                count += 1
        elif operations[step] == WITHDRAW:
            slot = slots[picks[step]]
            # A slot that was freed may hold another request by now.
            if slot >= 0 and slot_at(w, slot).waiting and slot_at(w, slot).position == picks[step]:
                withdraw(w, slot)
        else:
            slot = take_slot(w)
            slots[step] = slot
            slot_at(w, slot).key = operations[step]
            slot_at(w, slot).sequence = step
            slot_at(w, slot).position = step
            slot_at(w, slot).replica = 0
            enqueue(w, slot)
    while first_slot(w, 0) != NOWHERE:
        left[count] = slot_at(w, pop(w, 0)).position
        count += 1
    return count


keys = st.one_of(st.integers(0, 6).map(float), st.floats(0, 10))


@given(st.lists(st.one_of(keys, keys, st.just(POP), st.just(WITHDRAW)), max_size=80), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_who_leaves_a_queue_is_the_smallest_key_and_of_equals_the_first_that_entered(operations, random):
    run = Run(replicas([[[1.0]]]), arrivals([0.0]), deadlines(1.0), Settings())
    run.world["withdrawals"] = True
    picks = np.array([random.randrange(max(step, 1)) for step in range(len(operations))], dtype=np.int64)
    left = np.full(len(operations), -1)
    count = _drive(run.world.record, np.array(operations, dtype=np.float64), picks, left)
    waiting, expected = [], []
    for step, operation in enumerate(operations):
        if operation == POP:
            if waiting:
                waiting.sort()
                expected.append(waiting.pop(0)[1])
        elif operation == WITHDRAW:
            waiting = [pair for pair in waiting if pair[1] != picks[step]]
        else:
            waiting.append((operation, step))
    expected += [step for _, step in sorted(waiting)]
    assert left[:count].tolist() == expected
    replica = run.world.array("replicas")[0]
    assert (replica["queued"], replica["head"], replica["heap"]) == (0, NOWHERE, NOWHERE)
    assert run.world.array("head_key")[0] == np.inf
    assert run.world.array("groups")["work_s"][0] == 0.0
