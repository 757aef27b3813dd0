from __future__ import annotations

import json
from dataclasses import replace

import pytest

from foreplan.planning import Inputs
from foreplan.what_if import changed
from plans.demand import Demand
from plans.documents import read_document
from plans.errors import InvalidInput
from tests.foreplan.workspace import Workspace


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    workspace = Workspace.make(tmp_path_factory.mktemp("what-if"))
    workspace.plan()
    return workspace


@pytest.fixture(scope="module")
def inputs(planned):
    folder = planned.folder
    return Inputs.read(
        cluster=folder / "cluster.yaml",
        services=folder / "services.yaml",
        profiles=folder / "profiles",
        demand=read_document(folder / "demand.json", Demand),
    )


def test_nodes_come_and_go_and_demand_grows(inputs):
    other = changed(inputs, add=("node-x:fake*3@zone-9",), remove=("node-b",), scale_demand=1.5)
    assert [node.name for node in other.cluster.nodes] == ["node-a", "node-x"]
    assert (other.cluster.node("node-x").gpus.count, other.cluster.node("node-x").zone) == (3, "zone-9")
    assert [each.rate_rps[0].mean for each in other.demand.services] == [30.0, 12.0]
    assert changed(inputs) == inputs


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"add": ("nonsense",)}, "NAME:GPU_TYPE"),
        ({"add": ("x:gold*2",)}, "a GPU type of the cluster"),
        ({"add": ("node-a:fake",)}, "a name that no node has"),
        ({"remove": ("node-z",)}, "one of the nodes"),
        ({"remove": ("node-a", "node-b")}, "a node that is left"),
        ({"scale_demand": 0.0}, "a factor above 0"),
        ({"add": ("x:fake*0",)}, "count: Input should be greater than 0"),
        ({"add": ("x/1:fake*2",)}, "--add: found 'x/1:fake[*]2', expected name: "),
        ({"add": ("x:fake*2", "x:fake*2")}, "a name that no node has"),
    ],
)
def test_a_change_that_makes_no_sense_is_an_error(inputs, change, expected):
    with pytest.raises(InvalidInput, match=expected):
        changed(inputs, **change)


def test_pins_and_forbids_of_a_removed_node_go_with_it(inputs):
    fast, slow = inputs.services.services
    fast = fast.model_copy(update={"pin": ("node-a", "node-b/0"), "forbid": ("node-b/1", "node-a/1")})
    limited = replace(inputs, services=inputs.services.model_copy(update={"services": (fast, slow)}))
    kept = changed(limited, remove=("node-b",)).services.service(fast.name)
    assert (kept.pin, kept.forbid) == (("node-a",), ("node-a/1",))
    with pytest.raises(InvalidInput, match=r"found node-a, node-b/0, expected a place to be left that fast is pinned"):
        changed(limited, remove=("node-a", "node-b"))


def test_what_if_prints_the_difference_to_the_inputs_as_they_are(planned):
    result = planned.plan("--remove", "node-b", "--scale-demand", "2", "--json", output="other.json")
    found = json.loads(result.stdout)["what_if"]
    assert found["changed"]["fast (rps)"] == pytest.approx(40.0)
    assert found["base"]["fast (rps)"] == pytest.approx(20.0)
    assert found["changed"]["GPUs"] <= 2


def test_fewest_gpus_for_an_attainment(planned):
    result = json.loads(planned.plan("--minimize", "gpus", "--attainment", "0.5", "--json", output="few.json").stdout)
    assert result["solver"]["tiers"][0]["name"] == "gpus"
    assert result["gpus_used"] == result["solver"]["objective"]
    plain = json.loads((planned.folder / "plan.json").read_text())
    assert result["gpus_used"] <= sum(len(group["gpus"]) for group in plain["groups"])


def test_minimize_without_an_attainment_is_an_error(planned):
    assert "expected --attainment beside it" in planned.plan("--minimize", "gpus", output="no.json", code=1).stderr


@pytest.mark.parametrize("objective", ["fair-sum"])
def test_every_objective_makes_a_sound_plan(planned, objective):
    planned.plan("--objective", objective, output="fair.json")
    planned.run("check", "fair.json", *planned.inputs, "--demand", "demand.json")


def test_what_cannot_be_kept_is_explained(planned):
    arguments = ("--keep-after-loss", "1", "--attainment", "1", "--demand", "demand.json")
    planned.change("services.yaml", "min_replicas: 2", "min_replicas: 9")
    try:
        found = json.loads(planned.run("explain", "--infeasible", *planned.inputs, *arguments, "--json").stdout)
        text = planned.run("explain", "--infeasible", *planned.inputs, "--demand", "demand.json").stdout
    finally:
        planned.change("services.yaml", "min_replicas: 9", "min_replicas: 2")
    assert found["conflicts"] == [
        {"service": "fast", "field": "min_replicas", "detail": found["conflicts"][0]["detail"]}
    ]
    assert "fast.min_replicas: needs 9 replicas; at most 4 fit" in text
    assert "fast.min_replicas: 9 -> 4" in text


def test_a_node_is_explained_and_numbers_are_recomputed(planned):
    result = planned.run(
        "explain",
        "slow",
        "--plan",
        "plan.json",
        *planned.inputs,
        "--demand",
        "demand.json",
        "--node",
        "node-a",
        "--json",
    )
    assert json.loads(result.stdout)["service"] == "slow"


@pytest.mark.parametrize("kind", ["lp", "mps"])
def test_the_model_is_exported(planned, kind):
    planned.run("export", kind, *planned.inputs, "--demand", "demand.json", "-o", f"model.{kind}")
    text = (planned.folder / f"model.{kind}").read_text()
    assert "served" in text


def test_a_plan_for_changed_inputs_is_explained_with_the_same_changes(planned):
    """Without them the figures would be those of another demand: that is refused, by the name of the document."""
    planned.plan("--scale-demand", "2", output="doubled.json")
    asked = ("explain", "fast", "--plan", "doubled.json", *planned.inputs, "--demand", "demand.json")
    refused = planned.run(*asked, code=1).stderr
    assert "inputs.demand" in refused
    assert "--scale-demand" in refused
    answer = json.loads(planned.run(*asked, "--scale-demand", "2", "--json").stdout)
    (base,) = (
        each
        for each in json.loads(planned.run("show", "plan.json", "--json").stdout)["predicted"]
        if each["service"] == "fast"
    )
    assert answer["offered_rps"] == pytest.approx(2 * base["offered_rps"])
