"""Plan changes under load: move, other batch limit, other variant; failures, and attainment beside the evaluator's.

One service at 60 requests per second (Poisson), deadline 150 ms, on one of two devices. Half way through each run a
plan is applied. To reach: 0 failed requests, attainment during the transition (the second after the apply began and all
of the apply) within 2 points of the evaluator's prediction for the same arrivals.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

from executor_site import about, placed, running_site, services_of

from evaluator import evaluate
from executor.controller import apply
from executor.load import replay
from plans.plan import Prior
from traces.synthesis import Poisson, synthesise

SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 16.0
DEADLINE_S, RATE_RPS = 0.15, 60.0
SLOW, FAST = "timed-20-2-4", "timed-5-1-4"


def main() -> None:
    """Apply each change under load, and print."""
    services = services_of("m", deadline_s=DEADLINE_S, variants=[SLOW, FAST])
    start = placed({"a/0": {"m": SLOW}}, deadline_s=DEADLINE_S, max_batch=8)
    changes = {
        "move to another device": placed({"a/1": {"m": SLOW}}, deadline_s=DEADLINE_S, max_batch=8),
        "smaller batches": placed({"a/0": {"m": SLOW}}, deadline_s=DEADLINE_S, max_batch=4),
        "another variant": placed({"a/0": {"m": FAST}}, deadline_s=DEADLINE_S, max_batch=8),
        "a second replica": placed({"a/0": {"m": SLOW}, "a/1": {"m": SLOW}}, deadline_s=DEADLINE_S, max_batch=8),
    }
    trace = synthesise({"m": Poisson(rate_rps=RATE_RPS)}, duration_s=SECONDS, seed=5)
    print(about())
    with running_site(devices=2) as site:
        for name, change in changes.items():
            site.apply(start)
            prior = Prior(generation=1, digest=start.placement_digest)
            measured, began_s, ended_s = asyncio.run(_run(site, change, prior, trace, services))
            site.live = change
            window = measured[
                (measured["scheduled_s"] >= began_s) & (measured["scheduled_s"] <= max(ended_s, began_s + 1))
            ]
            failed = int((measured["outcome"] == "failed").sum())
            assert failed == 0, measured["status"].value_counts()
            simulated = evaluate(start, services, trace).requests
            assert simulated is not None
            same = simulated[
                (simulated["scheduled_s"] >= began_s) & (simulated["scheduled_s"] <= max(ended_s, began_s + 1))
            ]
            shares = [float((found["outcome"] == "good").mean()) for found in (window, same)]
            print(
                f"{name}: apply {ended_s - began_s:.2f} s, 0 failed of {len(measured)}; in the transition "
                f"({len(window)} requests) attainment {shares[0]:.1%}, predicted {shares[1]:.1%}"
            )


async def _run(site: Any, change: Any, prior: Any, trace: Any, services: Any) -> tuple[Any, float, float]:
    """Replay, and apply half way through; return the requests, and when the apply began and ended, seconds."""
    start_s = time.monotonic()

    async def applied() -> tuple[float, float]:
        await asyncio.sleep(SECONDS / 2)
        began_s = time.monotonic() - start_s
        await apply(change, site.cluster, [site.gateway], prior=prior)
        return began_s, time.monotonic() - start_s

    result, (began_s, ended_s) = await asyncio.gather(replay(trace, site.gateway, services), applied())
    return result.requests, began_s, ended_s


if __name__ == "__main__":
    main()
