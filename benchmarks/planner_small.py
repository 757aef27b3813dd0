"""Planning 20 services x 20 single-GPU servers with 3 variants each: the gap must be at most 1 % in under 2 s.

Three loads (half empty, full, overloaded) by three memory sizes by three seeds. Every plan is checked by the
independent checker. The time is that of the whole of `planner.solve`: building, every objective, and the plan document;
importing the solver library, once per process, is stated apart and counts too.

    python benchmarks/planner_small.py [--time-limit 1.5] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import time
from pathlib import Path

import numpy as np

from foreplan.planning import verify
from planner import Problem, Settings, Solved, solve
from plans.cluster import Cluster, GpuType, Node, NodeGpus
from plans.demand import Demand, Rate, ServiceDemand
from plans.service import LatencyService, LatencySlo, Services, Variant
from profiles.document import LatencyStatistics, Profile, ProfileMeta, Row
from profiles.library import ProfileLibrary

SERVICES = 20
SERVERS = 20
GIB = 2**30
VARIANTS = ((1.0, 0.90), (0.6, 0.84), (0.35, 0.75))
"""Cost relative to the first variant, and accuracy."""

MOST_GAP = 0.01
MOST_S = 2.0


def generate(
    seed: int,
    *,
    load: float,
    memory_gib: int,
    settings: Settings,
    service_count: int = SERVICES,
    server_count: int = SERVERS,
) -> Problem:
    """Return a seeded problem; ``load`` is half the work at batch 1 with the best variants over the capacity."""
    rng = np.random.default_rng(seed)
    work = rng.dirichlet(np.ones(service_count)) * server_count * load
    profiles, services, demands = [], [], []
    for index in range(service_count):
        base_s = float(np.exp(rng.uniform(np.log(0.003), np.log(0.06))))
        variants = []
        for rank, (cost, accuracy) in enumerate(VARIANTS):
            model = f"model-{index}-{rank}"
            weight = int(rng.uniform(0.4, 6.0) * GIB * cost)
            gain = float(rng.uniform(0.3, 0.9))
            variants.append(Variant(model=model, accuracy=round(accuracy - float(rng.uniform(0, 0.05)), 4)))
            profiles.append(_profile(model, base_s * cost, gain, weight))
        services.append(
            LatencyService(
                name=f"service-{index}",
                weight=float(rng.choice([1.0, 1.0, 2.0, 4.0])),
                variants=tuple(variants),
                slo=LatencySlo(deadline_s=base_s * float(rng.uniform(4, 15))),
            )
        )
        demands.append(
            ServiceDemand(
                service=f"service-{index}",
                burstiness_cv=float(rng.uniform(0.8, 2.0)),
                rate_rps=(Rate(mean=float(work[index] / base_s * 2.0)),),
            )
        )
    return Problem(
        cluster=Cluster(
            gpu_types={"gpu": GpuType(memory_bytes=memory_gib * GIB)},
            nodes=tuple(Node(name=f"server-{i}", gpus=NodeGpus(type="gpu", count=1)) for i in range(server_count)),
        ),
        services=Services(services=tuple(services)),
        profiles=ProfileLibrary(profiles),
        demand=Demand(window_s=300, services=tuple(demands)),
        settings=settings,
    )


def _profile(model: str, base_s: float, gain: float, weight: int) -> Profile:
    rows = []
    for batch in (1, 2, 4, 8, 16, 32):
        latency = base_s * (1 + (batch - 1) * (1 - gain))
        rows.append(
            Row(
                batch=batch,
                latency_s=LatencyStatistics(mean=latency, p50=latency, p95=latency * 1.02, p99=latency * 1.05),
                stage_latency_s=(latency,),
                weight_bytes=(weight,),
                peak_bytes=(weight + int(batch * 0.03 * weight) + 200_000_000,),
                load_s=weight / 1e9,
                samples=500,
            )
        )
    return Profile(model=model, gpu_type="gpu", source="measured", meta=ProfileMeta(), rows=tuple(rows))


def measure(seed: int, load: float, memory_gib: int, time_limit_s: float) -> dict[str, float | int | str]:
    """Plan one problem, check the plan, and return the row of the table."""
    settings = Settings(time_limit_s=time_limit_s, seed=seed)
    problem = generate(seed, load=load, memory_gib=memory_gib, settings=settings)
    started_s = time.perf_counter()
    result = solve(problem)
    wall_s = time.perf_counter() - started_s
    assert isinstance(result, Solved), result
    plan = result.plan
    faults = verify(plan, problem.cluster, problem.services, problem.profiles)
    assert not faults, faults
    weights = {service.name: service.weight for service in problem.services.services}
    offered = sum(weights[each.service] * each.rate_rps[0].mean for each in problem.demand.services)
    return {
        "load": load,
        "memory_gib": memory_gib,
        "seed": seed,
        "options": result.report.options,
        "served": plan.solver.objective / offered,
        "status": plan.solver.status,
        "gap": plan.solver.gap,
        "accuracy_gap": plan.solver.tiers[1].gap,
        "cost_gap": plan.solver.tiers[2].gap,
        "gpus": plan.gpus_used,
        "wall_s": wall_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time-limit", type=float, default=1.5, help="seconds for each plan")
    parser.add_argument("--json", type=Path, help="file for the raw samples")
    arguments = parser.parse_args()

    started_s = time.perf_counter()
    importlib.import_module("planner.mathopt_backend")
    import_s = time.perf_counter() - started_s
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    print(f"{machine}; importing the solver took {import_s:.2f} s; time limit {arguments.time_limit:g} s")
    titles = f"{'load':>5} {'memory':>7} {'seed':>4} {'served':>7} {'gap':>8} {'acc. gap':>8} {'cost gap':>8}"
    print(f"{titles} {'GPUs':>4} {'wall':>7}")
    rows = []
    for memory_gib in (6, 8, 16):
        for load in (0.5, 3.0, 8.0):
            for seed in (1, 2, 3):
                row = measure(seed, load, memory_gib, arguments.time_limit)
                rows.append(row)
                print(
                    f"{load:>5g} {memory_gib:>3} GiB {seed:>4} {row['served']:>7.1%} {row['gap']:>8.4%} "
                    f"{row['accuracy_gap']:>8.2%} {row['cost_gap']:>8.2%} {row['gpus']:>4} {row['wall_s']:>5.2f} s"
                )
    worst_gap, worst_s = (max(float(row[key]) for row in rows) for key in ("gap", "wall_s"))
    print(f"worst gap {worst_gap:.4%} (at most {MOST_GAP:.0%}), longest {worst_s:.2f} s (at most {MOST_S:g} s)")
    accuracy, cost = (max(float(row[key]) for row in rows) for key in ("accuracy_gap", "cost_gap"))
    print(f"later objectives: worst gap of accuracy {accuracy:.2%}, of cost {cost:.2%}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "import_s": import_s, "rows": rows}, indent=1))
    assert worst_gap <= MOST_GAP, f"gap {worst_gap:.4%}"
    assert worst_s + import_s <= MOST_S, f"{worst_s:.2f} s and {import_s:.2f} s for the import"


if __name__ == "__main__":
    main()
