"""The compiled loops of the single pass; `evaluator.single_pass` says what they are for.

They are compiled once per number of pipeline stages and routing policy, so that the walk through the stages is unrolled
and no policy is asked for inside the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numba
import numpy as np
from numpy.typing import NDArray

from evaluator.linking import entry_point
from plans import dispatch

__all__ = ["EARLIEST_FREE", "LEAST_FINISH", "ROUND_ROBIN", "WEIGHTED", "counting_kernel", "recording_kernel"]

EARLIEST_FREE, LEAST_FINISH, WEIGHTED, ROUND_ROBIN = range(4)
"""Routing policies, as the kernels know them."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Indices = NDArray[np.int32]

_next_replica = numba.njit(dispatch.next_replica)


@numba.njit(inline="always")
def _later(one_s: float, other_s: float) -> float:
    return one_s if one_s > other_s else other_s  # noqa: FURB136 - numba's max also looks for NaN


@numba.njit(inline="always")
def _walk(stages: int, entry_s: float, free_s: Floats, stage_s: Floats) -> float:
    """Return when a request leaves the last stage: each begins when the one before is done and it is free."""
    end_s = entry_s
    for stage in range(stages):
        end_s = _later(end_s, free_s[stage]) + stage_s[stage]
    return end_s


@numba.njit(inline="always")
def _choose(
    policy: int,
    stages: int,
    s: int,
    entry_s: float,
    count: Indices,
    group: Indices,
    option: Indices,
    weight: Floats,
    stage_s: Floats,
    free_s: Floats,
    last_s: Floats,
    credit: Floats,
) -> int:
    """Return the host of a request of service ``s``, by its position among the hosts; -1 without one."""
    hosts = count[s]
    chosen = -1
    if policy == WEIGHTED:
        chosen = _next_replica(weight[s, :hosts], credit[s, :hosts])
    elif policy == ROUND_ROBIN:
        if hosts > 0:
            chosen = int(credit[s, 0])
            credit[s, 0] = chosen + 1 if chosen + 1 < hosts else 0
    elif policy == EARLIEST_FREE:
        earliest_s = np.inf
        for host in range(hosts):
            if last_s[group[s, host]] < earliest_s:
                earliest_s = last_s[group[s, host]]
                chosen = host
    else:
        least_s = np.inf
        for host in range(hosts):
            end_s = _walk(stages, entry_s, free_s[group[s, host]], stage_s[option[s, host]])
            if end_s < least_s:
                least_s = end_s
                chosen = host
    return chosen


@cache
def counting_kernel(stages: int, policy: int, plain: bool) -> Callable[..., None]:
    """Return the kernel behind `count_good`.

    Args:
        stages: Pipeline stages, to unroll; 0 for as many as the table has.
        policy: One of the policies above.
        plain: Whether overhead, response and margin are 0, and need not be added to every request.
    """

    @entry_point(stages, policy, plain)
    def count_blocks(
        arrival_s: Floats,
        service: Indices,
        first: Integers,
        count: Indices,
        group: Indices,
        option: Indices,
        weight: Floats,
        stage_s: Floats,
        deadline_s: Floats,
        groups: int,
        overhead_s: float,
        response_s: float,
        margin_s: float,
        good: Integers,
    ) -> None:
        unrolled = stages if stages > 0 else stage_s.shape[1]
        free_s = np.zeros((groups, stage_s.shape[1]))
        last_s = np.zeros(groups)
        credit = np.zeros(weight.shape)
        for b in range(len(first) - 1):
            free_s[:] = 0.0
            last_s[:] = 0.0
            credit[:] = 0.0
            for i in range(first[b], first[b + 1]):
                s = service[i]
                entry_s = arrival_s[i] if plain else arrival_s[i] + overhead_s
                host = _choose(
                    policy, unrolled, s, entry_s, count, group, option, weight, stage_s, free_s, last_s, credit
                )
                if host < 0:
                    continue
                g, o = group[s, host], option[s, host]
                end_s = _walk(unrolled, entry_s, free_s[g], stage_s[o])
                finish_s = end_s if plain else end_s + response_s + margin_s
                if finish_s <= arrival_s[i] + deadline_s[s]:
                    good[s] += 1
                    end_s = entry_s
                    for stage in range(unrolled):
                        end_s = _later(end_s, free_s[g, stage]) + stage_s[o, stage]
                        free_s[g, stage] = end_s
                    last_s[g] = end_s

    return count_blocks


@cache
def recording_kernel(stages: int, policy: int) -> Callable[..., None]:
    """Return the kernel behind `run_single_pass`; arguments as for `counting_kernel`."""

    @entry_point(stages, policy)
    def record(
        arrival_s: Floats,
        service: Indices,
        count: Indices,
        group: Indices,
        option: Indices,
        weight: Floats,
        stage_s: Floats,
        deadline_s: Floats,
        groups: int,
        overhead_s: float,
        response_s: float,
        margin_s: float,
        accepted: NDArray[np.bool_],
        finish_s: Floats,
        chosen: Indices,
        busy_s: Floats,
    ) -> None:
        unrolled = stages if stages > 0 else stage_s.shape[1]
        free_s = np.zeros((groups, stage_s.shape[1]))
        last_s = np.zeros(groups)
        credit = np.zeros(weight.shape)
        for i in range(len(arrival_s)):
            s = service[i]
            entry_s = arrival_s[i] + overhead_s
            host = _choose(policy, unrolled, s, entry_s, count, group, option, weight, stage_s, free_s, last_s, credit)
            chosen[i] = host
            if host < 0:
                continue
            g, o = group[s, host], option[s, host]
            end_s = _walk(unrolled, entry_s, free_s[g], stage_s[o])
            finish_s[i] = end_s + response_s
            if finish_s[i] + margin_s <= arrival_s[i] + deadline_s[s]:
                accepted[i] = True
                end_s = entry_s
                for stage in range(unrolled):
                    end_s = _later(end_s, free_s[g, stage]) + stage_s[o, stage]
                    free_s[g, stage] = end_s
                    busy_s[g, stage] += stage_s[o, stage]
                last_s[g] = end_s

    return record
