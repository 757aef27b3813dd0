"""``export``: the model for other solvers."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from foreplan.cli.command import command
from foreplan.cli.options import (
    ClusterFile,
    CurrentFile,
    DemandFile,
    ProfilesDir,
    ServicesFile,
    TraceFile,
    read_demand,
)
from foreplan.cli.output import Output
from foreplan.cli.plan_options import Attainment, KeepAfterLoss, Minimize, Objective, Quantile, Window

__all__ = ["register"]


class ModelFormat(StrEnum):
    """How a model is written."""

    lp = "lp"
    mps = "mps"


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    command(app, "export")(export)


def export(
    out: Output,
    kind: Annotated[ModelFormat, typer.Argument(help="Format of the model.")],
    cluster: ClusterFile,
    services: ServicesFile,
    profiles: ProfilesDir,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the model goes.")],
    demand: DemandFile = None,
    trace: TraceFile = None,
    current: CurrentFile = None,
    quantile: Quantile = 0.9,
    objective: Annotated[Objective, typer.Option(help="What to maximise.")] = Objective.goodput,
    minimize: Annotated[
        Minimize | None, typer.Option(help="Fewest GPUs or least cost for --attainment, in place of --objective.")
    ] = None,
    attainment: Attainment = None,
    keep_after_loss: KeepAfterLoss = 0.0,
    window: Window = 60.0,
) -> None:
    """Write the exact model with its first objective, for any solver that reads LP or MPS."""
    from foreplan.planning import Inputs
    from planner import Problem, Settings, exact_model
    from planner.export import mps_text
    from plans.documents import write_text

    inputs = Inputs.read(
        cluster=cluster,
        services=services,
        profiles=profiles,
        demand=read_demand(demand, trace, window, out),
        current=current,
    )
    model = exact_model(
        Problem(
            cluster=inputs.cluster,
            services=inputs.services,
            profiles=inputs.profiles,
            demand=inputs.demand,
            current=inputs.current,
            settings=Settings(
                quantile=quantile,
                objective=objective.value,
                minimize=None if minimize is None else minimize.value,
                attainment=attainment,
                keep_after_loss=keep_after_loss,
            ),
        )
    )
    write_text(output, model.lp_text() if kind is ModelFormat.lp else mps_text(model))
    size = {"variables": len(model.variables), "integers": int(model.integer.sum()), "rows": len(model.rows)}
    out.result({"model": str(output), "format": kind.value, **size})
    out.say(f"wrote {output}: {size['variables']} variables, {size['integers']} of them integer, {size['rows']} rows")
