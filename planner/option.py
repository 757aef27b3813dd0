"""Options: what may be placed. One per service, variant, GPU type, parallelism and batch that can work at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from planner.problem import Problem
from planner.tail import utilisation_limit
from plans.demand import ServiceDemand
from plans.plan import Confidence
from plans.service import Service, Variant
from profiles.latency import Estimate, LatencyModel

__all__ = ["Catalogue", "Option", "Rejection", "build_catalogue", "variability_of"]

_Z99 = 2.3263478740408408
"""The 99th percentile of the standard normal distribution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to run one service on one group.

    Attributes:
        service: Name of the service.
        variant: The model.
        gpu_type: The GPU type that it was profiled on.
        tp: Tensor-parallel GPUs per stage.
        pp: Pipeline stages.
        batch: Largest batch.
        multi_frame: Frames of one stream batched together.
        accuracy: Accuracy of the variant, in [0, 1].
        memory_bytes: Peak bytes per GPU of each stage, weights included, shape (pp,).
        latency_s: 99th percentile of a full batch's latency, with the margin of an estimate that was not measured.
        hold_s: Mean time that a full batch holds the bottleneck stage.
        slack_s: Deadline less ``latency_s``: what is left for waiting; at least 0.
        variability: Sum of the squared coefficients of variation of arrivals and of service.
        utilisation: Utilisation up to which the share of late requests stays within the SLO, in (0, 1].
        at_floor: Whether the tail bound asked for less than the least utilisation that is planned for.
        weight_bytes: Weights over all GPUs of the group.
        load_s: Time that loading takes.
        deadline_s: Time from arrival within which a request is good.
        confidence: What the numbers rest on.
    """

    service: str
    variant: str
    gpu_type: str
    tp: int
    pp: int
    batch: int
    multi_frame: int = 1
    accuracy: float
    memory_bytes: tuple[int, ...]
    latency_s: float
    hold_s: float
    slack_s: float
    variability: float
    utilisation: float
    at_floor: bool
    weight_bytes: int
    load_s: float
    deadline_s: float
    confidence: Confidence

    @property
    def gpus(self) -> int:
        """Number of GPUs of the group."""
        return self.tp * self.pp

    @property
    def request_s(self) -> float:
        """Group time per request, seconds: u in docs/formulation.md."""
        return self.hold_s / self.batch

    @property
    def sustained_rps(self) -> float:
        """Rate that a group can serve with this option alone within the SLO: rho / u."""
        return self.utilisation / self.request_s

    @property
    def key(self) -> tuple[str, str, str, int, int, int]:
        """What tells options apart."""
        return (self.service, self.variant, self.gpu_type, self.tp, self.pp, self.batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """An option that cannot work anywhere: what was needed against what there is, in bytes, seconds or accuracy."""

    service: str
    variant: str
    gpu_type: str
    tp: int
    pp: int
    batch: int
    reason: Literal["memory", "latency", "accuracy"]
    needed: float
    available: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """Every option worth placing, sorted by key; what was rejected; how many were dominated."""

    options: tuple[Option, ...]
    rejections: tuple[Rejection, ...]
    pruned: int

    def of(self, service: str) -> Iterator[Option]:
        """Yield the options of ``service``."""
        return (option for option in self.options if option.service == service)


def build_catalogue(problem: Problem) -> Catalogue:
    """Return the options of ``problem``: those that fit, meet the deadline, and are not dominated."""
    options: list[Option] = []
    rejections: list[Rejection] = []
    for service in problem.services.services:
        demand = problem.demand.of(service.name)
        for variant in service.variants:
            for found in _of_variant(problem, service, variant, demand):
                (options if isinstance(found, Option) else rejections).append(found)  # type: ignore[arg-type]
    kept = _undominated(options, keep=_running(problem))
    return Catalogue(
        options=tuple(sorted(kept, key=lambda option: option.key)),
        rejections=tuple(rejections),
        pruned=len(options) - len(kept),
    )


def variability_of(estimate: Estimate, demand: ServiceDemand | None) -> float:
    """Return ca^2 + cs^2: burstiness of arrivals, and spread of batch times between mean and 99th percentile."""
    arrivals = 1.0 if demand is None else demand.burstiness_cv
    spread = max(0.0, estimate.p99_s - estimate.mean_s) / (_Z99 * estimate.mean_s)
    return arrivals**2 + spread**2


def _of_variant(
    problem: Problem, service: Service, variant: Variant, demand: ServiceDemand | None
) -> Iterator[Option | Rejection]:
    tokens = (None, None) if demand is None else (demand.input_tokens, demand.output_tokens)
    for gpu_type in sorted({node.gpus.type for node in problem.cluster.nodes}):
        for tp, pp in _parallelisms(problem, variant.model, gpu_type):
            model = problem.profiles.latency(
                variant.model, gpu_type, tp, pp, input_tokens=tokens[0], output_tokens=tokens[1]
            )
            if model is not None:
                yield from _of_model(problem, service, variant, demand, gpu_type, (tp, pp), model)


def _parallelisms(problem: Problem, model: str, gpu_type: str) -> tuple[tuple[int, int], ...]:
    wanted = problem.settings.parallelisms
    offered = problem.profiles.parallelisms(model, gpu_type)
    largest = max(node.gpus.count for node in problem.cluster.nodes if node.gpus.type == gpu_type)
    return tuple(pair for pair in offered if (wanted is None or pair in wanted) and pair[0] * pair[1] <= largest)


def _of_model(
    problem: Problem,
    service: Service,
    variant: Variant,
    demand: ServiceDemand | None,
    gpu_type: str,
    parallelism: tuple[int, int],
    model: LatencyModel,
) -> Iterator[Option | Rejection]:
    """Yield what each batch leads to.

    Batches outside the grid are left out: nobody measured them, and below it the latency model grants no gain.
    """
    running = _running_batches(problem, service.name, variant.model, gpu_type, parallelism)
    for batch in _batches(model.batches, running):
        yield _judge(problem, service, variant, demand, gpu_type, parallelism, model, batch)


def _batches(grid: tuple[int, ...], running: Iterable[int]) -> list[int]:
    """Return the grid, the powers of two inside it, and the batches in use that lie inside it."""
    powers = [2**exponent for exponent in range(grid[-1].bit_length())]
    return sorted({batch for batch in (*powers, *running) if grid[0] <= batch <= grid[-1]} | set(grid))


def _judge(
    problem: Problem,
    service: Service,
    variant: Variant,
    demand: ServiceDemand | None,
    gpu_type: str,
    parallelism: tuple[int, int],
    model: LatencyModel,
    batch: int,
) -> Option | Rejection:
    settings = problem.settings
    deadline_s = service.deadline_s(None if demand is None else demand.output_tokens)
    estimate = model.at(batch)
    memory = model.peak_bytes(batch)
    latency_s = estimate.p99_s * (1.0 if estimate.confidence == "measured" else 1.0 + estimate.error_ratio)
    hold_s = max(estimate.stage_s)
    # A lone request of the smallest batch waits for nothing; larger batches must leave time for the one before them.
    waiting_s = settings.blocking_factor * hold_s if batch > 1 else 0.0
    available = problem.cluster.gpu_types[gpu_type].memory_bytes * (1.0 - settings.headroom_ratio)
    checks = (
        ("accuracy", service.min_accuracy, variant.accuracy),
        ("memory", max(memory), available),
        ("latency", latency_s + waiting_s, deadline_s),
    )
    tp, pp = parallelism
    for reason, needed, limit in checks:
        if needed > limit:
            return Rejection(
                service=service.name,
                variant=variant.model,
                gpu_type=gpu_type,
                tp=tp,
                pp=pp,
                batch=batch,
                reason=reason,  # type: ignore[arg-type]
                needed=needed,
                available=limit,
            )
    variability = variability_of(estimate, demand)
    slack_s = deadline_s - latency_s
    allowed = utilisation_limit(
        slack_s - settings.blocking_factor * hold_s, hold_s / batch, variability, 1.0 - service.slo.attainment
    )
    return Option(
        service=service.name,
        variant=variant.model,
        gpu_type=gpu_type,
        tp=tp,
        pp=pp,
        batch=batch,
        accuracy=variant.accuracy,
        memory_bytes=tuple(memory),
        latency_s=latency_s,
        hold_s=hold_s,
        slack_s=slack_s,
        variability=variability,
        utilisation=min(max(allowed, settings.min_utilisation), settings.max_utilisation),
        at_floor=allowed < settings.min_utilisation,
        weight_bytes=tp * sum(model.weight_bytes),
        load_s=model.load_s,
        deadline_s=deadline_s,
        confidence=estimate.confidence,
    )


def _running(problem: Problem) -> frozenset[tuple[str, str, str, int, int, int]]:
    """Return the keys of what the current plan runs: those options stay, so that it can be compared."""
    return frozenset(
        (entry.service, entry.variant, node.gpus.type, group.tp, group.pp, entry.max_batch)
        for group in (problem.current.groups if problem.current else ())
        for node in problem.cluster.nodes
        if node.name == group.node
        for entry in group.loadout
    )


def _running_batches(
    problem: Problem, service: str, variant: str, gpu_type: str, parallelism: tuple[int, int]
) -> list[int]:
    return sorted(key[5] for key in _running(problem) if key[:5] == (service, variant, gpu_type, *parallelism))


def _undominated(options: list[Option], *, keep: frozenset[tuple[str, str, str, int, int, int]]) -> list[Option]:
    """Return the options that no other of the same service, GPU type and parallelism beats or equals in everything."""
    classes: dict[tuple[str, str, int, int], list[Option]] = {}
    for option in options:
        classes.setdefault((option.service, option.gpu_type, option.tp, option.pp), []).append(option)
    kept: list[Option] = []
    for members in classes.values():
        for position, option in enumerate(members):
            beaten = any(
                _dominates(other, option) and (earlier or not _dominates(option, other))
                for index, other in enumerate(members)
                if index != position
                for earlier in [index < position]
            )
            if option.key in keep or not beaten:
                kept.append(option)
    return kept


def _dominates(better: Option, worse: Option) -> bool:
    return (
        better.sustained_rps >= worse.sustained_rps
        and better.accuracy >= worse.accuracy
        and better.hold_s <= worse.hold_s
        and better.slack_s >= worse.slack_s
        and better.weight_bytes <= worse.weight_bytes
        and all(mine <= other for mine, other in zip(better.memory_bytes, worse.memory_bytes, strict=True))
    )
