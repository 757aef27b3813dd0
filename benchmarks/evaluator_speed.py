"""How fast the evaluator's event mode is, on one core: the kernel, whole evaluations, and against plain Python.

The kernel has one thread; its speed is per second of processor time, so that a busy machine distorts it less.
Every run is checked: requests are conserved, and a small run of the same kind ends request by request as in the naive
simulator of the tests. Compile time is measured apart, in a fresh process with an empty cache.

    python benchmarks/evaluator_speed.py [--requests 4000000] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the naive simulator of the tests

from evaluator import (  # noqa: E402
    Arrivals,
    Run,
    Settings,
    compile_arrivals,
    compile_deadlines,
    compile_replicas,
    evaluate,
    simulate_counts,
)
from foreplan.measure import processor_name  # noqa: E402
from plans import Group, LoadoutEntry, Plan, Route, Services, SolverReport, group_id  # noqa: E402
from tests.evaluator import naive  # noqa: E402
from traces.table import RequestTrace  # noqa: E402

PLAIN_RPS, BATCHED_RPS, GROWTH, NAIVE_RATIO, DAY_S, DAY_BYTES = 5e6, 2e6, 1.5, 300.0, 10.0, 2 * 2**30
GROUPS_PER_NODE = 8
SOLVER = SolverReport(name="by hand", status="feasible", objective=0, bound=0, gap=0, wall_s=0, seed=0)
DAY_REQUESTS = 10_000_000


def make_plan(groups: int, services: int, copies: int, max_batch: int, *, first_s: float = 0.01) -> Plan:
    """Return a plan that runs every service on ``copies`` groups, taken in turn; batches of b take 1 + 0.3 (b - 1)."""
    hosts: dict[int, list[int]] = {}
    for service in range(services):
        for copy in range(copies):
            hosts.setdefault((service * copies + copy) % groups, []).append(service)
    rows = tuple((first_s * (1 + 0.3 * b),) for b in range(max_batch))

    def entry(service: int) -> LoadoutEntry:
        return LoadoutEntry(
            service=f"s{service}",
            variant="m",
            max_batch=max_batch,
            rate_rps=1.0,
            memory_bytes=(1,),
            deadline_s=0.1,
            stage_latency_s=rows,
        )

    built = []
    for group, hosted in sorted(hosts.items()):
        node, gpu = f"n{group // GROUPS_PER_NODE}", group % GROUPS_PER_NODE
        loadout = tuple(entry(service) for service in dict.fromkeys(hosted))
        built.append(Group(id=group_id(node, (gpu,)), node=node, gpus=(gpu,), loadout=loadout))
    on = {f"s{s}": [g.id for g in built if g.entry(f"s{s}")] for s in range(services)}
    routes = {name: tuple(Route(group=g, weight=1 / len(ids)) for g in ids) for name, ids in on.items()}
    return Plan(solver=SOLVER, groups=tuple(built), routes=routes)


def make_services(count: int) -> Services:
    variants = [{"model": "m"}]
    return Services.model_validate(
        {"services": [{"name": f"s{s}", "slo": {"deadline": 0.1}, "variants": variants} for s in range(count)]}
    )


def capacity_rps(plan: Plan) -> float:
    """Return what the groups serve in full batches."""
    rates = [
        group.loadout[0].max_batch / group.loadout[0].batch_latency_s(group.loadout[0].max_batch)
        for group in plan.groups
    ]
    return sum(rates)


def make_trace(plan: Plan, services: int, load: float, requests: int, seed: int = 1) -> RequestTrace:
    """Return Poisson arrivals at ``load`` times the capacity."""
    rng = np.random.default_rng(seed)
    arrival_s = np.cumsum(rng.exponential(1 / (load * capacity_rps(plan)), requests))
    names = pd.Index([f"s{s}" for s in range(services)], dtype="str")
    service = names.take(rng.integers(0, services, requests))
    return RequestTrace(pd.DataFrame({"arrival_s": arrival_s, "service": service}))


def timed(
    plan: Plan, services: Services, arrivals: Arrivals, settings: Settings, repeats: int = 3
) -> tuple[float, float]:
    """Return requests per second of one core's time in the kernel (the best of some runs) and attainment."""
    replicas, deadlines = compile_replicas(plan, services), compile_deadlines(services)
    best_s, good = np.inf, 0
    for _ in range(repeats):
        run = Run(replicas, arrivals, deadlines, settings, keep_latencies=True)
        started_s = time.process_time()
        run.finish()
        best_s = min(best_s, time.process_time() - started_s)
        counts = run.world.array("counts")
        assert counts.sum() == len(arrivals.arrival_s), "requests were lost"
        assert run.world["in_use"] == 0, "requests are still in flight"
        good = int(counts[:, 1].sum())
    return len(arrivals.arrival_s) / best_s, good / len(arrivals.arrival_s)


def check_against_naive(plan: Plan, services: Services, load: float, requests: int) -> tuple[float, float]:
    """Compare every request with the naive simulator's; return the requests per second of both."""
    trace = make_trace(plan, len(services.services), load, requests, seed=7)
    started_s = time.process_time()
    expected = naive.run_trace(plan, services, trace)
    naive_s = time.process_time() - started_s
    frame = evaluate(plan, services, trace).requests
    for got, want in zip(frame.itertuples(), expected, strict=True):
        assert want is not None
        assert (got.outcome, None if got.reason != got.reason else got.reason) == (want.outcome, want.reason), (
            got,
            want,
        )
        assert want.finish_s is None or got.latency_s == want.finish_s - got.scheduled_s, (got, want)
    return requests / naive_s, float((frame["outcome"] == "good").mean())


def compile_seconds() -> tuple[float, float]:
    """Return the processor time of the first run in a fresh process: with an empty cache, and with a full one."""
    code = (
        "import time, numpy as np, pandas as pd\n"
        "import sys; sys.path.insert(0, 'benchmarks')\n"
        "from evaluator_speed import *\n"
        "p, s = make_plan(1, 1, 1, 1), make_services(1)\n"
        "t = make_trace(p, 1, 0.5, 10)\n"
        "a = time.process_time(); evaluate(p, s, t); print(time.process_time() - a)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        found = [
            float(
                subprocess.run(
                    [sys.executable, "-c", code],
                    cwd=ROOT,
                    env=os.environ | {"NUMBA_CACHE_DIR": folder},
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
            )
            for _ in range(2)
        ]
    return found[0], found[1]


def one_day() -> None:
    """Evaluate a day of ten million requests over 64 GPUs, and print seconds and peak bytes; a process of its own."""
    plan, services = make_plan(64, 40, 4, 8), make_services(40)
    rng = np.random.default_rng(3)
    arrival_s = np.sort(rng.random(DAY_REQUESTS) * 86_400)
    names = pd.Index([f"s{s}" for s in range(40)], dtype="str")
    frame = pd.DataFrame({"arrival_s": arrival_s, "service": names.take(rng.integers(0, 40, DAY_REQUESTS))})
    trace = RequestTrace(frame, duration_s=86_400)
    del frame, arrival_s
    evaluate(make_plan(1, 1, 1, 1), make_services(1), make_trace(make_plan(1, 1, 1, 1), 1, 0.5, 10))  # compiles
    started_s = time.perf_counter()
    result = evaluate(plan, services, trace, timeline_s=300.0)
    wall_s = time.perf_counter() - started_s
    assert result.summary.requests == DAY_REQUESTS
    assert result.timeline is not None
    assert result.timeline.outcomes.sum() == DAY_REQUESTS
    print(json.dumps({"wall_s": wall_s, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4_000_000, help="requests of each kernel run")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--day", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.day:
        one_day()
        return

    found: dict[str, float] = {}
    print(
        f"{processor_name()}, {os.cpu_count()} cores, {datetime.now(UTC):%Y-%m-%d}, Python {platform.python_version()}"
    )
    found["compile_s"], found["load_s"] = compile_seconds()
    print(
        f"first evaluation in a process: {found['compile_s']:.1f} s of processor with nothing compiled, "
        f"{found['load_s']:.2f} s from the cache"
    )

    cases = (
        ("no batching, EDF, early drop, 80 % load", 16, 8, 2, 1, 0.8, Settings()),
        ("no batching, EDF, early drop, 130 % load", 16, 8, 2, 1, 1.3, Settings()),
        ("no batching, FIFO, nothing dropped, 90 % load", 16, 8, 2, 1, 0.9, Settings(order="fifo", early_drop=False)),
        ("no batching, shortest queue, 80 % load", 16, 8, 2, 1, 0.8, Settings(routing="shortest-queue")),
        ("batches to 8, EDF, early drop, 60 % load", 16, 8, 2, 8, 0.6, Settings()),
        ("batches to 8, EDF, early drop, 120 % load", 16, 8, 2, 8, 1.2, Settings()),
        ("batches to 8, batch delay 5 ms, 60 % load", 16, 8, 2, 8, 0.6, Settings(batch_delay_s=0.005)),
        ("batches to 8, least finish, 80 % load", 16, 8, 2, 8, 0.8, Settings(routing="least-finish")),
    )
    for label, count, groups, copies, batch, load, settings in cases:
        plan, services = make_plan(groups, count, copies, batch), make_services(count)
        arrivals = compile_arrivals(make_trace(plan, count, load, arguments.requests), services)
        found[label], good = timed(plan, services, arrivals, settings)
        print(f"16 models, 8 groups: {label:48} {found[label] / 1e6:6.2f} M requests/s, attainment {good:.3f}")

    print("cost per request as groups grow, the same load on each group (services x copies on groups):")
    for label, batch, load in (("no batching", 1, 0.8), ("batches to 8", 8, 0.8)):
        speeds = {}
        for count, copies, groups in ((200, 2, 8), (10, 2, 8), (200, 5, 512)):
            plan, services = make_plan(groups, count, copies, batch), make_services(count)
            arrivals = compile_arrivals(make_trace(plan, count, load, arguments.requests), services)
            speeds[count, groups], _ = timed(plan, services, arrivals, Settings())
            print(f"  {label:12} {count:3} x {copies} on {groups:3}: {1e9 / speeds[count, groups]:6.1f} ns a request")
        found[f"growth {label}"] = speeds[200, 8] / speeds[200, 512]
        found[f"growth {label}, as many replicas a group"] = speeds[10, 8] / speeds[200, 512]
        print(
            f"  {label:12} 8 to 512 groups: {found[f'growth {label}']:.2f} with 200 services, "
            f"{found[f'growth {label}, as many replicas a group']:.2f} with as many replicas on each group"
        )

    plan, services = make_plan(8, 16, 2, 8), make_services(16)
    naive_rps, _ = check_against_naive(plan, services, 1.2, 4_000)
    found["naive ratio"] = found["batches to 8, EDF, early drop, 120 % load"] / naive_rps
    print(
        f"naive Python simulator, same outcome for each of 4000 requests: {naive_rps:.0f} requests/s, "
        f"{found['naive ratio']:.0f} times slower"
    )

    arrivals = compile_arrivals(make_trace(plan, 16, 0.8, 20_000), services)
    replicas, deadlines = compile_replicas(plan, services), compile_deadlines(services)
    started_s = time.perf_counter()
    for _ in range(200):
        simulate_counts(replicas, arrivals, deadlines, Settings())
    found["counts_s"] = (time.perf_counter() - started_s) / 200
    few = compile_arrivals(make_trace(plan, 16, 0.8, 20), services)
    started_s = time.perf_counter()
    for _ in range(200):
        simulate_counts(replicas, few, deadlines, Settings())
    found["counts_call_s"] = (time.perf_counter() - started_s) / 200
    print(
        f"simulate_counts: {found['counts_s'] * 1e3:.2f} ms for 20,000 requests, "
        f"{found['counts_call_s'] * 1e6:.0f} us for 20"
    )

    day = json.loads(
        subprocess.run([sys.executable, __file__, "--day"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    )
    found["day_s"], found["day_bytes"] = day["wall_s"], day["peak_bytes"]
    print(
        f"a day of 10 M requests on 64 GPUs, requests kept, timeline: {day['wall_s']:.1f} s, "
        f"peak {day['peak_bytes'] / 2**30:.2f} GiB with the trace"
    )

    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": processor_name(), "figures": found}, indent=1))
    for label, count in (("no batching", PLAIN_RPS), ("batches", BATCHED_RPS)):
        slowest = min(value for key, value in found.items() if key.startswith(label) and "growth" not in key)
        assert slowest >= count, f"{label}: {slowest:.3g} requests/s"
    assert max(value for key, value in found.items() if key.startswith("growth")) <= GROWTH
    assert found["naive ratio"] >= NAIVE_RATIO
    assert found["day_s"] <= DAY_S
    assert found["day_bytes"] <= DAY_BYTES


if __name__ == "__main__":
    main()
