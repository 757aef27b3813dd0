"""What workflows ask of their stages, worked out by hand."""

from __future__ import annotations

import pytest

from foreplan.workflow_demand import mean_calls, with_stages
from plans.demand import Demand, Rate, ServiceDemand
from plans.service import Services, Workflow


def flow(*edges):
    return Workflow.model_validate({"name": "flow", "slo": {"deadline": 1}, "edges": list(edges)})


def edge(source, target, **fields):
    return {"from": source, "to": target, **fields}


def test_fan_outs_multiply_and_the_larger_of_two_inputs_counts():
    found = mean_calls(flow(edge("a", "b", fanout=2), edge("b", "c", fanout=1.5), edge("a", "c")))
    assert found == {"a": 1.0, "b": 2.0, "c": 3.0}


def test_a_switch_divides_the_calls_and_where_its_arms_meet_they_are_whole_again():
    """Three in ten instances go through b, half through c, the rest end; both lead to d."""
    arms = [edge("a", "b", probability=0.3), edge("a", "c", probability=0.5)]
    found = mean_calls(flow(*arms, edge("b", "d"), edge("c", "d", fanout=2)))
    assert found == pytest.approx({"a": 1.0, "b": 0.3, "c": 0.5, "d": 1.3})


def test_a_service_has_its_own_requests_and_the_calls_of_workflows():
    services = Services.model_validate(
        {
            "services": [{"name": n, "slo": {"deadline": 1}, "variants": [{"model": n}]} for n in ("a", "b")],
            "workflows": [{"name": "flow", "slo": {"deadline": 1}, "edges": [edge("a", "b", fanout=2)]}],
        }
    )
    own = ServiceDemand(service="b", burstiness_cv=1.0, output_tokens=7.0, rate_rps=(Rate(mean=3.0),))
    calls = ServiceDemand(service="flow", burstiness_cv=2.0, rate_rps=(Rate(mean=10.0, quantiles={"0.9": 12.0}),))
    found = with_stages(Demand(window_s=1.0, method="test", services=(calls, own)), services)
    by_name = {one.service: one for one in found.services}
    assert by_name.keys() == {"a", "b"}
    assert by_name["a"].rate_rps == (Rate(mean=10.0, quantiles={"0.9": 12.0}),)
    assert by_name["b"].rate_rps == (Rate(mean=23.0, quantiles={"0.9": 27.0}),)
    assert (by_name["b"].burstiness_cv, by_name["b"].output_tokens) == (2.0, 7.0)
