"""Simulate a plan on a trace."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pandas as pd

from evaluator.changes import Change, PlanChange, check_changes, check_places
from evaluator.control import Controller
from evaluator.course import Course, Inventory
from evaluator.featured_run import FeaturedRun
from evaluator.fleet import Fleet
from evaluator.measures import (
    Hosts,
    RequestLog,
    StreamSummary,
    Timeline,
    accuracies,
    stream_summaries,
    summary_of,
    timeline_of,
)
from evaluator.run import Run
from evaluator.scenario import compile_arrivals, compile_deadlines
from evaluator.settings import Settings
from evaluator.single_pass import compile_hosts
from evaluator.single_pass_run import SinglePassRun, single_pass_faults
from evaluator.workflows import compile_workflows
from plans.cluster import Cluster
from plans.errors import Fault, InvalidInput
from plans.plan import Plan
from plans.service import Services
from profiles.library import ProfileLibrary
from traces.outcomes import RunSummary
from traces.table import RequestTrace

__all__ = ["Evaluation", "Mode", "evaluate"]

Mode = Literal["auto", "event", "single-pass"]
"""Which simulator runs; ``auto``: the single pass wherever it applies."""

_MOST_BINS = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What happened.

    Attributes:
        summary: Counts, attainment and percentiles, per service and in total.
        mode: Which simulator produced it (docs/evaluator.md, section 13).
        settings: How it was simulated.
        log: What became of each request; None where that was not kept.
        streams: What became of each stream; empty where requests were not kept.
        timeline: Counts over time; None where that was not asked for.
    """

    summary: RunSummary
    mode: Literal["event", "single-pass"]
    settings: Settings
    log: RequestLog | None
    streams: tuple[StreamSummary, ...]
    timeline: Timeline | None

    @property
    def requests(self) -> pd.DataFrame:
        """One row per request offered, in order of arrival.

        Columns: ``service, scheduled_s, latency_s`` (NaN unless finished), ``outcome`` (of
        `traces.outcomes.OUTCOMES`), ``reason`` (why dropped or failed), ``group, variant`` (missing unless it had a
        place; instances of workflows have none), ``batch_size, accuracy`` (missing unless finished there), ``ttft_s,
        tpot_s`` (missing unless iterations made it). Made anew at each call.

        Raises:
            ValueError: Requests were not kept.
        """
        return self._kept().table(self._kept().offered)

    def request_parts(self, rows: int = 1_000_000) -> Iterator[pd.DataFrame]:
        """Yield `requests` in parts of at most ``rows`` rows, for logs that should not be in memory as a table.

        Raises:
            ValueError: Requests were not kept.
        """
        return self._kept().parts(rows)

    def _kept(self) -> RequestLog:
        if self.log is None:
            raise ValueError("the requests of this run were not kept: evaluate(..., keep_requests=True)")
        return self.log


def evaluate(
    plan: Plan,
    services: Services,
    trace: RequestTrace,
    *,
    settings: Settings | None = None,
    cluster: Cluster | None = None,
    profiles: ProfileLibrary | None = None,
    changes: Sequence[Change] = (),
    controller: Controller | None = None,
    interval_s: float = 60.0,
    keep_requests: bool = True,
    timeline_s: float | None = None,
    mode: Mode = "auto",
) -> Evaluation:
    """Simulate ``plan`` serving ``trace``, open loop, as docs/evaluator.md says; repeatable bit by bit.

    Args:
        plan: What runs where.
        services: Deadlines and accuracies.
        trace: Arrivals.
        settings: How to simulate; the defaults are what the executor does.
        cluster: GPU types of the nodes, to find profiles by; the network between them; and where later plans run.
        profiles: Where percentiles, interference factors and token costs come from; without them latencies do not vary,
            batches that run at once share the time, and generation is served by the plan's table.
        changes: Plans that follow, failures and recoveries.
        controller: Looks at the run every ``interval_s`` and may replace the plan.
        interval_s: See there, seconds.
        keep_requests: Whether to keep what becomes of each request (15 bytes each), which makes percentiles exact and
            measures streams. Without, memory grows with the requests in flight alone.
        timeline_s: Width of the bins of a timeline, seconds.
        mode: Which simulator runs; the outcomes are the same wherever both may.

    Raises:
        InvalidInput: Plan or trace name services that ``services`` lacks, a plan is not of ``cluster``, the trace holds
            no request that counts, a setting is out of its range, latencies shall be drawn from profiles that are not
            there, plans shall change without a cluster, or a single pass is asked for where it does not apply.
    """
    chosen = settings or Settings()
    _check(trace, chosen, timeline_s, profiled=cluster is not None and profiles is not None)
    if chosen.latency == "profile" and cluster is not None and profiles is not None:
        _check_profiled(plan, cluster, profiles)
    check_places(plan, cluster, "plan")
    check_changes(changes, cluster)
    if controller is not None:
        _check_control(cluster, interval_s)
    inventory = Inventory(services, cluster, profiles, chosen)
    fleet = Fleet(plan, cluster)
    replicas, features = inventory.replicas(fleet), inventory.features(fleet)
    arrivals = compile_arrivals(trace, services)
    flows = int(arrivals.service_of_code.max()) >= len(services.services)
    kept: dict[str, Any] = {"keep_requests": keep_requests, "keep_latencies": not keep_requests, "bin_s": timeline_s}
    run: Run
    changing = bool(changes) or controller is not None
    single_pass = _is_single_pass(mode, chosen, services, trace, timeline_s, changing=changing)
    if single_pass:
        run = SinglePassRun(replicas, compile_hosts(plan, services), arrivals, compile_deadlines(services), chosen)
        run.finish()
    elif not (features.generating or flows or changing):
        run = Run(replicas, arrivals, compile_deadlines(services), chosen, **kept)
        run.finish()
    else:
        run = FeaturedRun(
            replicas,
            features,
            arrivals,
            compile_deadlines(services),
            chosen,
            flows=compile_workflows(services, plan),
            has_instances=flows,
            fails=any(not isinstance(change, PlanChange) for change in changes),
            **kept,
        )
        Course(run, fleet, inventory, changes=changes, controller=controller, interval_s=interval_s).finish()
    hosts = Hosts(
        groups=tuple(group.planned for group in fleet.groups),
        replicas=tuple((group.planned.id, replica.entry) for group, replica in fleet.replicas()),
    )
    return Evaluation(
        summary=summary_of(run, hosts, services, fleet.gpu_seconds),
        mode="single-pass" if single_pass else "event",
        settings=chosen,
        log=_log(run, hosts, services, trace) if keep_requests else None,
        streams=stream_summaries(run, services) if keep_requests else (),
        timeline=None if timeline_s is None else timeline_of(run, hosts, services),
    )


def _check_profiled(plan: Plan, cluster: Cluster, profiles: ProfileLibrary) -> None:
    """Refuse to draw latencies of models that nobody profiled: they would silently not vary."""
    types = {node.name: node.gpus.type for node in cluster.nodes}
    missing = sorted(
        {
            (entry.variant, types[group.node])
            for group in plan.groups
            if group.node in types
            for entry in group.loadout
            if profiles.profile(entry.variant, types[group.node]) is None
        }
    )
    if missing:
        raise InvalidInput(
            Fault(
                where="profiles",
                found=f"no profile of {model} on {gpu_type}",
                expected="one for every model of the plan with latency 'profile'",
                remedy="measure it with `foreplan profile run`, or take the plan's latencies with --latency mean",
            )
            for model, gpu_type in missing
        )


def _check(trace: RequestTrace, settings: Settings, timeline_s: float | None, *, profiled: bool) -> None:
    if not len(trace):
        raise InvalidInput.of("at least one request", where="trace", found="none")
    if trace.arrival_s[-1] < settings.warmup_s or (settings.until_s or math.inf) < trace.arrival_s[0]:
        raise InvalidInput.of("a request between warm-up and end of the run", where="trace", found="none")
    if settings.latency == "profile" and not profiled:
        remedy = "name both (--cluster and --profiles)"
        raise InvalidInput.of(
            "cluster and profiles with latency 'profile'", where="evaluate", found="none", remedy=remedy
        )
    if timeline_s is not None and not (math.isfinite(timeline_s) and timeline_s > trace.duration_s / _MOST_BINS):
        expected = f"a width above 0 seconds with at most {_MOST_BINS} bins over the trace"
        raise InvalidInput.of(expected, where="evaluate", field="timeline_s", found=timeline_s)


def _is_single_pass(
    mode: Mode, settings: Settings, services: Services, trace: RequestTrace, timeline_s: float | None, *, changing: bool
) -> bool:
    """Say whether one pass does it.

    Raises:
        InvalidInput: It was asked for and does not; with every reason.
    """
    if mode not in get_args(Mode):
        raise InvalidInput.of(f"one of {', '.join(get_args(Mode))}", where="evaluate", field="mode", found=repr(mode))
    if mode == "event":
        return False
    faults = single_pass_faults(settings, services, trace.services)
    for field, asked in (("timeline_s", timeline_s is not None), ("changes", changing)):
        if asked:
            faults.append(Fault(where="evaluate", field=field, found="some", expected="none in a single pass"))
    if faults and mode == "single-pass":
        raise InvalidInput(faults)
    return not faults


def _check_control(cluster: Cluster | None, interval_s: float) -> None:
    if cluster is None:
        raise InvalidInput.of("the cluster that plans run on, with a controller", where="evaluate", found="none")
    if not 0 < interval_s < math.inf:
        expected = "more than 0 seconds and finite"
        raise InvalidInput.of(expected, where="evaluate", field="interval_s", found=interval_s)


def _log(run: Run, hosts: Hosts, services: Services, trace: RequestTrace) -> RequestLog:
    world = run.world
    ttft_s, tpot_s = run.token_times() if isinstance(run, FeaturedRun) else (None, None)
    return RequestLog(
        arrivals=run.arrivals,
        offered=run.offered(),
        names=trace.services,
        end_s=world.array("log_end_s"),
        code=world.array("log_code"),
        replica=world.array("log_replica"),
        batch=world.array("log_batch"),
        groups=tuple(group for group, _ in hosts.replicas),
        variants=tuple(entry.variant for _, entry in hosts.replicas),
        accuracy=tuple(accuracies(hosts, services)),
        ttft_s=ttft_s,
        tpot_s=tpot_s,
    )
