from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from executor.dispatcher import QueueLimits
from executor.errors import Hopeless, QueueFull, ReplicaUnavailable
from executor.state import ReplicaKey
from executor.statistics import Counters
from executor.whole_requests import Pending, ReplicaRules, WholeRequests

KEY = ReplicaKey(group="g", service="video", variant="v")


class Queue:
    """The requests of one replica that bundles four frames, on a clock of its own."""

    def __init__(self, *, largest_s: float = 0.01, **limits: int) -> None:
        rules = {KEY: ReplicaRules(max_batch=8, latency_s=(largest_s,) * 8, frames=4, stages=1, generation=None)}
        self.rules = rules
        self.counters = Counters()
        self.now_s = 0.0
        self.ready = asyncio.Event()
        limit = QueueLimits(**limits)
        self.requests = WholeRequests(rules, {KEY: self.counters}, limit, lambda: self.now_s, self.ready.set)
        self.requests.configure(KEY)
        self.ready.clear()

    def submit(self, stream: str = "", *, deadline_s: float = 1e3, priority: int = 5, size_bytes: int = 4) -> Pending:
        inputs = {"x": np.zeros((1, size_bytes), np.uint8)}
        return self.requests.submit(KEY, inputs, 1, deadline_s, priority=priority, stream=stream)


def inside_a_loop(scenario: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def test() -> None:
        asyncio.run(scenario())

    test.__name__ = scenario.__name__
    return test


@inside_a_loop
async def test_frames_that_gather_count_against_the_limits_of_their_queue() -> None:
    queue = Queue(requests=3, payload_bytes=100)
    for number in range(3):
        queue.submit(f"stream {number}")
    for stream in ("another", ""):
        with pytest.raises(QueueFull, match="3 requests"):
            queue.submit(stream)
    assert (queue.requests.queued(KEY), queue.counters.dropped) == (3, 2)


@inside_a_loop
async def test_bytes_of_frames_that_gather_count_too() -> None:
    queue = Queue(requests=100, payload_bytes=100)
    queue.submit("a", size_bytes=60)
    with pytest.raises(QueueFull, match="60 bytes wait already, and 41 more"):
        queue.submit("b", size_bytes=41)
    queue.submit("b", size_bytes=40)


@inside_a_loop
async def test_a_bundle_that_was_let_in_frame_by_frame_enters_its_queue_at_the_limit() -> None:
    queue = Queue(requests=4, payload_bytes=16)
    pending = [queue.submit("a") for _ in range(4)]
    assert queue.requests.next() == pending


@inside_a_loop
async def test_work_that_gathers_before_a_request_can_make_it_hopeless() -> None:
    queue = Queue(largest_s=1.0)
    for number in range(24):
        queue.submit(f"stream {number}", deadline_s=1.5)
    with pytest.raises(QueueFull, match=r"3\.000 s of work wait before it"):
        queue.submit(deadline_s=1.4, priority=9)
    queue.submit(deadline_s=1.4)  # all of it has more time than this one


@inside_a_loop
async def test_a_bundle_that_is_not_full_enters_while_its_first_frame_can_still_be_served() -> None:
    queue = Queue(largest_s=9.99)
    frame = queue.submit("a", deadline_s=10.0)
    queue.now_s = 0.009
    async with asyncio.timeout(60):
        await queue.ready.wait()
    assert queue.requests.next() == [frame]


@inside_a_loop
async def test_clients_that_go_away_take_their_frames_with_them() -> None:
    queue = Queue(requests=8)
    gathering = [queue.submit(f"stream {number}") for number in range(4)]
    queued = [queue.submit("full") for _ in range(4)]
    for pending in (*gathering, *queued[1:]):
        queue.requests.cancel(pending)
    assert queue.requests.queued(KEY) == 1
    assert queue.counters.dropped == 7
    assert queue.requests.next() == queued[:1]
    assert queue.requests.next() == []


@inside_a_loop
async def test_a_request_whose_time_is_over_is_told_so_and_not_to_send_less() -> None:
    queue = Queue()
    queue.now_s = 5.0
    with pytest.raises(Hopeless, match="the deadline has passed"):
        queue.submit(deadline_s=4.999)
    assert (queue.requests.queued(KEY), queue.counters.dropped) == (0, 1)


@inside_a_loop
async def test_a_client_that_leaves_after_its_answer_was_there_is_counted_once() -> None:
    queue = Queue()
    failed, gone = queue.submit(), queue.submit()
    assert queue.requests.next() == [failed, gone]
    queue.requests.settle([failed], ReplicaUnavailable("its worker was lost"))
    gone.answer.cancel()
    for pending in (failed, gone):
        queue.requests.cancel(pending)
    assert (queue.counters.failed, queue.counters.dropped) == (1, 1)
    assert failed.answer.exception() is not None


@pytest.mark.parametrize("closed_before", [False, True])
def test_what_was_to_run_alone_fails_with_its_replica(closed_before: bool) -> None:
    async def scenario() -> None:
        queue = Queue()
        pending = queue.submit()
        assert queue.requests.next() == [pending]
        if closed_before:
            queue.requests.close(KEY, "it left the plan")
            del queue.rules[KEY]
        queue.requests.run_alone([pending])
        if not closed_before:
            queue.requests.close(KEY, "it left the plan")
        assert isinstance(pending.answer.exception(), ReplicaUnavailable)
        assert queue.requests.next() == []

    asyncio.run(scenario())
