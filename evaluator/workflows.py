"""Workflows, and where their transfers go, as arrays (docs/evaluator.md, section 11)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from plans.cluster import Cluster
from plans.plan import Plan
from plans.service import Services
from plans.workflows import least_latencies_s, stages_of, tails_s

__all__ = ["GroupPlaces", "WorkflowArrays", "compile_workflows", "group_places", "stages_of"]


class WorkflowArrays(NamedTuple):
    """All workflows, one after the other. Stages and edges are numbered within their workflow.

    Attributes:
        stage_first: Shape (workflow + 1,): stages of workflow w are stage_first[w] to stage_first[w + 1].
        edge_first: Shape (workflow + 1,), likewise.
        deadline_s: Shape (workflow,): from arrival to the end of the instance.
        service: Shape (stage,): index of the service in ``Services.services``.
        join_any: Shape (stage,): whether the first input releases the stage.
        tail_s: Shape (stage,): least time that the stages behind it take.
        entry: Shape (stage,): whether no edge leads to the stage.
        source: Shape (edge,): stage that it leaves.
        target: Shape (edge,): stage that it leads to.
        fanout: Shape (edge,): calls per call of the source.
        payload_bytes: Shape (edge,).
        probability: Shape (edge,): of a switch; NaN on edges that are always taken.
    """

    stage_first: NDArray[np.int64]
    edge_first: NDArray[np.int64]
    deadline_s: NDArray[np.float64]
    service: NDArray[np.int64]
    join_any: NDArray[np.bool_]
    tail_s: NDArray[np.float64]
    entry: NDArray[np.bool_]
    source: NDArray[np.int64]
    target: NDArray[np.int64]
    fanout: NDArray[np.float64]
    payload_bytes: NDArray[np.float64]
    probability: NDArray[np.float64]


class GroupPlaces(NamedTuple):
    """Where groups are, as far as transfers between them depend on it.

    Attributes:
        node: Shape (group,): number of the group's node.
        intra_bandwidth: Shape (group,): bytes per second between groups of its node; infinite where none is stated.
        network_bandwidth: Bytes per second between nodes.
        network_latency_s: Seconds that any transfer between nodes takes at least.
    """

    node: NDArray[np.int64]
    intra_bandwidth: NDArray[np.float64]
    network_bandwidth: float
    network_latency_s: float


def compile_workflows(services: Services, plan: Plan) -> WorkflowArrays:
    """Return the arrays of all workflows of ``services``, with tails by the replicas of ``plan``."""
    index = {service.name: position for position, service in enumerate(services.services)}
    least_s = least_latencies_s(plan)
    stages = [stages_of(workflow) for workflow in services.workflows]
    edges = [workflow.edges for workflow in services.workflows]
    tails = [tails_s(each, workflow, least_s) for each, workflow in zip(stages, services.workflows, strict=True)]
    joins = [[flow.joins.get(s) == "any" for s in each] for each, flow in zip(stages, services.workflows, strict=True)]
    entries = [[all(e.target != s for e in own) for s in each] for each, own in zip(stages, edges, strict=True)]
    numbered = [(each.index, edge) for each, own in zip(stages, edges, strict=True) for edge in own]
    return WorkflowArrays(
        stage_first=_offsets([len(each) for each in stages]),
        edge_first=_offsets([len(each) for each in edges]),
        deadline_s=np.array([workflow.slo.deadline_s for workflow in services.workflows], dtype=np.float64),
        service=np.array([index[name] for each in stages for name in each], dtype=np.int64),
        join_any=np.array([flag for each in joins for flag in each], dtype=np.bool_),
        tail_s=np.array([tail for each in tails for tail in each], dtype=np.float64),
        entry=np.array([flag for each in entries for flag in each], dtype=np.bool_),
        source=np.array([number(edge.source) for number, edge in numbered], dtype=np.int64),
        target=np.array([number(edge.target) for number, edge in numbered], dtype=np.int64),
        fanout=np.array([edge.fanout for _, edge in numbered], dtype=np.float64),
        payload_bytes=np.array([edge.payload_bytes for _, edge in numbered], dtype=np.float64),
        probability=np.array(
            [np.nan if edge.probability is None else edge.probability for _, edge in numbered], dtype=np.float64
        ),
    )


def group_places(nodes: Sequence[str], cluster: Cluster | None) -> GroupPlaces:
    """Return the places of groups on ``nodes``, one name per group. Without a cluster transfers take no time."""
    names = list(dict.fromkeys(nodes))
    bandwidths = {node.name: node.intra_bandwidth for node in cluster.nodes} if cluster else {}
    return GroupPlaces(
        node=np.array([names.index(node) for node in nodes], dtype=np.int64),
        intra_bandwidth=np.array([bandwidths.get(node) or np.inf for node in nodes], dtype=np.float64),
        network_bandwidth=cluster.network.bandwidth if cluster else np.inf,
        network_latency_s=cluster.network.latency_s if cluster else 0.0,
    )


def _offsets(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
