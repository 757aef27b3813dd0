"""Workflows at the wire, and what a plan tells nodes and gateways of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor import wire
from executor.assignment import desired_state, routing_table, workflow_rules
from executor.proto import control_pb2 as pb
from executor.state import DesiredState
from plans.errors import InvalidInput
from tests.executor.placements import placement
from tests.executor.test_workflow import workflows
from tests.executor.workflow_site import CHAIN_EDGES, plan, workflow

CHAIN = plan(workflow(*CHAIN_EDGES), {"a/0": {"first": "m"}, "b/0": {"then": "m"}, "c/0": {"last": "m"}})
ADDRESSES = {"a": "a:1", "b": "b:1", "c": "c:1", "d": "d:1"}


@given(flow=workflows(), scatter=st.booleans())
def test_law_decode_after_encode_is_the_identity(flow: Any, scatter: bool) -> None:
    rules = workflow_rules(flow, placement({"a/0": {"s1": "m"}}))
    state = DesiredState(
        generation=3,
        placement_digest="d",
        node="a",
        workflows=(rules,),
        handover=routing_table(CHAIN, ADDRESSES, 3) if scatter else None,
    )
    assert wire.desired_state_from_proto(wire.desired_state_to_proto(state)) == state


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (lambda flow: setattr(flow, "name", ""), "workflows[0].name"),
        (lambda flow: setattr(flow, "deadline_s", 0), "workflows[0].deadline_s"),
        (lambda flow: flow.ClearField("edges"), "workflows[0].edges"),
        (lambda flow: setattr(flow.stages[1], "service", "first"), "workflows[0].stages"),
        (lambda flow: setattr(flow.stages[1], "tail_s", -1.0), "workflows[0].stages[1].tail_s"),
        (lambda flow: setattr(flow.edges[0], "target", "nobody"), "workflows[0].edges[0]"),
        (lambda flow: setattr(flow.edges[1], "target", "first"), "workflows[0].edges[1]"),
        (lambda flow: setattr(flow.edges[0], "fanout", float("inf")), "workflows[0].edges[0].fanout"),
        (lambda flow: setattr(flow.edges[0], "probability", 1.5), "workflows[0].edges[0].probability"),
        (lambda flow: flow.edges[0].MergeFrom(pb.WorkflowEdge(scatter=True)), "workflows[0].edges[0].inputs"),
    ],
)
def test_a_workflow_that_contradicts_itself_is_refused(spoil: Callable[[Any], None], field: str) -> None:
    message = wire.desired_state_to_proto(desired_state(CHAIN, "a", 1, ADDRESSES))
    if field.endswith("inputs"):
        message.workflows[0].edges[0].ClearField("inputs")
    spoil(message.workflows[0])
    with pytest.raises(InvalidInput) as caught:
        wire.desired_state_from_proto(message)
    assert field in {fault.field for fault in caught.value.faults}


def test_nodes_are_told_of_workflows_where_a_stage_hands_over_and_of_routes_everywhere() -> None:
    states = {node: desired_state(CHAIN, node, 4, ADDRESSES) for node in ADDRESSES}
    assert {node: len(state.workflows) for node, state in states.items()} == {"a": 1, "b": 1, "c": 0, "d": 0}
    (table,) = {state.handover for state in states.values()}
    assert table is not None
    assert table.generation == 4
    assert [routes.service for routes in table.services] == ["first", "last", "then"]
    (rules,) = states["a"].workflows
    assert dict(zip(rules.stages, rules.tails_s, strict=True)) == {"first": 0.002, "then": 0.001, "last": 0.0}


def test_a_plan_without_workflows_says_nothing_of_them() -> None:
    bare = CHAIN.model_copy(update={"workflows": ()})
    assert desired_state(bare, "a", 4, ADDRESSES).handover is None
    assert bare.placement_digest != CHAIN.placement_digest
    assert "workflows" not in bare.model_dump()


def test_gateways_send_a_workflow_to_the_replicas_of_its_first_stage() -> None:
    table = routing_table(CHAIN, ADDRESSES, 4)
    flow = table.services[-1]
    assert (flow.service, flow.stage, flow.deadline_s) == ("flow", "first", 60.0)
    assert [target.group for target in flow.targets] == ["a/0"]
    unserved = CHAIN.model_copy(update={"routes": {"then": CHAIN.routes["then"]}})
    assert routing_table(unserved, ADDRESSES, 4).services[-1].targets == ()
