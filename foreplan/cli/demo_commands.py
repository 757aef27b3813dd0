"""``demo``: the whole job on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foreplan.cli.command import command
from foreplan.cli.options import Seed
from foreplan.cli.output import Output

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    command(app, "demo")(demo)


def demo(
    out: Output,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="A day, or a folder of days, in Azure Functions 2019 format."),
    ] = None,
    folder: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where everything goes.")] = Path(
        "demo"
    ),
    windows: Annotated[int, typer.Option(help="Minutes of the trace to replay, at ten times speed.", min=1)] = 10,
    load: Annotated[
        float, typer.Option(help="Share of the cores that can be spared to keep busy at the peak.", min=0.01, max=5)
    ] = 0.45,
    seed: Seed = 1,
) -> None:
    """Do the whole job on this machine: profile, forecast, plan, apply, replay, evaluate, report."""
    from foreplan.demo import run_demo

    result = run_demo(out, folder, trace=trace, windows=windows, core_share=load, seed=seed)
    out.result(result.to_json())
    rows = []
    for prediction in result.plan.predicted:
        found = [result.runs[label].summary.service(prediction.service) for label in ("simulated", "measured")]
        shares = [prediction.attainment, *(one.attainment for one in found)]
        rows.append(
            [prediction.service, *("-" if share is None else f"{share:.1%}" for share in shares), found[1].mean_batch]
        )
    out.table(["service", "predicted", "simulated", "measured", "mean batch"], rows, title="Attainment")
    out.say(f"wrote {result.report} after {result.wall_s:.0f} s")
