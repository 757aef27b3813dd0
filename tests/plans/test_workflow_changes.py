from __future__ import annotations

from plans.service import Workflow
from plans.workflow_changes import WorkflowChange, compare_workflows

SWITCH = [
    {"from": "detect", "to": "read", "probability": 0.5, "bytes": 1000},
    {"from": "detect", "to": "count", "probability": 0.25},
]


def workflow(edges=SWITCH, deadline_s=1.0, name="plates", **fields):
    return Workflow.model_validate({"name": name, "slo": {"deadline": deadline_s}, "edges": edges, **fields})


def changed(before, after):
    return [(one.subject, one.before, one.after) for one in compare_workflows(before, after)]


def test_equal_workflows_do_not_differ_in_whatever_order_they_stand():
    one, other = workflow(), workflow(name="other")
    assert compare_workflows([one, other], [other, one]) == ()


def test_a_workflow_that_comes_or_goes_is_told_whole():
    told = "edge detect -> read, edge detect -> count within 1 s"
    assert compare_workflows([], [workflow()]) == (
        WorkflowChange(workflow="plates", part="", before="none", after=told),
    )
    assert changed([workflow()], []) == [("workflow plates", told, "none")]


def test_fields_and_edges_are_told_one_by_one():
    edges = [SWITCH[0] | {"bytes": 2000}, {"from": "read", "to": "store"}]
    after = workflow([edges[0], edges[1]], deadline_s=2.0, affinity="none", joins={"store": "any"})
    assert changed([workflow()], [after]) == [
        ("workflow plates, slo.deadline_s", "1.0", "2.0"),
        ("workflow plates, affinity", "prefer", "none"),
        (
            "workflow plates, edge detect -> read",
            "fanout 1.0, payload_bytes 1000, probability 0.5",
            "fanout 1.0, payload_bytes 2000, probability 0.5",
        ),
        ("workflow plates, edge detect -> count", "fanout 1.0, payload_bytes 0, probability 0.25", "none"),
        ("workflow plates, joins.store", "none", "any"),
        ("workflow plates, edge read -> store", "none", "fanout 1.0, payload_bytes 0"),
    ]


def test_the_order_of_edges_counts_as_a_switch_takes_the_first_that_fits():
    assert changed([workflow()], [workflow(SWITCH[::-1])]) == [
        (
            "workflow plates, order of edges",
            "edge detect -> read, edge detect -> count",
            "edge detect -> count, edge detect -> read",
        )
    ]


def test_two_edges_between_the_same_services_are_told_apart():
    twice = [{"from": "detect", "to": "read"}, {"from": "detect", "to": "read", "fanout": 2.0}]
    ((subject, was, becomes),) = changed([workflow(twice)], [workflow([twice[0], twice[1] | {"fanout": 3.0}])])
    assert subject == "workflow plates, edge detect -> read (2)"
    assert (was, becomes) == ("fanout 2.0, payload_bytes 0", "fanout 3.0, payload_bytes 0")
