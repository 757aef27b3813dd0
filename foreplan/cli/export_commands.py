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
from foreplan.cli.plan_options import (
    AddNodes,
    Attainment,
    Blocking,
    BlockingCharge,
    DropPenalties,
    DropPenalty,
    FirstObjective,
    Headroom,
    KeepAfterLoss,
    Minimized,
    Objective,
    Quantile,
    RemoveNodes,
    ScaleDemand,
    Scenarios,
    Utility,
    UtilityCurve,
    UtilityExponent,
    Window,
    check_together,
)

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
    blocking: BlockingCharge = Blocking.expected,
    headroom: Headroom = 0.05,
    objective: FirstObjective = Objective.goodput,
    utility: UtilityCurve = Utility.linear,
    utility_exponent: UtilityExponent = 4.0,
    drop_penalty: DropPenalties = DropPenalty.none,
    minimize: Minimized = None,
    attainment: Attainment = None,
    keep_after_loss: KeepAfterLoss = 0.0,
    scenarios: Scenarios = 0,
    add: AddNodes = None,
    remove: RemoveNodes = None,
    scale_demand: ScaleDemand = 1.0,
    window: Window = 60.0,
) -> None:
    """Write the exact model with its first objective, for any solver that reads LP or MPS.

    The model is that of `plan` with the same options.
    """
    from foreplan.planning import Inputs
    from foreplan.what_if import changed
    from planner import Problem, Settings, exact_model
    from planner.export import mps_text
    from plans.documents import write_text

    check_together(objective, utility, drop_penalty, minimize, attainment)
    inputs = Inputs.read(
        cluster=cluster,
        services=services,
        profiles=profiles,
        demand=read_demand(demand, trace, window, out),
        current=current,
    )
    inputs = changed(inputs, add=add or (), remove=remove or (), scale_demand=scale_demand)
    model = exact_model(
        Problem(
            cluster=inputs.cluster,
            services=inputs.services,
            profiles=inputs.profiles,
            demand=inputs.demand,
            current=inputs.current,
            settings=Settings(
                quantile=quantile,
                blocking=blocking.value,
                headroom_ratio=headroom,
                objective=objective.value,
                utility=utility.value,
                utility_exponent=utility_exponent,
                drop_penalty=drop_penalty.value,
                minimize=None if minimize is None else minimize.value,
                attainment=attainment,
                keep_after_loss=keep_after_loss,
                scenarios=scenarios,
            ),
        )
    )
    write_text(output, model.lp_text() if kind is ModelFormat.lp else mps_text(model))
    size = {"variables": len(model.variables), "integers": int(model.integer.sum()), "rows": len(model.rows)}
    out.result({"model": str(output), "format": kind.value, **size})
    out.say(f"wrote {output}: {size['variables']} variables, {size['integers']} of them integer, {size['rows']} rows")
