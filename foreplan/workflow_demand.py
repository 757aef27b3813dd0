"""The demand of services that workflows call: what a trace of workflows asks of each of their stages."""

from __future__ import annotations

import itertools
import math

from plans.demand import Demand, Rate, ServiceDemand
from plans.service import Edge, Services, Workflow

__all__ = ["mean_calls", "with_stages"]


def with_stages(demand: Demand, services: Services) -> Demand:
    """Return ``demand`` with the mean calls of every stage in place of the workflows that it names.

    Rates add up quantile by quantile, as if the peaks came together. Burstiness is the largest of those that add up;
    tokens are the service's own.
    """
    flows = {workflow.name: workflow for workflow in services.workflows}
    if not flows.keys() & {one.service for one in demand.services}:
        return demand
    parts: dict[str, list[tuple[ServiceDemand, float]]] = {}
    for one in demand.services:
        calls = mean_calls(flows[one.service]) if one.service in flows else {one.service: 1.0}
        for name, times in calls.items():
            parts.setdefault(name, []).append((one, times))
    return demand.model_copy(update={"services": tuple(_sum(name, found) for name, found in parts.items())})


def mean_calls(workflow: Workflow) -> dict[str, float]:
    """Return the calls of each stage per instance, in the mean over the switches; fan-outs are not rounded.

    docs/evaluator.md, section 11: a stage is called as often as the largest of its taken incoming edges says, once
    without any in the workflow. Every combination of the switches is looked at.
    """
    switches: dict[str, list[Edge]] = {}
    for edge in workflow.edges:
        if edge.probability is not None:
            switches.setdefault(edge.source, []).append(edge)
    names = dict.fromkeys(name for edge in workflow.edges for name in (edge.source, edge.target))
    mean = dict.fromkeys(names, 0.0)
    for chosen in itertools.product(*([*edges, None] for edges in switches.values())):
        chance = math.prod(
            1.0 - sum(other.probability or 0.0 for other in edges) if edge is None else edge.probability or 0.0
            for edge, edges in zip(chosen, switches.values(), strict=True)
        )
        taken = [edge for edge in workflow.edges if edge.probability is None or edge in chosen]
        known: dict[str, float] = {}
        for name in names:
            mean[name] += chance * _calls(workflow, taken, name, known)
    return mean


def _calls(workflow: Workflow, taken: list[Edge], name: str, known: dict[str, float]) -> float:
    """Return the calls of stage ``name`` when the edges ``taken`` are taken; ``known`` keeps what was found."""
    if name not in known:
        found = [e.fanout * _calls(workflow, taken, e.source, known) for e in taken if e.target == name]
        first = all(edge.target != name for edge in workflow.edges)
        known[name] = 1.0 if first else max(found, default=0.0)
    return known[name]


def _sum(name: str, parts: list[tuple[ServiceDemand, float]]) -> ServiceDemand:
    own = next((one for one, _ in parts if one.service == name), None)
    rates = tuple(
        Rate(
            mean=sum(one.rate_rps[window].mean * times for one, times in parts),
            quantiles={
                level: sum(one.rate_rps[window].at(float(level)) * times for one, times in parts)
                for level in parts[0][0].rate_rps[window].quantiles
            },
        )
        for window in range(len(parts[0][0].rate_rps))
    )
    cv = max(one.burstiness_cv for one, _ in parts)
    if own is None:
        return ServiceDemand(service=name, burstiness_cv=cv, rate_rps=rates)
    return own.model_copy(update={"burstiness_cv": cv, "rate_rps": rates})
