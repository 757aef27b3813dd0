from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans.dispatch import (
    DISPLACED,
    HIGHEST_CREDIT,
    HOPELESS,
    LOWEST_CREDIT,
    corrected_weight,
    credit_after,
    earliest,
    least,
    next_at_random,
    next_batch,
    next_batch_undropped,
    next_by_credit,
    next_in_turn,
    next_replica,
    ready_s,
)

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


@given(st.floats(0, 10), st.floats(0, 12), st.integers(1, 200), latencies)
def test_where_nothing_is_dropped_a_late_head_goes_in_the_largest_batch(now, deadline, queued, latency_s):
    size = next_batch_undropped(now, deadline, queued, len(latency_s), latency_s)
    most = min(queued, len(latency_s))
    if now + latency_s[0] > deadline:
        assert size == most
    else:
        assert now + latency_s[size - 1] <= deadline
        assert size == most or now + latency_s[size] > deadline


@given(st.floats(0, 10), st.floats(0, 5), st.integers(1, 8), st.floats(0, 1), st.floats(0, 1))
def test_a_queue_waits_for_company_until_full_or_the_delay_or_the_deadline(entry, allowed, queued, largest_s, delay_s):
    found = ready_s(entry, entry + allowed, queued, 8, largest_s, delay_s)
    assert found == (entry if queued == 8 else min(entry + delay_s, entry + allowed - largest_s))


weights_with_gaps = st.lists(st.one_of(st.just(0.0), st.floats(0.1, 10)), max_size=6)


@given(weights_with_gaps, st.integers(0, 50))
def test_turns_go_round_the_replicas_in_use(weights, turn):
    usable = [position for position, weight in enumerate(weights) if weight > 0]
    assert next_in_turn(weights, turn) == (usable[turn % len(usable)] if usable else -1)


@given(weights_with_gaps, st.floats(0, 1, exclude_max=True))
def test_chance_falls_into_the_interval_of_a_replica_in_use(weights, chance):
    chosen = next_at_random(weights, chance)
    if not any(weights):
        assert chosen == -1
        return
    assert weights[chosen] > 0
    assert sum(weights[:chosen]) <= chance * sum(weights) + 1e-9
    assert sum(weights[: chosen + 1]) >= chance * sum(weights) - 1e-9


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.integers(0, 3)), max_size=6))
def test_the_least_of_those_in_use_is_the_first_of_equals(replicas):
    in_use = [(value, position) for position, (weight, value) in enumerate(replicas) if weight > 0]
    found = least([weight for weight, _ in replicas], [value for _, value in replicas])
    assert found == (min(in_use)[1] if in_use else -1)


@given(st.lists(st.floats(0.1, 20), min_size=1, max_size=6), st.integers(1, 200))
def test_credits_take_the_place_of_weights(credits_, requests):
    left, right = np.zeros(len(credits_)), np.zeros(len(credits_))
    for _ in range(requests):
        assert next_by_credit([1.0] * len(credits_), credits_, left) == next_replica(credits_, right)
    assert next_by_credit([0.0] * len(credits_), credits_, left) == -1


@given(st.floats(LOWEST_CREDIT, HIGHEST_CREDIT), st.integers(0, 10), st.floats(0, 2), st.floats(0.01, 1))
def test_credit_rises_by_adding_and_falls_by_multiplying_within_its_bounds(credit, waiting, increase, decrease):
    found = credit_after(credit, waiting, 4, increase, decrease)
    assert LOWEST_CREDIT <= found <= HIGHEST_CREDIT
    if waiting <= 4:
        assert found == pytest.approx(min(credit + increase, HIGHEST_CREDIT))
    else:
        assert found == pytest.approx(max(credit * decrease, LOWEST_CREDIT))


@given(st.floats(0, 10), st.floats(0, 100), st.floats(0, 100), st.floats(0.01, 10))
def test_a_weight_falls_with_the_wait_and_keeps_a_twentieth(weight, wait_s, more_s, deadline_s):
    now = corrected_weight(weight, wait_s, deadline_s)
    assert corrected_weight(weight, 0.0, deadline_s) == weight
    assert 0.05 * weight <= now <= weight
    assert corrected_weight(weight, wait_s + more_s, deadline_s) <= now


def test_half_a_deadline_of_waiting_halves_a_weight():
    assert corrected_weight(0.8, 0.5, 1.0) == pytest.approx(0.4)
    assert corrected_weight(0.8, 7.0, 1.0) == pytest.approx(0.04)
