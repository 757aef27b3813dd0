"""``evaluate`` and ``report``."""

from __future__ import annotations

import itertools
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from foreplan.cli.command import command
from foreplan.cli.options import (
    ClusterFile,
    EngineName,
    PlanFile,
    Seed,
    ServicesFile,
    Workers,
    compilation_told,
    read_requests,
)
from foreplan.cli.output import Output

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from evaluator.changes import Change
    from evaluator.measures import StreamSummary
    from foreplan.batch import Context
    from plans.plan import Plan
    from traces.outcomes import RunSummary
    from traces.table import RequestTrace

__all__ = ["print_summary", "register"]

_COLUMNS = [
    "service",
    "offered",
    "good",
    "late",
    "dropped",
    "failed",
    "in flight",
    "attainment",
    "p50 (ms)",
    "p95 (ms)",
    "p99 (ms)",
    "mean batch",
    "accuracy",
]

_KEPT_REQUESTS = 20_000_000
"""Longer traces are only counted unless their requests are asked for: percentiles to 0.4 %, streams not told apart."""

Routing = Literal[
    "weighted",
    "weighted-random",
    "round-robin",
    "shortest-queue",
    "least-finish",
    "earliest-free",
    "credits",
    "corrected",
]
Order = Literal["edf", "fifo"]
Admission = Literal["dispatch", "arrival"]
Latency = Literal["mean", "profile", "exponential"]
Mode = Literal["auto", "event", "single-pass"]
# The evaluator's own choices, spelled again so that `--help` does not compile a simulator; a test holds them equal.

RequestsFile = Annotated[
    Path | None, typer.Option("--requests", metavar="FILE", help="Keep one row per request: .parquet or .csv.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    command(app, "evaluate")(evaluate)
    command(app, "report")(report)


def evaluate(
    out: Output,
    plans: Annotated[list[Path], typer.Argument(metavar="PLAN...", help="Plan files; several are a batch of runs.")],
    services: ServicesFile,
    traces: Annotated[
        list[Path], typer.Option("--trace", metavar="FILE", help="Request trace to serve; repeat for a batch of runs.")
    ],
    cluster: Annotated[
        Path | None, typer.Option("--cluster", metavar="FILE", help="cluster.yaml: for --fail, --then and --profiles.")
    ] = None,
    profiles: Annotated[
        Path | None, typer.Option("--profiles", metavar="DIR", help="For drawn latencies, interference and tokens.")
    ] = None,
    routing: Annotated[
        Routing | None,
        typer.Option(
            help="How a request finds its replica; without: as gateways do (corrected), and weighted with "
            "admission at arrival."
        ),
    ] = None,
    order: Annotated[Order, typer.Option(help="Order of the queues.")] = "edf",
    batch_delay: Annotated[float, typer.Option(help="Seconds that a head waits for its batch to fill.", min=0)] = 0.0,
    early_drop: Annotated[bool, typer.Option("--early-drop/--no-early-drop", help="Drop what cannot be met.")] = True,
    admission: Annotated[
        Admission, typer.Option(help="Decide when a request's turn comes, or when it arrives.")
    ] = "dispatch",
    concurrency: Annotated[int, typer.Option(help="Batches at once on a group of one stage.", min=1)] = 1,
    latency: Annotated[
        Latency, typer.Option(help="Latency of a batch: the plan's, drawn from the profiles, or exponential.")
    ] = "mean",
    overhead: Annotated[float, typer.Option(help="Seconds that gateway and transport add before the queue.")] = 0.0,
    response: Annotated[float, typer.Option(help="Seconds from the end of a batch to the client.")] = 0.0,
    iteration_overhead: Annotated[
        float, typer.Option(help="Seconds that agent and worker add to each iteration of a service that generates.")
    ] = 0.0,
    warmup: Annotated[float, typer.Option(help="Seconds whose requests are not counted.", min=0)] = 0.0,
    until: Annotated[float | None, typer.Option(help="End of the run, seconds; what runs then is in flight.")] = None,
    then: Annotated[
        list[str] | None,
        typer.Option("--then", metavar="SECONDS=PLAN", help="Change to another plan, with its loads; repeat."),
    ] = None,
    fail: Annotated[
        list[str] | None,
        typer.Option(
            "--fail", metavar="NODE[/GPU]@FROM[-TO]", help="A node or GPU fails, and recovers, at seconds; repeat."
        ),
    ] = None,
    mtbf: Annotated[
        float | None, typer.Option(help="Mean seconds between random failures of a node; with --mttr.")
    ] = None,
    mttr: Annotated[float | None, typer.Option(help="Mean seconds until a failed node is back.")] = None,
    mode: Annotated[
        Mode, typer.Option(help="Simulator: of events, or one pass over the arrivals, with --admission arrival.")
    ] = "auto",
    seed: Seed = 0,
    seeds: Annotated[int, typer.Option(help="Runs: of the trace, and of resampled ones.", min=1)] = 1,
    engine: EngineName = "processes",
    workers: Workers = 0,
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="DIR", help="Keep finished runs of a batch, and go on from them.")
    ] = None,
    requests: RequestsFile = None,
    timeline: Annotated[
        Path | None, typer.Option("--timeline", metavar="FILE", help="Counts per service over time: .parquet or .csv.")
    ] = None,
    resolution: Annotated[float, typer.Option(help="Width of the timeline's bins, seconds.", min=0.001)] = 60.0,
) -> None:
    """Simulate plans on traces: goodput, attainment and latency per service."""
    from evaluator import GATEWAY_ROUTING, Settings
    from foreplan.batch import Context
    from foreplan.runs import check_table_name
    from plans.cluster import Cluster
    from plans.codec import read_plan
    from plans.documents import read_document
    from plans.service import Services
    from profiles.library import ProfileLibrary

    for table in (requests, timeline):
        if table is not None:
            check_table_name(table)
    context = Context(
        services=read_document(services, Services),
        cluster=None if cluster is None else read_document(cluster, Cluster),
        profiles=None if profiles is None else ProfileLibrary.read(profiles),
        settings=Settings(
            seed=seed,
            routing=routing or ("weighted" if admission == "arrival" else GATEWAY_ROUTING),
            order=order,
            batch_delay_s=batch_delay,
            early_drop=early_drop,
            admission=admission,
            concurrency=concurrency,
            latency=latency,
            overhead_s=overhead,
            response_s=response,
            iteration_overhead_s=iteration_overhead,
            warmup_s=warmup,
            until_s=until,
        ),
        mode=mode,
    )
    arrivals = {str(path): read_requests(path, out) for path in traces}
    known = {str(path): read_plan(path) for path in plans}
    # What is kept and what Ray does are batches, be it of one run.
    if len(known) * len(arrivals) * seeds == 1 and keep is None and engine == "processes":
        changes = _changes(context, arrivals[str(traces[0])], then or [], fail or [], mtbf, mttr, seed)
        _evaluate_one(
            out, context, known[str(plans[0])], arrivals[str(traces[0])], changes, requests, timeline, resolution
        )
        return
    _refuse_in_a_batch({"--then": then, "--fail": fail, "--mtbf": mtbf, "--requests": requests, "--timeline": timeline})
    _evaluate_batch(out, context, known, arrivals, seeds, engine, workers, keep)


def _evaluate_one(
    out: Output,
    context: Context,
    plan: Plan,
    arrivals: RequestTrace,
    changes: Sequence[Change],
    requests: Path | None,
    timeline: Path | None,
    resolution_s: float,
) -> None:
    from evaluator import evaluate as simulate
    from foreplan.runs import write_requests, write_timeline

    with out.progress(f"simulating {len(arrivals)} requests"), compilation_told(out):
        result = simulate(
            plan,
            context.services,
            arrivals,
            settings=context.settings,
            cluster=context.cluster,
            profiles=context.profiles,
            changes=changes,
            keep_requests=requests is not None or len(arrivals) <= _KEPT_REQUESTS,
            timeline_s=None if timeline is None else resolution_s,
            mode=context.mode,
        )
    if requests is not None:
        write_requests(requests, result.request_parts())
    if timeline is not None and result.timeline is not None:
        write_timeline(timeline, result.timeline)
    streams = [asdict(stream) for stream in result.streams]
    shown = {**result.summary.to_json(), "mode": result.mode}
    out.result({**shown, "streams": streams} if streams else shown)
    print_summary(out, result.summary)
    if streams:
        columns = ["service", "stream", "frames", "good", "fps", "jitter (ms)", "largest (ms)"]
        out.table(columns, [_stream_row(stream) for stream in result.streams])
    out.note(f"mode: {result.mode}")


def _stream_row(stream: StreamSummary) -> list[object]:
    jitters = [None if value is None else value * 1000 for value in (stream.mean_jitter_s, stream.largest_jitter_s)]
    return [stream.service, stream.stream, stream.offered, stream.good, stream.fps, *jitters]


def _evaluate_batch(
    out: Output,
    context: Context,
    plans: Mapping[str, Plan],
    traces: Mapping[str, RequestTrace],
    seeds: int,
    engine: Literal["processes", "ray"],
    workers: int,
    keep: Path | None,
) -> None:
    from foreplan.batch import run_batch

    total = len(plans) * len(traces) * seeds
    with out.progress(f"{total} runs", total=total) as progress, compilation_told(out):
        finished = itertools.count(1)
        runs = run_batch(
            context,
            plans,
            traces,
            seeds=seeds,
            engine=engine,
            workers=workers or os.cpu_count() or 1,
            kept=keep,
            done=lambda _: progress.update(next(finished)),
        )
    out.result({"runs": runs})
    columns = ["plan", "trace", "seed", "requests", "attainment", "goodput (rps)", "GPU-hours", "mode"]
    rows = []
    for run in runs:
        attained = "-" if run["attainment"] is None else f"{run['attainment']:.2%}"
        cells = [run["plan"], run["trace"], run["seed"], run["requests"], attained]
        rows.append([*cells, run["goodput_rps"], run["gpu_hours"], run["mode"]])
    out.table(columns, rows)


def _refuse_in_a_batch(options: Mapping[str, object]) -> None:
    from plans.errors import Fault, InvalidInput

    faults = [
        Fault(where=name, found="a batch of runs", expected="one plan, trace and seed, without --keep and Ray")
        for name, value in options.items()
        if value
    ]
    if faults:
        raise InvalidInput(faults)


def _changes(
    context: Context,
    arrivals: RequestTrace,
    then: Sequence[str],
    fail: Sequence[str],
    mtbf_s: float | None,
    mttr_s: float | None,
    seed: int,
) -> list[Change]:
    """Return the changes that the options ask for, by time."""
    from evaluator.changes import Failure, check_failure, random_failures
    from foreplan.changes import failures_of, plan_change_of
    from plans.errors import InvalidInput

    changes: list[Change] = [plan_change_of(text) for text in then]
    failures = {text: failures_of(text) for text in fail}
    changes += [change for found in failures.values() for change in found]
    if (mtbf_s is None) != (mttr_s is None):
        raise InvalidInput.of("both or neither", where="--mtbf and --mttr", found="one of them")
    if (changes or mtbf_s is not None) and context.cluster is None:
        raise InvalidInput.of("the cluster that changes", where="--cluster", found="none")
    for text, found in failures.items():
        for failure in found:
            if context.cluster is not None and isinstance(failure, Failure):
                check_failure(failure, context.cluster, f"--fail {text}")
    if mtbf_s is not None and mttr_s is not None and context.cluster is not None:
        changes += random_failures(
            context.cluster, mtbf_s=mtbf_s, mttr_s=mttr_s, until_s=arrivals.duration_s, seed=seed
        )
    return sorted(changes, key=lambda change: change.at_s)


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
                one.in_flight,
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
    used = f", {summary.gpu_hours:.4g} GPU-hours" if summary.gpu_hours else ""
    out.say(
        f"{summary.requests} requests in {summary.wall_s:.4g} s: goodput {summary.goodput_rps:.4g} of "
        f"{summary.offered_rps:.4g} rps, attainment {attained}{used}"
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
