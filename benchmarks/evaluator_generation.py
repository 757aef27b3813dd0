"""How many engine iterations per second the evaluator makes of generating services, on one core.

An iteration is one prefill or one decode of all running sequences of a replica. The rate is per second of processor
time in the kernel, compiled before. Every run is checked: each request ends, as many tokens come out as were asked for
(a lone sequence takes one iteration for each), and small cases end request by request as in the naive simulator.

    python benchmarks/evaluator_generation.py [--requests 400000] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the naive simulator of the tests

from evaluator import Settings, compile_arrivals, compile_deadlines  # noqa: E402
from evaluator.course import Course, Inventory  # noqa: E402
from evaluator.featured_run import FeaturedRun  # noqa: E402
from evaluator.fleet import Fleet  # noqa: E402
from evaluator.workflows import compile_workflows  # noqa: E402
from foreplan.measure import processor_name  # noqa: E402
from plans import Cluster, Group, LoadoutEntry, Plan, Route, Services, SolverReport, group_id  # noqa: E402
from profiles import Profile, ProfileLibrary  # noqa: E402
from tests.evaluator.comparison import disagreements  # noqa: E402
from tests.evaluator.random_scenarios import random_case  # noqa: E402
from traces.table import RequestTrace  # noqa: E402

TARGET_PER_S = 1e6
SOLVER = SolverReport(name="by hand", status="feasible", objective=0, bound=0, gap=0, wall_s=0, seed=0)
KV_BYTES = 1000


def make_profile() -> ProfileLibrary:
    def row(phase: str, batch: int, tokens: int, mean: float) -> dict[str, object]:
        sizes = {"weight_bytes": [0], "peak_bytes": [0], "stage_latency_s": [mean]}
        return {"phase": phase, "batch": batch, "input_tokens": tokens, "latency_s": {"mean": mean}, **sizes}

    rows = [row("prefill", 1, tokens, 0.005 + 2e-5 * tokens) for tokens in (128, 512, 2048, 8192)]
    rows += [row("decode", b, c, 0.008 + 1e-4 * b + 2e-8 * b * c) for b in (1, 8, 64) for c in (256, 4096)]
    fields = {"model": "chat", "gpu_type": "gpu", "source": "modelled", "rows": rows, "kv_bytes_per_token": KV_BYTES}
    return ProfileLibrary([Profile.model_validate(fields)])


def make_plan(replicas: int, max_batch: int, kv_tokens: int) -> Plan:
    groups = []
    for index in range(replicas):
        entry = LoadoutEntry(
            service="chat",
            variant="chat",
            max_batch=max_batch,
            rate_rps=1.0,
            memory_bytes=(kv_tokens * KV_BYTES,),
            deadline_s=10.0,
            stage_latency_s=((1.0,),) * max_batch,
        )
        node = f"node-{index}"
        groups.append(Group(id=group_id(node, (0,)), node=node, gpus=(0,), loadout=(entry,)))
    routes = {"chat": tuple(Route(group=group.id, weight=1 / replicas) for group in groups)}
    return Plan(solver=SOLVER, groups=tuple(groups), routes=routes)


def make_run(plan: Plan, trace: RequestTrace) -> tuple[FeaturedRun, Course]:
    slo = {"ttft": "1e6s", "tpot": "1e6s"}
    services = Services.model_validate(
        {"services": [{"name": "chat", "class": "generation", "slo": slo, "variants": [{"model": "chat"}]}]}
    )
    nodes = [{"name": group.node, "gpus": {"type": "gpu", "count": 1}} for group in plan.groups]
    cluster = Cluster.model_validate({"gpu_types": {"gpu": {"memory": "80GiB"}}, "nodes": nodes})
    settings = Settings()
    inventory = Inventory(services, cluster, make_profile(), settings)
    fleet = Fleet(plan, cluster)
    run = FeaturedRun(
        inventory.replicas(fleet),
        inventory.features(fleet),
        compile_arrivals(trace, services),
        compile_deadlines(services),
        settings,
        flows=compile_workflows(services, plan),
        keep_requests=True,
    )
    return run, Course(run, fleet, inventory)


def make_trace(requests: int, rate_rps: float, seed: int) -> RequestTrace:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "arrival_s": np.cumsum(rng.exponential(1 / rate_rps, requests)),
            "service": "chat",
            "input_tokens": rng.integers(16, 1024, requests),
            "output_tokens": rng.integers(1, 512, requests),
        }
    ).astype({"input_tokens": "Int64", "output_tokens": "Int64"})
    return RequestTrace(frame)


def measure(
    name: str, replicas: int, max_batch: int, kv_tokens: int, requests: int, rate_rps: float
) -> dict[str, object]:
    plan, trace = make_plan(replicas, max_batch, kv_tokens), make_trace(requests, rate_rps, 1)
    make_run(plan, trace)[1].finish()  # compiles
    run, course = make_run(plan, trace)
    started = time.process_time()
    course.finish()
    took_s = time.process_time() - started
    iterations = int(run.world.array("groups")["started"].sum())
    assert (run.world.array("log_code") == 1).all(), "every request ends good"
    generators = run.world.array("generators")
    assert (generators["running"] == 0).all()
    assert (generators["context"] == 0).all()
    return {
        "case": name,
        "requests": requests,
        "iterations": iterations,
        "kernel_s": took_s,
        "iterations_per_s": iterations / took_s,
        "tokens_per_iteration": float(trace.numbers("output_tokens").sum() / iterations),
    }


def check() -> None:
    """Compare with the naive simulator, and a lone sequence with what it must take."""
    for seed in range(40):
        assert not disagreements(random_case(seed, "generation")), seed
    trace = RequestTrace(
        pd.DataFrame({"arrival_s": [0.0], "service": "chat", "input_tokens": [100], "output_tokens": [300]}).astype(
            {"input_tokens": "Int64", "output_tokens": "Int64"}
        )
    )
    run, course = make_run(make_plan(1, 8, 10_000), trace)
    course.finish()
    assert run.world.array("groups")["started"].sum() == 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=400_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    check()
    count = options.requests
    cases = [
        measure("1 replica, up to 8 sequences", 1, 8, 100_000, count, 2.5),
        measure("8 replicas, up to 64 sequences", 8, 64, 100_000, count, 60.0),
        measure("8 replicas, memory for 8000 tokens", 8, 64, 8_000, count, 28.0),
    ]
    print(f"{processor_name()}, Python {platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}")
    for case in cases:
        print(
            f"{case['case']}: {case['iterations']:,} iterations of {case['tokens_per_iteration']:.1f} tokens in "
            f"{case['kernel_s']:.2f} s: {case['iterations_per_s'] / 1e6:.2f} million per second"
        )
        verdict = "met" if case["iterations_per_s"] >= TARGET_PER_S else "MISSED"
        print(f"  target {TARGET_PER_S / 1e6:.0f} million: {verdict}")
    if options.json is not None:
        options.json.write_text(json.dumps(cases, indent=1))


if __name__ == "__main__":
    main()
