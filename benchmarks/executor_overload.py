"""Goodput at three times the capacity against the peak, and memory while it lasts.

One device, 20 ms + 2 ms per item, batches up to 8 (222 items per second), deadline 200 ms, Poisson arrivals at 0.5 to 3
times the capacity. To reach: goodput at 3x at least 90 % of the peak, memory flat.
"""

from __future__ import annotations

import asyncio
import sys

from executor_site import about, placed, running_site, services_of

from executor.load import LoadOptions, replay
from traces.synthesis import Poisson, synthesise

VARIANT, BATCH, DEADLINE_S = "timed-20-2-4", 8, 0.2
CAPACITY_RPS = BATCH / (0.020 + 0.002 * BATCH)
SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 15.0
LOADS = (0.5, 0.8, 1.0, 1.5, 3.0)


def main() -> None:
    """Measure and print."""
    services = services_of("m", deadline_s=DEADLINE_S, variants=[VARIANT])
    plan = placed({"a/0": {"m": VARIANT}}, deadline_s=DEADLINE_S, max_batch=BATCH)
    print(about())
    goodput: dict[float, float] = {}
    with running_site(devices=1) as site:
        site.apply(plan)
        for load in LOADS:
            trace = synthesise({"m": Poisson(rate_rps=load * CAPACITY_RPS)}, duration_s=SECONDS, seed=7)
            before = {name: site.resident_bytes(name) for name in ("a", "gateway")}
            result = asyncio.run(replay(trace, site.gateway, services, LoadOptions()))
            grown = {name: (site.resident_bytes(name) - before[name]) / 2**20 for name in before}
            one = result.summary.services[0]
            assert one.offered == one.good + one.late + one.dropped + one.failed
            assert one.failed == 0, result.requests["status"].value_counts()
            goodput[load] = one.good / SECONDS
            print(
                f"{load:.1f} x capacity ({load * CAPACITY_RPS:.0f}/s): goodput {goodput[load]:.1f}/s, late {one.late}, "
                f"dropped {one.dropped}; memory agent {grown['a']:+.1f}, gateway {grown['gateway']:+.1f} MiB"
            )
    share = goodput[3.0] / max(goodput.values())
    print(f"goodput at 3 x capacity: {share:.1%} of the peak")


if __name__ == "__main__":
    main()
