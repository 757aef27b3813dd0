"""Plan changes under load: move, batch limit, variant, TP; failures, and attainment beside the evaluator's.

One service at 60 requests per second (Poisson), deadline 150 ms, on one of two devices. Half way through each run a
plan is applied. To reach: 0 failed requests, attainment during the transition (the second after the apply began and all
of the apply) within 2 points of the evaluator's prediction for the same arrivals. The change from one device to a
tensor-parallel group of two, and back, runs a real model (bert-tiny-16, real workers) at 20 requests per second and a
deadline of 500 ms: there the failures, and the attainment before and in the transition, say something on two cores.
"""

from __future__ import annotations

import asyncio
import sys
import time

import pandas as pd
from executor_site import Site, about, placed, running_site, services_of

from evaluator import evaluate
from executor.controller import apply
from executor.load import replay
from plans import Plan, Services
from plans.plan import Prior
from traces.synthesis import Poisson, synthesise
from traces.table import RequestTrace

SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 16.0
DEADLINE_S, RATE_RPS = 0.15, 60.0
SLOW, FAST = "timed-20-2-4", "timed-5-1-4"
REAL_SECONDS = 40.0
REAL, TORCH = "bert-tiny-16", "executor.runtime.group_runtime:TorchGroupRuntime"


def main() -> None:
    """Apply each change under load, and print."""
    print(about())
    timed_changes()
    tensor_parallel_changes()


def timed_changes() -> None:
    """Changes of a timed model, beside the evaluator's prediction."""
    services = services_of("m", deadline_s=DEADLINE_S, variants=[SLOW, FAST])
    start = placed({"a/0": {"m": SLOW}}, deadline_s=DEADLINE_S, max_batch=8)
    changes = {
        "move to another device": placed({"a/1": {"m": SLOW}}, deadline_s=DEADLINE_S, max_batch=8),
        "smaller batches": placed({"a/0": {"m": SLOW}}, deadline_s=DEADLINE_S, max_batch=4),
        "another variant": placed({"a/0": {"m": FAST}}, deadline_s=DEADLINE_S, max_batch=8),
        "a second replica": placed({"a/0": {"m": SLOW}, "a/1": {"m": SLOW}}, deadline_s=DEADLINE_S, max_batch=8),
    }
    trace = synthesise({"m": Poisson(rate_rps=RATE_RPS)}, duration_s=SECONDS, seed=5)
    with running_site(devices=2) as site:
        for name, change in changes.items():
            site.apply(start)
            measured, began_s, ended_s = changed(site, change, trace, services)
            simulated = evaluate(start, services, trace).requests
            assert simulated is not None
            report(name, measured, began_s, ended_s, f"predicted {attainment(simulated, began_s, ended_s):.1%}")


def tensor_parallel_changes() -> None:
    """From one device to two sharded ones, and back, with a model of the torch runtime."""
    services = services_of("m", deadline_s=0.5, variants=[REAL])
    one, two = (
        placed({group: {"m": REAL}}, deadline_s=0.5, max_batch=4, latency_s=lambda _, most: ((0.02,),) * most)
        for group in ("a/0", "a/0-1")
    )
    trace = synthesise({"m": Poisson(rate_rps=20.0)}, duration_s=REAL_SECONDS, seed=5)
    with running_site(devices=2, runtime=TORCH) as site:
        site.apply(one)
        for name, change in (("tp 1 -> 2", two), ("tp 2 -> 1", one)):
            measured, began_s, ended_s = changed(site, change, trace, services, after_s=3.0)
            assert ended_s < REAL_SECONDS, "the apply outlasted the requests"
            report(name, measured, began_s, ended_s, f"before {attainment(measured, 0.0, began_s, least_s=0.0):.1%}")


def changed(
    site: Site, change: Plan, trace: RequestTrace, services: Services, *, after_s: float = SECONDS / 2
) -> tuple[pd.DataFrame, float, float]:
    """Apply ``change`` ``after_s`` seconds into the trace; return the requests, when it began, and when it ended."""
    assert site.live is not None
    prior = Prior(generation=1, digest=site.live.placement_digest)
    measured, began_s, ended_s = asyncio.run(_run(site, change, prior, trace, services, after_s))
    site.live = change
    assert not (measured["outcome"] == "failed").any(), measured["status"].value_counts()
    return measured, began_s, ended_s


def attainment(requests: pd.DataFrame, began_s: float, ended_s: float, *, least_s: float = 1.0) -> float:
    """Return the share of good requests among those that came between the two, or ``least_s`` if that is longer."""
    at_s = requests["scheduled_s"]
    return float((requests[(at_s >= began_s) & (at_s <= max(ended_s, began_s + least_s))]["outcome"] == "good").mean())


def report(name: str, measured: pd.DataFrame, began_s: float, ended_s: float, beside: str) -> None:
    """Print one change."""
    share = attainment(measured, began_s, ended_s)
    print(
        f"{name}: apply {ended_s - began_s:.2f} s, 0 failed of {len(measured)}; attainment in the transition "
        f"{share:.1%}, {beside}"
    )


async def _run(
    site: Site, change: Plan, prior: Prior, trace: RequestTrace, services: Services, after_s: float
) -> tuple[pd.DataFrame, float, float]:
    """Replay, and apply after ``after_s``; return the requests, and when the apply began and ended, seconds."""
    start_s = time.monotonic()

    async def applied() -> tuple[float, float]:
        await asyncio.sleep(after_s)
        began_s = time.monotonic() - start_s
        await apply(change, site.cluster, [site.gateway], prior=prior)
        return began_s, time.monotonic() - start_s

    result, (began_s, ended_s) = await asyncio.gather(replay(trace, site.gateway, services), applied())
    return result.requests, began_s, ended_s


if __name__ == "__main__":
    main()
