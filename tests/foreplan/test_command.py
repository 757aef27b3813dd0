from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from foreplan.cli.command import command
from foreplan.cli.output import Output
from plans import ApplyRolledBack, InvalidInput, RemoteFailure, StalePlan

runner = CliRunner()


@dataclass(frozen=True, kw_only=True)
class Place:
    city: Annotated[str, typer.Option("--city")]
    floor: Annotated[int, typer.Option("--floor")] = 0


def app_that(action):
    app = typer.Typer()

    def act(out):
        action(out)

    command(app, "act")(act)
    return app


def raising(error):
    def action(out):
        raise error

    return app_that(action)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            InvalidInput.of("a number", where="f.yaml", field="x", found="'y'"),
            1,
            "f.yaml: x: found 'y', expected a number",
        ),
        (RemoteFailure("agent of node-a", "gone", retryable=True), 1, "agent of node-a: gone"),
        (StalePlan("generation 7 is live"), 4, "generation 7 is live"),
        (ApplyRolledBack("node-a: no memory"), 5, "no memory"),
        (FileNotFoundError(2, "No such file or directory", "x.json"), 1, "x.json: No such file"),
        (ZeroDivisionError("oops"), 1, "a bug in Foreplan: ZeroDivisionError: oops"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_error_has_its_exit_code_and_no_stack_trace(error, code, text):
    result = runner.invoke(raising(error), [])
    assert result.exit_code == code
    assert text in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_debug_shows_where_an_error_comes_from(caplog):
    result = runner.invoke(raising(ZeroDivisionError("oops")), ["--debug"])
    assert result.exit_code == 1
    assert caplog.records[0].exc_info[0] is ZeroDivisionError


def test_json_goes_to_stdout_and_everything_else_to_stderr():
    def action(out):
        out.result({"a": 1})
        out.say("for people")
        out.table(["column"], [[1]])
        out.warn("careful")
        with out.progress("working"):
            pass

    result = runner.invoke(app_that(action), ["--json"])
    assert json.loads(result.stdout) == {"a": 1}
    assert "careful" in result.stderr


def test_a_table_that_is_piped_is_plain_and_uncut():
    def action(out):
        out.table(["name", "value"], [["x" * 300, 1.23456], ["y", None]])

    result = runner.invoke(app_that(action), [])
    assert "x" * 300 in result.stdout
    assert "1.235" in result.stdout
    assert not set("╭│─┃━") & set(result.stdout)


def test_a_dataclass_stands_for_the_options_that_are_its_fields():
    app, seen = typer.Typer(), []

    def act(out: Output, before: int, place: Place, after: int = 3):
        seen.append((before, place, after))

    command(app, "act")(act)
    given = ["1", "--city", "Bern", "--floor", "2"]
    assert runner.invoke(app, given).exit_code == 0
    assert runner.invoke(app, [*given[:3], "--after", "4"]).exit_code == 0
    assert seen == [(1, Place(city="Bern", floor=2), 3), (1, Place(city="Bern"), 4)]
    refused = runner.invoke(app, ["1"])
    assert refused.exit_code == 2
    assert "--city" in refused.stderr


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("module", ["typer", "foreplan.cli.apply_commands", "executor.apply_plan"])
def test_ctrl_c_while_modules_are_loaded_shows_no_traceback(module, tmp_path):
    code = (
        "import sys\nfrom importlib.abc import MetaPathFinder\nfrom foreplan.__main__ import main\n"
        "class Interrupting(MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}: raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        f"sys.argv = ['foreplan', 'rollback', '--cluster', 'c', '--gateway', 'g:1', '--store', {str(tmp_path)!r}, "
        "'--timeout', 'stage=1']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


def test_ctrl_c_while_a_class_is_made_is_one_too():
    def action(out):
        raise RuntimeError("Error calling __set_name__ on 'Descriptor' instance") from KeyboardInterrupt()

    result = runner.invoke(app_that(action), [])
    assert (result.exit_code, result.stderr) == (130, "error: interrupted\n")


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom foreplan.cli.app import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print(sorted({'torch', 'ortools', 'ray', 'pandas', 'numba', 'grpc', 'plotly'} & set(sys.modules)))"
    )
    assert python(code).strip() == "[]"


@pytest.mark.parametrize("module", ["planner", "foreplan.planning", "evaluator", "plans.diff", "executor.controller"])
def test_planning_evaluating_and_applying_import_no_torch(module):
    assert python(f"import sys, {module}; print('torch' in sys.modules)").strip() == "False"


def test_the_version_is_the_distribution_s():
    from importlib.metadata import version

    from foreplan.cli.app import app

    assert runner.invoke(app, ["--version"]).stdout == f"foreplan {version('foreplan')}\n"
