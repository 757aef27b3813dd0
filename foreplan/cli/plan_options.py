"""Options of planning that several commands share: what they may be set to, and what they mean for a problem."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foreplan.cli.options import ClusterFile, DemandFile, ProfilesDir, ServicesFile, TraceFile, read_demand

if TYPE_CHECKING:
    from foreplan.cli.output import Output
    from foreplan.planning import Inputs
    from planner import Settings

__all__ = [
    "Blocking",
    "DropPenalty",
    "InputOptions",
    "LimitOptions",
    "Method",
    "Minimize",
    "Objective",
    "ObjectiveOptions",
    "Solver",
    "SolverName",
    "Utility",
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
Quantile = Annotated[
    float, typer.Option("--quantile", help="Quantile of the demand to plan for.", min=0.001, max=0.999)
]
BlockingCharge = Annotated[Blocking, typer.Option("--blocking", help="Charge for sharing a group.")]
Headroom = Annotated[float, typer.Option("--headroom", help="Share of GPU memory left free.", min=0, max=0.99)]
Attainment = Annotated[
    float | None, typer.Option("--attainment", help="Share of every rate that has to be served.", min=0.0, max=1.0)
]
KeepAfterLoss = Annotated[
    float,
    typer.Option(
        "--keep-after-loss", help="Share of every rate that survives the loss of any one node.", min=0.0, max=1.0
    ),
]
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
AddNodes = Annotated[
    list[str] | None, typer.Option("--add", "--add-node", metavar="NAME:TYPE*GPUS", help="What if: one node more.")
]
RemoveNodes = Annotated[list[str] | None, typer.Option("--remove", metavar="NODE", help="What if: without it.")]
ScaleDemand = Annotated[float, typer.Option("--scale-demand", help="What if: every rate times this.", min=0.0)]
Window = Annotated[float, typer.Option("--window", help="Window of the rates taken from --trace, seconds.", min=0.001)]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputOptions:
    """What is planned from, and what to suppose of it."""

    cluster: ClusterFile
    services: ServicesFile
    profiles: ProfilesDir
    demand: DemandFile = None
    trace: TraceFile = None
    window: Window = 60.0
    add: AddNodes = None
    remove: RemoveNodes = None
    scale_demand: ScaleDemand = 1.0

    def read(self, out: Output, current: Path | None = None) -> Inputs:
        """Read the documents as they are, with the plan ``current`` as the running one.

        Raises:
            InvalidInput: A file is wrong, or both or neither of --demand and --trace are given.
        """
        from foreplan.planning import Inputs

        return Inputs.read(
            cluster=self.cluster,
            services=self.services,
            profiles=self.profiles,
            demand=read_demand(self.demand, self.trace, self.window, out),
            current=current,
        )

    @property
    def what_if(self) -> bool:
        """Whether something is to be supposed."""
        return bool(self.add or self.remove or self.scale_demand != 1.0)

    def supposed(self, inputs: Inputs) -> Inputs:
        """Return ``inputs`` with what is to be supposed.

        Raises:
            InvalidInput: It cannot be: see `foreplan.what_if.changed`.
        """
        from foreplan.what_if import changed

        return changed(inputs, add=self.add or (), remove=self.remove or (), scale_demand=self.scale_demand)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitOptions:
    """What decides whether there is a plan."""

    quantile: Quantile = 0.9
    blocking: BlockingCharge = Blocking.expected
    headroom: Headroom = 0.05
    attainment: Attainment = None
    keep_after_loss: KeepAfterLoss = 0.0

    def in_settings(self, settings: Settings) -> Settings:
        """Return ``settings`` with these."""
        return replace(
            settings,
            quantile=self.quantile,
            blocking=self.blocking.value,
            headroom_ratio=self.headroom,
            attainment=self.attainment,
            keep_after_loss=self.keep_after_loss,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveOptions:
    """What decides which plan is best."""

    objective: FirstObjective = Objective.goodput
    utility: UtilityCurve = Utility.linear
    utility_exponent: UtilityExponent = 4.0
    drop_penalty: DropPenalties = DropPenalty.none
    minimize: Minimized = None
    scenarios: Scenarios = 0

    def in_settings(self, settings: Settings) -> Settings:
        """Return ``settings``, which have their limits, with these.

        Raises:
            InvalidInput: Options would go unheard beside the others; one fault for each.
        """
        self._check(settings.attainment)
        return replace(
            settings,
            objective=self.objective.value,
            utility=self.utility.value,
            utility_exponent=self.utility_exponent,
            drop_penalty=self.drop_penalty.value,
            minimize=None if self.minimize is None else self.minimize.value,
            scenarios=self.scenarios,
        )

    def _check(self, attainment: float | None) -> None:
        from plans.errors import Fault, InvalidInput

        curves = (("--utility", self.utility, Utility.linear), ("--drop-penalty", self.drop_penalty, DropPenalty.none))
        faults = [
            Fault(where="command line", field=name, found=chosen.value, expected="--objective utility beside it")
            for name, chosen, default in curves
            if self.objective is not Objective.utility and chosen is not default
        ]
        if self.minimize is not None:
            found, where = self.minimize.value, "command line"
            if attainment is None:
                remedy = "pass --attainment, such as 0.99: the share of every service's requests to serve"
                faults.append(
                    Fault(
                        where=where, field="--minimize", found=found, expected="--attainment beside it", remedy=remedy
                    )
                )
            if self.objective is not Objective.goodput:
                expected = f"either this or --objective {self.objective.value}"
                faults.append(Fault(where=where, field="--minimize", found=found, expected=expected))
        if faults:
            raise InvalidInput(faults)
