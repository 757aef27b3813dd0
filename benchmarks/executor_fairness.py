"""Does the simulator say what happens? Three recorded runs, the same arrivals simulated and served.

Two services on one device (they block each other) and a second replica of one: steady Poisson, bursty (gamma, cv 4) and
overloaded. To reach: attainment within 3 points per service, p99 within 15 %.
"""

from __future__ import annotations

import asyncio
import sys

from executor_site import about, placed, running_site, services_of

from evaluator import evaluate
from executor.load import LoadOptions, replay
from traces.synthesis import Gamma, Poisson, synthesise

SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 30.0
DEADLINE_S, BATCH = 0.25, 8
GROUPS = {"a/0": {"x": "timed-20-2-4", "y": "timed-30-2-4"}, "a/1": {"x": "timed-20-2-4"}}


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
    worst_points = worst_ratio = 0.0
    with running_site(devices=2) as site:
        site.apply(plan)
        for name, loads in runs.items():
            trace = synthesise(loads, duration_s=SECONDS, seed=11)
            measured = asyncio.run(replay(trace, site.gateway, services, LoadOptions())).summary
            simulated = evaluate(plan, services, trace).summary
            for one in measured.services:
                other = simulated.service(one.service)
                assert one.offered == other.offered == one.good + one.late + one.dropped + one.failed
                assert one.attainment is not None
                assert other.attainment is not None
                points = abs(one.attainment - other.attainment) * 100
                p99 = [found.latency_s.p99 for found in (one, other)]
                ratio = abs(p99[0] / p99[1] - 1) if p99[0] and p99[1] else 0.0
                worst_points, worst_ratio = max(worst_points, points), max(worst_ratio, ratio)
                shares = f"measured {one.attainment:.2%}, simulated {other.attainment:.2%} ({points:.1f} points)"
                tails = f"p99 {(p99[0] or 0) * 1e3:.0f} and {(p99[1] or 0) * 1e3:.0f} ms ({ratio:.0%})"
                print(f"{name} {one.service}: attainment {shares}; {tails}")
    print(f"largest difference: {worst_points:.1f} points of attainment, {worst_ratio:.0%} of p99")


if __name__ == "__main__":
    main()
