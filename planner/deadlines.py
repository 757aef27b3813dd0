"""What each service has to keep: its own SLO, and its part of the end-to-end deadlines of the workflows it is in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter

from planner.problem import Problem
from plans.cluster import Network
from plans.demand import ServiceDemand
from plans.service import Edge, Workflow

__all__ = ["Target", "longest_through", "parts_of", "stages", "targets", "time_for_stages_s", "transfer_s"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A service's deadline in seconds, and the share of its requests that has to meet it, in (0, 1)."""

    deadline_s: float
    attainment: float


def targets(problem: Problem, demands: Mapping[str, ServiceDemand]) -> dict[str, Target]:
    """Return what every service has to keep: (3.4) and (3.5) of docs/formulation.md.

    A workflow's deadline, less the transfers on the path where they take longest, is split over its services: as the
    problem says, or else in proportion to their least latencies, for each along the longest path through it. So the
    parts of any path sum to at most the whole. Its miss rate is split evenly over the longest chain (union bound).
    """
    found = {}
    for service in problem.services.services:
        demand = demands.get(service.name)
        deadline_s = service.deadline_s(None if demand is None else demand.output_tokens)
        found[service.name] = Target(deadline_s=deadline_s, attainment=service.slo.attainment)
    for workflow in problem.services.workflows:
        for name, part in parts_of(problem, workflow, demands).items():
            found[name] = Target(
                deadline_s=min(found[name].deadline_s, part.deadline_s),
                attainment=max(found[name].attainment, part.attainment),
            )
    return found


def transfer_s(network: Network, edge: Edge) -> float:
    """Return the seconds that handing over what ``edge`` carries takes from one node to another."""
    return network.latency_s + edge.payload_bytes / network.bandwidth


def stages(workflow: Workflow) -> tuple[str, ...]:
    """Return the services of ``workflow`` in the order in which its edges name them."""
    return tuple(dict.fromkeys(name for edge in workflow.edges for name in (edge.source, edge.target)))


def time_for_stages_s(problem: Problem, workflow: Workflow) -> float:
    """Return the end-to-end deadline less the transfers on the path where they take longest; at least 0."""
    transfers_s = {(edge.source, edge.target): transfer_s(problem.cluster.network, edge) for edge in workflow.edges}
    nothing = dict.fromkeys(stages(workflow), 0.0)
    return max(0.0, workflow.slo.deadline_s - max(longest_through(workflow, nothing, transfers_s).values()))


def parts_of(problem: Problem, workflow: Workflow, demands: Mapping[str, ServiceDemand]) -> dict[str, Target]:
    """Return the part of every stage of ``workflow``: (3.4) and (3.5)."""
    names = stages(workflow)
    shares = problem.deadline_shares.get(workflow.name)
    if shares is None:
        least_s = {name: _least_latency_s(problem, name, demands.get(name)) for name in names}
        through_s = longest_through(workflow, least_s, {})
        shares = {name: least_s[name] / through_s[name] for name in names}
    left_s = time_for_stages_s(problem, workflow)
    chain = max(longest_through(workflow, dict.fromkeys(names, 1.0), {}).values())
    attainment = 1.0 - (1.0 - workflow.slo.attainment) / chain
    return {name: Target(deadline_s=left_s * shares[name], attainment=attainment) for name in names}


def longest_through(
    workflow: Workflow, stage: Mapping[str, float], edge_cost: Mapping[tuple[str, str], float]
) -> dict[str, float]:
    """Return, per stage, the cost of the dearest path of the workflow that leads through it."""
    before: dict[str, list[str]] = {name: [] for name in stage}
    after: dict[str, list[str]] = {name: [] for name in stage}
    for edge in workflow.edges:
        before[edge.target].append(edge.source)
        after[edge.source].append(edge.target)
    order = list(TopologicalSorter(before).static_order())
    upto: dict[str, float] = {}
    for name in order:
        upto[name] = stage[name] + max(
            (upto[other] + edge_cost.get((other, name), 0.0) for other in before[name]), default=0.0
        )
    onward: dict[str, float] = {}
    for name in reversed(order):
        onward[name] = stage[name] + max(
            (onward[other] + edge_cost.get((name, other), 0.0) for other in after[name]), default=0.0
        )
    return {name: upto[name] + onward[name] - stage[name] for name in stage}


def _least_latency_s(problem: Problem, name: str, demand: ServiceDemand | None) -> float:
    """Return the least 99th percentile of any of a service's options at the smallest batch; 1 without a profile."""
    service = problem.services.service(name)
    tokens = (None, None) if demand is None else (demand.input_tokens, demand.output_tokens)
    found = []
    for gpu_type in sorted({node.gpus.type for node in problem.cluster.nodes}):
        for variant in service.variants:
            for tp, pp in problem.profiles.parallelisms(variant.model, gpu_type):
                model = problem.profiles.latency(
                    variant.model, gpu_type, tp, pp, input_tokens=tokens[0], output_tokens=tokens[1]
                )
                if model is not None and variant.accuracy >= service.min_accuracy:
                    found.append(model.at(model.batches[0]).p99_s)
    return min(found, default=1.0)
