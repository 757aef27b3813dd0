"""``evaluate`` and ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foreplan.cli.command import command
from foreplan.cli.options import ClusterFile, PlanFile, ServicesFile, read_requests
from foreplan.cli.output import Output

if TYPE_CHECKING:
    from traces.outcomes import RunSummary

__all__ = ["print_summary", "register"]

_COLUMNS = [
    "service",
    "offered",
    "good",
    "late",
    "dropped",
    "failed",
    "attainment",
    "p50 (ms)",
    "p95 (ms)",
    "p99 (ms)",
    "mean batch",
    "accuracy",
]

RequestsFile = Annotated[
    Path | None, typer.Option("--requests", metavar="FILE", help="Keep one row per request: .parquet or .csv.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    command(app, "evaluate")(evaluate)
    command(app, "report")(report)


def evaluate(
    out: Output,
    plan: PlanFile,
    services: ServicesFile,
    trace: Annotated[Path, typer.Option("--trace", metavar="FILE", help="Request trace to serve.")],
    overhead: Annotated[float, typer.Option(help="Seconds that gateway and transport add.", min=0)] = 0.0,
    requests: RequestsFile = None,
) -> None:
    """Simulate a plan on a trace: goodput, attainment and latency per service."""
    from evaluator import evaluate as simulate
    from foreplan.runs import write_requests
    from plans.codec import read_plan
    from plans.documents import read_document
    from plans.service import Services

    arrivals = read_requests(trace, out)
    with out.progress(f"simulating {len(arrivals)} requests"):
        result = simulate(read_plan(plan), read_document(services, Services), arrivals, overhead_s=overhead)
    if requests is not None:
        write_requests(requests, result.requests)
    out.result(result.summary.to_json())
    print_summary(out, result.summary)


def print_summary(out: Output, summary: RunSummary) -> None:
    """Print a run, simulated or real, as tables."""
    out.table(
        _COLUMNS,
        [
            [
                one.service,
                one.offered,
                one.good,
                one.late,
                one.dropped,
                one.failed,
                None if one.attainment is None else f"{one.attainment:.2%}",
                *(
                    None if value is None else value * 1000
                    for value in (one.latency_s.p50, one.latency_s.p95, one.latency_s.p99)
                ),
                one.mean_batch,
                one.accuracy,
            ]
            for one in summary.services
        ],
    )
    measured = [group for group in summary.groups if group.utilisation is not None]
    if measured:
        out.table(["group", "utilisation"], [[group.group, f"{group.utilisation:.1%}"] for group in measured])
    attained = "-" if summary.attainment is None else f"{summary.attainment:.2%}"
    out.say(
        f"{summary.requests} requests in {summary.wall_s:.4g} s: goodput {summary.goodput_rps:.4g} of "
        f"{summary.offered_rps:.4g} rps, attainment {attained}, {summary.gpu_hours:.4g} GPU-hours"
    )


def report(
    out: Output,
    plan: PlanFile,
    cluster: ClusterFile,
    services: ServicesFile,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Page to write.")],
    profiles: Annotated[Path | None, typer.Option("--profiles", metavar="DIR", help="Folder of profiles.")] = None,
    demand: Annotated[Path | None, typer.Option("--demand", metavar="FILE", help="The forecast.")] = None,
    history: Annotated[
        Path | None, typer.Option("--history", metavar="FILE", help="Rates before the forecast.")
    ] = None,
    actual: Annotated[Path | None, typer.Option("--actual", metavar="FILE", help="Rates that then came.")] = None,
    simulated: Annotated[Path | None, typer.Option(metavar="FILE", help="`evaluate --requests` output.")] = None,
    measured: Annotated[Path | None, typer.Option(metavar="FILE", help="`load --requests` output.")] = None,
    title: Annotated[str, typer.Option(help="Heading.")] = "Foreplan report",
) -> None:
    """Write one self-contained HTML page about a plan and what became of it."""
    from foreplan.report import Content, render
    from foreplan.runs import read_run
    from plans.cluster import Cluster
    from plans.codec import read_plan
    from plans.demand import Demand
    from plans.documents import read_document, write_text
    from plans.service import Services
    from profiles.library import ProfileLibrary
    from traces.files import read_rate_trace

    read = read_plan(plan)
    wanted = read_document(services, Services)
    runs = {
        label: read_run(path, read, wanted)
        for label, path in (("simulated", simulated), ("measured", measured))
        if path is not None
    }
    content = Content(
        title=title,
        plan=read,
        cluster=read_document(cluster, Cluster),
        services=wanted,
        profiles=None if profiles is None else ProfileLibrary.read(profiles),
        demand=None if demand is None else read_document(demand, Demand),
        history=None if history is None else read_rate_trace(history).value,
        actual=None if actual is None else read_rate_trace(actual).value,
        runs=runs,
    )
    write_text(output, render(content))
    out.result({"report": str(output)})
    out.say(f"wrote {output}")
