from __future__ import annotations

import pytest

from plans import Services, check_plan
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
