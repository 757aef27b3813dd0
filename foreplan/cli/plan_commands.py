"""``plan``, ``check``, ``show``, ``schema``; with ``explain``, ``diff`` and ``export`` from their own modules."""

from __future__ import annotations

from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from foreplan.cli import diff_commands, explain_commands, export_commands
from foreplan.cli.command import EXIT_INFEASIBLE, command
from foreplan.cli.options import (
    ClusterFile,
    CurrentFile,
    DemandFile,
    PlanFile,
    ProfilesDir,
    Seed,
    ServicesFile,
    compilation_told,
)
from foreplan.cli.output import Output
from foreplan.cli.plan_options import InputOptions, LimitOptions, Method, ObjectiveOptions, Solver, SolverName
from foreplan.cli.plan_tables import plan_json, print_plan

if TYPE_CHECKING:
    from planner import Infeasible, NoPlanFound, Report

__all__ = ["register"]


class SchemaKind(StrEnum):
    """A document."""

    cluster = "cluster"
    services = "services"
    plan = "plan"
    profile = "profile"
    demand = "demand"


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    command(app, "plan")(make)
    command(app, "check")(check)
    command(app, "show")(show)
    explain_commands.register(app)
    diff_commands.register(app)
    export_commands.register(app)
    command(app, "schema")(schema)


def make(
    out: Output,
    inputs: InputOptions,
    limits: LimitOptions,
    objectives: ObjectiveOptions,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the plan goes.")],
    current: CurrentFile = None,
    time_limit: Annotated[float, typer.Option(help="Seconds for the ILP solve.", min=0.1)] = 10.0,
    solver: SolverName = Solver.highs,
    method: Annotated[
        Method, typer.Option(help="One model over all groups, column generation, or by the size of the problem.")
    ] = Method.auto,
    polish: Annotated[float, typer.Option(help="Seconds of search guided by simulation; 0: none.", min=0)] = 0.0,
    polish_traces: Annotated[
        int, typer.Option(help="Sampled traces that every candidate of the polish is scored on.", min=3, max=1000)
    ] = 16,
    seed: Seed = 1,
) -> None:
    """Decide which service runs where, with a proven optimality gap, and write the plan.

    With --add, --remove or --scale-demand the plan is for the changed inputs, and what that changes is printed.
    """
    from foreplan.planning import make_plan
    from foreplan.polish import PolishSettings
    from foreplan.what_if import difference
    from planner import Settings, Solved
    from plans.codec import write_plan
    from plans.documents import check_writable
    from plans.transition import transition
    from traces.files import read_request_trace

    check_writable(output)
    solving = Settings(time_limit_s=time_limit, backend=solver.value, method=method.value, seed=seed)
    settings = objectives.in_settings(limits.in_settings(solving))
    as_is = inputs.read(out, current)
    arrivals = None
    if inputs.trace is not None and inputs.scale_demand == 1.0 and polish > 0:  # they came at the rates as they were
        arrivals = read_request_trace(inputs.trace).value
    target = inputs.supposed(as_is) if inputs.what_if else as_is
    polishing = f", then polishing for {polish:g} s" if polish > 0 else ""
    doing = f"solving with {solver.value}, at most {time_limit:g} s{polishing}"
    with out.progress(doing), compilation_told(out):
        result = make_plan(target, settings, PolishSettings(time_s=polish, traces=polish_traces), arrivals)
    if not isinstance(result, Solved):
        _no_plan(out, result)
    found = None
    if inputs.what_if:
        with out.progress("solving the inputs as they are, to compare"):
            base = make_plan(as_is, settings)
        if isinstance(base, Solved):
            found = difference(base.plan, result.plan, as_is.cluster, target.cluster)
        else:
            out.warn("there is no plan for the inputs as they are to compare with")
    write_plan(output, result.plan)
    compared = {} if found is None else {"what_if": {"base": found.base, "changed": found.changed}}
    falls = transition(target.current, result.plan, target.cluster).falls
    outcome = {"method": result.report.method, "falls": [asdict(fall) for fall in falls]}
    out.result(plan_json(result.plan, output) | outcome | compared)
    print_plan(out, result.plan)
    out.say(f"searched by {_METHODS[result.report.method]}: {_size(result.report)}")
    if found is not None:
        out.table(["what", "as it is", "what if", "change"], [list(row) for row in found.rows()], title="What if")
        out.note("this plan is for the changed inputs, not for the cluster and the demand as they are")
    out.say(f"wrote {output}")


_METHODS = {"direct": "one model over groups", "columns": "column generation over loadouts"}


def _size(report: Report) -> str:
    return f"{report.options} options, {report.groups} candidate groups in {report.classes} classes"


def _no_plan(out: Output, result: Infeasible | NoPlanFound) -> NoReturn:
    from planner import Infeasible

    if isinstance(result, Infeasible):
        out.error(f"no plan can keep all hard constraints; {result.conflicts.title}")
        for line in result.conflicts.lines():
            out.note(f"  {line}")
        out.note("`foreplan explain --infeasible` says what to relax")
    else:
        out.error(f"no plan found in time: {result.detail}; raise --time-limit")
    raise typer.Exit(EXIT_INFEASIBLE)


def check(
    out: Output,
    plan: PlanFile,
    cluster: ClusterFile,
    services: ServicesFile,
    profiles: ProfilesDir,
    demand: DemandFile = None,
) -> None:
    """Verify a plan and its certificate from its documents alone, independently of the planner."""
    from foreplan.planning import verify
    from foreplan.workflow_demand import with_stages
    from planner.assemble import digests_of
    from plans.cluster import Cluster
    from plans.codec import read_plan
    from plans.demand import Demand
    from plans.documents import read_document
    from plans.errors import InvalidInput
    from plans.service import Services
    from profiles.library import ProfileLibrary

    read = read_plan(plan)
    wanted = read_document(services, Services)
    inventory, library = read_document(cluster, Cluster), ProfileLibrary.read(profiles)
    expected = None if demand is None else with_stages(read_document(demand, Demand), wanted)
    faults = [replace(fault, where=str(plan)) for fault in verify(read, inventory, wanted, library, expected)]
    given = digests_of(inventory, wanted, library, expected)
    others = [name for name, digest in read.inputs.items() if given.get(name, digest) != digest]
    out.result({"plan": str(plan), "sound": not faults, "faults": [str(fault) for fault in faults], "others": others})
    for name in others:
        out.warn(f"the plan was made from another {name} document; it is checked against the one given")
    if faults:
        raise InvalidInput(faults)
    out.say(f"{plan}: sound ({len(read.groups)} groups on {read.gpus_used} GPUs)")


def show(out: Output, plan: PlanFile) -> None:
    """Print a plan: groups, loadouts, predictions, certificate, transition."""
    from plans.codec import read_plan

    read = read_plan(plan)
    out.result(read.model_dump(mode="json", by_alias=True))
    print_plan(out, read)


def schema(out: Output, kind: Annotated[SchemaKind, typer.Argument(help="Which document.")]) -> None:
    """Write the JSON Schema of a document, so that editors can complete and check it."""
    import json
    import sys

    from plans.cluster import Cluster
    from plans.demand import Demand
    from plans.documents import Document
    from plans.plan import Plan
    from plans.service import Services
    from profiles.document import Profile

    kinds: dict[str, type[Document]] = {
        "cluster": Cluster,
        "services": Services,
        "plan": Plan,
        "profile": Profile,
        "demand": Demand,
    }
    document = kinds[kind.value]
    written = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | document.model_json_schema(by_alias=True)
    sys.stdout.write(json.dumps(written, indent=2) + "\n")
