"""What is compared: policies at points of load, deadlines and burstiness, over several seeds of the same arrivals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evaluator import Settings as SimulationSettings
from evaluator import evaluate
from evaluator.linking import working_clock
from evaluator.policy import Situation
from evaluator.sweep import Engine, Job, code_digest, key_of, run_jobs
from foreplan.batch import BLOCKS
from foreplan.compare.policies import policy
from foreplan.compare.replanning import Replanner
from foreplan.report.content import timeline
from foreplan.workflow_demand import with_stages
from planner import Settings
from plans.cluster import Cluster
from plans.documents import canonical_digest
from plans.errors import InvalidInput
from plans.service import Services
from profiles.library import ProfileLibrary
from traces.demand import observed_demand
from traces.outcomes import RunSummary
from traces.resample import block_bootstrap, with_burstiness
from traces.table import RequestTrace

__all__ = ["Outcome", "Point", "Sample", "Study", "compare"]

_TIMELINE_BINS = 120
_QUANTILES = 201
"""Points of a latency distribution, from 0 to 100 % of the requests offered."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Point:
    """Where the policies meet: factors on the load and on every deadline, and the burstiness (None: as recorded)."""

    load: float = 1.0
    slo_scale: float = 1.0
    burstiness_cv: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """The documents and the arrivals.

    Attributes:
        cluster: The same GPUs for every policy.
        services: The same services and deadlines for every policy.
        profiles: How long models take.
        history: Arrivals that policies plan from.
        served: Arrivals that they are judged by.
        planning: Settings of Foreplan's own policy.
        simulation: Overheads, order, drops; the same for all. Routing is each policy's own.
        polish_s: Seconds of Foreplan's own search guided by simulation.
        replan_s: Seconds after which every policy plans again at the rates that it has just seen; 0: it never does.
    """

    cluster: Cluster
    services: Services
    profiles: ProfileLibrary
    history: RequestTrace
    served: RequestTrace
    planning: Settings
    simulation: SimulationSettings
    polish_s: float = 0.0
    replan_s: float = 0.0

    def at(self, point: Point, seed: int) -> Study:
        """Return the study at ``point``: seed 0 serves the recorded arrivals, others a block bootstrap of them.

        Raises:
            InvalidInput: A factor is out of its range.
        """
        served = self.served
        if seed:
            served = block_bootstrap(served, block_s=served.duration_s / BLOCKS, seed=seed)
        return replace(
            self,
            services=_scaled_deadlines(self.services, point.slo_scale),
            history=_moved(self.history, point, seed=1),
            served=_moved(served, point, seed=2 + seed),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One policy serving one seed of the arrivals.

    Attributes:
        seed: 0 is the recorded trace.
        attainment: Good requests over all offered.
        goodput_rps: Good requests per second of the trace, so that late answers do not stretch the time of one policy.
        gpu_hours: GPUs held, times the length of the run.
        services: Attainment per service; those without a request are left out.
        latency_s: Shape (quantile,): latency below which the share k / 200 of all offered requests finished; None
            beyond the share that finished at all.
        timeline: Bins with ``start_s``, ``offered_rps``, ``good_rps``; only of seed 0.
    """

    seed: int
    attainment: float
    goodput_rps: float
    gpu_hours: float
    services: Mapping[str, float]
    latency_s: Sequence[float | None]
    timeline: Mapping[str, Sequence[float]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One policy at one point, over all seeds.

    Attributes:
        policy: Its name.
        point: Where.
        gpus: GPUs that its plan uses.
        decide_s: Seconds that its decision took, those of compiling the simulator left out.
        mode: Mode of the simulation.
        routing: How requests found their replica (docs/evaluator.md, section 4).
        samples: One per seed, in order.
    """

    policy: str
    point: Point
    gpus: int
    decide_s: float
    mode: str
    routing: str
    samples: tuple[Sample, ...]

    @property
    def attainments(self) -> list[float]:
        """Attainment per seed."""
        return [sample.attainment for sample in self.samples]


def compare(
    study: Study,
    policies: Sequence[str],
    points: Sequence[Point],
    *,
    seeds: int,
    engine: Engine = "processes",
    workers: int = 1,
    kept: Path | None = None,
    done: Callable[[str], None] = lambda key: None,
) -> tuple[Outcome, ...]:
    """Return the outcome of every policy at every point, in that order.

    A policy plans once per point, from the history at that point, and then serves every seed.

    Args:
        study: Documents and arrivals.
        policies: Names; see `foreplan.compare.policies`.
        points: Where they are compared.
        seeds: Number of arrivals served, at least 1; the first is the recorded trace.
        engine: Where the runs are done.
        workers: Runs at a time.
        kept: Folder for results, so that an interrupted comparison goes on.
        done: Called after each run.

    Raises:
        InvalidInput: No or an unknown policy, or documents that contradict each other.
    """
    if not policies:
        raise InvalidInput.of("at least one policy", where="--policies", found="none")
    for name in policies:
        policy(name, study.planning, study.polish_s)
    documents = canonical_digest([study.cluster, study.services])
    common = (
        code_digest("planner", "foreplan"),
        documents,
        study.profiles.digest,
        study.history.digest,
        study.served.digest,
    )
    numbers = (seeds, study.polish_s, study.replan_s)
    settings = (asdict(study.planning), asdict(study.simulation))
    jobs = {
        (name, point): Job(
            key=f"{name}-{key_of(*common, *numbers, *settings, asdict(point), name)}",
            work=_run,
            arguments=(study, name, point, seeds),
        )
        for point in points
        for name in policies
    }
    results = run_jobs(list(jobs.values()), engine=engine, workers=workers, kept=kept, done=done)
    return tuple(_outcome(name, point, results[job.key]) for (name, point), job in jobs.items())


def _run(study: Study, name: str, point: Point, seeds: int) -> dict[str, Any]:
    """Plan at ``point`` and serve every seed; the work of one job."""
    with working_clock() as clock:
        return _served(study, name, point, seeds, clock)


def _served(study: Study, name: str, point: Point, seeds: int, clock: Callable[[], float]) -> dict[str, Any]:
    chosen = policy(name, study.planning, study.polish_s)
    planned = study.at(point, 0)
    demand = with_stages(
        observed_demand(planned.history, window_s=planned.history.duration_s),
        planned.services,
    )
    situation = Situation(
        cluster=planned.cluster,
        services=planned.services,
        profiles=planned.profiles,
        demand=demand,
        history=planned.history,
        seed=study.planning.seed,
    )
    started_s = clock()
    decision = chosen.decide(situation)
    decide_s = clock() - started_s
    samples = []
    mode = ""
    for seed in range(seeds):
        served = study.at(point, seed)
        settings = replace(study.simulation, routing=decision.routing, seed=study.simulation.seed + seed)
        found = evaluate(
            decision.plan,
            served.services,
            served.served,
            settings=settings,
            cluster=served.cluster,
            profiles=served.profiles,
            controller=Replanner(chosen, situation, clock=clock) if study.replan_s else None,
            interval_s=study.replan_s or 60.0,
        )
        mode = found.mode
        samples.append(asdict(_sample(seed, found.summary, found.requests, served.served.duration_s)))
    told = {"gpus": decision.plan.gpus_used, "decide_s": decide_s, "mode": mode, "routing": decision.routing}
    return {**told, "samples": samples}


def _sample(seed: int, summary: RunSummary, requests: pd.DataFrame, duration_s: float) -> Sample:
    latency_s = np.sort(requests["latency_s"].dropna().to_numpy(dtype=np.float64))
    ranks = np.maximum(np.ceil(np.linspace(0, 1, _QUANTILES) * len(requests)).astype(int) - 1, 0)
    quantiles = [float(latency_s[rank]) if rank < len(latency_s) else None for rank in ranks]
    drawn = None
    if seed == 0:
        bins = timeline(requests, bin_s=summary.wall_s / _TIMELINE_BINS, end_s=summary.wall_s)
        drawn = {
            name: [float(value) for value in getattr(bins, name)] for name in ("start_s", "offered_rps", "good_rps")
        }
    return Sample(
        seed=seed,
        attainment=summary.attainment or 0.0,
        goodput_rps=summary.good / duration_s,
        gpu_hours=summary.gpu_hours,
        services={one.service: one.attainment for one in summary.services if one.attainment is not None},
        latency_s=quantiles,
        timeline=drawn,
    )


def _outcome(name: str, point: Point, result: dict[str, Any]) -> Outcome:
    samples = tuple(Sample(**sample) for sample in result["samples"])
    return Outcome(
        policy=name,
        point=point,
        gpus=result["gpus"],
        decide_s=result["decide_s"],
        mode=result["mode"],
        routing=result["routing"],
        samples=samples,
    )


def _scaled_deadlines(services: Services, factor: float) -> Services:
    """Return ``services`` with every time of every SLO multiplied by ``factor``."""
    if factor == 1.0:
        return services
    times = ("deadline_s", "jitter_s", "ttft_s", "tpot_s")

    def scaled(slo: Any) -> Any:
        return slo.model_copy(update={name: getattr(slo, name) * factor for name in times if hasattr(slo, name)})

    return services.model_copy(
        update={
            "services": tuple(each.model_copy(update={"slo": scaled(each.slo)}) for each in services.services),
            "workflows": tuple(each.model_copy(update={"slo": scaled(each.slo)}) for each in services.workflows),
        }
    )


def _moved(trace: RequestTrace, point: Point, seed: int) -> RequestTrace:
    if point.load != 1.0:
        trace = trace.scaled(point.load, seed)
    if point.burstiness_cv is not None:
        trace = with_burstiness(trace, point.burstiness_cv, window_s=trace.duration_s / BLOCKS, seed=seed)
    return trace
