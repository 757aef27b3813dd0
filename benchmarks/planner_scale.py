"""Planning from 20 services x 20 GPUs to 1,000 services x 10,000 GPUs: gap, time and memory.

Every problem is generated from the formulas below, planned in a process of its own (its peak resident memory is that of
the process), verified by the independent checker, and its objective computed again from the plan document alone.

    python benchmarks/planner_scale.py [--size 200x512 ...] [--loads 2 8 ...] [--seeds 1 2 ...] [--json FILE]
        [--keep-after-loss 1.0] [--strict]

All loads by all seeds of a size are run in one go; the worst gap and the longest time of each size are printed after it
and, with --strict, held to the targets. With --keep-after-loss the plans outlive the loss of any one node; no target
is stated for those.

The formulas. A model has weights of W bytes (families from 0.1 to 140 GB, drawn so that small ones are common) and
works through g = 2 W of multiply-adds per request times a number of tokens or patches. On a GPU of bandwidth B, speed
F and memory M, with tensor parallelism t and p stages, a batch of b takes

    l(b) = 1 ms + W / (B t) + b g / (F t) (1 + 0.08 log2 t) + 0.3 ms (p - 1) + 0.5 ms (t > 1)

spread evenly over the stages, with a 99th percentile of 1.05 l, and needs W / (t p) + b A / t + 0.25 GB on each GPU,
where A, its activations, is 2 % of W and at least 10 MB. Parallelism is profiled where a GPU is left with at least
1.5 GB of weights. Services take three variants of one family (1, 0.5 and 0.25 times the weights, accuracy falling), a
deadline of 3 to 15 times the latency of the first variant on the GPU type that serves it best, weights that grow with
the work of a request to the power 0.7 times 1 to 4, and demand in proportion to rank to the power -1.1 (Zipf), scaled
so that serving everything with first variants at batch 1 would take ``load`` times all GPUs there are; with batches
and smaller variants the clusters are about full at a load of 8.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from foreplan.planning import verify
from planner import Problem, Settings, Solved, solve
from plans.cluster import Cluster, GpuType, Node, NodeGpus
from plans.demand import Demand, Rate, ServiceDemand
from plans.plan import Plan
from plans.service import LatencyService, LatencySlo, Services, Variant
from profiles.document import LatencyStatistics, Profile, ProfileMeta, Row
from profiles.library import ProfileLibrary

GB = 1e9
BATCHES = (1, 2, 4, 8, 16, 32)
SHAPES = tuple((tp, pp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4, 8) if tp * pp <= 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A GPU type: memory in bytes, bandwidth in bytes/s, speed in multiply-adds/s, cost per hour, GPUs per node."""

    name: str
    memory: float
    bandwidth: float
    speed: float
    cost: float
    per_node: int


KINDS = (
    Kind(name="l4-24gb", memory=24 * GB, bandwidth=0.3e12, speed=0.05e15, cost=0.8, per_node=4),
    Kind(name="a100-80gb", memory=80 * GB, bandwidth=2.0e12, speed=0.13e15, cost=2.5, per_node=8),
    Kind(name="h100-80gb", memory=80 * GB, bandwidth=3.35e12, speed=0.4e15, cost=3.9, per_node=8),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A row of the table: what to reach, and on what."""

    services: int
    gpus: int
    most_gap: float
    most_s: float
    kinds: tuple[Kind, ...] = KINDS
    shapes: tuple[tuple[int, int], ...] = SHAPES

    @property
    def name(self) -> str:
        """Services x GPUs."""
        return f"{self.services}x{self.gpus}"


_SERVER = Kind(name="l4-24gb", memory=24 * GB, bandwidth=0.3e12, speed=0.05e15, cost=0.8, per_node=1)
SIZES = (
    Size(services=20, gpus=20, most_gap=0.001, most_s=1.0, kinds=(_SERVER,), shapes=((1, 1),)),
    Size(services=40, gpus=64, most_gap=0.005, most_s=10.0),
    Size(services=200, gpus=512, most_gap=0.01, most_s=60.0),
    Size(services=500, gpus=2000, most_gap=0.02, most_s=120.0),
    Size(services=1000, gpus=10000, most_gap=0.03, most_s=300.0),
)


def latency_s(kind: Kind, weights: float, work: float, tp: int, pp: int, batch: int) -> float:
    """Return the seconds that a batch takes: the formula at the top of the module."""
    compute_s = batch * work / (kind.speed * tp) * (1 + 0.08 * math.log2(tp))
    return 1e-3 + weights / (kind.bandwidth * tp) + compute_s + 3e-4 * (pp - 1) + 5e-4 * (tp > 1)


def profile(model: str, kind: Kind, weights: float, work: float, shapes: tuple[tuple[int, int], ...]) -> Profile | None:
    """Return the profile of a model on a GPU type; None when no parallelism fits."""
    activations = max(0.02 * weights, 1e7)
    rows = []
    for tp, pp in shapes:
        shard = weights / (tp * pp)
        if (tp * pp > 1 and shard < 1.5 * GB) or shard + activations / tp + 0.25 * GB > kind.memory:
            continue
        for batch in BATCHES:
            mean = latency_s(kind, weights, work, tp, pp, batch)
            rows.append(
                Row(
                    tp=tp,
                    pp=pp,
                    batch=batch,
                    latency_s=LatencyStatistics(mean=mean, p50=mean, p95=mean * 1.02, p99=mean * 1.05),
                    stage_latency_s=(mean / pp,) * pp,
                    weight_bytes=(int(shard),) * pp,
                    peak_bytes=(int(shard + batch * activations / tp + 0.25 * GB),) * pp,
                    load_s=weights / (8 * GB),
                    samples=500,
                )
            )
    if not rows:
        return None
    return Profile(model=model, gpu_type=kind.name, source="measured", meta=ProfileMeta(), rows=tuple(rows))


def generate(size: Size, *, load: float, seed: int, settings: Settings) -> Problem:
    """Return a seeded problem of ``size``."""
    rng = np.random.default_rng(seed)
    families = max(8, size.services // 5)
    largest = max(kind.memory * (1 if size.shapes == ((1, 1),) else 8) for kind in size.kinds)
    base = np.minimum(0.1 * GB * 1400 ** rng.beta(1.0, 1.6, families), min(140 * GB, 0.6 * largest))
    tokens = np.exp(rng.uniform(np.log(16), np.log(256), families))
    profiles: list[Profile] = []
    quickest = np.full(families, np.inf)
    effort_s = np.full(families, np.inf)
    for family in range(families):
        for rank, part in enumerate((1.0, 0.5, 0.25)):
            weights = float(base[family] * part)
            work = weights * float(tokens[family])
            for kind in size.kinds:
                found = profile(f"model-{family}-{rank}", kind, weights, work, size.shapes)
                if found is None:
                    continue
                profiles.append(found)
                if rank == 0:
                    ones = [row for row in found.rows if row.batch == 1]
                    quickest[family] = min(quickest[family], *(row.latency_s.mean for row in ones))
                    relative = kind.speed / size.kinds[0].speed
                    effort_s[family] = min(
                        effort_s[family], *(row.stage_latency_s[0] * row.tp * row.pp * relative for row in ones)
                    )
    nodes, speeds = [], []
    share = (0.25, 0.375, 0.375)[: len(size.kinds)] if len(size.kinds) > 1 else (1.0,)
    for kind, part in zip(size.kinds, share, strict=True):
        count = round(size.gpus * part / kind.per_node)
        nodes += [
            Node(name=f"{kind.name}-{i}", zone=f"zone-{i % 4}", gpus=NodeGpus(type=kind.name, count=kind.per_node))
            for i in range(count)
        ]
        speeds += [kind.speed / size.kinds[0].speed] * count * kind.per_node
    services, demands = [], []
    chosen = rng.integers(0, families, size.services)
    zipf = (np.arange(size.services) + 1.0) ** -1.1
    zipf = rng.permutation(zipf / zipf.sum())
    for index, family in enumerate(chosen):
        effort = float(effort_s[family])
        importance = float(rng.choice([1.0, 1.0, 2.0, 4.0]))
        services.append(
            LatencyService(
                name=f"service-{index}",
                weight=round(importance * (effort / 0.01) ** 0.7, 4),
                variants=tuple(
                    Variant(model=f"model-{family}-{rank}", accuracy=round(0.9 - 0.06 * rank, 3)) for rank in range(3)
                ),
                slo=LatencySlo(deadline_s=float(quickest[family] * rng.uniform(3, 15))),
                min_replicas=int(rng.random() < 0.1),
                max_gpus=int(size.gpus * zipf[index] * 2) + 8 if rng.random() < 0.05 else None,
            )
        )
        demands.append(
            ServiceDemand(
                service=f"service-{index}",
                burstiness_cv=float(rng.uniform(0.8, 2.0)),
                rate_rps=(Rate(mean=float(zipf[index] * sum(speeds) * load / effort)),),
            )
        )
    return Problem(
        cluster=Cluster(
            gpu_types={
                kind.name: GpuType(memory_bytes=int(kind.memory), cost_per_hour=kind.cost) for kind in size.kinds
            },
            nodes=tuple(nodes),
        ),
        services=Services(services=tuple(services)),
        profiles=ProfileLibrary(profiles),
        demand=Demand(window_s=300, services=tuple(demands)),
        settings=settings,
    )


def goodput(plan: Plan, problem: Problem) -> float:
    """Return the weighted rate that ``plan`` serves, from its entries alone."""
    weight = {service.name: service.weight for service in problem.services.services}
    offered = {each.service: each.rate_rps[0].mean for each in problem.demand.services}
    served = dict.fromkeys(offered, 0.0)
    for group in plan.groups:
        for entry in group.loadout:
            served[entry.service] += entry.rate_rps
    assert all(served[name] <= offered[name] * (1 + 1e-6) + 1e-9 for name in offered), "more served than asked for"
    return sum(weight[name] * min(rate, offered[name]) for name, rate in served.items())


def measure(size: Size, load: float, seed: int, method: str, keep: float = 0.0) -> dict[str, object]:
    """Plan one problem, check the plan, and return the row of the table."""
    settings = Settings(
        time_limit_s=0.97 * size.most_s,
        seed=seed,
        gap=size.most_gap / 10,
        method=method,  # type: ignore[arg-type]
        keep_after_loss=keep,
    )
    problem = generate(size, load=load, seed=seed, settings=settings)
    started_s = time.perf_counter()
    result = solve(problem)
    wall_s = time.perf_counter() - started_s
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert isinstance(result, Solved), result
    plan = result.plan
    faults = verify(plan, problem.cluster, problem.services, problem.profiles)
    assert not faults, faults[:3]
    found = goodput(plan, problem)
    assert abs(found - plan.solver.objective) <= 1e-6 * found, (found, plan.solver.objective)
    offered = sum(
        service.weight * each.rate_rps[0].mean
        for service, each in zip(problem.services.services, problem.demand.services, strict=True)
    )
    return {
        "size": size.name,
        "load": load,
        "seed": seed,
        "method": result.report.method,
        "options": result.report.options,
        "groups": result.report.groups,
        "classes": result.report.classes,
        "served": found / offered,
        "gap": (plan.solver.bound - found) / found,
        "tiers": {tier.name: tier.gap for tier in plan.solver.tiers},
        "gpus": plan.gpus_used,
        "wall_s": wall_s,
        "peak_bytes": peak,
    }


def _isolated(size: Size, load: float, seed: int, method: str, keep: float) -> dict[str, object]:
    """Measure in a new process, so that peak memory is that of one problem."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (size, load, seed, method, keep))


def _summary(size: Size, rows: list[dict[str, object]]) -> list[str]:
    """Print the worst of a size, and return what it misses of its targets."""
    gap, wall_s = (max(float(row[key]) for row in rows) for key in ("gap", "wall_s"))  # type: ignore[arg-type]
    tiers = {name: max(row["tiers"][name] for row in rows) for name in rows[0]["tiers"]}  # type: ignore[index, attr-defined]
    worst = " ".join(f"{name} {value:.3%}" for name, value in tiers.items())
    print(f"{size.name:>10} worst of {len(rows)}: gap {gap:.4%}, {wall_s:.1f} s; {worst}", flush=True)
    return [
        f"{size.name}: {text}"
        for text, late in (
            (f"gap {gap:.4%} instead of {size.most_gap:.2%}", gap > size.most_gap),
            (f"{wall_s:.1f} s instead of {size.most_s:g} s", wall_s > size.most_s),
        )
        if late
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="*", default=[size.name for size in SIZES])
    parser.add_argument("--loads", "--load", nargs="*", type=float, default=[2.0, 8.0, 16.0])
    parser.add_argument("--seeds", "--seed", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--method", default="auto", choices=["auto", "direct", "columns"])
    parser.add_argument("--keep-after-loss", type=float, default=0.0, help="share of rates that any lost node leaves")
    parser.add_argument("--strict", action="store_true", help="fail where a size misses its targets")
    parser.add_argument("--json", type=Path, help="file for the raw samples")
    arguments = parser.parse_args()
    machine = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    print(machine)
    titles = f"{'size':>10} {'load':>5} {'seed':>4} {'method':>8} {'served':>7} {'gap':>8} {'to reach':>8}"
    print(f"{titles} {'GPUs':>6} {'wall':>8} {'peak':>9}  gaps of all objectives")
    rows = []
    missed: list[str] = []
    for size in SIZES:
        if size.name not in arguments.size:
            continue
        for load in arguments.loads:
            for seed in arguments.seeds:
                row = _isolated(size, load, seed, arguments.method, arguments.keep_after_loss)
                rows.append(row)
                tiers = " ".join(f"{name} {gap:.3%}" for name, gap in row["tiers"].items())  # type: ignore[attr-defined]
                print(
                    f"{size.name:>10} {load:>5g} {seed:>4} {row['method']:>8} {row['served']:>7.1%} {row['gap']:>8.4%} "
                    f"{size.most_gap:>8.2%} {row['gpus']:>6} {row['wall_s']:>6.1f} s "
                    f"{row['peak_bytes'] / 2**30:>5.2f} GiB  {tiers}",  # type: ignore[operator]
                    flush=True,
                )
        missed += _summary(size, [row for row in rows if row["size"] == size.name])
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    assert not (arguments.strict and missed), "; ".join(missed)


if __name__ == "__main__":
    main()
