"""What a plan must keep beyond each group: spreading, workflow rates, affinity, required shares, lost nodes, scenarios.

`planner/side_rows.py` states them as inequalities; the numbers are those of docs/formulation.md, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.groups import CandidateGroup, GroupClass
from planner.linear import Floats
from planner.option import Option
from planner.problem import Problem, derived_services
from planner.scenario import sampled_scenarios

__all__ = ["Block", "Call", "Coupling", "Requirements", "SpreadRule", "refined", "requirements_of"]

_LEAST_SHARE = 0.01
"""Most compute that a replica asked for by `min_replicas` has to be given: enough to be a replica that serves."""


_MOST_LOSS_PAIRS = 4_000
"""Nodes times pairs of group and option up to which every loss has a routing of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpreadRule:
    """How the replicas of ``service`` (by position) are spread.

    ``domain_of`` holds, per group, the position of its failure domain among ``domains``, or -1 where the service
    cannot run.
    """

    service: int
    domains: tuple[str, ...]
    domain_of: tuple[int, ...]
    max_skew: int
    min_domains: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Coupling:
    """The rate of ``child`` is the sum of fan-out times rate over its ``callers`` (positions of services)."""

    child: int
    callers: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """An edge of a workflow whose bytes should, or must, stay on one node."""

    source: int
    target: int
    fanout: float
    payload_bytes: int
    required: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Routing of its own over the same replicas: another demand, or the demand as planned with one node lost.

    Attributes:
        name: The scenario, or the node.
        offered_rps: Shape (service,).
        lost_node: The node whose groups serve nothing, or None.
    """

    name: str
    offered_rps: Floats
    lost_node: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """All of it for one planning space.

    Attributes:
        spreads: Services that are spread.
        couplings: Services that only workflows call.
        calls: Edges with an affinity and something to hand over.
        least_rps: Shape (service,): rate that has to be served.
        least_share: Shape (option,): compute share of every replica.
        keep_after_loss: Share of each service's rate that each of ``losses`` must leave possible.
        losses: One block per node, where ``keep_after_loss`` asks for it.
        one_emergency: Whether one routing has to do for every loss, because one for each would be too many variables.
        scenarios: One block per demand scenario.
    """

    spreads: tuple[SpreadRule, ...] = ()
    couplings: tuple[Coupling, ...] = ()
    calls: tuple[Call, ...] = ()
    least_rps: Floats
    least_share: Floats
    keep_after_loss: float = 0.0
    losses: tuple[Block, ...] = ()
    one_emergency: bool = False
    scenarios: tuple[Block, ...] = ()

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Lost nodes, then scenarios."""
        return (*self.losses, *self.scenarios)

    @property
    def restrict(self) -> bool:
        """Whether a placement that keeps memory, compute, blocking, budgets and replicas may still be refused."""
        return bool(
            self.spreads
            or self.couplings
            or self.losses
            or any(call.required for call in self.calls)
            or self.least_rps.any()
            or self.least_share.any()
        )

    @property
    def keeps_idle_replicas(self) -> bool:
        """Whether a replica without a rate may still be needed: for spreading, a lost node or a scenario."""
        return bool(self.spreads or self.blocks)


def requirements_of(
    problem: Problem,
    groups: Sequence[CandidateGroup],
    options: Sequence[Option],
    offered_rps: Floats,
) -> Requirements:
    """Return what ``problem`` asks for; ``offered_rps`` has shape (service,)."""
    names = [service.name for service in problem.services.services]
    position = {name: index for index, name in enumerate(names)}
    settings = problem.settings
    losses = (
        tuple(Block(name=node.name, offered_rps=offered_rps, lost_node=node.name) for node in problem.cluster.nodes)
        if settings.keep_after_loss > 0
        else ()
    )
    return Requirements(
        spreads=tuple(_spreads(problem, groups, options)),
        couplings=tuple(
            Coupling(child=position[name], callers=tuple((position[caller], fanout) for caller, fanout in callers))
            for name, callers in derived_services(problem).items()
        ),
        calls=_calls(problem, position),
        least_rps=offered_rps * (settings.attainment or 0.0),
        least_share=_least_share(problem, options, offered_rps, position),
        keep_after_loss=settings.keep_after_loss,
        losses=losses,
        one_emergency=bool(losses) and _one_emergency(problem, sum(len(group.options) for group in groups)),
        scenarios=tuple(
            Block(name=name, offered_rps=np.array([rates[service] for service in names]))
            for name, rates in sampled_scenarios(problem)
        ),
    )


def refined(
    classes: Sequence[GroupClass], groups: Sequence[CandidateGroup], problem: Problem
) -> tuple[GroupClass, ...]:
    """Split ``classes`` by what the requirements of ``problem`` tell apart: nodes, zones, or nothing."""
    # With one routing for every loss there are too many nodes to tell classes apart by.
    pairs = sum(each.count * len(each.options) for each in classes)
    exact_losses = problem.settings.keep_after_loss > 0 and not _one_emergency(problem, pairs)
    by_node = exact_losses or any(workflow.affinity == "require" for workflow in problem.services.workflows)
    over = {service.spread.over for service in problem.services.services if service.spread is not None}
    if not by_node and not over:
        return tuple(classes)
    zones = {node.name: node.zone for node in problem.cluster.nodes}
    split: list[GroupClass] = []
    for each in classes:
        members: dict[str, list[int]] = {}
        for member in each.members:
            node = groups[member].node
            members.setdefault(node if by_node or "node" in over else zones[node], []).append(member)
        split.extend(replace(each, members=tuple(found)) for found in members.values())
    return tuple(split)


def _one_emergency(problem: Problem, pairs: int) -> bool:
    return len(problem.cluster.nodes) * pairs > _MOST_LOSS_PAIRS


def _spreads(problem: Problem, groups: Sequence[CandidateGroup], options: Sequence[Option]) -> list[SpreadRule]:
    zones = {node.name: node.zone for node in problem.cluster.nodes}
    rules = []
    for index, service in enumerate(problem.services.services):
        if service.spread is None:
            continue
        mine = {position for position, option in enumerate(options) if option.service == service.name}
        labels = [group.node if service.spread.over == "node" else zones[group.node] for group in groups]
        able = [not mine.isdisjoint(group.options) for group in groups]
        domains = tuple(dict.fromkeys(label for label, can in zip(labels, able, strict=True) if can))
        rules.append(
            SpreadRule(
                service=index,
                domains=domains,
                domain_of=tuple(domains.index(label) if can else -1 for label, can in zip(labels, able, strict=True)),
                max_skew=service.spread.max_skew,
                min_domains=service.spread.min_domains,
            )
        )
    return rules


def _calls(problem: Problem, position: dict[str, int]) -> tuple[Call, ...]:
    return tuple(
        Call(
            source=position[edge.source],
            target=position[edge.target],
            fanout=edge.fanout,
            payload_bytes=edge.payload_bytes,
            required=workflow.affinity == "require",
        )
        for workflow in problem.services.workflows
        if workflow.affinity != "none"
        for edge in workflow.edges
        if edge.payload_bytes > 0 or workflow.affinity == "require"
    )


def _least_share(problem: Problem, options: Sequence[Option], offered_rps: Floats, position: dict[str, int]) -> Floats:
    """Return `_LEAST_SHARE`, or a tenth of an even share of the demand where that is less; 0 without min_replicas."""
    least = np.zeros(len(options))
    asked = {service.name: service.min_replicas for service in problem.services.services}
    for index, option in enumerate(options):
        replicas = asked[option.service]
        if replicas:
            wanted = float(offered_rps[position[option.service]]) / option.sustained_rps
            least[index] = min(_LEAST_SHARE, wanted / (10 * replicas))
    return least
