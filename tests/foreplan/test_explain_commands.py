from __future__ import annotations

import json

import pytest
import typer

from foreplan.cli.app import app
from tests.foreplan.workspace import Workspace

NOT_OF_THE_MODEL = {"method", "time_limit", "polish", "polish_traces", "solver", "seed"}
"""Options of ``plan`` that say how a model is solved, not what it is."""


@pytest.fixture
def workspace(tmp_path):
    return Workspace.make(tmp_path)


def options_of(name):
    command = typer.main.get_command(app).commands[name]
    return {each.name: (each.opts, each.default, each.help) for each in command.params}


def test_whatever_shapes_the_model_of_a_plan_can_be_exported_with_the_same_option():
    plan, exported = options_of("plan"), options_of("export")
    assert plan.keys() - exported.keys() <= NOT_OF_THE_MODEL
    for name in plan.keys() & exported.keys() - {"output"}:
        assert plan[name] == exported[name]


def test_whatever_decides_whether_there_is_a_plan_can_be_said_to_explain_why_there_is_none():
    plan, explained = options_of("plan"), options_of("explain")
    for name in (
        *("solver", "quantile", "blocking", "headroom", "attainment", "keep_after_loss", "seed"),
        *("add", "remove", "scale_demand", "window", "demand", "trace"),
    ):
        assert plan[name] == explained[name]


def test_no_plan_is_explained_with_the_options_that_plan_was_given(workspace):
    workspace.change("services.yaml", "min_replicas: 2", "min_replicas: 5")
    flags = ("--solver", "scip", "--blocking", "none", "--seed", "3")
    given = (*workspace.inputs, "--demand", "demand.json", *flags, "--add", "node-z:fake*1")
    # Two nodes of two GPUs and one more.
    found = json.loads(workspace.run("explain", "--infeasible", *given, "--json").stdout)
    assert not found["infeasible"]
    found = json.loads(workspace.run("explain", "--infeasible", *given[:-2], "--json").stdout)
    assert found["infeasible"]
    assert found["minimal"]
    assert found["least"]
    assert [(each["service"], each["field"]) for each in found["conflicts"]] == [("fast", "min_replicas")]
    assert [(each["stated"], each["possible"]) for each in found["relaxation"]] == [(5.0, 4.0)]


def test_a_model_is_exported_as_the_options_change_it(workspace):
    inputs = (*workspace.inputs, "--demand", "demand.json")
    workspace.run("export", "lp", *inputs, "-o", "plain.lp")
    changes = ("--blocking", "strict", "--headroom", "0.2", "--scale-demand", "2", "--remove", "node-b")
    utility = ("--objective", "utility", "--utility", "step", "--drop-penalty", "linear")
    workspace.run("export", "lp", *inputs, *changes, *utility, "-o", "changed.lp")
    plain, changed = ((workspace.folder / name).read_text() for name in ("plain.lp", "changed.lp"))
    assert "node~b#0" in plain
    assert "node~b#0" not in changed
    assert "switch(" in changed
    refused = workspace.run("export", "lp", *inputs, "--utility", "step", "-o", "refused.lp", code=1)
    assert "--objective utility beside it" in refused.stderr
