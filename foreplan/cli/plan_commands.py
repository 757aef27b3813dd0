"""``plan``, ``check``, ``show``, ``diff``, ``schema``; with ``explain`` and ``export`` from their own modules."""

from __future__ import annotations

from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from foreplan.cli import explain_commands, export_commands
from foreplan.cli.command import EXIT_CHANGES, EXIT_INFEASIBLE, command
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

if TYPE_CHECKING:
    from planner import Infeasible, NoPlanFound, Report
    from plans.plan import Plan, Prediction, Unserved

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
    command(app, "diff")(diff)
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
    _print_plan(out, result.plan)
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


def plan_json(plan: Plan, path: Path) -> dict[str, Any]:
    """Return what ``plan --json`` prints."""
    data = plan.model_dump(mode="json", by_alias=True)
    kept = {key: data[key] for key in ("solver", "predicted", "unserved", "shadow_prices", "warnings")}
    if plan.polish is not None:
        kept["polish"] = data["polish"]
    return kept | {"plan": str(path), "gpus_used": plan.gpus_used}


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
    _print_plan(out, read)


def _attainment(prediction: Prediction) -> str:
    if prediction.attainment_interval is None:
        return f"{prediction.attainment:.2%}"
    low, high = prediction.attainment_interval
    return f"{prediction.attainment:.2%} ({low:.2%} to {high:.2%})"


def _left_out(left: Unserved, predicted: Prediction | None) -> str:
    """Say what of a service is not planned for; queueing and simulation may well predict that some of it is served."""
    text = f"{left.service} {left.rate_rps:.4g} rps ({left.reason}): {left.detail}"
    planned_rps = 0.0 if predicted is None else predicted.offered_rps - left.rate_rps
    if predicted is None or planned_rps <= 1e-6 * predicted.offered_rps:
        return f"unserved: {text}"
    more = predicted.goodput_rps > planned_rps * (1 + 1e-3)
    beside = f"; predicted in time all the same: {predicted.goodput_rps:.4g} rps in all" if more else ""
    return f"beyond the planned utilisation: {text}{beside}"


def _print_plan(out: Output, plan: Plan) -> None:
    from plans.units import format_bytes, format_seconds

    solver = plan.solver
    first = solver.tiers[0].name if solver.tiers else "goodput"
    unit = " rps (weighted)" if first == "goodput" else ""
    proven = "at least" if solver.bound < solver.objective else "at most"
    out.say(
        f"{solver.status}: {first} {solver.objective:.6g}{unit}, proven {proven} {solver.bound:.6g}, gap "
        f"{solver.gap:.3%}; {plan.gpus_used} GPUs; {solver.name}, {format_seconds(solver.wall_s)}"
    )
    if plan.polish is not None:
        polish = plan.polish
        out.say(
            f"polished by {polish.scorer} on {polish.traces} traces ({polish.arrivals}): attainment "
            f"{polish.start_attainment:.2%} -> {polish.attainment:.2%} on traces kept out of the search; "
            f"{polish.candidates} candidates, {format_seconds(polish.wall_s)}"
        )
    out.table(
        ["group", "tp", "pp", "service", "variant", "batch", "rate (rps)", "memory per GPU"],
        [
            [
                group.id,
                group.tp,
                group.pp,
                entry.service,
                entry.variant,
                entry.max_batch,
                entry.rate_rps,
                format_bytes(max(entry.memory_bytes)),
            ]
            for group in plan.groups
            for entry in group.loadout
        ],
        title="Placement",
    )
    out.table(
        ["service", "offered (rps)", "goodput (rps)", "attainment", "p50 (ms)", "p99 (ms)", "accuracy", "confidence"],
        [
            [
                prediction.service,
                prediction.offered_rps,
                prediction.goodput_rps,
                _attainment(prediction),
                None if prediction.latency_s.p50 is None else prediction.latency_s.p50 * 1000,
                None if prediction.latency_s.p99 is None else prediction.latency_s.p99 * 1000,
                prediction.accuracy,
                prediction.confidence,
            ]
            for prediction in plan.predicted
        ],
        title="Predicted",
    )
    predicted = {each.service: each for each in plan.predicted}
    for left in plan.unserved:
        out.say(_left_out(left, predicted.get(left.service)))
    for gpu_type, price in plan.shadow_prices.items():
        out.say(f"one more {gpu_type} adds {price:.4g} weighted rps to the relaxation's goodput")
    if plan.contingencies:
        worst = min(plan.contingencies, key=lambda each: each.goodput_rps / max(each.offered_rps, 1e-12))
        mean = sum(each.goodput_rps for each in plan.contingencies) / len(plan.contingencies)
        out.say(
            f"{len(plan.contingencies)} contingencies: {mean:.4g} rps (weighted) on average; the worst, {worst.kind} "
            f"{worst.name}, serves {worst.goodput_rps:.4g} of {worst.offered_rps:.4g}"
        )
    if plan.transition:
        out.table(
            ["step", "action", "group", "service", "moves", "about"],
            [
                [s.step, s.action, s.group, s.service, format_bytes(s.moved_bytes), format_seconds(s.est_s)]
                for s in plan.transition
            ],
            title="Transition",
        )
    for warning in plan.warnings:
        out.warn(warning)


def diff(
    out: Output,
    before: Annotated[Path, typer.Argument(metavar="A", help="The plan before.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="The plan after.")],
    detailed_exitcode: Annotated[
        bool, typer.Option("--detailed-exitcode", help="Exit 2 when the placement changes.")
    ] = False,
) -> None:
    """Show what changes from plan A to plan B."""
    from plans.codec import read_plan
    from plans.diff import diff as compare

    change = compare(read_plan(before), read_plan(after))
    out.result(
        {
            "changes": change.changes_placement,
            "entries": [
                {
                    "action": entry.action,
                    "group": entry.group,
                    "service": entry.service,
                    "reloads": entry.reloads,
                    "before": None if entry.before is None else entry.before.model_dump(mode="json", by_alias=True),
                    "after": None if entry.after is None else entry.after.model_dump(mode="json", by_alias=True),
                }
                for entry in change.entries
            ],
            "routes": [
                {
                    "service": route.service,
                    "before": [r.model_dump() for r in route.before or ()],
                    "after": [r.model_dump() for r in route.after or ()],
                }
                for route in change.routes
            ],
            "workflows": [asdict(one) for one in change.workflows],
        }
    )
    _print_diff(out, change)
    if detailed_exitcode and change.changes_placement:
        raise typer.Exit(EXIT_CHANGES)


def _print_diff(out: Output, change: Any) -> None:
    if not change.changes_placement:
        out.say("no changes")
        return
    signs = {"create": "+", "update": "~", "delete": "-"}
    counts = dict.fromkeys(signs, 0)
    for entry in change.entries:
        counts[entry.action] += 1
        out.say(f"{signs[entry.action]} {entry.group} {entry.service}: {_entry_change(entry)}")
    for route in change.routes:
        before, after = ({r.group: r.weight for r in routes or ()} for routes in (route.before, route.after))
        moved = [
            f"{group} {before.get(group, 0):.0%} -> {after.get(group, 0):.0%}"
            for group in sorted(before.keys() | after.keys())
            if before.get(group) != after.get(group)
        ]
        out.say(f"~ routes {route.service}: {', '.join(moved)}")
    for one in change.workflows:
        out.say(f"~ {one.subject}: {one.before} -> {one.after}")
    if "workflows" in change.record and not change.workflows:
        out.say("~ workflows: the same in another order")
    out.say(
        f"{counts['create']} to create, {counts['update']} to update, {counts['delete']} to delete, "
        f"{len(change.routes)} services to route anew"
        + (f", {len({one.workflow for one in change.workflows})} workflows to change" if change.workflows else "")
    )


def _entry_change(entry: Any) -> str:
    if entry.before is None or entry.after is None:
        known = entry.after or entry.before
        return f"{known.variant}, batch {known.max_batch}, {known.rate_rps:.4g} rps"
    parts = [
        f"{name} {old} -> {new}"
        for name, old, new in (
            ("variant", entry.before.variant, entry.after.variant),
            ("batch", entry.before.max_batch, entry.after.max_batch),
            ("rate", f"{entry.before.rate_rps:.4g}", f"{entry.after.rate_rps:.4g} rps"),
            ("deadline", entry.before.deadline_s, entry.after.deadline_s),
        )
        if str(old) != str(new).removesuffix(" rps")
    ]
    return ", ".join(parts or ["profile figures"]) + ("; loads weights" if entry.reloads else "")


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
