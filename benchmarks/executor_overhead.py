"""What gateway and agent add to a 20 ms model: 100 requests per second of 150 KB, open loop, on loopback.

The model sleeps, so the two cores are free for everything else; what is added is the latency from the scheduled arrival
less the time that the batch ran, for requests that met no other in queue or batch (arrivals 40 ms apart on each of four
devices). To reach: p50 at most 1.5 ms, p99 at most 5 ms.
"""

from __future__ import annotations

import asyncio
import sys

import numpy as np
import pandas as pd
from executor_site import about, placed, running_site, services_of

from executor.load import LoadOptions, replay
from traces.table import RequestTrace

VARIANT, RATE_RPS, SECONDS = "timed-20-0-37500", 100.0, float(sys.argv[1]) if len(sys.argv) > 1 else 20.0


def main() -> None:
    """Measure and print."""
    plan = placed({f"a/{gpu}": {"m": VARIANT} for gpu in range(4)}, deadline_s=1.0, max_batch=1)
    services = services_of("m", deadline_s=1.0, variants=[VARIANT])
    count = int(RATE_RPS * SECONDS)
    trace = RequestTrace(pd.DataFrame({"arrival_s": np.arange(count) / RATE_RPS, "service": "m"}))
    with running_site(devices=4) as site:
        site.apply(plan)
        asyncio.run(replay(trace.window(0, 2.0), site.gateway, services))  # warm
        before = {name: site.cpu_s(name) for name in ("a", "gateway")}
        result = asyncio.run(replay(trace, site.gateway, services, LoadOptions()))
        used = {name: (site.cpu_s(name) - before[name]) / count for name in before}
    frame = result.requests
    assert (frame["outcome"] == "good").all(), frame["outcome"].value_counts()
    added_ms = ((frame["latency_s"] - frame["run_s"]) * 1000).to_numpy()
    send_ms = ((frame["sent_s"] - frame["scheduled_s"]) * 1000).to_numpy()
    net_ms = added_ms - send_ms
    print(about())
    for name, values in (("from the scheduled arrival", added_ms), ("from the actual send", net_ms)):
        quantiles = np.quantile(values, [0.5, 0.9, 0.99])
        print(f"added {name}: p50 {quantiles[0]:.2f} ms, p90 {quantiles[1]:.2f} ms, p99 {quantiles[2]:.2f} ms")
    print(f"processor time per request: gateway {used['gateway'] * 1e3:.2f} ms, agent {used['a'] * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
