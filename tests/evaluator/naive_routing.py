"""Sections 4 and 7: which replica a request goes to, and whether it is admitted there."""

from __future__ import annotations

from tests.evaluator.naive_parts import (
    Replica,
    Request,
    uniform,
)
from tests.evaluator.naive_state import State


class Routing(State):
    """The router."""

    # Section 4: routing ----------------------------------------------------------------------------------------------

    def route(self, request: Request) -> bool:
        """Choose the replica; say whether there is one."""
        replicas = [r for g in self.groups for r in g.replicas if r.entry.service == request.service and r.routable]
        if not replicas:
            self.end(request, "failed", "no route")
            return False
        request.replica = self.choose(request, replicas)
        request.replica.outstanding += 1
        return True

    def choose(self, request: Request, replicas: list[Replica]) -> Replica:
        if request.stream is None:
            return self.by_policy(request, replicas)
        stream = request.service, request.stream
        if self.followed.get(stream) not in replicas:
            self.followed[stream] = self.by_policy(request, replicas)
        return self.followed[stream]

    def by_policy(self, request: Request, replicas: list[Replica]) -> Replica:
        policy = self.told.routing
        if policy == "weighted":
            return in_smooth_turns(replicas, [r.weight for r in replicas])
        if policy == "credits":
            return in_smooth_turns(replicas, [r.credit for r in replicas])
        if policy == "corrected":
            return in_smooth_turns(replicas, [self.corrected_weight(r) for r in replicas])
        if policy == "weighted-random":
            return self.at_random(request, replicas)
        if policy == "round-robin":
            turn = self.turn_of[request.service]
            self.turn_of[request.service] += 1
            return replicas[turn % len(replicas)]
        if policy == "shortest-queue":
            return min(replicas, key=lambda r: r.outstanding)
        if policy == "least-finish":
            return min(replicas, key=self.expected_finish_s)
        assert policy == "earliest-free"
        return min(replicas, key=lambda r: r.group.reserved_s[-1])

    def at_random(self, request: Request, replicas: list[Replica]) -> Replica:
        index = request.position if request.instance is None else request.position * 4096 + request.call
        total = 0.0
        for replica in replicas:
            total += replica.weight
        mark = uniform(self.told.seed, 0, index) * total
        cumulated = 0.0
        for replica in replicas:
            cumulated += replica.weight
            if mark < cumulated:
                return replica
        return replicas[-1]

    def expected_finish_s(self, replica: Replica) -> float:
        if self.told.admission == "arrival":
            return self.predicted(replica)[-1] + self.told.response_s
        return self.expected_start_s(replica) + replica.latency_s(1)

    def expected_start_s(self, replica: Replica) -> float:
        free_s = replica.group.first_stage_free_s(self.told.concurrency, self.now)
        return max(self.now, free_s) + replica.group.work_s

    def corrected_weight(self, replica: Replica) -> float:
        part = (self.expected_start_s(replica) - self.now) / self.services[replica.entry.service].deadline_s(1)
        return replica.weight * max(1.0 - part, 0.05)

    # Section 7: admission --------------------------------------------------------------------------------------------

    def predicted(self, replica: Replica) -> list[float]:
        """When each stage would end, after what was accepted before."""
        clock, ends = self.now, []
        for reserved_s, stage_s in zip(replica.group.reserved_s, replica.entry.stage_latency_s[0], strict=True):
            clock = max(clock, reserved_s) + stage_s
            ends.append(clock)
        return ends

    def admits(self, request: Request, replica: Replica) -> bool:
        ends = self.predicted(replica)
        if ends[-1] + self.told.response_s + self.told.admission_margin_s > request.deadline_s:
            return False
        replica.group.reserved_s = ends
        return True


def in_smooth_turns(replicas: list[Replica], weights: list[float]) -> Replica:
    """Everybody gains his weight, the richest (first of equals) is chosen and pays the total."""
    total = 0.0
    for replica, weight in zip(replicas, weights, strict=True):
        replica.balance += weight
        total += weight
    chosen = max(replicas, key=lambda r: r.balance)
    chosen.balance -= total
    return chosen
