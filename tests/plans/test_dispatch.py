from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from plans.dispatch import DISPLACED, HOPELESS, earliest, next_batch, next_replica

latencies = st.lists(st.floats(0.001, 0.1), min_size=1, max_size=32).map(lambda values: np.cumsum(values))


@given(st.floats(0, 10), st.floats(0, 12), st.integers(1, 200), latencies)
def test_a_batch_always_meets_the_head_and_is_as_large_as_it_may_be(now, deadline, queued, latency_s):
    max_batch = len(latency_s)
    size = next_batch(now, deadline, queued, max_batch, latency_s)
    if size >= 1:
        assert now + latency_s[size - 1] <= deadline
        assert size == min(queued, max_batch) or now + latency_s[size] > deadline
    elif size == HOPELESS:
        assert now + latency_s[0] > deadline
    else:
        assert size == DISPLACED
        assert queued > max_batch
        assert now + latency_s[0] <= deadline < now + latency_s[max_batch - 1]


@given(st.floats(0, 10), st.floats(0, 12), st.integers(1, 32), latencies)
def test_nobody_gives_way_when_no_full_batch_waits_behind(now, deadline, queued, latency_s):
    size = next_batch(now, deadline, min(queued, len(latency_s)), len(latency_s), latency_s)
    assert size != DISPLACED


@given(st.lists(st.one_of(st.floats(0, 100), st.just(math.inf)), max_size=8))
def test_the_earliest_head_is_the_first_smallest(deadlines):
    expected = deadlines.index(min(deadlines)) if deadlines and min(deadlines) < math.inf else -1
    assert earliest(deadlines) == expected


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6), st.integers(1, 300))
def test_every_replica_gets_its_share_to_within_one_request(weights, requests):
    credit = np.zeros(len(weights))
    counts = np.zeros(len(weights))
    chosen = [next_replica(weights, credit) for _ in range(requests)]
    if sum(weights) == 0:
        assert set(chosen) == {-1}
        return
    for position in chosen:
        counts[position] += 1
    shares = np.array(weights) / sum(weights) * requests
    assert (np.abs(counts - shares) < len(weights)).all()
    assert counts[np.array(weights) == 0].sum() == 0


def test_two_to_one_alternates_without_bursts():
    credit = np.zeros(2)
    assert [next_replica([2.0, 1.0], credit) for _ in range(6)] == [0, 1, 0, 0, 1, 0]
