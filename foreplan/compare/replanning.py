"""A policy that plans again and again while the simulation runs, from what it has just seen."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from evaluator.control import Observation, Turn
from evaluator.policy import Policy, Situation, Undecided
from foreplan.workflow_demand import with_stages
from plans.cluster import Cluster
from plans.demand import Demand, Rate, ServiceDemand
from plans.plan import Plan

__all__ = ["Replanner"]


class Replanner:
    """Asks ``policy`` for a plan at the rates since the last time; an `evaluator.control.Controller`.

    The time that the policy takes is charged to the simulation: its plan is known only then. Nodes that are known to be
    down are left out.

    Args:
        policy: Decides.
        situation: What it was given at the start; burstiness and tokens stay as they were there.
        clock: The time in seconds, to charge for.
    """

    def __init__(self, policy: Policy, situation: Situation, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._policy = policy
        self._situation = situation
        self._clock = clock

    def observe(self, observation: Observation) -> Turn | None:
        """Return the policy's plan for the rates seen, or None when it would change nothing or has none."""
        started_s = self._clock()
        situation = replace(
            self._situation,
            cluster=_without(self._situation.cluster, observation.down),
            demand=with_stages(_seen(self._situation.demand, observation), self._situation.services),
            current=observation.plan,
        )
        if not situation.cluster.nodes:
            return None
        try:
            plan = self._policy.decide(situation).plan
        except Undecided:
            return None
        if _running(plan) == _running(observation.plan):
            return None
        return Turn(plan=plan, solve_s=self._clock() - started_s)


def _seen(planned: Demand, observation: Observation) -> Demand:
    length_s = observation.now_s - observation.since_s
    services = tuple(
        ServiceDemand(
            service=name,
            burstiness_cv=before.burstiness_cv if (before := planned.of(name)) else 1.0,
            streams=before.streams if before else None,
            input_tokens=before.input_tokens if before else None,
            output_tokens=before.output_tokens if before else None,
            rate_rps=(Rate(mean=seen.arrived / length_s),),
        )
        for name, seen in observation.services.items()
    )
    return Demand(window_s=length_s, start_s=observation.now_s, method="last interval", services=services)


def _running(plan: Plan) -> object:
    """Return what nodes run and gateways do under ``plan``; planned rates alone change neither."""
    groups = [
        (group.id, group.tp, group.pp, [(one.service, one.variant, one.max_batch) for one in group.loadout])
        for group in plan.groups
    ]
    return groups, plan.routes


def _without(cluster: Cluster, down: frozenset[str]) -> Cluster:
    if not down:
        return cluster
    return cluster.model_copy(update={"nodes": tuple(node for node in cluster.nodes if node.name not in down)})
