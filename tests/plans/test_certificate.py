from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans import Services
from plans.certificate import check_certificate
from plans.plan import Plan, Prediction, SolverReport, Tier, Unserved
from tests.plans.strategies import cluster, entry, group, plan

SERVICES = Services.model_validate(
    {
        "services": [
            {"name": "detect", "slo": {"deadline": 1.0}, "weight": 3.0, "variants": [{"model": "detect-model"}]},
            {"name": "segment", "slo": {"deadline": 1.0}, "variants": [{"model": "segment-model"}]},
        ]
    }
)
GROUPS = [
    group("node-0", (0,), [entry("detect", rate_rps=4.0), entry("segment", rate_rps=2.0)]),
    group("node-0", (1, 2), [entry("detect", gpus=2, rate_rps=6.0)]),
]
VALUES = {"goodput": 32.0, "gpus": 3.0, "gpu-cost": 3.0}
"""3 x (4 + 6) + 2, and three GPUs of 1.0 per hour."""


def report(name: str, objective: float, bound: float, *later: Tier) -> SolverReport:
    gap = abs(bound - objective) / abs(objective)
    tiers = (Tier(name=name, objective=objective, bound=bound, gap=gap), *later)
    fields = {"status": "feasible", "objective": objective, "bound": bound, "gap": gap, "wall_s": 0.0, "seed": 0}
    return SolverReport(name="test", tiers=tiers, **fields)


def stated(solver: SolverReport, **fields: object) -> Plan:
    predicted = [
        Prediction.model_validate(
            {
                "service": name,
                "offered_rps": offered,
                "goodput_rps": 0.0,
                "attainment": 0.0,
                "latency_s": {"p50": None, "p99": None},
            }
            | {"confidence": "measured"}
        )
        for name, offered in (("detect", 12.0), ("segment", 2.0))
    ]
    left = Unserved(service="detect", rate_rps=2.0, reason="compute", detail="")
    return plan(GROUPS, **({"solver": solver, "predicted": predicted, "unserved": (left,)} | fields))


def faults(one: Plan) -> str:
    return " | ".join(str(fault) for fault in check_certificate(one, cluster(), SERVICES))


@pytest.mark.parametrize(
    ("name", "bound"), [("goodput", 33.0), ("goodput", 32.0), ("gpus", 2.0), ("gpu-cost", 3.0), ("max-min", 1.0)]
)
def test_a_true_certificate_has_no_fault(name, bound):
    assert faults(stated(report(name, VALUES.get(name, 0.5), bound))) == ""


@given(st.sampled_from(sorted(VALUES)), st.floats(0.5, 50.0))
def test_an_objective_is_true_or_found(name, objective):
    bound = objective - 0.1 if name != "goodput" else objective + 0.1
    found = faults(stated(report(name, objective, bound)))
    assert (f"the {name} of the placement" in found) == (abs(objective - VALUES[name]) > 1e-5 * VALUES[name])


@pytest.mark.parametrize(("name", "bound"), [("goodput", 31.0), ("gpus", 3.5), ("gpu-cost", 4.0)])
def test_a_bound_on_the_wrong_side_is_found(name, bound):
    assert f"solver.tiers.{name}.bound" in faults(stated(report(name, VALUES[name], bound)))


def test_a_gap_of_other_numbers_is_found():
    sound = report("goodput", 32.0, 40.0)
    assert "solver.gap: found 0.5, expected 0.25" in faults(stated(sound.model_copy(update={"gap": 0.5})))
    later = Tier(name="accuracy", objective=10.0, bound=11.0, gap=0.0)
    assert "solver.tiers.accuracy.gap" in faults(stated(report("goodput", 32.0, 40.0, later)))


def test_what_is_left_out_without_a_word_is_found():
    sound = report("goodput", 32.0, 32.0)
    assert "unserved.detect: found 0 rps, expected 2 rps: 12 are offered and 10 planned" in faults(
        stated(sound, unserved=())
    )
    much = Unserved(service="segment", rate_rps=1.0, reason="compute", detail="")
    assert "unserved.segment" in faults(stated(sound, unserved=(*stated(sound).unserved, much)))


def test_a_polished_plan_keeps_the_certificate_of_its_start():
    polish = {
        "scorer": "test",
        "arrivals": "test",
        "traces": 3,
        "requests": 1,
        "candidates": 1,
        "start_attainment": 0.5,
        "attainment": 0.6,
        "wall_s": 1.0,
    }
    assert faults(stated(report("goodput", 50.0, 51.0), polish=polish)) == ""
    assert "bound" in faults(stated(report("goodput", 50.0, 49.0), polish=polish))
