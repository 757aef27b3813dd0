"""The engine against queueing theory, over two million arrivals each.

In each case the mean wait is known exactly; with fixed seeds the runs are what they are.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from evaluator import Settings
from tests.evaluator.arrays import arrivals, deadlines, finished, latencies_s, replicas

ARRIVALS = 2_000_000
NEVER_S = 1e9


def poisson(rate_rps, seed):
    return arrivals(np.cumsum(np.random.default_rng(seed).exponential(1 / rate_rps, ARRIVALS)))


def mean_latency_s(table, rate_rps, *, seed, interference=None, **settings):
    hosts = replicas(table, interference=interference)
    run = finished(Settings(seed=seed, **settings), hosts, poisson(rate_rps, seed), deadlines(NEVER_S))
    return latencies_s(run).mean()


def pollaczek_khinchine_s(rho, service_s, squared_cv):
    """Mean wait of M/G/1: rho / (1 - rho) * (1 + cv^2) / 2 * service time."""
    return rho / (1 - rho) * (1 + squared_cv) / 2 * service_s


@pytest.mark.parametrize("rho", [0.5, 0.7])
@pytest.mark.parametrize(("latency", "squared_cv"), [("mean", 0.0), ("exponential", 1.0)])
def test_one_server_waits_as_pollaczek_and_khinchine_say(latency, squared_cv, rho):
    wait_s = mean_latency_s([[[1.0]]], rho, seed=1, latency=latency) - 1.0
    assert wait_s == pytest.approx(pollaczek_khinchine_s(rho, 1.0, squared_cv), rel=0.01)


def erlang_c_wait_s(servers, offered):
    """Mean wait of M/M/c with a mean service time of 1: C(c, a) / (c - a)."""
    blocked = 1.0
    for n in range(1, servers + 1):
        blocked = offered * blocked / (n + offered * blocked)
    waits = blocked / (1 - offered / servers * (1 - blocked))
    return waits / (servers - offered)


def deterministic_wait_s(servers, offered):
    """Mean wait of M/D/c with a service time of 1, from Crommelin's chain (POEEJ 1932).

    Whoever is in service at t is gone at t + 1, and nobody else: N(t + 1) = max(N(t) - c, 0) + arrivals in 1. The chain
    has the distribution of N at any time; its mean less those in service are those that wait; Little's law.
    """
    most = 400
    counts = np.arange(most)
    arrive = np.exp(counts * math.log(offered) - offered - np.array([math.lgamma(n + 1) for n in counts]))
    share = arrive.copy()
    for _ in range(2_000):
        stay = np.concatenate([[share[: servers + 1].sum()], share[servers + 1 :]])
        share = np.convolve(stay, arrive)[:most]
    share /= share.sum()
    return (share @ counts - offered) / offered


@pytest.mark.parametrize(("latency", "expected_s"), [("exponential", erlang_c_wait_s), ("mean", deterministic_wait_s)])
@pytest.mark.parametrize("servers", [2, 4])
def test_concurrent_batches_without_interference_are_servers(latency, expected_s, servers):
    offered = 0.8 * servers
    latency_s = mean_latency_s(
        [[[1.0]]], offered, seed=2, latency=latency, concurrency=servers, interference=np.ones((1, servers))
    )
    assert latency_s - 1.0 == pytest.approx(expected_s(servers, offered), rel=0.02)


@pytest.mark.parametrize("stages", [(1.0, 0.4), (0.4, 1.0), (0.5, 1.0, 0.7)])
def test_stages_in_tandem_wait_as_the_slowest_alone(stages):
    """Deterministic servers in tandem keep a request as long, in all, as the slowest (Friedman, Oper. Res. 1965)."""
    rho = 0.7
    wait_s = mean_latency_s([[stages]], rho, seed=3) - sum(stages)
    assert wait_s == pytest.approx(pollaczek_khinchine_s(rho, 1.0, 0.0), rel=0.01)


def test_a_server_that_takes_all_that_waits_makes_them_wait_half_a_service():
    """Unlimited batches of fixed time: who finds it busy waits half of it on average; who does not, starts at once.

    A service (1) is followed by an idle time (mean 1 / rate) when nobody arrived meanwhile, with exp(-rate).
    """
    for rate_rps in (0.5, 3.0):
        wait_s = mean_latency_s(np.ones((1, 64, 1)), rate_rps, seed=4, early_drop=False) - 1.0
        busy = 1 / (1 + math.exp(-rate_rps) / rate_rps)
        assert wait_s == pytest.approx(busy / 2, rel=0.01)


def test_a_random_split_of_a_poisson_stream_feeds_servers_that_know_nothing_of_each_other():
    """Weighted-random routing thins the stream: each server is an M/D/1 of its own share."""
    hosts = replicas(np.ones((2, 1, 1)), group_of=(0, 1), service_of=(0, 0), weight=(0.3, 0.7))
    run = finished(Settings(seed=5, routing="weighted-random"), hosts, poisson(1.0, 5), deadlines(NEVER_S))
    latency_s, replica = latencies_s(run), run.world.array("log_replica")
    for position, share in enumerate((0.3, 0.7)):
        wait_s = latency_s[replica == position].mean() - 1.0
        assert wait_s == pytest.approx(pollaczek_khinchine_s(share, 1.0, 0.0), rel=0.015)
