"""Options of planning that several commands share, and what they may be set to."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

__all__ = [
    "AddNodes",
    "Attainment",
    "Blocking",
    "BlockingCharge",
    "DropPenalties",
    "DropPenalty",
    "FirstObjective",
    "Headroom",
    "KeepAfterLoss",
    "Method",
    "Minimize",
    "Minimized",
    "Objective",
    "Quantile",
    "RemoveNodes",
    "ScaleDemand",
    "Scenarios",
    "Solver",
    "SolverName",
    "Utility",
    "UtilityCurve",
    "UtilityExponent",
    "Window",
    "check_together",
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


SolverName = Annotated[Solver, typer.Option("--solver", help="MILP solver.")]
BlockingCharge = Annotated[Blocking, typer.Option("--blocking", help="Charge for sharing a group.")]
FirstObjective = Annotated[Objective, typer.Option("--objective", help="What to maximise first.")]
UtilityCurve = Annotated[Utility, typer.Option("--utility", help="Curve of --objective utility.")]
UtilityExponent = Annotated[float, typer.Option("--utility-exponent", help="Exponent of the power curve.", min=0.01)]
DropPenalties = Annotated[DropPenalty, typer.Option("--drop-penalty", help="Penalty of --objective utility.")]
Minimized = Annotated[
    Minimize | None,
    typer.Option("--minimize", help="Fewest GPUs or least cost for --attainment, in place of --objective."),
]
Scenarios = Annotated[
    int, typer.Option("--scenarios", help="Demand scenarios to average over; 0: the quantile.", min=0)
]
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


def check_together(
    objective: Objective,
    utility: Utility,
    drop_penalty: DropPenalty,
    minimize: Minimize | None,
    attainment: float | None,
) -> None:
    """Check that no option would go unheard beside the others.

    Raises:
        InvalidInput: With one fault for each that would.
    """
    from plans.errors import Fault, InvalidInput

    curves = (("--utility", utility, Utility.linear), ("--drop-penalty", drop_penalty, DropPenalty.none))
    faults = [
        Fault(where="command line", field=name, found=chosen.value, expected="--objective utility beside it")
        for name, chosen, default in curves
        if objective is not Objective.utility and chosen is not default
    ]
    if minimize is not None:
        found, where = minimize.value, "command line"
        if attainment is None:
            remedy = "pass --attainment, such as 0.99: the share of every service's requests to serve"
            faults.append(
                Fault(where=where, field="--minimize", found=found, expected="--attainment beside it", remedy=remedy)
            )
        if objective is not Objective.goodput:
            expected = f"either this or --objective {objective.value}"
            faults.append(Fault(where=where, field="--minimize", found=found, expected=expected))
    if faults:
        raise InvalidInput(faults)
