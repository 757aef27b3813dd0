"""``export``: the model for other solvers."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from foreplan.cli.command import command
from foreplan.cli.options import CurrentFile
from foreplan.cli.output import Output
from foreplan.cli.plan_options import InputOptions, LimitOptions, ObjectiveOptions

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
    inputs: InputOptions,
    limits: LimitOptions,
    objectives: ObjectiveOptions,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the model goes.")],
    current: CurrentFile = None,
) -> None:
    """Write the exact model with its first objective, for any solver that reads LP or MPS.

    The model is that of `plan` with the same options.
    """
    from planner import Problem, Settings, exact_model
    from planner.export import mps_text
    from plans.documents import write_text

    settings = objectives.in_settings(limits.in_settings(Settings()))
    read = inputs.supposed(inputs.read(out, current))
    model = exact_model(
        Problem(
            cluster=read.cluster,
            services=read.services,
            profiles=read.profiles,
            demand=read.demand,
            current=read.current,
            settings=settings,
        )
    )
    write_text(output, model.lp_text() if kind is ModelFormat.lp else mps_text(model))
    size = {"variables": len(model.variables), "integers": int(model.integer.sum()), "rows": len(model.rows)}
    out.result({"model": str(output), "format": kind.value, **size})
    out.say(f"wrote {output}: {size['variables']} variables, {size['integers']} of them integer, {size['rows']} rows")
