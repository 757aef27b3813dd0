"""Options of planning that several commands share, and what they may be set to."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

__all__ = [
    "AddNodes",
    "Attainment",
    "Blocking",
    "DropPenalty",
    "Headroom",
    "KeepAfterLoss",
    "Method",
    "Minimize",
    "Objective",
    "Quantile",
    "RemoveNodes",
    "ScaleDemand",
    "Solver",
    "Utility",
    "Window",
]


class Solver(StrEnum):
    """A solver for the ILP."""

    highs = "highs"
    scip = "scip"
    cp_sat = "cp-sat"
    cbc = "cbc"


class Method(StrEnum):
    """How placements are searched."""

    auto = "auto"
    direct = "direct"
    columns = "columns"


class Blocking(StrEnum):
    """How long another service's batch is assumed to hold a shared group."""

    strict = "strict"
    expected = "expected"
    none = "none"


class Objective(StrEnum):
    """What to maximise first."""

    goodput = "goodput"
    max_min = "max-min"
    fair_sum = "fair-sum"
    utility = "utility"


class Utility(StrEnum):
    """What a served share is worth."""

    linear = "linear"
    step = "step"
    power = "power"


class DropPenalty(StrEnum):
    """What dropping costs of a utility."""

    none = "none"
    step = "step"
    linear = "linear"


class Minimize(StrEnum):
    """What to minimise where an attainment is required."""

    gpus = "gpus"
    cost = "cost"


Window = Annotated[float, typer.Option("--window", help="Window of the rates taken from --trace, seconds.", min=0.001)]
Quantile = Annotated[
    float, typer.Option("--quantile", help="Quantile of the demand to plan for.", min=0.001, max=0.999)
]


Attainment = Annotated[
    float | None, typer.Option("--attainment", help="Share of every rate that has to be served.", min=0.0, max=1.0)
]
KeepAfterLoss = Annotated[
    float, typer.Option(help="Share of every rate that survives the loss of any one node.", min=0.0, max=1.0)
]
Headroom = Annotated[float, typer.Option(help="Share of GPU memory left free.", min=0, max=0.99)]
AddNodes = Annotated[
    list[str] | None, typer.Option("--add", "--add-node", metavar="NAME:TYPE*GPUS", help="What if: one node more.")
]
RemoveNodes = Annotated[list[str] | None, typer.Option("--remove", metavar="NODE", help="What if: without it.")]
ScaleDemand = Annotated[float, typer.Option("--scale-demand", help="What if: every rate times this.", min=0.0)]
