"""Planning problems for tests: generated ones, and a town that uses almost every feature."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from planner import Solved, solve
from planner.problem import Problem
from planner.settings import Settings
from plans.cluster import Cluster, GpuType, Node, NodeGpus
from plans.demand import Demand, Rate, ServiceDemand
from plans.service import (
    Edge,
    FrequencyService,
    FrequencySlo,
    GenerationService,
    GenerationSlo,
    LatencyService,
    LatencySlo,
    Service,
    Services,
    Spread,
    Variant,
    Workflow,
)
from profiles.document import LatencyStatistics, Profile, ProfileMeta, Row
from profiles.library import ProfileLibrary

MIB = 2**20
GIB = 2**30

QUIET = Settings(gap=0.0, tolerance=1e-7, time_limit_s=20.0)
"""Exact, with time to spare."""


def cluster(*nodes: tuple[str, str, int], memory_gib: float = 16, cost: float = 1.0) -> Cluster:
    """Return a cluster of (node, GPU type, count); the k-th type has k times the memory and cost of the first."""
    types = list(dict.fromkeys(gpu_type for _, gpu_type, _ in nodes))
    return Cluster(
        gpu_types={
            name: GpuType(memory_bytes=int(memory_gib * GIB * (index + 1)), cost_per_hour=cost * (index + 1))
            for index, name in enumerate(types)
        },
        nodes=tuple(Node(name=name, gpus=NodeGpus(type=kind, count=count)) for name, kind, count in nodes),
    )


def profile(
    model: str,
    gpu_type: str = "gpu",
    *,
    base_s: float = 0.01,
    growth: float = 0.5,
    weights_gib: float = 2.0,
    batches: tuple[int, ...] = (1, 2, 4, 8),
    parallelisms: tuple[tuple[int, int], ...] = ((1, 1),),
    source: str = "measured",
) -> Profile:
    """Return a profile whose batch of b takes ``base_s * (1 + growth * (b - 1))``, spread over tp * pp GPUs."""
    rows = []
    for tp, pp in parallelisms:
        for batch in batches:
            latency = base_s * (1 + growth * (batch - 1)) / tp
            weight = int(weights_gib * GIB / (tp * pp))
            rows.append(
                Row(
                    tp=tp,
                    pp=pp,
                    batch=batch,
                    latency_s=LatencyStatistics(mean=latency, p50=latency, p95=latency, p99=latency),
                    stage_latency_s=(latency / pp,) * pp,
                    weight_bytes=(weight,) * pp,
                    peak_bytes=(weight + batch * 16 * MIB,) * pp,
                    load_s=1.0,
                    samples=100,
                )
            )
    return Profile(model=model, gpu_type=gpu_type, source=source, meta=ProfileMeta(), rows=tuple(rows))  # type: ignore[arg-type]


def latency_service(name: str, *models: tuple[str, float], deadline_s: float = 0.2, **fields: object) -> LatencyService:
    """Return a service with (model, accuracy) variants."""
    return LatencyService(
        name=name,
        slo=LatencySlo(deadline_s=deadline_s),
        variants=tuple(Variant(model=model, accuracy=accuracy) for model, accuracy in models),
        **fields,  # type: ignore[arg-type]
    )


def demand(**rates: float) -> Demand:
    """Return one window of Poisson demand."""
    return Demand(
        window_s=60.0,
        services=tuple(ServiceDemand(service=name, rate_rps=(Rate(mean=rate),)) for name, rate in rates.items()),
    )


def problem(
    inventory: Cluster,
    services: list[Service],
    profiles: list[Profile],
    wanted: Demand,
    *,
    settings: Settings = QUIET,
    current: object = None,
) -> Problem:
    """Return the problem of these documents."""
    return Problem(
        cluster=inventory,
        services=Services(services=tuple(services)),
        profiles=ProfileLibrary(profiles),
        demand=wanted,
        settings=settings,
        current=current,  # type: ignore[arg-type]
    )


def generated(
    seed: int,
    *,
    services: int = 3,
    nodes: int = 2,
    gpus: int = 1,
    types: int = 1,
    load: float = 1.0,
    batches: tuple[int, ...] = (1, 4),
    parallelisms: tuple[tuple[int, int], ...] = ((1, 1),),
    settings: Settings = QUIET,
) -> Problem:
    """Return a seeded random problem with tight memory, mixed deadlines, weights, budgets and minimum replicas."""
    rng = np.random.default_rng(seed)
    names = [f"type{index}" for index in range(types)]
    inventory = cluster(*((f"node{index}", names[index % types], gpus) for index in range(nodes)), memory_gib=8)
    profiles, offered, rates = [], [], {}
    for index in range(services):
        base_s = float(rng.uniform(0.005, 0.04))
        variants = []
        for rank, cost in enumerate((1.0, 0.5)):
            model = f"model{index}{'ab'[rank]}"
            variants.append((model, round(0.9 - 0.1 * rank - float(rng.uniform(0, 0.05)), 3)))
            weights_gib = float(rng.uniform(1.0, 6.0)) * cost
            growth = float(rng.uniform(0.2, 0.8))
            profiles.extend(
                profile(
                    model,
                    name,
                    base_s=base_s * cost * (1.0, 0.6)[number % 2],
                    growth=growth,
                    weights_gib=weights_gib,
                    batches=batches,
                    parallelisms=parallelisms,
                )
                for number, name in enumerate(names)
            )
        offered.append(
            latency_service(
                f"s{index}",
                *variants,
                deadline_s=base_s * float(rng.uniform(2.0, 10.0)),
                weight=float(rng.choice([1.0, 2.0, 3.0])),
                min_replicas=int(rng.random() < 0.2),
                max_gpus=int(rng.integers(1, nodes * gpus + 1)) if rng.random() < 0.3 else None,
            )
        )
        rates[f"s{index}"] = float(rng.uniform(0.2, 2.0)) * load * nodes * gpus / services / base_s
    return problem(inventory, list(offered), profiles, demand(**rates), settings=settings)


FEATURES = (
    "spread-node",
    "spread-zone",
    "domains",
    "workflow",
    "affinity",
    "attainment",
    "loss",
    "max-min",
    "fair-sum",
    "utility",
    "utility-kinked",
    "utility-power",
    "gpus",
    "cost",
    "scenarios",
)
"""What `featured` can add to a problem."""


def featured(wanted: Problem, feature: str) -> Problem:
    """Return ``wanted``, which has at least two services and two nodes, with one more feature."""
    settings, services, inventory = wanted.settings, list(wanted.services.services), wanted.cluster
    workflows: tuple[Workflow, ...] = ()
    rates = wanted.demand
    spread = {
        "spread-node": Spread(over="node"),
        "spread-zone": Spread(over="zone"),
        "domains": Spread(over="node", max_skew=2, min_domains=2),
    }
    if feature in spread:
        services[0] = services[0].model_copy(update={"spread": spread[feature]})
        nodes = tuple(
            node.model_copy(update={"zone": f"zone{index % 2}"}) for index, node in enumerate(inventory.nodes)
        )
        inventory = inventory.model_copy(update={"nodes": nodes})
    elif feature in ("workflow", "affinity"):
        first, second = services[0].name, services[1].name
        edge = Edge(source=first, target=second, fanout=1.5, payload_bytes=1000)
        affinity = "require" if feature == "affinity" else "prefer"
        slo = LatencySlo(deadline_s=sum(service.deadline_s() for service in services[:2]))
        workflows = (Workflow(name="w", slo=slo, edges=(edge,), affinity=affinity),)
        rates = rates.model_copy(update={"services": tuple(s for s in rates.services if s.service != second)})
    elif feature in ("attainment", "gpus", "cost"):
        minimize = None if feature == "attainment" else feature
        settings = replace(settings, attainment=0.5, minimize=minimize)  # type: ignore[arg-type]
    elif feature == "loss":
        settings = replace(settings, keep_after_loss=0.5)
    elif feature == "scenarios":
        settings = replace(settings, scenarios=3)
        wide = tuple(
            demand.model_copy(update={"rate_rps": tuple(_uncertain(rate.mean) for rate in demand.rate_rps)})
            for demand in rates.services
        )
        rates = rates.model_copy(update={"services": wide})
    elif feature == "utility-kinked":
        settings = replace(settings, objective="utility", utility="linear", drop_penalty="linear")
    elif feature == "utility-power":
        settings = replace(settings, objective="utility", utility="power", drop_penalty="step")
    else:
        settings = replace(settings, objective=feature, utility="step")  # type: ignore[arg-type]
    return replace(
        wanted,
        cluster=inventory,
        services=Services(services=tuple(services), workflows=workflows),
        settings=settings,
        demand=rates,
    )


KINDS = ("plain", "parallel", "types", "frequency", "generation", "limits", "bursts", "running")
"""What `generated_of` can make of a problem."""


def generated_of(kind: str, seed: int) -> Problem:
    """Return a seeded random problem of three or four services on two or three nodes, of one of `KINDS`.

    ``running`` has a plan that runs already, made for half of the load.
    """
    shape = {"services": 3 + seed % 2, "nodes": 2 + seed // 2 % 2, "load": (1.0, 1.8, 4.0)[seed % 3]}
    if kind == "parallel":
        shape |= {"nodes": 2, "gpus": 2, "parallelisms": ((1, 1), (2, 1), (1, 2))}
    wanted = generated(500 + seed, batches=(2, 8), types=2 if kind == "types" else 1, **shape)  # type: ignore[arg-type]
    last = wanted.services.services[-1]
    if kind == "frequency":
        (asked,) = (each for each in wanted.demand.services if each.service == last.name)
        fps = 2.0 / last.deadline_s()
        streams = max(1, round(asked.rate_rps[0].mean / fps))
        slo = FrequencySlo(fps=fps, jitter_s=last.deadline_s() / 2)
        video = FrequencyService(name=last.name, slo=slo, variants=last.variants, weight=last.weight)
        rate = (Rate(mean=streams * fps),)
        return _replaced(wanted, video, asked.model_copy(update={"streams": streams, "rate_rps": rate}))
    if kind == "generation":
        kinds = {node.gpus.type for node in wanted.cluster.nodes}
        library = [
            *wanted.profiles,
            *(phased("talk", gpu_type, weights_gib=2.0, batches=(1, 4, 16)) for gpu_type in sorted(kinds)),
        ]
        talk = GenerationService(
            name=last.name,
            slo=GenerationSlo(ttft_s=0.3, tpot_s=0.04),
            variants=(Variant(model="talk"),),
            weight=10.0 * last.weight,
        )
        asked = ServiceDemand(
            service=last.name, input_tokens=128, output_tokens=50, rate_rps=(Rate(mean=1.0 + 4.0 * (seed % 5)),)
        )
        return _replaced(replace(wanted, profiles=ProfileLibrary(library)), talk, asked)
    if kind == "limits":
        first, second = wanted.services.services[:2]
        node = wanted.cluster.nodes[seed % 2].name
        pinned = first.model_copy(update={"pin": (node,), "max_gpus": None})
        barred = second.model_copy(update={"forbid": (node,), "min_replicas": 1, "max_gpus": 2})
        strict = last.model_copy(update={"min_accuracy": 0.81})
        return _replaced(_replaced(_replaced(wanted, pinned), barred), strict)
    if kind == "bursts":
        demands = tuple(each.model_copy(update={"burstiness_cv": 2.5}) for each in wanted.demand.services)
        return replace(wanted, demand=wanted.demand.model_copy(update={"services": demands}))
    if kind == "running":
        demands = tuple(
            each.model_copy(update={"rate_rps": tuple(Rate(mean=rate.mean / 2) for rate in each.rate_rps)})
            for each in wanted.demand.services
        )
        before = solve(replace(wanted, demand=wanted.demand.model_copy(update={"services": demands})))
        return replace(wanted, current=before.plan if isinstance(before, Solved) else None)
    return wanted


def _replaced(wanted: Problem, service: Service, demand: ServiceDemand | None = None) -> Problem:
    """Return ``wanted`` with another service, and another demand for it, of the same name."""
    services = tuple(service if each.name == service.name else each for each in wanted.services.services)
    demands = tuple(
        demand if demand is not None and each.service == service.name else each for each in wanted.demand.services
    )
    return replace(
        wanted,
        services=wanted.services.model_copy(update={"services": services}),
        demand=wanted.demand.model_copy(update={"services": demands}),
    )


def phased(
    model: str,
    gpu_type: str = "gpu",
    *,
    pp: int = 1,
    weights_gib: float = 1.0,
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32),
    kv_bytes: int | None = None,
) -> Profile:
    """Return a generating model: a prefill of 20 ms per 128 tokens, steps of 12 ms that grow with batch and context."""
    weights = int(weights_gib * GIB) // pp
    rows = []
    for batch, tokens in itertools.product(batches, (64, 128, 256, 512)):
        for phase, mean in (
            ("prefill", 0.02 * batch * tokens / 128),
            ("decode", 0.012 + 3e-4 * batch + 2e-7 * batch * tokens),
        ):
            rows.append(
                Row(
                    pp=pp,
                    batch=batch,
                    phase=phase,  # type: ignore[arg-type]
                    input_tokens=tokens,
                    latency_s=LatencyStatistics(mean=mean, p99=mean),
                    stage_latency_s=(mean / pp,) * pp,
                    weight_bytes=(weights,) * pp,
                    peak_bytes=(weights + batch * 16 * MIB // pp,) * pp,
                    samples=100,
                )
            )
    return Profile(
        model=model,
        gpu_type=gpu_type,
        source="measured",
        meta=ProfileMeta(),
        rows=tuple(rows),
        kv_bytes_per_token=kv_bytes,
    )


def _uncertain(rate_rps: float) -> Rate:
    return Rate(mean=rate_rps, quantiles={"0.1": 0.3 * rate_rps, "0.5": rate_rps, "0.9": 2.0 * rate_rps})


def town(*, settings: Settings = QUIET) -> Problem:
    """Return a problem with almost every feature.

    Two GPU types, nodes with several GPUs, tensor and pipeline parallelism, all three request classes, variants with a
    minimum accuracy, a budget, a pin, a forbid, minimum replicas, weights, bursts and quantiles.
    """
    small = {"batches": (1, 2, 4, 8)}
    wide = {"batches": (1, 4, 8), "parallelisms": ((1, 1), (2, 1), (1, 2))}
    profiles = [
        profile(model, gpu_type, base_s=base_s * speed, weights_gib=weights, **shape)  # type: ignore[arg-type]
        for model, base_s, weights, shape in (
            ("eye-large", 0.020, 5.0, small),
            ("eye-small", 0.008, 1.5, small),
            ("road", 0.012, 2.0, small),
            ("talk", 0.300, 14.0, wide),
            ("words", 0.004, 0.5, small),
        )
        for gpu_type, speed in (("slow", 1.0), ("quick", 0.5))
    ]
    services: list[Service] = [
        latency_service(
            "detect",
            ("eye-large", 0.61),
            ("eye-small", 0.55),
            deadline_s=0.15,
            weight=2.0,
            min_accuracy=0.5,
            min_replicas=2,
            max_gpus=3,
        ),
        FrequencyService(
            name="street", slo=FrequencySlo(fps=10, jitter_s=0.02), variants=(Variant(model="road"),), pin=("east",)
        ),
        GenerationService(
            name="chat",
            slo=GenerationSlo(ttft_s=0.5, tpot_s=0.02),
            variants=(Variant(model="talk"),),
            forbid=("west/0",),
        ),
        latency_service("read", ("words", 0.9), deadline_s=0.05),
    ]
    wanted = Demand(
        window_s=60.0,
        services=(
            ServiceDemand(
                service="detect", burstiness_cv=2.0, rate_rps=(Rate(mean=80.0, quantiles={"0.5": 75.0, "0.9": 120.0}),)
            ),
            ServiceDemand(service="street", streams=6, rate_rps=(Rate(mean=60.0),)),
            ServiceDemand(service="chat", rate_rps=(Rate(mean=3.0),), output_tokens=100),
            ServiceDemand(service="read", rate_rps=(Rate(mean=40.0),)),
        ),
    )
    inventory = cluster(("west", "slow", 2), ("east", "quick", 4), memory_gib=12, cost=1.5)
    return problem(inventory, services, profiles, wanted, settings=settings)


def crowd(*services: Service, **rates: float) -> Problem:
    """Return what ``services`` ask of two nodes of one GPU, with models of several sizes; ``rates`` by service."""
    return problem(
        cluster(("a", "gpu", 1), ("b", "gpu", 1)),
        list(services),
        [profile("m"), profile("heavy", weights_gib=15.0), profile("huge", weights_gib=40.0), profile("tiny")],
        demand(**rates),
    )
