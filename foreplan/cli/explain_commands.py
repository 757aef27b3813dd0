"""``explain``."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foreplan.cli.command import command
from foreplan.cli.options import Seed
from foreplan.cli.output import Output
from foreplan.cli.plan_options import InputOptions, LimitOptions, Solver, SolverName

if TYPE_CHECKING:
    from foreplan.planning import Inputs
    from planner import Problem
    from plans.plan import Plan

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    command(app, "explain")(explain)


def explain(
    out: Output,
    inputs: InputOptions,
    limits: LimitOptions,
    service: Annotated[str | None, typer.Argument(help="A service.")] = None,
    plan: Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="The plan to explain.")] = None,
    infeasible: Annotated[
        bool, typer.Option("--infeasible", help="Say why there is no plan, and what to relax least.")
    ] = False,
    node: Annotated[str | None, typer.Option("--node", help="Say why not on this node, by solving again.")] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds for solving again; 0 leaves it out.", min=0.0)] = 5.0,
    solver: SolverName = Solver.highs,
    seed: Seed = 1,
) -> None:
    """Say why a service is placed as it is: what binds, and why not otherwise; or why there is no plan at all.

    A plan is explained with the settings it was made with; --solver, --quantile, --blocking, --headroom, --attainment,
    --keep-after-loss and --seed are for --infeasible, which has no plan to take them from. A plan made with --add,
    --remove or --scale-demand is explained with the same.
    """
    from foreplan.planning import settings_of
    from planner import Problem, Settings
    from planner import explain as explain_service
    from plans.codec import read_plan
    from plans.errors import InvalidInput

    if infeasible == (service is not None):
        found = "both" if infeasible else "neither"
        raise InvalidInput.of("one of SERVICE and --infeasible", where="command line", found=found)
    read = inputs.supposed(inputs.read(out))
    problem = Problem(cluster=read.cluster, services=read.services, profiles=read.profiles, demand=read.demand)
    if service is None:
        settings = limits.in_settings(Settings(seed=seed, backend=solver.value))
        _explain_infeasible(out, replace(problem, settings=settings), max(time_limit, 1.0))
        return
    if plan is None:
        raise InvalidInput.of("the plan to explain", where="command line", field="--plan", found="nothing")
    names = [known.name for known in read.services.services]
    if service not in names:
        raise InvalidInput.of(f"one of {', '.join(names)}", where="command line", field="SERVICE", found=repr(service))
    explained = read_plan(plan)
    _check_inputs(explained, read, str(plan))
    problem = replace(problem, settings=settings_of(explained))
    explanation = explain_service(problem, explained, service, node=node, time_limit_s=time_limit)
    out.result(explanation.to_json())
    for line in explanation.lines():
        out.say(line)


def _check_inputs(plan: Plan, inputs: Inputs, where: str) -> None:
    """Check that ``plan`` was made from ``inputs``, as far as it says what it was made from.

    Raises:
        InvalidInput: With one fault for each document that is another.
    """
    from planner.assemble import digests_of
    from plans.errors import Fault, InvalidInput

    found = digests_of(inputs.cluster, inputs.services, inputs.profiles, inputs.demand)
    faults = [
        Fault(
            where=where,
            field=f"inputs.{name}",
            found=f"{digest[:19]}..., and the {name} given {found[name][:19]}...",
            expected=f"the {name} that the plan was made from",
            remedy="pass the same files, and the same --add, --remove, --scale-demand and --window",
        )
        for name, digest in plan.inputs.items()
        if name in found and digest != found[name]
    ]
    if faults:
        raise InvalidInput(faults)


def _explain_infeasible(out: Output, problem: Problem, time_limit_s: float) -> None:
    import time

    from planner import explain_infeasible

    found = explain_infeasible(problem, clock=time.monotonic, time_limit_s=time_limit_s)
    conflicts = found.conflicts
    out.result(
        {
            "infeasible": conflicts is not None,
            "conflicts": [] if conflicts is None else [asdict(each) for each in conflicts.members],
            "minimal": conflicts is not None and conflicts.minimal,
            "relaxation": [asdict(each) for each in found.relaxation],
            "least": found.least,
            "everywhere": found.everywhere,
        }
    )
    for line in found.lines():
        out.say(line)
