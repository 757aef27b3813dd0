"""What a placement policy is: demand and state in, a plan and a way of routing out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from evaluator.settings import Routing
from plans.cluster import Cluster
from plans.demand import Demand
from plans.errors import InvalidInput
from plans.plan import Plan
from plans.service import Services
from profiles.library import ProfileLibrary
from traces.table import RequestTrace

__all__ = ["Decision", "Policy", "Situation", "Undecided"]


class Undecided(InvalidInput):
    """A policy finds no plan: nothing fits, or the problem is infeasible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """All that a policy may look at.

    Attributes:
        cluster: The GPUs, the same for every policy that is compared.
        services: What must be served, with the deadlines that everybody is judged by.
        profiles: How long models take.
        demand: Rates to plan for.
        history: Arrivals seen before; the ones that will be judged are not among them.
        current: The running plan, or None when nothing runs.
        seed: Seed of everything random in the policy.
    """

    cluster: Cluster
    services: Services
    profiles: ProfileLibrary
    demand: Demand
    history: RequestTrace
    current: Plan | None = None
    seed: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A placement, and how requests are routed over it."""

    plan: Plan
    routing: Routing = "weighted"


class Policy(Protocol):
    """A way of placing services."""

    @property
    def name(self) -> str:
        """How tables and plots call it."""

    def decide(self, situation: Situation) -> Decision:
        """Return what should run in ``situation``.

        Raises:
            Undecided: Nothing can be placed.
            InvalidInput: The documents contradict each other.
        """
