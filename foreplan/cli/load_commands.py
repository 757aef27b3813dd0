"""``load``: a trace replayed against a live gateway."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foreplan.cli.command import EXIT_ERROR, EXIT_INTERRUPTED, command
from foreplan.cli.evaluate_commands import RequestsFile, print_summary
from foreplan.cli.options import Seed, ServicesFile, read_requests
from foreplan.cli.output import Output, Step
from foreplan.cli.tls_options import ClientCert, ClientKey, Insecure, RootCert, client_dialer

if TYPE_CHECKING:
    from executor.load import LoadOptions, LoadProgress, LoadResult
    from plans.service import Services
    from traces.table import RequestTrace

__all__ = ["register"]

_REMEDIES = {
    "NOT_FOUND": " (the gateway has no plan with their service: see `foreplan status`)",
    "UNAVAILABLE": " (the gateway went away, or no replica could take them: see `foreplan status`)",
    "PERMISSION_DENIED": " (the certificate has no role that may)",
}
"""What a status of requests that failed points to."""

_STOPS = (signal.SIGINT, signal.SIGTERM)


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    command(app, "load")(load)


def load(
    out: Output,
    trace: Annotated[Path, typer.Option("--trace", metavar="FILE", help="Request trace to replay.")],
    services: ServicesFile,
    gateway: Annotated[str, typer.Option("--gateway", metavar="HOST:PORT", help="The gateway.")],
    speed: Annotated[float, typer.Option(help="Trace seconds per second.", min=0.001)] = 1.0,
    processes: Annotated[int, typer.Option(help="Processes that send.", min=1)] = 1,
    connections: Annotated[int, typer.Option(help="Connections of each process to the gateway.", min=1)] = 1,
    gpus: Annotated[int, typer.Option(help="GPUs that the plan uses, for GPU-hours.", min=0)] = 0,
    requests: RequestsFile = None,
    seed: Seed = 0,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
    root_cert: RootCert = None,
    insecure: Insecure = False,
) -> None:
    """Replay a trace against a live gateway, open loop, and count what became of every request.

    Ctrl-C or SIGTERM ends the run early: what was sent is written and counted all the same. A second Ctrl-C ends the
    command.
    """
    from executor.load import LoadOptions
    from foreplan.runs import check_table_name, write_requests
    from plans.documents import read_document
    from plans.service import Services

    if requests is not None:
        check_table_name(requests)
    dialer = client_dialer([gateway], client_cert, client_key, root_cert, insecure=insecure)
    known = read_document(services, Services)
    arrivals = read_requests(trace, out)
    with out.progress(f"replaying {len(arrivals)} requests", total=len(arrivals), in_lines=True) as step:
        how = LoadOptions(
            speed=speed,
            processes=processes,
            connections=connections,
            seed=seed,
            gpus=gpus,
            on_progress=lambda progress: _show(step, progress),
            tls=dialer.credentials.files if dialer.credentials else None,
        )
        result = asyncio.run(_replay(arrivals, gateway, known, how))
    for warning in result.warnings:
        out.warn(warning)
    for problem in result.lost:
        out.error(problem)
    if failures := _failures(result):
        out.warn(failures)
    out.result(result.summary.to_json())
    print_summary(out, result.summary)
    if requests is not None:
        write_requests(requests, [result.requests])  # last: where it fails, the run was not for nothing
    if result.lost:
        raise typer.Exit(EXIT_ERROR)
    if how.stop.is_set():
        out.error(
            f"interrupted: only {len(result.requests)} of {len(arrivals)} requests were sent, and are counted here"
        )
        raise typer.Exit(EXIT_INTERRUPTED)


def _failures(result: LoadResult) -> str:
    """Return how requests failed, the commonest first; empty where none did."""
    failed = result.requests[result.requests["outcome"] == "failed"]
    counts = failed["status"].value_counts()
    text = ", ".join(f"{count} {status}{_REMEDIES.get(str(status), '')}" for status, count in counts.items())
    return f"{len(failed)} requests failed: {text}" if text else ""


async def _replay(arrivals: RequestTrace, gateway: str, services: Services, how: LoadOptions) -> LoadResult:
    """Replay; a Ctrl-C or SIGTERM ends the run, and the next one everything."""
    from executor.load import replay

    loop = asyncio.get_running_loop()

    def stop() -> None:
        for number in _STOPS:
            loop.remove_signal_handler(number)
        how.stop.set()

    for number in _STOPS:
        loop.add_signal_handler(number, stop)
    try:
        return await replay(arrivals, gateway, services, how)
    finally:
        for number in _STOPS:
            loop.remove_signal_handler(number)


def _show(step: Step, progress: LoadProgress) -> None:
    """Show how far a run is, with what its latencies are so far."""
    text = f"{progress.good} of {progress.done} in time"
    p50_s, p99_s = progress.latency.quantile_s(0.5), progress.latency.quantile_s(0.99)
    if p50_s is not None and p99_s is not None:
        text += f", p50 {p50_s * 1000:.1f} ms, p99 {p99_s * 1000:.1f} ms"
    step.update(progress.done, total=progress.total, text=text)
