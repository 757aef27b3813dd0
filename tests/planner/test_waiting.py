from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.waiting import waiting_time

services = st.lists(st.tuples(st.floats(1e-3, 1.0), st.floats(0.01, 0.3)), min_size=1, max_size=3)


def mean_s(wait):
    """Return the mean of a wait: the area above its cumulative distribution."""
    return float((1.0 - wait.cumulative[:-1]).sum()) * wait.cell_s


def waits_of_a_fifo_queue(holds_s, utilisations, count, seed):
    """Simulate by Lindley's recursion: W' = max(0, W + S - A)."""
    rng = np.random.default_rng(seed)
    rates = np.array(utilisations) / np.array(holds_s)
    service = rng.choice(len(holds_s), size=count, p=rates / rates.sum())
    steps = np.array(holds_s)[service] - rng.exponential(1 / rates.sum(), count)
    total = np.concatenate([[0.0], np.cumsum(steps)])
    return total - np.minimum.accumulate(total)


def test_an_idle_group_makes_nobody_wait():
    for wait in (waiting_time([], []), waiting_time([0.1], [0.0])):
        assert wait.exceeds(0.0) == 0.0
        assert wait.quantile_s(0.99) == 0.0


@given(services)
def test_the_mean_wait_is_that_of_pollaczek_and_khinchine(shared):
    """Law: E[W] = sum of lambda_j h_j^2 / (2 (1 - rho)), here with lambda_j h_j = beta_j."""
    holds_s, busy = zip(*shared, strict=True)
    expected = sum(h * b for h, b in shared) / (2 * (1 - sum(busy)))
    assert mean_s(waiting_time(holds_s, busy)) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("holds_s", "busy"), [([0.01], [0.7]), ([0.013, 0.19], [0.15, 0.2]), ([0.01, 0.02, 0.5], [0.2, 0.3, 0.3])]
)
def test_tails_are_those_of_a_simulated_queue(holds_s, busy):
    waits = waits_of_a_fifo_queue(holds_s, busy, 400_000, seed=1)
    wait = waiting_time(holds_s, busy)
    for level in (0.5, 0.9, 0.99):
        assert wait.quantile_s(level) == pytest.approx(np.quantile(waits, level), rel=0.08, abs=2 * wait.cell_s)


@given(services, st.floats(0.0, 3.0), st.floats(0.1, 5.0))
def test_the_probability_falls_with_time_and_the_quantile_is_its_inverse(shared, time_s, stretch):
    wait = waiting_time(*zip(*shared, strict=True))
    assert 0 <= wait.exceeds(time_s, stretch=stretch) <= wait.exceeds(time_s / 2, stretch=stretch) <= 1
    assert wait.exceeds(wait.quantile_s(0.9, stretch=stretch), stretch=stretch) <= 0.1 + 1e-9


@given(services)
def test_a_neighbour_never_shortens_the_wait(shared):
    alone = waiting_time([shared[0][0]], [shared[0][1]])
    together = waiting_time(*zip(*shared, strict=True))
    slack_s = 2 * max(alone.cell_s, together.cell_s)
    assert together.quantile_s(0.99) >= alone.quantile_s(0.99) - slack_s


def test_a_saturated_group_has_a_finite_wait():
    wait = waiting_time([0.1], [1.5])
    assert 0 < wait.quantile_s(0.99) < float("inf")
    assert wait.exceeds(-1.0) == 1.0
