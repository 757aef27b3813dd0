from __future__ import annotations

import pytest

from plans import Demand, Services, check_plan
from tests.plans.strategies import cluster, entry, group, plan

SERVICES = Services.model_validate(
    {
        "services": [
            {
                "name": "detect",
                "slo": {"deadline": 1.0},
                "variants": [{"model": "detect-model", "accuracy": 0.9}, {"model": "poor", "accuracy": 0.1}],
                "min_accuracy": 0.5,
                "min_replicas": 1,
                "max_gpus": 2,
                "forbid": ["node-1/3"],
            },
            {"name": "segment", "slo": {"deadline": 1.0}, "variants": [{"model": "segment-model"}]},
        ]
    }
)


class Figures:
    """Profiles that say what `strategies.entry` says."""

    def memory_bytes(self, service, model, gpu_type, tp, pp, batch):
        return None if model == "unprofiled" else (100,) * pp

    def latency_s(self, service, model, gpu_type, tp, pp, batch):
        return None if model == "unprofiled" else 0.01 * batch


def found(one):
    return " | ".join(str(fault) for fault in check_plan(one, cluster(), SERVICES, Figures()))


def test_a_sound_plan_has_no_fault():
    assert found(plan([group("node-0", (0,), [entry("detect"), entry("segment")])])) == ""


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([group("node-9", (0,), [entry("detect")])], "another cluster"),
        ([group("node-0", (4,), [entry("detect")])], "GPUs 0 to 3"),
        ([group("node-0", (0,), [entry("detect"), entry("stranger")])], "stranger"),
        ([group("node-0", (0,), [entry("detect", variant="nonesuch")])], "one of the service's variants"),
        ([group("node-0", (0,), [entry("detect", variant="poor")])], "min_accuracy 0.5"),
        ([group("node-1", (3,), [entry("detect")])], "pin and forbid"),
        ([group("node-0", (0,), [entry("detect", memory_bytes=(99,))])], "profiled 100 B"),
        ([group("node-0", (0,), [entry("detect", memory_bytes=(1001,))])], "of GPU memory"),
        (
            [group("node-0", (0,), [entry("detect", memory_bytes=(600,)), entry("segment", memory_bytes=(600,))])],
            "of GPU",
        ),
        ([group("node-0", (0,), [entry("detect", stage_latency_s=((0.01,), (0.03,)))])], "profiled latency"),
        ([group("node-0", (0,), [entry("detect", stage_latency_s=((0.03,), (0.02,)))])], "falls with batch"),
        ([group("node-0", (0,), [entry("detect", deadline_s=0.001)])], "within the deadline"),
        ([group("node-0", (0,), [entry("detect", rate_rps=101.0)])], "of the group's time"),
        ([group("node-0", (0,), [entry("segment")])], "min_replicas 1"),
        ([group("node-0", (i,), [entry("detect")]) for i in range(3)], "max_gpus 2"),
    ],
)
def test_every_broken_promise_is_found(groups, expected):
    assert expected in found(plan(groups))


def test_a_model_without_profile_is_found():
    services = Services.model_validate(
        {"services": [{"name": "detect", "slo": {"deadline": 1.0}, "variants": [{"model": "unprofiled"}]}]}
    )
    one = plan([group("node-0", (0,), [entry("detect", variant="unprofiled")])])
    assert "a profile of unprofiled on tiny" in str(check_plan(one, cluster(), services, Figures())[0])


def test_routes_must_follow_the_rates():
    sound = plan([group("node-0", (0,), [entry("detect")]), group("node-0", (1,), [entry("detect")])])
    skewed = sound.model_copy(
        update={
            "routes": {
                "detect": tuple(
                    r.model_copy(update={"weight": w}) for r, w in zip(sound.routes["detect"], (0.9, 0.1), strict=True)
                )
            }
        }
    )
    assert found(sound) == ""
    assert "weight 0.5000" in found(skewed)


def test_a_prediction_cannot_exceed_what_is_offered():
    prediction = {
        "service": "detect",
        "offered_rps": 5.0,
        "goodput_rps": 6.0,
        "attainment": 1.0,
        "latency_s": {"p50": None, "p99": None},
        "confidence": "measured",
    }
    one = plan([group("node-0", (0,), [entry("detect")])], predicted=(prediction,))
    assert "at most the 5 rps that can be served" in found(one)


FLOW = {
    "services": [
        {
            "name": name,
            "slo": {"deadline": 1.0},
            "variants": [{"model": f"{name}-model"}],
            **({"spread": {"over": "node", "max_skew": 1, "min_domains": 2}} if name == "detect" else {}),
        }
        for name in ("detect", "segment")
    ],
    "workflows": [
        {
            "name": "w",
            "slo": {"deadline": 1.0},
            "affinity": "require",
            "edges": [{"from": "detect", "to": "segment", "fanout": 2.0, "bytes": 1000}],
        }
    ],
}


def flow(rates=(1.0, 2.0, 1.0, 2.0), deadlines=(0.4, 0.5), nodes=("node-0", "node-1"), **fields):
    """Return a plan of a workflow: on each of two nodes a caller and what it calls."""
    groups = []
    for position, node in enumerate(nodes):
        caller, callee = rates[2 * position : 2 * position + 2]
        members = [
            entry("detect", rate_rps=caller, deadline_s=deadlines[0]),
            entry("segment", rate_rps=callee, deadline_s=deadlines[1]),
        ]
        groups.append(group(node, (position,), members))
    return plan(groups, **{"workflows": Services.model_validate(FLOW).workflows} | fields)


def found_in_flow(one):
    demand = Demand.model_validate({"window_s": 60, "services": [{"service": "detect", "rate_rps": [{"mean": 2.0}]}]})
    faults = check_plan(one, cluster(), Services.model_validate(FLOW), Figures(), demand)
    return " | ".join(str(fault) for fault in faults)


def promise(service, offered):
    return {
        "service": service,
        "offered_rps": offered,
        "goodput_rps": 0.0,
        "attainment": 0.0,
        "latency_s": {"p50": None, "p99": None},
        "confidence": "measured",
    }


def test_workflows_are_those_of_the_services_by_name_and_edge():
    (workflow,) = Services.model_validate(FLOW).workflows
    (edge,) = workflow.edges
    other = workflow.model_copy(update={"edges": (edge.model_copy(update={"fanout": 3.0}),)})
    assert "workflow w, edge detect -> segment" in found_in_flow(flow(workflows=(other,)))
    assert "fanout 2.0" in found_in_flow(flow(workflows=(other,)))
    assert "make the plan again" in found_in_flow(flow(workflows=(other,)))
    stray = found_in_flow(flow(workflows=(workflow, workflow.model_copy(update={"name": "stray"}))))
    assert "workflow stray" in stray
    assert "expected none, as in services.yaml" in stray


def test_a_plan_that_says_nothing_of_workflows_is_to_be_made_again():
    told = found_in_flow(flow(workflows=()))
    assert told.startswith("plan: workflows: found none, expected w, as in services.yaml; ")
    assert told.endswith("make it again with `foreplan plan`")


def test_a_sound_workflow_has_no_fault():
    assert found_in_flow(flow()) == ""
    assert found_in_flow(flow(settings={"attainment": 0.9, "keep_after_loss": 0.5})) == ""


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (flow(nodes=("node-0", "node-0")), "min_domains 2"),
        (flow(rates=(1.0, 2.0, 1.0, 3.0)), "its callers' rates lead to"),
        (flow(rates=(1.5, 2.0, 0.5, 2.0)), "that detect calls there"),
        (flow(deadlines=(0.6, 0.5)), "end-to-end deadline"),
        (flow(deadlines=(1.5, 0.5)), "at most the service's 1 s"),
        (
            flow(
                settings={"attainment": 0.9},
                predicted=(promise("detect", 4.0),),
                unserved=({"service": "detect", "rate_rps": 2.0, "reason": "compute", "detail": ""},),
            ),
            "attainment 0.9",
        ),
    ],
)
def test_every_broken_promise_between_groups_is_found(one, expected):
    assert expected in found_in_flow(one)


def test_a_service_that_dies_with_its_node_is_found():
    services = Services.model_validate({"services": [dict(FLOW["services"][1])]})
    one = plan([group("node-0", (0,), [entry("segment")])], settings={"keep_after_loss": 0.5})
    assert "without node-0" in str(check_plan(one, cluster(), services, Figures())[0])


def test_replicas_that_pile_up_in_one_domain_are_found():
    piled = flow(nodes=("node-0", "node-1"))
    more = group("node-0", (2,), [entry("detect", rate_rps=1.0, deadline_s=0.4)])
    third = group("node-0", (3,), [entry("detect", rate_rps=1.0, deadline_s=0.4)])
    text = found_in_flow(plan([*piled.groups, more, third]))
    assert "3 in node-0" in text


def test_the_wait_for_the_frames_of_a_stream_counts():
    services = Services.model_validate(
        {
            "services": [
                {
                    "name": "segment",
                    "class": "frequency",
                    "slo": {"fps": 10, "jitter": 0.01},
                    "variants": [{"model": "segment-model"}],
                }
            ]
        }
    )
    single = entry("segment", deadline_s=0.11)
    double = entry("segment", deadline_s=0.11, multi_frame=2)
    assert check_plan(plan([group("node-0", (0,), [single])]), cluster(), services, Figures()) == ()
    (fault,) = check_plan(plan([group("node-0", (0,), [double])]), cluster(), services, Figures())
    assert "waiting for 2 frames" in str(fault)
