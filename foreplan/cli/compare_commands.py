"""``compare``."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foreplan.cli.command import command
from foreplan.cli.options import (
    ClusterFile,
    EngineName,
    ProfilesDir,
    Seed,
    ServicesFile,
    Workers,
    compilation_told,
    read_requests,
)
from foreplan.cli.output import Output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from foreplan.compare import Outcome, Point, Regret, Study

__all__ = ["register"]

_SAME_GPU_HOURS_RATIO = 1.001


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    command(app, "compare")(compare)


def compare(
    out: Output,
    cluster: ClusterFile,
    services: ServicesFile,
    profiles: ProfilesDir,
    trace: Annotated[Path, typer.Option("--trace", metavar="FILE", help="Arrivals that every policy serves.")],
    policies: Annotated[
        str,
        typer.Option(
            "--policies",
            metavar="A,B,..",
            help="Policies; differences are against the first. foreplan, ilp (without polish), round-robin, random, "
            "least-loaded, selective-replication.",
        ),
    ] = "foreplan,selective-replication,least-loaded,round-robin,random",
    history: Annotated[
        Path | None,
        typer.Option(
            "--history",
            metavar="FILE",
            help="Arrivals to plan from; without it the first half of --trace, then the second is served.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Arrivals served: the trace, and resampled ones.", min=1)] = 5,
    load: Annotated[str, typer.Option(metavar="X,..", help="Multiples of the load.")] = "1",
    slo_scale: Annotated[str, typer.Option(metavar="X,..", help="Multiples of every deadline.")] = "1",
    burstiness: Annotated[
        str, typer.Option(metavar="CV,..", help="Coefficients of variation of the gaps, beside the recorded one.")
    ] = "",
    regret: Annotated[bool, typer.Option("--regret/--no-regret", help="Plan in hindsight, too.")] = True,
    polish: Annotated[float, typer.Option(help="Seconds of Foreplan's search by simulation.", min=0)] = 10.0,
    time_limit: Annotated[float, typer.Option(help="Seconds of Foreplan's ILP.", min=0.1)] = 10.0,
    replan: Annotated[
        float, typer.Option(help="Seconds after which every policy plans again, its time charged; 0: never.", min=0)
    ] = 0.0,
    overhead: Annotated[float, typer.Option(help="Seconds that gateway and transport add.", min=0)] = 0.0,
    engine: EngineName = "processes",
    workers: Workers = 0,
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="DIR", help="Keep finished runs here, and go on from them.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="HTML page to write.")] = None,
    seed: Seed = 1,
) -> None:
    """Serve the same arrivals with several policies: attainment, goodput, GPU-hours, regret."""
    import os

    from evaluator import Settings as SimulationSettings
    from foreplan.compare import Study, render
    from foreplan.compare import compare as run
    from planner import Settings
    from plans.cluster import Cluster
    from plans.documents import check_writable, read_document, write_text
    from plans.service import Services, check_against_cluster
    from profiles.library import ProfileLibrary

    if output is not None:
        check_writable(output)
    inventory = read_document(cluster, Cluster)
    wanted = read_document(services, Services)
    check_against_cluster(wanted, inventory, where=str(services))
    served = read_requests(trace, out)
    if history is None:
        half_s = served.duration_s / 2
        before, served = served.window(0, half_s), served.window(half_s, served.duration_s + 1e-9)
        out.note(f"planned from the first half of {trace}; the second half ({len(served)} requests) is served")
    else:
        before = read_requests(history, out)
    study = Study(
        cluster=inventory,
        services=wanted,
        profiles=ProfileLibrary.read(profiles),
        history=before,
        served=served,
        planning=Settings(seed=seed, time_limit_s=time_limit),
        simulation=SimulationSettings(seed=seed, overhead_s=overhead),
        polish_s=polish,
        replan_s=replan,
    )
    names = [name.strip() for name in policies.split(",") if name.strip()]
    points = _points(load, slo_scale, burstiness)
    total = len(names) * len(points)
    with (
        out.progress(f"{len(names)} policies at {len(points)} points", total=total) as progress,
        compilation_told(out),
    ):
        finished = itertools.count(1)
        outcomes = run(
            study,
            names,
            points,
            seeds=seeds,
            engine=engine,
            workers=workers or os.cpu_count() or 1,
            kept=keep,
            done=lambda _: progress.update(next(finished)),
        )
    regrets = _regrets(out, study, outcomes, points) if regret else []
    remarks = _remarks(outcomes, points)
    _print(out, outcomes, regrets, remarks)
    if output is not None:
        write_text(output, render(f"Policies on {trace.name}", outcomes, regrets, remarks))
        out.say(f"wrote {output}")


def _regrets(out: Output, study: Study, outcomes: Sequence[Outcome], points: Sequence[Point]) -> list[Regret]:
    from foreplan.compare import regret

    regrets = []
    with out.progress("planning in hindsight", total=len(points)) as progress:
        for position, point in enumerate(points, start=1):
            regrets.append(regret(study, outcomes, point))
            progress.update(position)
    return regrets


def _print(out: Output, outcomes: Sequence[Outcome], regrets: Sequence[Regret], remarks: Sequence[str]) -> None:
    from dataclasses import asdict

    from foreplan.compare.page import COLUMNS, routings, rows

    out.result({"outcomes": [asdict(each) for each in outcomes], "regret": [asdict(each) for each in regrets]})
    out.table(list(COLUMNS), rows(outcomes, regrets))
    for each in regrets:
        bound = "" if each.bound_rps is None else f"; no placement exceeds {each.bound_rps:.4g} rps"
        out.say(f"best in hindsight: {each.best_rps:.4g} rps by {each.best}{bound}")
    for remark in remarks:
        out.warn(remark)
    out.note(routings(outcomes))
    out.note(f"mode: {', '.join(sorted({each.mode for each in outcomes}))}")


def _remarks(outcomes: Sequence[Outcome], points: Sequence[Point]) -> list[str]:
    """Say where GPU-hours were not equal."""
    unequal = []
    for point in points:
        hours = [each.samples[0].gpu_hours for each in outcomes if each.point == point]
        if max(hours) > min(hours) * _SAME_GPU_HOURS_RATIO:
            unequal.append(point)
    if not unequal:
        return []
    share = f"{len(unequal)} of {len(points)} points" if len(points) > 1 else "this trace"
    return [f"the policies did not use equal GPU-hours at {share}; the table says how many each used"]


def _points(load: str, slo_scale: str, burstiness: str) -> list[Point]:
    """Return the points on the three axes through the recorded trace."""
    from foreplan.compare import Point

    loads, scales, cvs = (_numbers(text, f"--{name}") for text, name in _axes(load, slo_scale, burstiness))
    base = Point(load=loads[0] if len(loads) == 1 else 1.0, slo_scale=scales[0] if len(scales) == 1 else 1.0)
    points = [base]
    points += [Point(load=value, slo_scale=base.slo_scale) for value in loads]
    points += [Point(load=base.load, slo_scale=value) for value in scales]
    points += [Point(load=base.load, slo_scale=base.slo_scale, burstiness_cv=value) for value in cvs]
    return list(dict.fromkeys(points))


def _axes(load: str, slo_scale: str, burstiness: str) -> list[tuple[str, str]]:
    return [(load, "load"), (slo_scale, "slo-scale"), (burstiness, "burstiness")]


def _numbers(text: str, option: str) -> list[float]:
    import math

    from plans.errors import InvalidInput

    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise InvalidInput.of("numbers above 0, separated by commas", where=option, found=repr(part))
        found.append(value)
    return found
