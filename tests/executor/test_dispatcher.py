from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from executor.dispatcher import Dispatcher, DropReason, QueueLimits, Waiting
from executor.errors import QueueFull
from executor.state import ReplicaKey
from plans.dispatch import next_batch

A = ReplicaKey(group="n/0", service="a", variant="v")
B = ReplicaKey(group="n/0", service="b", variant="v")


def waiting(number, deadline_s=math.inf, *, key=A, items=1, payload_bytes=0):
    return Waiting(number=number, key=key, deadline_s=deadline_s, items=items, payload_bytes=payload_bytes)


def dispatcher(max_batch=4, latency_s=None, limits=None):
    made = Dispatcher(limits)
    made.configure(A, max_batch, latency_s or [0.1 * (size + 1) for size in range(max_batch)])
    return made


def numbers(requests):
    return [request.number for request in requests]


def test_an_empty_dispatcher_decides_nothing():
    decision = dispatcher().decide(0.0)
    assert (decision.drops, decision.batch) == ((), None)


def test_the_earliest_deadline_goes_first_whatever_the_order_of_arrival():
    made = dispatcher(max_batch=2)
    for number, deadline_s in enumerate([9.0, 3.0, 5.0]):
        made.add(waiting(number, deadline_s))
    assert numbers(made.decide(0.0).batch.requests) == [1, 2]


def test_equal_deadlines_keep_the_order_of_arrival():
    made = dispatcher(max_batch=8)
    for number in range(5):
        made.add(waiting(number, 7.0))
    assert numbers(made.decide(0.0).batch.requests) == [0, 1, 2, 3, 4]


def test_services_take_turns_by_the_deadline_of_their_heads():
    made = dispatcher()
    made.configure(B, 1, [0.1])
    made.add(waiting(0, 5.0))
    made.add(waiting(1, 4.0, key=B))
    assert made.decide(0.0).batch.key == B
    assert made.decide(0.0).batch.key == A


def test_a_batch_is_no_larger_than_the_head_can_bear():
    made = dispatcher(max_batch=4)
    for number in range(3):
        made.add(waiting(number, 0.25 + number))
    assert made.decide(0.0).batch.items == 2


def test_what_cannot_be_met_any_more_is_dropped_and_the_next_is_served():
    made = dispatcher()
    made.add(waiting(0, 0.05))
    made.add(waiting(1, 5.0))
    decision = made.decide(0.0)
    assert [(drop.request.number, drop.reason) for drop in decision.drops] == [(0, DropReason.HOPELESS)]
    assert numbers(decision.batch.requests) == [1]


def test_a_head_that_cannot_bear_the_full_batch_behind_it_gives_way():
    made = dispatcher(max_batch=2)
    made.add(waiting(0, 0.15))
    made.add(waiting(1, 9.0))
    made.add(waiting(2, 9.0))
    decision = made.decide(0.0)
    assert [(drop.request.number, drop.reason) for drop in decision.drops] == [(0, DropReason.DISPLACED)]
    assert numbers(decision.batch.requests) == [1, 2]


def test_a_request_of_several_items_is_kept_whole():
    made = dispatcher(max_batch=4)
    made.add(waiting(0, 5.0, items=3))
    made.add(waiting(1, 6.0, items=2))
    made.add(waiting(2, 7.0, items=1))
    first = made.decide(0.0).batch
    assert (numbers(first.requests), first.items) == ([0], 3)  # 1 does not fit, and 2 does not overtake it
    assert numbers(made.decide(0.0).batch.requests) == [1, 2]


def test_a_request_of_several_items_needs_the_latency_of_them_all():
    made = dispatcher(max_batch=4)
    made.add(waiting(0, 0.35, items=4))
    assert made.decide(0.0).drops[0].reason is DropReason.HOPELESS


def test_a_cancelled_request_is_not_served():
    made = dispatcher()
    made.add(waiting(0, 5.0))
    made.add(waiting(1, 6.0))
    assert made.cancel(waiting(0, 5.0))
    assert not made.cancel(waiting(0, 5.0))
    assert numbers(made.decide(0.0).batch.requests) == [1]


def test_a_queue_refuses_what_is_beyond_its_limits():
    made = dispatcher(limits=QueueLimits(requests=2, payload_bytes=10))
    made.add(waiting(0, 5.0, payload_bytes=6))
    with pytest.raises(
        QueueFull, match=r"^[^:]+: 6 bytes wait already, and 5 more exceed its queue's limit of 10; send less"
    ):
        made.add(waiting(1, 5.0, payload_bytes=5))
    made.add(waiting(2, 5.0, payload_bytes=4))
    with pytest.raises(QueueFull, match=r"^[^:]+: 2 requests wait already, its queue's limit; send less"):
        made.add(waiting(3, 5.0))


@pytest.mark.parametrize("bad", [waiting(0), waiting(0, math.nan), waiting(0, 1.0, items=5), waiting(0, 1.0, items=0)])
def test_a_request_that_could_never_be_served_is_refused(bad):
    with pytest.raises(ValueError, match="finite deadline"):
        dispatcher().add(bad)


def test_a_smaller_max_batch_returns_the_requests_that_became_too_large():
    made = dispatcher(max_batch=4)
    made.add(waiting(0, 5.0, items=3))
    made.add(waiting(1, 6.0, items=2))
    assert numbers(made.configure(A, 2, [0.1, 0.2])) == [0]
    assert numbers(made.decide(0.0).batch.requests) == [1]


def test_closing_a_queue_returns_what_waited_earliest_deadline_first():
    made = dispatcher()
    made.add(waiting(0, 6.0))
    made.add(waiting(1, 5.0))
    assert numbers(made.close(A)) == [1, 0]
    assert made.close(A) == ()
    with pytest.raises(KeyError):
        made.add(waiting(2, 5.0))


def test_clearing_keeps_the_rules():
    made = dispatcher()
    made.add(waiting(0, 5.0))
    assert numbers(made.clear()) == [0]
    made.add(waiting(1, 5.0))
    assert made.decide(0.0).batch.items == 1


def test_waiting_work_is_counted_in_full_batches():
    made = dispatcher(max_batch=2, latency_s=[1.0, 1.5])
    for number in range(5):
        made.add(waiting(number, 99.0))
    assert made.queue_work_s(A) == pytest.approx(1.5 + 1.5 + 1.0)
    assert made.items(A) == 5


@given(
    st.lists(st.floats(0.0, 3.0), min_size=1, max_size=12),
    st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5).map(sorted),
)
def test_single_items_are_batched_exactly_by_the_shared_rule(deadlines, latency_s):
    made = dispatcher(len(latency_s), latency_s)
    for number, deadline_s in enumerate(deadlines):
        made.add(waiting(number, deadline_s))
    left = sorted(deadlines)
    while left:
        size = next_batch(0.0, left[0], len(left), len(latency_s), latency_s)
        decided = None
        if size > 0:
            decided = made.decide(0.0)
            assert [request.deadline_s for request in decided.batch.requests] == left[:size]
            return
        left.pop(0)
    assert made.decide(0.0).batch is None


class Requests(RuleBasedStateMachine):
    """Law: every request ends exactly once: in a batch, dropped, cancelled, refused or returned."""

    def __init__(self):
        super().__init__()
        self.made = Dispatcher(QueueLimits(requests=6))
        self.max_batch = {A: 3, B: 2}
        for key, size in self.max_batch.items():
            self.made.configure(key, size, [0.2 * (number + 1) for number in range(size)])
        self.now_s = 0.0
        self.inside = {}
        self.count = 0

    @rule(key=st.sampled_from([A, B]), slack_s=st.floats(0.0, 2.0), items=st.integers(1, 3))
    def arrive(self, key, slack_s, items):
        request = waiting(self.count, self.now_s + slack_s, key=key, items=min(items, self.max_batch[key]))
        self.count += 1
        try:
            self.made.add(request)
        except QueueFull:
            assert sum(other.key == key for other in self.inside.values()) == 6
        else:
            self.inside[request.number] = request

    @rule(step_s=st.floats(0.0, 0.5))
    def decide(self, step_s):
        self.now_s += step_s
        decision = self.made.decide(self.now_s)
        for drop in decision.drops:
            request = self.inside.pop(drop.request.number)
            if drop.reason is DropReason.HOPELESS:
                assert self.now_s + 0.2 * request.items > request.deadline_s
            else:
                assert self.now_s + 0.2 * self.max_batch[request.key] > request.deadline_s
        if decision.batch is None:
            assert not self.inside
            return
        batch = decision.batch
        assert sum(request.items for request in batch.requests) == batch.items <= self.max_batch[batch.key]
        for request in batch.requests:
            assert self.inside.pop(request.number) == request
        assert self.now_s + 0.2 * batch.items <= batch.requests[0].deadline_s
        deadlines = [request.deadline_s for request in batch.requests]
        assert deadlines == sorted(deadlines)
        left = [request.deadline_s for request in self.inside.values() if request.key == batch.key]
        assert not left or deadlines[-1] <= min(left)
        assert all(batch.requests[0].deadline_s <= request.deadline_s for request in self.inside.values())

    @precondition(lambda self: self.inside)
    @rule(choice=st.randoms(use_true_random=False))
    def cancel(self, choice):
        request = self.inside.pop(choice.choice(sorted(self.inside)))
        assert self.made.cancel(request)

    @rule(key=st.sampled_from([A, B]))
    def reopen(self, key):
        for request in self.made.close(key):
            del self.inside[request.number]
        self.made.configure(key, self.max_batch[key], [0.2 * (size + 1) for size in range(self.max_batch[key])])

    @invariant()
    def nothing_is_lost(self):
        for key in (A, B):
            assert self.made.queued(key) == sum(request.key == key for request in self.inside.values())


TestRequests = Requests.TestCase
