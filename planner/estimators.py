"""Latency of a job that several identical replicas share, from queueing theory: the three estimators of Faro.

docs/formulation.md, section 10, states them. Each takes the arrival rate, the time that one request takes and the
number of replicas. For plans, the simulator predicts instead; these are
for the separable problem of `planner.quota`, where a formula is needed per (job, replicas).
"""

from __future__ import annotations

import math
from typing import Literal

__all__ = ["Estimator", "erlang_c", "estimate_latency_s", "mdc_latency_s", "relaxed_mdc_latency_s", "upper_bound_s"]

Estimator = Literal["upper-bound", "mdc", "relaxed-mdc"]

_RELAXED_FROM = 0.95
"""Utilisation beyond which the relaxed estimate grows in proportion to the rate."""


def estimate_latency_s(
    estimator: Estimator, rate_rps: float, request_s: float, replicas: int, percentile: float = 99.0
) -> float:
    """Return what ``estimator`` says, in seconds; infinite where it knows no finite answer."""
    if estimator == "upper-bound":
        return upper_bound_s(rate_rps, request_s, replicas)
    if estimator == "mdc":
        return mdc_latency_s(rate_rps, request_s, replicas, percentile)
    return relaxed_mdc_latency_s(rate_rps, request_s, replicas, percentile)


def upper_bound_s(rate_rps: float, request_s: float, replicas: int) -> float:
    """Return rate * time / replicas, as if a second's requests all came at once and were served last: (10.5)."""
    return rate_rps * request_s / replicas if replicas > 0 else math.inf


def erlang_c(offered_load: float, servers: int) -> float:
    """Return the probability of having to wait in M/M/c at ``offered_load`` (rate * time) below ``servers``.

    By the recursion of Erlang B over the servers, which stays in range for any number (A. K. Erlang, 1917).
    """
    if offered_load >= servers:
        return 1.0
    blocked = 1.0
    for count in range(1, servers + 1):
        blocked = offered_load * blocked / (count + offered_load * blocked)
    return blocked / (1.0 - offered_load / servers * (1.0 - blocked))


def mdc_latency_s(rate_rps: float, request_s: float, replicas: int, percentile: float) -> float:
    """Return a percentile of the latency in M/D/c, its wait taken as half that of M/M/c; infinite from saturation on.

    With C the probability of waiting and E[W] the mean wait in M/M/c, the q-th percentile of the wait is
    W_q = max(0, (E[W] / C) ln(100 C / (100 - q))), and the latency is time + W_q / 2: (10.6).

    Args:
        rate_rps: Arrivals, requests per second.
        request_s: Time of one request on a replica, seconds.
        replicas: Number of replicas.
        percentile: q, between 0 and 100, both excluded.
    """
    load = rate_rps * request_s
    if replicas <= 0 or load >= replicas:
        return math.inf
    waiting = erlang_c(load, replicas)
    if waiting <= 0:
        return request_s
    # E[W] / C is the mean wait of those who wait.
    wait_s = max(0.0, request_s / (replicas - load) * math.log(100.0 * waiting / (100.0 - percentile)))
    return request_s + wait_s / 2.0


def relaxed_mdc_latency_s(rate_rps: float, request_s: float, replicas: int, percentile: float) -> float:
    """Return `mdc_latency_s` up to a utilisation of 0.95, beyond it that value times rate over the rate there: (10.7).

    So a job that is overloaded still has a slope: one replica more always helps.
    """
    if replicas <= 0:
        return math.inf
    edge_rps = _RELAXED_FROM * replicas / request_s
    if rate_rps <= edge_rps:
        return mdc_latency_s(rate_rps, request_s, replicas, percentile)
    return mdc_latency_s(edge_rps, request_s, replicas, percentile) * rate_rps / edge_rps
