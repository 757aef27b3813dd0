"""The compiled event loop.

Events are ordered by (time, priority, sequence): at equal times arrivals come before dispatches, so that what arrives
together can be batched together, and otherwise the earlier cause comes first. The dispatch rules are those of
`plans.dispatch`, compiled.
"""

from __future__ import annotations

import heapq
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from plans import dispatch

__all__ = ["DROPPED_DISPLACED", "DROPPED_HOPELESS", "FAILED_UNROUTED", "FINISHED", "simulate"]

FINISHED = 1
DROPPED_HOPELESS = 2
DROPPED_DISPLACED = 3
FAILED_UNROUTED = 4

_next_batch = numba.njit(cache=True)(dispatch.next_batch)
_next_replica = numba.njit(cache=True)(dispatch.next_replica)
_earliest = numba.njit(cache=True)(dispatch.earliest)

_HOPELESS = dispatch.HOPELESS
_DISPLACED = dispatch.DISPLACED


@numba.njit(cache=True)
def simulate(  # noqa: C901 - one loop; calls across jitted functions would copy its state around
    arrival_s: NDArray[np.float64],
    service: NDArray[np.int64],
    deadline_s: NDArray[np.float64],
    overhead_s: float,
    group_of: NDArray[np.int64],
    max_batch: NDArray[np.int64],
    stage_s: NDArray[np.float64],
    total_s: NDArray[np.float64],
    stages: NDArray[np.int64],
    first: NDArray[np.int64],
    weight: NDArray[np.float64],
    service_first: NDArray[np.int64],
    service_replicas: NDArray[np.int64],
) -> tuple[Any, Any, Any, Any, Any]:
    """Run every request to its end.

    Args:
        arrival_s: Shape (request,), sorted: when each request is sent.
        service: Shape (request,): its service.
        deadline_s: Shape (request,): absolute deadline.
        overhead_s: Seconds that gateway and transport add to each request before its queue.
        group_of: As in `evaluator.scenario.Replicas`, and so the following.
        max_batch: Largest batch of each replica.
        stage_s: Stage latencies.
        total_s: Batch latencies.
        stages: Pipeline stages of each group.
        first: Replicas of each group.
        weight: Routing weights.
        service_first: Replicas of each service, as positions in the next.
        service_replicas: Replicas sorted by service.

    Returns:
        Per request: state (FINISHED, DROPPED_*, FAILED_UNROUTED), finish time (of the drop when dropped), replica (-1
        without), batch size (0 without); per group: seconds that each stage was busy, shape (group, stage).
    """
    requests = len(arrival_s)
    groups = len(stages)
    state = np.zeros(requests, dtype=np.int64)
    finish_s = np.full(requests, np.nan)
    replica_of = np.full(requests, -1, dtype=np.int64)
    batch_of = np.zeros(requests, dtype=np.int64)
    busy_s = np.zeros((groups, stage_s.shape[2]))
    free_s = np.zeros((groups, stage_s.shape[2]))
    awake = np.zeros(groups, dtype=np.bool_)  # a dispatch of the group is in the heap
    credit = np.zeros(len(weight))
    # One queue per replica: a doubly linked list through the requests, sorted by deadline.
    head = np.full(len(weight), -1, dtype=np.int64)
    tail = np.full(len(weight), -1, dtype=np.int64)
    queued = np.zeros(len(weight), dtype=np.int64)
    after = np.full(requests, -1, dtype=np.int64)
    before = np.full(requests, -1, dtype=np.int64)
    head_deadline = np.full(len(weight), np.inf)

    events: Any = [(np.float64(0.0), np.int64(0), np.int64(0), np.int64(0))]
    events.clear()
    sequence = 0
    upcoming = 0
    while upcoming < requests or len(events) > 0:
        if upcoming < requests and (len(events) == 0 or arrival_s[upcoming] + overhead_s <= events[0][0]):
            request = upcoming
            upcoming += 1
            now = arrival_s[request] + overhead_s
            choices = service_replicas[service_first[service[request]] : service_first[service[request] + 1]]
            share = credit[choices]
            chosen = _next_replica(weight[choices], share)
            credit[choices] = share
            if chosen < 0:
                state[request] = FAILED_UNROUTED
                finish_s[request] = now
                continue
            replica = choices[chosen]
            replica_of[request] = replica
            place = tail[replica]
            while place >= 0 and deadline_s[place] > deadline_s[request]:
                place = before[place]
            follower = head[replica] if place < 0 else after[place]
            before[request] = place
            after[request] = follower
            if place < 0:
                head[replica] = request
                head_deadline[replica] = deadline_s[request]
            else:
                after[place] = request
            if follower < 0:
                tail[replica] = request
            else:
                before[follower] = request
            queued[replica] += 1
            group = group_of[replica]
            if not awake[group]:
                awake[group] = True
                heapq.heappush(events, (max(now, free_s[group, 0]), 1, sequence, group))
                sequence += 1
            continue

        now, _, _, group = heapq.heappop(events)
        awake[group] = False
        while True:
            local = _earliest(head_deadline[first[group] : first[group + 1]])
            if local < 0:
                break
            replica = first[group] + local
            latency_s = total_s[replica]
            size = _next_batch(now, head_deadline[replica], queued[replica], max_batch[replica], latency_s)
            taken = max(size, 1)
            done_s = now
            if size >= 1:
                start_s = now
                for stage in range(stages[group]):
                    start_s = max(start_s, free_s[group, stage])
                    held_s = stage_s[replica, size - 1, stage]
                    free_s[group, stage] = start_s + held_s
                    busy_s[group, stage] += held_s
                    start_s += held_s
                done_s = start_s
            for _ in range(taken):
                request = head[replica]
                head[replica] = after[request]
                if after[request] >= 0:
                    before[after[request]] = -1
                    head_deadline[replica] = deadline_s[after[request]]
                else:
                    tail[replica] = -1
                    head_deadline[replica] = np.inf
                queued[replica] -= 1
                finish_s[request] = done_s
                batch_of[request] = max(size, 0)
                if size >= 1:
                    state[request] = FINISHED
                else:
                    state[request] = DROPPED_HOPELESS if size == _HOPELESS else DROPPED_DISPLACED
            if size >= 1:
                awake[group] = True
                heapq.heappush(events, (free_s[group, 0], 1, sequence, group))
                sequence += 1
                break
    return state, finish_s, replica_of, batch_of, busy_s
