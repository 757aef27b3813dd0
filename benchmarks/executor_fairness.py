"""Does the simulator say what happens? Three recorded runs, the same arrivals simulated and served.

Two services on one device (they block each other) and a second replica of one: steady Poisson, bursty (gamma, cv 4) and
overloaded. To reach: attainment within 3 points per service, p99 within 15 %.

The simulator is told what a run before these, of single requests, measured: how long a request is on the way, and how
much longer than the model alone a batch keeps its device (from the agent's own statistics). It routes as the gateway
does. Nothing is fitted to the runs that are compared.

Under overload who is dropped hangs on milliseconds: over 10 s the simulator's own attainment of y moves by 6 points
when its overheads change by one or two, over 30 s by 4 (standard deviation 0.9). So runs take 30 s or more.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from typing import get_args

import grpc
import numpy as np
import pandas as pd
import uvloop
from executor_site import Site, about, placed, running_site, services_of

from evaluator import Settings, evaluate
from executor.load import LoadOptions, replay
from executor.proto import open_inference_pb2 as pb
from executor.proto import open_inference_pb2_grpc as pb_grpc
from executor.routing import Routing
from plans import Plan, Services
from traces.synthesis import Gamma, Poisson, synthesise
from traces.table import RequestTrace

SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 30.0
ROUTING: Routing = next((one for one in get_args(Routing) if one in sys.argv[2:]), "corrected")
DEADLINE_S, BATCH, CALIBRATION_RPS, CALIBRATION_S = 0.25, 8, 40.0, 5.0
GROUPS = {"a/0": {"x": "timed-20-2-4", "y": "timed-30-2-4"}, "a/1": {"x": "timed-20-2-4"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """What serving costs beside the models: seconds on the way, there and back, and per batch."""

    there_s: float
    back_s: float
    batch_s: float


def main() -> None:
    """Measure, simulate and print."""
    services = services_of("x", "y", deadline_s=DEADLINE_S, variants=["timed-20-2-4", "timed-30-2-4"])
    plan = placed(GROUPS, deadline_s=DEADLINE_S, max_batch=BATCH)
    runs = {
        "steady": {"x": Poisson(rate_rps=80), "y": Poisson(rate_rps=30)},
        "bursty": {"x": Gamma(rate_rps=80, cv=4), "y": Gamma(rate_rps=30, cv=4)},
        "overload": {"x": Poisson(rate_rps=400), "y": Poisson(rate_rps=100)},
    }
    print(about())
    with running_site(devices=2, gateway_options=["--routing", ROUTING]) as site:
        site.apply(plan)
        overheads = _calibrated(site, plan, services)
        print(f"routing {ROUTING}; {overheads}")
        differences = [
            _compared(name, site, plan, services, synthesise(loads, duration_s=SECONDS, seed=11), overheads)
            for name, loads in runs.items()
        ]
    points, ratio = (max(values) for values in zip(*differences, strict=True))
    print(f"largest difference: {points:.1f} points of attainment, {ratio:.0%} of p99")


def _compared(
    name: str, site: Site, plan: Plan, services: Services, trace: RequestTrace, overheads: Overheads
) -> tuple[float, float]:
    """Serve and simulate ``trace``; print, and return the largest differences in points and as a ratio of p99."""
    result = uvloop.run(replay(trace, site.gateway, services, LoadOptions()))
    for warning in result.warnings:
        print(f"{name}: {warning}")
    settings = Settings(routing=ROUTING, overhead_s=overheads.there_s, response_s=overheads.back_s)
    simulated = evaluate(_slower(plan, overheads.batch_s), services, trace, settings=settings).summary
    worst_points = worst_ratio = 0.0
    for one in result.summary.services:
        other = simulated.service(one.service)
        assert one.offered == other.offered == one.good + one.late + one.dropped + one.failed
        assert one.attainment is not None
        assert other.attainment is not None
        points = abs(one.attainment - other.attainment) * 100
        p99 = [found.latency_s.p99 for found in (one, other)]
        ratio = abs(p99[0] / p99[1] - 1) if p99[0] and p99[1] else 0.0
        worst_points, worst_ratio = max(worst_points, points), max(worst_ratio, ratio)
        shares = (
            f"measured {one.attainment:.2%} ({one.late} late), simulated {other.attainment:.2%} ({points:.1f} points)"
        )
        tails = f"p99 {(p99[0] or 0) * 1e3:.0f} and {(p99[1] or 0) * 1e3:.0f} ms ({ratio:.0%})"
        print(f"{name} {one.service}: attainment {shares}; {tails}")
    return worst_points, worst_ratio


def _calibrated(site: Site, plan: Plan, services: Services) -> Overheads:
    """Send single requests, far apart, and return what they cost beside their models."""
    count = int(CALIBRATION_RPS * CALIBRATION_S)
    trace = RequestTrace(pd.DataFrame({"arrival_s": np.arange(count) / CALIBRATION_RPS, "service": "x"}))
    frame = uvloop.run(replay(trace, site.gateway, services, LoadOptions())).requests
    assert (frame["outcome"] == "good").all(), frame["outcome"].value_counts()
    batch_s = asyncio.run(_batch_s(site.gateway, "x", count)) - plan.groups[0].loadout[0].batch_latency_s(1)
    way_s = float((frame["latency_s"] - frame["run_s"]).median()) - batch_s
    return Overheads(there_s=way_s / 2, back_s=way_s / 2, batch_s=batch_s)


async def _batch_s(gateway: str, service: str, count: int) -> float:
    """Return the mean seconds from start to end of ``count`` batches of one, as agents count them."""
    async with grpc.aio.insecure_channel(gateway) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        answer = await stub.ModelStatistics(pb.ModelStatisticsRequest(name=service))
    (ones,) = [batch.compute_infer for batch in answer.model_stats[0].batch_stats if batch.batch_size == 1]
    assert ones.count == count
    return float(ones.ns / ones.count / 1e9)


def _slower(plan: Plan, batch_s: float) -> Plan:
    """Return ``plan`` with ``batch_s`` more for every batch."""
    groups = tuple(
        group.model_copy(
            update={
                "loadout": tuple(
                    entry.model_copy(
                        update={"stage_latency_s": tuple((row[0] + batch_s,) for row in entry.stage_latency_s)}
                    )
                    for entry in group.loadout
                )
            }
        )
        for group in plan.groups
    )
    return plan.model_copy(update={"groups": groups})


if __name__ == "__main__":
    main()
