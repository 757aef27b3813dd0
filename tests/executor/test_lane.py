from __future__ import annotations

import asyncio

import pytest

from executor.errors import QueueFull
from executor.lane import Generating, Lane, TokenRequest
from executor.runtime.protocol import GenerationFacts
from executor.state import GenerationRules, ReplicaKey
from executor.statistics import Counters

KEY = ReplicaKey(group="g", service="chat", variant="v")
FACTS = GenerationFacts(vocabulary=100, max_context=64, kv_bytes_per_token=1, stop_tokens=())


def let_wait(lane: Lane, number: int) -> None:
    answer = asyncio.get_running_loop().create_future()
    sequence = Generating(key=KEY, number=number, arrived_s=0.0, answer=answer, on_token=lambda _: None)
    lane.add(sequence, TokenRequest(prompt=(1,), new_tokens=2))


@pytest.mark.parametrize(("ttft_s", "taken"), [(1.0, 5), (0.2, 1), (10.0, 41)])
def test_a_lane_takes_work_for_twice_the_time_of_a_first_token_and_no_more(ttft_s: float, taken: int) -> None:
    async def scenario() -> None:
        counters = Counters()
        lane = Lane(KEY, FACTS, counters, most_waiting=1024)
        lane.configure(GenerationRules(ttft_s=ttft_s, tpot_s=0.1, kv_bytes=10**6), max_batch=4, latency_s=2.0)
        for number in range(taken):
            let_wait(lane, number)
        with pytest.raises(QueueFull, match="of work wait before it, its first token is due in"):
            let_wait(lane, taken)
        assert (lane.waiting, counters.dropped) == (taken, 1)

    asyncio.run(scenario())


def test_a_lane_lets_no_more_wait_than_its_limit() -> None:
    async def scenario() -> None:
        lane = Lane(KEY, FACTS, Counters(), most_waiting=2)
        lane.configure(GenerationRules(ttft_s=100.0, tpot_s=0.1, kv_bytes=10**6), max_batch=4, latency_s=2.0)
        for number in range(2):
            let_wait(lane, number)
        with pytest.raises(QueueFull, match="2 requests wait already"):
            let_wait(lane, 2)

    asyncio.run(scenario())


def test_a_lane_counts_the_tokens_of_what_it_answered_and_when_the_first_came() -> None:
    async def scenario() -> None:
        counters = Counters()
        lane = Lane(KEY, FACTS, counters, most_waiting=2)
        lane.configure(GenerationRules(ttft_s=100.0, tpot_s=0.1, kv_bytes=10**6), max_batch=4, latency_s=2.0)
        let_wait(lane, 0)
        for now_s in (0.4, 0.5):
            iteration = lane.turn(now_s - 0.1)
            assert iteration is not None
            lane.end(iteration, (3,), 0.1, now_s)()
        assert (counters.prompt_tokens, counters.output_tokens, counters.completed) == (1, 2, 1)
        assert counters.ttft.total_s == pytest.approx(0.4)
        assert counters.tpot.total_s == pytest.approx(0.1)

    asyncio.run(scenario())
