"""The policies that can be compared, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from evaluator.baselines import LeastLoaded, RandomPlacement, RoundRobin, SelectiveReplication
from evaluator.policy import Decision, Policy, Situation, Undecided
from evaluator.settings import Routing
from foreplan.planning import Inputs, make_plan
from foreplan.polish import PolishSettings
from planner import Settings, Solved
from plans.errors import InvalidInput

__all__ = ["FOREPLAN_ROUTING", "POLICIES", "ForeplanPolicy", "policy"]

FOREPLAN_ROUTING: Routing = "least-finish"
"""How requests find their replica under Foreplan's own plans; `foreplan gateway --routing` offers the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeplanPolicy:
    """Foreplan's own: the ILP, and with ``polish_s`` the search guided by simulation on the history.

    Attributes:
        settings: How to plan.
        polish_s: Seconds for the search; 0 turns it off.
    """

    name: str = "foreplan"
    settings: Settings = field(default_factory=Settings)
    polish_s: float = 0.0

    def decide(self, situation: Situation) -> Decision:
        """Return what should run in ``situation``; see `Policy`."""
        inputs = Inputs(
            cluster=situation.cluster,
            services=situation.services,
            profiles=situation.profiles,
            demand=situation.demand,
            current=situation.current,
        )
        polish = PolishSettings(time_s=self.polish_s)
        result = make_plan(inputs, self.settings, polish, situation.history)
        if not isinstance(result, Solved):
            raise Undecided.of(
                "a feasible problem",
                where=f"policy {self.name}",
                found=type(result).__name__,
                remedy="`foreplan plan` with the same inputs says what conflicts",
            )
        return Decision(plan=result.plan, routing=FOREPLAN_ROUTING)


POLICIES: Mapping[str, Callable[[Settings, float], Policy]] = {
    "foreplan": lambda settings, polish_s: ForeplanPolicy(settings=settings, polish_s=polish_s),
    "ilp": lambda settings, polish_s: ForeplanPolicy(name="ilp", settings=settings),
    "round-robin": lambda settings, polish_s: RoundRobin(),
    "random": lambda settings, polish_s: RandomPlacement(),
    "least-loaded": lambda settings, polish_s: LeastLoaded(),
    "selective-replication": lambda settings, polish_s: SelectiveReplication(),
}
"""Makers of policies by name, from the settings and the polish of Foreplan's own; ``ilp`` is Foreplan's without it."""


def policy(name: str, settings: Settings, polish_s: float) -> Policy:
    """Return the policy called ``name``.

    Raises:
        InvalidInput: There is none.
    """
    if name not in POLICIES:
        raise InvalidInput.of(f"some of {', '.join(POLICIES)}", where="--policies", found=repr(name))
    return POLICIES[name](settings, polish_s)
