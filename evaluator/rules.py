"""The rules of `plans.dispatch`, compiled: the very functions that the executor calls; and the seeded draws."""

# mypy: disable-error-code="no-any-return"
# Records and their fields have no types for mypy.

from __future__ import annotations

import math

import numpy as np

from evaluator.memory import compiled, inlined
from plans import dispatch

__all__ = [
    "DRAW_EDGES",
    "DRAW_LATENCY",
    "DRAW_ROUTING",
    "DRAW_SWITCHES",
    "corrected_weight",
    "credit_after",
    "draw",
    "earliest",
    "exponential",
    "least",
    "next_at_random",
    "next_batch",
    "next_batch_undropped",
    "next_by_credit",
    "next_in_turn",
    "next_replica",
    "quantile",
    "ready_s",
]

DRAW_ROUTING = 0
DRAW_LATENCY = 1
DRAW_SWITCHES = 2
DRAW_EDGES = 3

corrected_weight = inlined(dispatch.corrected_weight)
credit_after = inlined(dispatch.credit_after)
earliest = inlined(dispatch.earliest)
least = inlined(dispatch.least)
next_at_random = inlined(dispatch.next_at_random)
next_batch = inlined(dispatch.next_batch)
next_batch_undropped = inlined(dispatch.next_batch_undropped)
next_by_credit = inlined(dispatch.next_by_credit)
next_in_turn = inlined(dispatch.next_in_turn)
next_replica = inlined(dispatch.next_replica)
ready_s = inlined(dispatch.ready_s)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_30, _27, _31, _11, _1 = (np.uint64(bits) for bits in (30, 27, 31, 11, 1))
_UNIT = 2.0**-53


@compiled
def _mix(z: np.uint64) -> np.uint64:
    """Return the output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    z = (z ^ (z >> _30)) * _FIRST
    z = (z ^ (z >> _27)) * _SECOND
    return z ^ (z >> _31)


@compiled
def draw(seed: np.uint64, purpose: int, index: int) -> float:
    """Return the draw from [0, 1) that belongs to (seed, purpose, index), whatever was drawn before."""
    h = _mix(seed + _GOLDEN)
    h = _mix(h + _GOLDEN * (np.uint64(purpose) + _1))
    h = _mix(h + _GOLDEN * (np.uint64(index) + _1))
    return float(h >> _11) * _UNIT


@compiled
def quantile(at_0: float, at_50: float, at_95: float, at_99: float, u: float) -> float:
    """Return the quantile at ``u`` of a distribution that is linear between four of its quantiles, then constant."""
    if u <= 0.5:
        return at_0 + (at_50 - at_0) * u / 0.5
    if u <= 0.95:
        return at_50 + (at_95 - at_50) * (u - 0.5) / (0.95 - 0.5)
    if u <= 0.99:
        return at_95 + (at_99 - at_95) * (u - 0.95) / (0.99 - 0.95)
    return at_99


@compiled
def exponential(u: float) -> float:
    """Return the quantile at ``u`` of the exponential distribution with mean 1."""
    return -math.log(1.0 - u)
