from __future__ import annotations

import json

import pytest

from tests.foreplan.workspace import Workspace


@pytest.fixture
def workspace(tmp_path):
    return Workspace.make(tmp_path)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    workspace = Workspace.make(tmp_path_factory.mktemp("planned"))
    workspace.plan()
    return workspace


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("cluster.yaml", "memory: 1MiB", "memory: -1MiB", "cluster.yaml:2: gpu_types.fake.memory: found '-1MiB'"),
        ("cluster.yaml", "count: 2", "count: 2, colour: red", "colour: found an unknown field"),
        (
            "services.yaml",
            "attainment: 0.9",
            "attainment: 1.2",
            "services.yaml:3: services[0].slo.attainment: found 1.2",
        ),
        (
            "services.yaml",
            "model: fake-slow-20",
            "model: unprofiled",
            "services.yaml: services[1].variants: found service",
        ),
        ("services.yaml", "model: fake-slow-20", "model: unprofiled", "a profile of one of them on a GPU type present"),
        (
            "services.yaml",
            "name: slow",
            "name: slow\n    pin: [node-z]",
            "found 'node-z', expected a node or node/index",
        ),
        ("demand.json", '"service": "slow"', '"service": "ghost"', "demand.json: services[1].service: found 'ghost'"),
        ("profiles/slow.json", '"batch": 2', '"batch": 0', "profiles/slow.json:1: rows[1].batch: found 0"),
        ("profiles/slow.json", '"format_version": "1.0"', '"format_version": "2.0"', "expected major version 1"),
    ],
)
def test_a_damaged_input_is_named_and_no_plan_is_written(workspace, file, old, new, expected):
    workspace.change(file, old, new)
    result = workspace.plan(code=1)
    assert expected in result.stderr
    assert "plan.json" not in workspace.files()
    assert result.stdout == ""


def test_all_faults_of_a_file_come_at_once(workspace):
    workspace.change("services.yaml", "deadline: 500ms", "deadline: soon")
    workspace.change("services.yaml", "min_replicas: 2", "min_replicas: -2")
    error = workspace.plan(code=1).stderr
    assert "services[0].slo.deadline" in error
    assert "services[0].min_replicas" in error


def test_hard_constraints_that_cannot_hold_exit_with_3_and_name_themselves(workspace):
    workspace.change("services.yaml", "min_replicas: 2", "min_replicas: 5")
    error = workspace.plan(code=3).stderr
    assert "fast" in error
    assert "min_replicas" in error
    assert "plan.json" not in workspace.files()


@pytest.mark.parametrize("flags", [(), ("--demand", "demand.json", "--trace", "t.csv")])
def test_demand_comes_from_exactly_one_place(workspace, flags):
    result = workspace.run("plan", *workspace.inputs, "-o", "plan.json", *flags, code=1)
    assert "one of --demand and --trace" in result.stderr


def test_a_model_that_does_not_fit_is_left_out_with_the_reason(workspace):
    workspace.change("cluster.yaml", "memory: 1MiB", "memory: 2KiB")
    workspace.change("services.yaml", "    min_replicas: 2\n", "")
    result = json.loads(workspace.plan("--json").stdout)
    assert {left["service"]: left["reason"] for left in result["unserved"]} == {"fast": "memory", "slow": "memory"}
    assert result["gpus_used"] == 0


def test_a_plan_is_made_checked_shown_and_explained(planned):
    shown = json.loads(planned.run("show", "plan.json", "--json").stdout)
    assert {entry["service"] for group in shown["groups"] for entry in group["loadout"]} == {"fast", "slow"}
    assert shown["solver"]["gap"] <= 0.01
    assert shown["inputs"].keys() == {"cluster", "services", "profiles", "demand"}
    assert "sound" in planned.run("check", "plan.json", *planned.inputs).stdout
    explained = planned.run("explain", "fast", "--plan", "plan.json", *planned.inputs, "--demand", "demand.json").stdout
    assert "fast" in explained
    assert len(explained.splitlines()) <= 40


def test_plan_json_has_the_documented_shape(planned):
    result = json.loads(planned.plan("--json", output="again.json").stdout)
    assert result.keys() == {
        *("solver", "predicted", "unserved", "shadow_prices", "warnings", "plan", "gpus_used", "method", "falls")
    }
    assert result["method"] == "direct"
    assert {prediction["service"] for prediction in result["predicted"]} == {"fast", "slow"}


@pytest.mark.parametrize("solver", ["highs", "cbc"])
def test_both_solvers_reach_the_same_goodput(planned, solver):
    result = json.loads(planned.plan("--json", "--solver", solver, output=f"{solver}.json").stdout)
    assert result["solver"]["objective"] == pytest.approx(28.0, rel=0.01)


def test_column_generation_is_asked_for_by_method_and_reaches_the_same_goodput(planned):
    result = json.loads(planned.plan("--json", "--method", "columns", output="columns.json").stdout)
    assert result["method"] == "columns"
    assert result["solver"]["name"] == "highs+columns"
    assert result["solver"]["objective"] == pytest.approx(28.0, rel=0.01)


def test_explain_of_an_unknown_service_lists_the_known_ones(planned):
    result = planned.run("explain", "nobody", "--plan", "plan.json", *planned.inputs, "--demand", "demand.json", code=1)
    assert "expected one of fast, slow" in result.stderr


def test_a_tampered_plan_fails_the_check(planned, tmp_path):
    document = json.loads((planned.folder / "plan.json").read_text())
    document["groups"][0]["loadout"][0]["memory_bytes"] = [2**21]
    path = tmp_path / "tampered.json"
    path.write_text(json.dumps(document))
    result = planned.run("check", path, *planned.inputs, code=1)
    assert f"{path}: node-a/0: found 2 MiB" in result.stderr
    assert "of GPU memory" in result.stderr


def test_a_check_against_other_documents_says_so(planned, tmp_path):
    more = (planned.folder / "demand.json").read_text().replace('"mean": 8.0', '"mean": 9.0')
    (tmp_path / "more.json").write_text(more)
    result = planned.run("check", "plan.json", *planned.inputs, "--demand", tmp_path / "more.json", "--json")
    assert json.loads(result.stdout)["others"] == ["demand"]
    assert "made from another demand document" in result.stderr
    assert "another" not in planned.run("check", "plan.json", *planned.inputs, "--demand", "demand.json").stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--utility", "step"), "--utility: found step, expected --objective utility beside it"),
        (("--drop-penalty", "step", "--objective", "max-min"), "--drop-penalty: found step"),
        (("--minimize", "cost"), "pass --attainment"),
        (("--minimize", "gpus", "--attainment", "0.9", "--objective", "max-min"), "either this or --objective max-min"),
        (("-o", "nowhere/x.json"), "no such folder"),
        (("-o", "."), "found a folder, expected the name of a file"),
    ],
)
def test_options_that_would_go_unheard_and_bad_destinations_are_refused_before_planning(planned, options, expected):
    result = planned.run("plan", *planned.inputs, "--demand", "demand.json", "-o", "unheard.json", *options, code=1)
    assert expected in result.stderr


def test_a_quantile_beyond_the_forecast_is_a_warning(planned):
    planned.change("demand.json", '"mean": 8.0', '"mean": 8.0, "quantiles": {"0.5": 8.0, "0.9": 9.0}')
    result = planned.plan("--quantile", "0.99", "--json", output="beyond.json")
    planned.change("demand.json", '"mean": 8.0, "quantiles": {"0.5": 8.0, "0.9": 9.0}', '"mean": 8.0')
    (warning,) = [each for each in json.loads(result.stdout)["warnings"] if "quantile" in each]
    assert warning == "slow: quantile 0.99 is planned at 0.9, the outermost that is forecast"


def test_diff_says_what_changes_and_its_exit_code_can_be_detailed(planned):
    planned.change("demand.json", '"mean": 8.0', '"mean": 60.0')
    planned.plan("--current", "plan.json", output="more.json")
    planned.change("demand.json", '"mean": 60.0', '"mean": 8.0')
    assert "no changes" in planned.run("diff", "plan.json", "plan.json", "--detailed-exitcode").stdout
    changed = planned.run("diff", "plan.json", "more.json", "--detailed-exitcode", code=2).stdout
    assert "slow" in changed
    planned.run("diff", "plan.json", "more.json")


def test_workflows_alone_are_a_change_that_diff_and_check_tell(planned):
    plan = json.loads((planned.folder / "plan.json").read_text())
    flow = {"name": "both", "slo": {"deadline": 9.0}, "edges": [{"from": "fast", "to": "slow"}]}
    (planned.folder / "flowing.json").write_text(json.dumps(plan | {"workflows": [flow]}))
    told = planned.run("diff", "plan.json", "flowing.json", "--detailed-exitcode", code=2).stdout
    assert "~ workflow both: none -> edge fast -> slow within 9 s" in told
    assert "1 workflows to change" in told
    assert (
        "workflow both: found edge fast -> slow" in planned.run("check", "flowing.json", *planned.inputs, code=1).stderr
    )


def test_a_plan_cut_short_is_refused_by_every_reader(planned, tmp_path):
    path = tmp_path / "short.json"
    path.write_text((planned.folder / "plan.json").read_text()[:500])
    for command in (["show"], ["check"], ["diff", "plan.json"], ["evaluate"]):
        more = planned.inputs if command == ["check"] else []
        if command == ["evaluate"]:
            more = ["--services", "services.yaml", "--trace", "none.csv"]
            planned.run("trace", "synth", "--service", "fast=1", "--duration", 5, "-o", "none.csv")
        assert "short.json" in planned.run(*command, path, *more, code=1).stderr


@pytest.mark.parametrize("kind", ["cluster", "services", "plan", "profile", "demand"])
def test_schemas_are_json_schemas(planned, kind):
    schema = json.loads(planned.run("schema", kind).stdout)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["type"] == "object"


def test_a_trace_goes_from_synthesis_to_forecast_to_plan_to_evaluation_to_report(planned):
    planned.run("trace", "synth", "--service", "fast=20", "--service", "slow=5", "--duration", 60, "-o", "t.parquet")
    shown = json.loads(planned.run("trace", "show", "t.parquet", "--json").stdout)
    assert {one["service"] for one in shown["services"]} == {"fast", "slow"}
    planned.run("forecast", "--trace", "t.parquet", "--window", 5, "--method", "last-value", "-o", "f.json")
    planned.run("plan", *planned.inputs, "--demand", "f.json", "-o", "forecast-plan.json")
    planned.run("plan", *planned.inputs, "--trace", "t.parquet", "-o", "trace-plan.json")
    flags = ["--services", "services.yaml", "--trace", "t.parquet", "--requests", "s.parquet", "--json"]
    result = json.loads(planned.run("evaluate", "trace-plan.json", *flags).stdout)
    assert result.keys() >= {"requests", "wall_s", "offered_rps", "goodput_rps", "attainment", "gpu_hours", "services"}
    assert result["attainment"] > 0.95
    planned.run(
        "report", "trace-plan.json", *planned.inputs, "--demand", "f.json", "--simulated", "s.parquet", "-o", "r.html"
    )
    assert "node-a" in (planned.folder / "r.html").read_text()


def test_a_run_says_its_mode_and_refuses_what_it_could_not_write_or_keep_before_it_runs(planned):
    planned.run("trace", "synth", "--service", "fast=20", "--duration", 30, "-o", "e.parquet")
    planned.run("plan", *planned.inputs, "--trace", "e.parquet", "-o", "e.json")
    run = ("evaluate", "e.json", "--services", "services.yaml", "--trace", "e.parquet")
    events, single = (
        json.loads(planned.run(*run, "--admission", "arrival", "--order", "fifo", "--mode", mode, "--json").stdout)
        for mode in ("event", "auto")
    )
    assert (events.pop("mode"), single.pop("mode")) == ("event", "single-pass")
    assert events["services"] == single["services"]
    assert events["services"][0].keys() >= {"offered", "good", "late", "dropped", "failed", "in_flight"}
    assert "admission" in planned.run(*run, "--mode", "single-pass", code=1).stderr
    before = planned.files()
    failed = planned.run(*run, "--requests", "e-requests.csv", "--timeline", "e-timeline.txt", code=1)
    assert "e-timeline.txt" in failed.stderr
    assert planned.files() == before
    kept = json.loads(planned.run(*run, "--keep", "kept", "--json").stdout)
    assert [each["mode"] for each in kept["runs"]] == ["event"]
    assert "--keep" in planned.run(*run, "--keep", "kept", "--then", "1=e.json", code=1).stderr


def test_a_run_is_routed_as_gateways_route_by_default(planned):
    planned.run("trace", "synth", "--service", "fast=60", "--service", "slow=20", "--duration", 30, "-o", "r.parquet")
    planned.run("plan", *planned.inputs, "--trace", "r.parquet", "-o", "r.json")
    run = ("evaluate", "r.json", "--services", "services.yaml", "--trace", "r.parquet", "--json")
    unsaid, corrected, weighted = (
        json.loads(planned.run(*run, *said).stdout)
        for said in ((), ("--routing", "corrected"), ("--routing", "weighted"))
    )
    assert unsaid == corrected
    assert unsaid["groups"] != weighted["groups"]


def test_a_truncated_trace_is_named(planned):
    planned.run("trace", "synth", "--service", "fast=20", "--duration", 60, "-o", "whole.parquet")
    (planned.folder / "cut.parquet").write_bytes((planned.folder / "whole.parquet").read_bytes()[:-200])
    assert "cut.parquet" in planned.run("trace", "show", "cut.parquet", code=1).stderr


def test_a_backtest_prints_scores_and_writes_nothing(planned):
    planned.run("trace", "synth", "--service", "fast=20", "--duration", 120, "-o", "b.csv")
    before = planned.files()
    result = json.loads(
        planned.run(
            "forecast", "--trace", "b.csv", "--window", 2, "--backtest", "--method", "last-value", "--json"
        ).stdout
    )
    assert result["weighted_quantile_loss"] > 0
    assert planned.files() == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--service", "a=1", "--service", "a=2"), "--service: found 'a=2', expected each service once"),
        (
            ("--service", "a=10", "--process", "streams"),
            "--service: found 'a=10', expected a rate that is a multiple of --fps (30)",
        ),
        (("--service", "a=0", "--process", "streams"), "expected a rate that is a multiple of --fps (30)"),
    ],
)
def test_a_load_that_is_not_as_asked_is_refused(workspace, options, expected):
    assert expected in workspace.run("trace", "synth", *options, "-o", "t.csv", code=1).stderr
    assert "t.csv" not in workspace.files()


def test_a_part_without_requests_is_kept_with_a_warning(workspace):
    workspace.run("trace", "synth", "--service", "a=10", "--duration", 30, "-o", "t.csv")
    result = workspace.run("trace", "import", "t.csv", "--start", 1000, "-o", "late.csv")
    assert "warning: late.csv has no requests; what was read lasts" in result.stderr


def test_a_forecast_of_more_windows_than_memory_holds_is_refused(workspace):
    result = workspace.run("forecast", "--trace", "t.csv", "--windows", 10**9, "-o", "d.json", code=2)
    assert "20000" in result.stderr


def test_a_fault_that_only_the_simulation_finds_names_the_file(planned):
    planned.run("trace", "synth", "--service", "ghost=5", "--duration", 5, "-o", "ghost.csv")
    result = planned.run("evaluate", "plan.json", "--services", "services.yaml", "--trace", "ghost.csv", code=1)
    assert "error: ghost.csv: service: found 'ghost'" in result.stderr
    planned.run("trace", "synth", "--service", "fast=5", "--duration", 5, "-o", "five.csv")
    text = (planned.folder / "plan.json").read_text()
    (planned.folder / "edited.json").write_text(text.replace('"variant": "fake-double"', '"variant": "other"'))
    result = planned.run("evaluate", "edited.json", "--services", "services.yaml", "--trace", "five.csv", code=1)
    assert "error: edited.json: groups: fast.variant: found 'other', expected one of fake-double" in result.stderr
