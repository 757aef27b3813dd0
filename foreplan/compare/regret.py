"""Goodput lost against hindsight: the best placement known for the very trace, and what no placement can exceed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from evaluator import evaluate
from foreplan.compare.policies import FOREPLAN_ROUTING
from foreplan.compare.study import Outcome, Point, Study
from foreplan.planning import Inputs, make_plan
from foreplan.polish import PolishSettings
from foreplan.workflow_demand import with_stages
from planner import Solved
from plans.demand import Demand, Rate
from traces.demand import observed_demand

__all__ = ["Regret", "regret"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Regret:
    """What the recorded trace would have allowed at one point.

    Attributes:
        point: Where.
        best_rps: Goodput, over the time of the trace, of the best placement known: Foreplan's, planned and polished on
            the trace itself, or that of a compared policy where it is better.
        best: Which one it is: ``hindsight`` or the policy's name.
        bound_rps: What no placement exceeds: the proven bound of the ILP at the true mean rates with groups that may
            be busy all the time and no interference. The rate served is concave in the rate offered, so the mean over
            a varying load is not above what the mean load allows. None when no bound was found in time, or when some
            placement did better, because the ILP counts out a model whose latency it estimates too cautiously.
        regret: By policy, the share of ``best_rps`` that it lost, in [0, 1].
    """

    point: Point
    best_rps: float
    best: str
    bound_rps: float | None
    regret: dict[str, float]


def regret(study: Study, outcomes: Sequence[Outcome], point: Point) -> Regret:
    """Return the regret of every outcome at ``point``, on the recorded trace (seed 0).

    Raises:
        InvalidInput: The documents contradict each other.
    """
    there = study.at(point, 0)
    known = {outcome.policy: outcome.samples[0].attainment for outcome in outcomes if outcome.point == point}
    observed = observed_demand(there.served, window_s=there.served.duration_s)
    demand = _mean_rates(with_stages(observed, there.services))
    inputs = Inputs(cluster=there.cluster, services=there.services, profiles=there.profiles, demand=demand)
    candidates = dict(known)
    planned = make_plan(inputs, there.planning, PolishSettings(time_s=there.polish_s), there.served)
    if isinstance(planned, Solved):
        found = evaluate(
            planned.plan,
            there.services,
            there.served,
            settings=replace(there.simulation, routing=FOREPLAN_ROUTING),
            cluster=there.cluster,
            profiles=there.profiles,
            keep_requests=False,
        )
        candidates["hindsight"] = found.summary.attainment or 0.0
    best = max(candidates, key=lambda name: candidates[name])
    offered_rps = len(there.served) / there.served.duration_s
    best_rps = candidates[best] * offered_rps
    bound_rps = _bound_rps(inputs, there, offered_rps)
    return Regret(
        point=point,
        best_rps=best_rps,
        best=best,
        bound_rps=None if bound_rps is None or bound_rps < best_rps * (1 - 1e-9) else bound_rps,
        regret={name: 1 - share / candidates[best] if candidates[best] > 0 else 0.0 for name, share in known.items()},
    )


def _bound_rps(inputs: Inputs, study: Study, offered_rps: float) -> float | None:
    """Return the proven bound on the fluid goodput, with every service weighted alike."""
    services = inputs.services.model_copy(
        update={"services": tuple(each.model_copy(update={"weight": 1.0}) for each in inputs.services.services)}
    )
    settings = replace(study.planning, max_utilisation=1.0, min_utilisation=1.0, blocking="none", headroom_ratio=0.0)
    result = make_plan(replace(inputs, services=services), settings)
    if not isinstance(result, Solved):
        return None
    return min(result.plan.solver.bound, offered_rps)


def _mean_rates(demand: Demand) -> Demand:
    """Return ``demand`` with nothing but means, so that every quantile of it is the true rate."""
    return demand.model_copy(
        update={
            "services": tuple(
                each.model_copy(update={"rate_rps": tuple(Rate(mean=rate.mean) for rate in each.rate_rps)})
                for each in demand.services
            )
        }
    )
