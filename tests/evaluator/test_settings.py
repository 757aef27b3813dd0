from __future__ import annotations

import math

import pytest

from evaluator import Settings, evaluate
from plans import InvalidInput, Services
from profiles.library import ProfileLibrary
from tests.planner.problems import cluster, latency_service, profile
from tests.plans.strategies import entry, group, plan
from traces.synthesis import Poisson, synthesise


def faults(**fields):
    with pytest.raises(InvalidInput) as caught:
        Settings(**fields)
    return {fault.field for fault in caught.value.faults}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("seed", 0.5),
        ("routing", "random"),
        ("order", "lifo"),
        ("admission", "never"),
        ("latency", "median"),
        ("early_drop", 1),
        ("batch_delay_s", -0.001),
        ("batch_delay_s", math.nan),
        ("overhead_s", math.inf),
        ("concurrency", 0),
        ("concurrency", True),
        ("credit_decrease", 0.0),
        ("credit_decrease", 1.5),
        ("until_s", -1.0),
        ("retries", -1),
        ("max_prefill_tokens", 0),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_name(field, value):
    assert faults(**{field: value}) == {field}


def test_every_fault_is_named_at_once():
    assert faults(seed=-1, order="lifo", overhead_s=-1) == {"seed", "order", "overhead_s"}


def test_settings_that_exclude_each_other_are_refused():
    assert faults(admission="arrival") == {"order"}
    assert faults(admission="arrival", order="fifo", concurrency=2, latency="profile", batch_delay_s=0.1) == {
        "concurrency",
        "latency",
        "batch_delay_s",
    }
    for routing in ("credits", "corrected"):
        assert faults(admission="arrival", order="fifo", routing=routing) == {"routing"}
    assert faults(routing="earliest-free") == {"routing"}
    assert faults(admission_margin_s=0.1) == {"admission_margin_s"}
    assert faults(warmup_s=2.0, until_s=2.0) == {"until_s"}


def test_latencies_of_a_model_without_a_profile_are_not_drawn():
    plan_ = plan([group("node-0", (0,), [entry("detect")])])
    there = cluster(("node-0", "gpu", 1))
    wanted = Services(services=(latency_service("detect", ("model", 0.9)),))
    trace = synthesise({"detect": Poisson(rate_rps=5)}, duration_s=5, seed=1)
    library = ProfileLibrary([profile("another")])
    with pytest.raises(InvalidInput, match=r"no profile of .* on gpu"):
        evaluate(plan_, wanted, trace, settings=Settings(latency="profile"), cluster=there, profiles=library)
