from __future__ import annotations

import pytest
from pydantic import ValidationError

from plans import Services


def services(**workflow):
    return Services.model_validate(
        {
            "services": [
                {"name": name, "slo": {"deadline": 1}, "variants": [{"model": "m"}]}
                for name in ("detect", "read", "sort")
            ],
            "workflows": [{"name": "plates", "slo": {"deadline": 1}, **workflow}],
        }
    )


def edge(source, target, **fields):
    return {"from": source, "to": target, **fields}


def test_a_workflow_may_switch_and_join_any():
    found = services(
        edges=[
            edge("detect", "read", probability=0.3),
            edge("detect", "sort", probability=0.7),
        ],
        joins={"read": "any"},
    ).workflow("plates")
    assert found.joins == {"read": "any"}
    assert [each.probability for each in found.edges] == [0.3, 0.7]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"edges": [edge("detect", "read")], "joins": {"detect": "any"}}, "some edge leads to: found detect"),
        ({"edges": [edge("detect", "read", probability=0.5), edge("detect", "sort")]}, "on every edge from 'detect'"),
        (
            {"edges": [edge("detect", "read", probability=0.5), edge("detect", "sort", probability=0.6)]},
            "at most 1 together: found 1.1",
        ),
        ({"edges": [edge("detect", "read")], "name": "detect"}, "a name of its own"),
    ],
)
def test_workflows_that_contradict_themselves_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        services(**fields)


def test_an_unknown_workflow_is_a_key_error():
    with pytest.raises(KeyError):
        services(edges=[edge("detect", "read")]).workflow("other")
