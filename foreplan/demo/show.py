"""The demo, step by step: profile, forecast, plan, apply, replay, evaluate, report."""

from __future__ import annotations

import asyncio
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import evaluator
from executor.controller import apply
from executor.load import LoadOptions, replay
from forecaster import forecast
from foreplan.cli.output import Output
from foreplan.demo.processes import ChildProcesses
from foreplan.demo.stage import (
    DAY_WINDOWS,
    MODELS,
    SPEED,
    Load,
    Machine,
    cluster_yaml,
    cut_load,
    make_cluster,
    make_services,
    read_history,
    services_yaml,
)
from foreplan.measure import Device, measure, processor_name
from foreplan.planning import Inputs, make_plan
from foreplan.ports import free_ports
from foreplan.report import Content, Run, render
from foreplan.runs import write_requests
from planner import Settings, Solved
from plans.cluster import Cluster
from plans.codec import write_plan
from plans.demand import Demand
from plans.documents import write_document, write_text
from plans.errors import ForeplanError, InvalidInput, RemoteFailure
from plans.plan import Plan
from plans.service import Services
from profiles.document import Profile
from profiles.library import ProfileLibrary
from profiles.profiler import Progress, StopRule
from traces.files import write_trace
from traces.rates import RateTrace
from traces.table import RequestTrace

__all__ = ["DemoResult", "run_demo"]

SAMPLE = Path(__file__).resolve().parent.parent.parent / "examples" / "azure_sample"
BATCHES = (1, 2, 4, 8)
WARM_UP_REQUESTS = 8
WARM_UP_GAP_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """What the demo found out.

    Attributes:
        plan: The plan that was applied.
        runs: The same arrivals, simulated and measured.
        overhead_s: What gateway and transport added per request, measured on warm-up requests.
        report: The page.
        wall_s: Time from start to end.
    """

    plan: Plan
    runs: dict[str, Run]
    overhead_s: float
    report: Path
    wall_s: float

    def to_json(self) -> dict[str, Any]:
        """Return what ``demo --json`` prints."""
        return {
            "wall_s": self.wall_s,
            "report": str(self.report),
            "services": [
                {
                    "service": prediction.service,
                    "attainment": {"predicted": prediction.attainment}
                    | {label: run.summary.service(prediction.service).attainment for label, run in self.runs.items()},
                    "mean_batch": self.runs["measured"].summary.service(prediction.service).mean_batch,
                }
                for prediction in self.plan.predicted
            ],
        }


def run_demo(
    out: Output, folder: Path, *, trace: Path | None, windows: int, core_share: float, seed: int
) -> DemoResult:
    """Do the whole job in ``folder``: its files stay there to be looked at, its processes do not.

    Args:
        out: Where to say what happens.
        folder: Made when missing; files of an earlier demo are replaced.
        trace: A day (or a folder of days) in Azure Functions 2019 format; the shipped sample when left out.
        windows: Minutes of the trace to forecast, plan for and replay.
        core_share: Share of the cores that can be spared which the models alone keep busy in the busiest window.
        seed: Seed of the mapping, the arrivals and the solver.

    Raises:
        InvalidInput: The trace is no such trace, or too short.
        RemoteFailure: An agent or the gateway did not start, or died.
    """
    started_s = time.monotonic()
    machine = Machine.here()
    if machine.remark:
        out.warn(machine.remark)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "state", ignore_errors=True)  # of an earlier demo, whose plan is not ours
    source = _source(trace)
    rates = read_history(source, seed=seed)  # before anything slow, so that a wrong file is said at once
    profiles = _profile(out, folder / "profiles", seed)
    services, cluster = make_services(profiles), make_cluster(machine)
    write_text(folder / "services.yaml", services_yaml(services))
    write_text(folder / "cluster.yaml", cluster_yaml(cluster))
    load = cut_load(rates, profiles, machine, windows=windows, core_share=core_share, seed=seed)
    write_trace(folder / "history.parquet", load.history)
    write_trace(folder / "arrivals.parquet", load.arrivals)
    demand = _forecast(load.history, windows, seed)
    write_document(folder / "demand.json", demand)
    out.say(f"forecast {windows} windows of {demand.window_s:g} s: {demand.method}")
    plan = _plan(out, folder / "plan.json", cluster, services, profiles, demand, seed)
    measured, overhead_s = _serve(out, folder, cluster, services, plan, load, seed)
    as_served = evaluator.Settings(routing=evaluator.GATEWAY_ROUTING, overhead_s=overhead_s)
    simulated = evaluator.evaluate(plan, services, load.arrivals, settings=as_served)
    runs = {"simulated": Run(summary=simulated.summary, requests=simulated.requests), "measured": measured}
    for label, run in runs.items():
        write_requests(folder / f"{label}.parquet", [run.requests])
    facts = {
        "machine": f"{processor_name()}, {machine.cores} cores",
        "trace": f"{source.name}, {len(load.arrivals)} requests in {load.arrivals.duration_s:g} s, {SPEED:g}x speed",
        "overhead": f"{overhead_s * 1000:.1f} ms per request for gateway and transport, put into the simulation",
    }
    content = Content(
        title="Foreplan demo",
        facts=facts,
        plan=plan,
        cluster=cluster,
        services=services,
        profiles=profiles,
        demand=demand,
        history=_tail(load.history, windows),
        actual=load.actual,
        runs=runs,
        remarks=(machine.remark,) if machine.remark else (),
    )
    report = folder / "report.html"
    write_text(report, render(content))
    wall_s = time.monotonic() - started_s
    return DemoResult(plan=plan, runs=runs, overhead_s=overhead_s, report=report, wall_s=wall_s)


def _source(trace: Path | None) -> Path:
    if trace is not None:
        return trace
    if not SAMPLE.is_dir():
        raise InvalidInput.of(
            "the shipped sample", where=SAMPLE, found="nothing", remedy="give --trace FILE, or run from a checkout"
        )
    return SAMPLE


def _forecast(history: RateTrace, windows: int, seed: int) -> Demand:
    """Forecast like the day before where the history has one, like the last minute otherwise."""
    if history.counts().shape[1] < DAY_WINDOWS + windows:
        return forecast(history, method="last-value", windows=windows, seed=seed)
    return forecast(history, method="seasonal-naive", period=DAY_WINDOWS, windows=windows, seed=seed)


def _profile(out: Output, folder: Path, seed: int) -> ProfileLibrary:
    folder.mkdir(parents=True, exist_ok=True)
    profiles: list[Profile] = []
    with out.progress(f"profiling {len(MODELS)} models on this CPU", total=len(MODELS)) as step:

        def show(progress: Progress) -> None:
            at = "loading" if progress.batch is None else f"batch {progress.batch}"
            step.update(len(profiles) + progress.done_ratio, text=f"profiling {progress.model}: {at}")

        device = Device(gpu_type="cpu", seed=seed)
        for profile in measure(MODELS, device, BATCHES, StopRule(point_s=1.5), progress=show):
            write_document(folder / f"{profile.model}.{profile.gpu_type}.json", profile)
            profiles.append(profile)
    out.table(
        ["model", *(f"batch {batch} (ms)" for batch in BATCHES)],
        [[one.model, *(row.latency_s.mean * 1000 for row in one.rows)] for one in profiles],
        title="Profiles",
    )
    return ProfileLibrary(profiles)


def _plan(
    out: Output,
    path: Path,
    cluster: Cluster,
    services: Services,
    profiles: ProfileLibrary,
    demand: Demand,
    seed: int,
) -> Plan:
    inputs = Inputs(cluster=cluster, services=services, profiles=profiles, demand=demand)
    with out.progress("planning"):
        result = make_plan(inputs, Settings(seed=seed, blocking="strict"))
    if not isinstance(result, Solved):
        raise ForeplanError(f"the demo's own problem has no plan: {result}")
    write_plan(path, result.plan)
    return result.plan


def _serve(
    out: Output, folder: Path, cluster: Cluster, services: Services, plan: Plan, load: Load, seed: int
) -> tuple[Run, float]:
    """Start agents and gateway, apply, warm up, replay; returns the run and the overhead per request in seconds."""
    gateway = f"127.0.0.1:{free_ports(1)[0]}"
    with ChildProcesses(folder / "logs") as processes:
        with out.progress("starting two agents and the gateway"):
            for node in cluster.nodes:
                where = ["--cluster", str(folder / "cluster.yaml"), "--node", node.name]
                state = ["--state-dir", str(folder / "state" / node.name)]
                processes.start(f"agent-{node.name}", ["agent", *where, *state])
            state = ["--state-dir", str(folder / "state" / "gateway")]
            processes.start("gateway", ["gateway", "--listen", gateway, *state])
        with out.progress("applying the plan: loading models"):
            applied = asyncio.run(apply(plan, cluster, [gateway]))
        out.say(f"applied the plan as generation {applied.generation}")
        overhead_s = _warm_up(out, gateway, services, plan, seed)
        duration_s = load.arrivals.duration_s
        text = f"replaying {len(load.arrivals)} requests in {duration_s:g} s"
        with out.progress(text, total=len(load.arrivals)) as step:
            options = LoadOptions(
                seed=seed, gpus=plan.gpus_used, on_progress=lambda one: step.update(one.done, total=one.total)
            )
            result = asyncio.run(replay(load.arrivals, gateway, services, options))
    for warning in result.warnings:
        out.warn(warning)
    return Run(summary=result.summary, requests=result.requests), overhead_s


def _warm_up(out: Output, gateway: str, services: Services, plan: Plan, seed: int) -> float:
    """Send a few requests to the idle system, and return the median of what they take beyond their profile."""
    names = [service.name for service in services.services if service.name in plan.routes]
    times_s = np.arange(WARM_UP_REQUESTS * len(names)) * WARM_UP_GAP_S
    frame = pd.DataFrame({"arrival_s": times_s, "service": names * WARM_UP_REQUESTS})
    with out.progress("warming up, and measuring what gateway and transport add"):
        result = asyncio.run(replay(RequestTrace(frame), gateway, services, LoadOptions(seed=seed)))
    profiled = {entry.service: entry.batch_latency_s(1) for group in plan.groups for entry in group.loadout}
    beyond_s = result.requests["latency_s"] - result.requests["service"].map(profiled)
    if beyond_s.isna().all():
        raise RemoteFailure(f"gateway at {gateway}", "answered none of the warm-up requests", retryable=False)
    return max(0.0, float(beyond_s.median()))


def _tail(history: RateTrace, windows: int) -> RateTrace:
    """Return the end of the history, six times as long as the forecast, for the plot."""
    start_s = history.end_s - 6 * windows * history.window_s
    return history.window(max(0.0, start_s), history.end_s, rebase=False)
