"""What a plan assigns to each node, and to the gateways."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping

from executor.state import (
    Backend,
    DesiredGroup,
    DesiredReplica,
    DesiredState,
    GenerationRules,
    ReplicaKey,
    RoutingTable,
    ServiceRoutes,
    Target,
    WorkflowEdge,
    WorkflowRules,
)
from executor.workflow import Structure
from plans.plan import LoadoutEntry, Plan
from plans.service import Workflow
from plans.workflows import least_latencies_s, stages_of, tails_s

__all__ = ["desired_state", "routing_table", "workflow_rules"]


def desired_state(
    plan: Plan, node: str, generation: int, addresses: Mapping[str, str] | None = None, *, underway: bool = False
) -> DesiredState:
    """Return what ``node`` shall run under ``plan``; a node that the plan does not use gets a state without groups.

    ``addresses``: ``host:port`` of every node's agent, for workflows; without them none is run. ``underway``: the plan
    is a stop on the way to that whose digest it carries.
    """
    workflows = _handing_over(plan, node) if addresses else ()
    return DesiredState(
        workflows=workflows,
        handover=_handover(plan, addresses, generation) if addresses and plan.workflows else None,
        generation=generation,
        placement_digest=plan.placement_digest,
        underway=underway,
        node=node,
        groups=tuple(
            DesiredGroup(
                id=group.id,
                gpus=group.gpus,
                tensor_parallel=group.tp,
                pipeline_parallel=group.pp,
                replicas=tuple(
                    DesiredReplica(
                        service=entry.service,
                        variant=entry.variant,
                        max_batch=entry.max_batch,
                        multi_frame=entry.multi_frame,
                        deadline_s=entry.deadline_s,
                        batch_latency_s=tuple(entry.batch_latency_s(batch + 1) for batch in range(entry.max_batch)),
                        memory_bytes=entry.memory_bytes,
                        shape=(group.tp, group.pp),
                        generation=_generation(entry),
                        rate_rps=entry.rate_rps,
                    )
                    for entry in group.loadout
                ),
            )
            for group in plan.groups
            if group.node == node
        ),
    )


def _generation(entry: LoadoutEntry) -> GenerationRules | None:
    """Return how ``entry`` generates; key-value memory is what the plan sets aside beyond the weights."""
    if entry.tokens is None:
        return None
    return GenerationRules(
        ttft_s=entry.tokens.ttft_s,
        tpot_s=entry.tokens.tpot_s,
        kv_bytes=max(0, sum(entry.memory_bytes) - entry.weight_bytes),
        max_prefill_tokens=entry.tokens.max_prefill_tokens,
        prefill_tokens=entry.tokens.prefill_tokens,
        prefill_s=entry.tokens.prefill_s,
    )


def workflow_rules(workflow: Workflow, plan: Plan) -> WorkflowRules:
    """Return ``workflow`` as agents run it, with tails by the replicas of ``plan``."""
    stages = stages_of(workflow)
    return WorkflowRules(
        name=workflow.name,
        deadline_s=workflow.slo.deadline_s,
        edges=tuple(
            WorkflowEdge(
                source=edge.source,
                target=edge.target,
                fanout=edge.fanout,
                probability=edge.probability,
                inputs=tuple(edge.inputs.items()),
                scatter=edge.scatter,
            )
            for edge in workflow.edges
        ),
        stages=stages,
        tails_s=tuple(tails_s(stages, workflow, least_latencies_s(plan))),
        any_joins=frozenset(name for name, join in workflow.joins.items() if join == "any"),
    )


def _handing_over(plan: Plan, node: str) -> tuple[WorkflowRules, ...]:
    """Return the workflows of which ``node`` runs a stage that hands over to others."""
    here = {entry.service for group in plan.groups if group.node == node for entry in group.loadout}
    found = [workflow_rules(workflow, plan) for workflow in plan.workflows]
    return tuple(rules for rules in found if here & {rules.stages[0], *Structure.of(rules).relays})


def _handover(plan: Plan, addresses: Mapping[str, str], generation: int) -> RoutingTable:
    """Return where calls of the stages of workflows go."""
    stages = {stage for workflow in plan.workflows for stage in stages_of(workflow)}
    services = tuple(_service_routes(plan, name, ()) for name in sorted(stages & plan.routes.keys()))
    nodes = sorted({target.node for routes in services for target in routes.targets})
    return RoutingTable(
        generation=generation,
        placement_digest=plan.placement_digest,
        backends=tuple(Backend(node=node, address=addresses[node]) for node in nodes),
        services=services,
    )


def routing_table(
    plan: Plan, addresses: Mapping[str, str], generation: int, *, without: Collection[ReplicaKey] = ()
) -> RoutingTable:
    """Return the routes of ``plan``; a workflow has those of its first stage.

    Args:
        plan: The plan.
        addresses: ``host:port`` of every node's agent.
        generation: The plan's number on this cluster.
        without: Replicas that are not loaded yet. They get no requests, and the others of their service share the
            weight; a service that has only such replicas keeps its entry with no targets.

    Raises:
        KeyError: A node that the plan routes to has no address.
    """
    nodes = {group.node for group in plan.groups}
    return RoutingTable(
        generation=generation,
        placement_digest=plan.placement_digest,
        backends=tuple(Backend(node=node, address=addresses[node]) for node in sorted(nodes)),
        services=(
            *(_service_routes(plan, service, without) for service in sorted(plan.routes)),
            *(_workflow_routes(plan, workflow, without) for workflow in plan.workflows),
        ),
    )


def _workflow_routes(plan: Plan, workflow: Workflow, without: Collection[ReplicaKey]) -> ServiceRoutes:
    first = stages_of(workflow)[0]
    targets = _service_routes(plan, first, without).targets if first in plan.routes else ()
    return ServiceRoutes(service=workflow.name, deadline_s=workflow.slo.deadline_s, targets=targets, stage=first)


def _service_routes(plan: Plan, service: str, without: Collection[ReplicaKey]) -> ServiceRoutes:
    targets = []
    deadlines = []
    first_tokens = []
    for route in plan.routes[service]:
        group = plan.group(route.group)
        entry = group.entry(service)
        if entry is None:  # the plan's own validation excludes it
            continue
        deadlines.append(entry.deadline_s)
        if entry.tokens is not None:
            first_tokens.append(entry.tokens.ttft_s)
        if ReplicaKey(group=group.id, service=service, variant=entry.variant) not in without:
            targets.append(
                Target(
                    group=group.id,
                    node=group.node,
                    weight=route.weight,
                    variant=entry.variant,
                    share_s=max(entry.stage_latency_s[-1]) / entry.max_batch,
                    alone_s=entry.batch_latency_s(1),
                )
            )
    total = math.fsum(target.weight for target in targets)
    return ServiceRoutes(
        service=service,
        deadline_s=min(deadlines, default=0.0),
        first_token_s=min(first_tokens, default=None),
        targets=tuple(
            dataclasses.replace(target, weight=target.weight / total) if without else target for target in targets
        ),
    )
