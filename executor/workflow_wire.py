"""Workflows at the wire: the part of `executor.wire` that turns their messages into inner types and back."""

from __future__ import annotations

import math
from collections.abc import Iterator

from executor.proto import control_pb2 as pb
from executor.state import WorkflowEdge, WorkflowRules
from executor.wire_fault import fault
from plans.errors import Fault

__all__ = ["workflow_faults", "workflow_from_proto", "workflow_to_proto"]

_MOST_EDGES = 128
"""As in the document: stages and edges are numbered in 8 bits."""


def workflow_to_proto(workflow: WorkflowRules) -> pb.Workflow:
    """Return the message for ``workflow``."""
    return pb.Workflow(
        name=workflow.name,
        deadline_s=workflow.deadline_s,
        stages=[
            pb.WorkflowStage(service=stage, tail_s=tail_s, join_any=stage in workflow.any_joins)
            for stage, tail_s in zip(workflow.stages, workflow.tails_s, strict=True)
        ],
        edges=[
            pb.WorkflowEdge(
                source=edge.source,
                target=edge.target,
                fanout=edge.fanout,
                probability=edge.probability,
                inputs=[pb.TensorMap(input=name, output=output) for name, output in edge.inputs],
                scatter=edge.scatter,
            )
            for edge in workflow.edges
        ],
    )


def workflow_from_proto(message: pb.Workflow) -> WorkflowRules:
    """Return the workflow in ``message``, which has no `workflow_faults`."""
    return WorkflowRules(
        name=message.name,
        deadline_s=message.deadline_s,
        edges=tuple(
            WorkflowEdge(
                source=edge.source,
                target=edge.target,
                fanout=edge.fanout,
                probability=edge.probability if edge.HasField("probability") else None,
                inputs=tuple((tensor.input, tensor.output) for tensor in edge.inputs),
                scatter=edge.scatter,
            )
            for edge in message.edges
        ),
        stages=tuple(stage.service for stage in message.stages),
        tails_s=tuple(stage.tail_s for stage in message.stages),
        any_joins=frozenset(stage.service for stage in message.stages if stage.join_any),
    )


def workflow_faults(workflow: pb.Workflow, field: str) -> Iterator[Fault]:
    """Yield what is wrong with ``workflow``, which stands at ``field`` of the whole message."""
    if not 0 < workflow.deadline_s < math.inf:
        yield fault(f"{field}.deadline_s", workflow.deadline_s, "seconds above 0 and finite")
    if not 1 <= len(workflow.edges) <= _MOST_EDGES:
        yield fault(f"{field}.edges", f"{len(workflow.edges)} edges", f"1 to {_MOST_EDGES}")
    order = [stage.service for stage in workflow.stages]
    if not all(order) or len(set(order)) < len(order):
        yield fault(f"{field}.stages", order, "services, each once")
        return
    for position, stage in enumerate(workflow.stages):
        if not 0 <= stage.tail_s < math.inf:
            yield fault(f"{field}.stages[{position}].tail_s", stage.tail_s, "seconds of at least 0, finite")
    for position, edge in enumerate(workflow.edges):
        here = f"{field}.edges[{position}]"
        if not {edge.source, edge.target} <= set(order) or order.index(edge.source) >= order.index(edge.target):
            yield fault(here, f"{edge.source!r} to {edge.target!r}", "stages, the source before the target")
        if not 0 < edge.fanout < math.inf:
            yield fault(f"{here}.fanout", edge.fanout, "a number above 0, finite")
        if edge.HasField("probability") and not 0 < edge.probability <= 1:
            yield fault(f"{here}.probability", edge.probability, "above 0 and at most 1")
        if edge.scatter and not edge.inputs:
            yield fault(f"{here}.inputs", "none", "what is scattered")
