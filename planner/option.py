"""Options: what may be placed. One per service, variant, GPU type, parallelism and batch that can work at all."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from planner.deadlines import Target, targets
from planner.generation import TokenModel, token_model, with_margin
from planner.problem import Problem, service_demands
from planner.tail import utilisation_limit
from plans.demand import ServiceDemand
from plans.plan import Confidence
from plans.service import FrequencyService, GenerationService, Service, Variant
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
        latency_s: 99th percentile of a full batch's latency, with the margin of an estimate that was not measured, and
            with the wait for the frames of a multi-frame batch; of a whole answer for a model profiled by phases.
        hold_s: Mean time that a full batch holds the bottleneck stage; that of its passes for a generating model.
        block_s: Longest time that it keeps others from that stage: ``hold_s``, or one pass of a generating model.
        slack_s: Deadline less ``latency_s``: what is left for waiting; at least 0. The least of what the limits on
            first, further and all tokens leave for a model profiled by phases.
        variability: Sum of the squared coefficients of variation of arrivals and of service.
        utilisation: Utilisation up to which the share of late requests stays within the SLO, in (0, 1].
        at_floor: Whether the tail bound asked for less than the least utilisation that is planned for.
        weight_bytes: Weights over all GPUs of the group.
        load_s: Time that loading takes: the profile's, or `_load_s` where it states none.
        token_ratio: Time per further token over the TPOT, in [0, 1]: the share of the group's time that neighbours must
            leave to it, (4.22). 0 where no tokens follow each other.
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
    block_s: float
    slack_s: float
    variability: float
    utilisation: float
    at_floor: bool
    weight_bytes: int
    load_s: float
    deadline_s: float
    confidence: Confidence
    token_ratio: float = 0.0

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
    demands = service_demands(problem)
    goals = targets(problem, demands)
    running = _running(problem)
    largest = _largest_nodes(problem)
    for service in problem.services.services:
        demand, goal = demands.get(service.name), goals[service.name]
        for variant in service.variants:
            for found in _of_variant(problem, service, variant, demand, goal, running, largest):
                (options if isinstance(found, Option) else rejections).append(found)  # type: ignore[arg-type]
    kept = _undominated(options, keep={(*key, batch) for key, batches in running.items() for batch in batches})
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


def _largest_nodes(problem: Problem) -> dict[str, int]:
    """Return the GPUs of the largest node of each type, by type."""
    largest: dict[str, int] = {}
    for node in problem.cluster.nodes:
        largest[node.gpus.type] = max(largest.get(node.gpus.type, 0), node.gpus.count)
    return dict(sorted(largest.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """One service with one variant at one parallelism, whose batches are judged one by one.

    Attributes:
        model: Whole requests.
        phases: First and further tokens, where the variant generates and was profiled by phases.
    """

    problem: Problem
    service: Service
    variant: Variant
    demand: ServiceDemand | None
    goal: Target
    gpu_type: str
    parallelism: tuple[int, int]
    model: LatencyModel
    phases: TokenModel | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Figures:
    """What one batch takes: the fields of `Option` of the same names.

    Attributes:
        limits: (reason, needed, available) of everything that must hold.
        allowed: Utilisation that the tail bound allows; below 0 for none.
        token_ratio: As in `Option`.
    """

    multi_frame: int
    memory_bytes: tuple[int, ...]
    latency_s: float
    hold_s: float
    block_s: float
    slack_s: float
    variability: float
    confidence: Confidence
    limits: tuple[tuple[Literal["memory", "latency", "accuracy"], float, float], ...]
    allowed: float
    token_ratio: float = 0.0


def _of_variant(
    problem: Problem,
    service: Service,
    variant: Variant,
    demand: ServiceDemand | None,
    goal: Target,
    running: Mapping[tuple[str, str, str, int, int], frozenset[int]],
    largest: Mapping[str, int],
) -> Iterator[Option | Rejection]:
    """Yield what each GPU type, parallelism and batch leads to.

    Batches outside the grid are left out: nobody measured them, and below it the latency model grants no gain.
    """
    tokens = (None, None) if demand is None else (demand.input_tokens, demand.output_tokens)
    for gpu_type, most_gpus in largest.items():
        for pair in _parallelisms(problem, variant.model, gpu_type, most_gpus):
            model = problem.profiles.latency(
                variant.model, gpu_type, *pair, input_tokens=tokens[0], output_tokens=tokens[1]
            )
            if model is None:
                continue
            candidate = _Candidate(
                problem=problem,
                service=service,
                variant=variant,
                demand=demand,
                goal=goal,
                gpu_type=gpu_type,
                parallelism=pair,
                model=model,
                phases=token_model(problem, service, variant.model, demand, gpu_type, pair),
            )
            in_use = running.get((service.name, variant.model, gpu_type, *pair), frozenset())
            yield from (_judge(candidate, batch) for batch in _batches(model.batches, in_use))


def _parallelisms(problem: Problem, model: str, gpu_type: str, most_gpus: int) -> tuple[tuple[int, int], ...]:
    wanted = problem.settings.parallelisms
    offered = problem.profiles.parallelisms(model, gpu_type)
    return tuple(pair for pair in offered if (wanted is None or pair in wanted) and pair[0] * pair[1] <= most_gpus)


def _batches(grid: tuple[int, ...], running: Iterable[int]) -> list[int]:
    """Return the grid, the powers of two inside it, and the batches in use that lie inside it."""
    powers = [2**exponent for exponent in range(grid[-1].bit_length())]
    return sorted({batch for batch in (*powers, *running) if grid[0] <= batch <= grid[-1]} | set(grid))


def _judge(candidate: _Candidate, batch: int) -> Option | Rejection:
    """Return the option of ``batch``, or the first limit that it breaks: accuracy, memory, the latency guards."""
    settings, variant = candidate.problem.settings, candidate.variant
    figures = _of_batch(candidate, batch) if candidate.phases is None else _of_answers(candidate, batch)
    usable = candidate.problem.cluster.gpu_types[candidate.gpu_type].memory_bytes * (1.0 - settings.headroom_ratio)
    tp, pp = candidate.parallelism
    for reason, needed, available in (
        ("accuracy", candidate.service.min_accuracy, variant.accuracy),
        ("memory", max(figures.memory_bytes), usable),
        *figures.limits,
    ):
        if needed > available:
            return Rejection(
                service=candidate.service.name,
                variant=variant.model,
                gpu_type=candidate.gpu_type,
                tp=tp,
                pp=pp,
                batch=batch,
                reason=reason,  # type: ignore[arg-type]
                needed=needed,
                available=available,
            )
    return Option(
        service=candidate.service.name,
        variant=variant.model,
        gpu_type=candidate.gpu_type,
        tp=tp,
        pp=pp,
        batch=batch,
        multi_frame=figures.multi_frame,
        accuracy=variant.accuracy,
        memory_bytes=figures.memory_bytes,
        latency_s=figures.latency_s,
        hold_s=figures.hold_s,
        block_s=figures.block_s,
        slack_s=figures.slack_s,
        variability=figures.variability,
        utilisation=min(max(figures.allowed, settings.min_utilisation), settings.max_utilisation),
        at_floor=figures.allowed < settings.min_utilisation,
        weight_bytes=tp * sum(candidate.model.weight_bytes),
        load_s=_load_s(candidate),
        deadline_s=candidate.goal.deadline_s,
        confidence=figures.confidence,
        token_ratio=figures.token_ratio,
    )


def _load_s(candidate: _Candidate) -> float:
    """Return the load time that the profile states, else that of the largest stage's weights at ``load_bandwidth``.

    Devices of a group load side by side. 0 where neither is known.
    """
    bandwidth = candidate.problem.cluster.gpu_types[candidate.gpu_type].load_bandwidth
    if candidate.model.load_s > 0 or not bandwidth:
        return candidate.model.load_s
    return max(candidate.model.weight_bytes) / bandwidth


def _of_batch(candidate: _Candidate, batch: int) -> _Figures:
    """Return what a batch of whole requests takes: (3.1), (3.2) and (3.6)."""
    service, goal = candidate.service, candidate.goal
    estimate = candidate.model.at(batch)
    frames = _frames_of_one_stream(service, candidate.demand, batch)
    frames_s = (frames - 1) / service.slo.fps if isinstance(service, FrequencyService) else 0.0
    latency_s, hold_s = frames_s + with_margin(estimate), max(estimate.stage_s)
    charged_s = candidate.problem.settings.blocking_factor * hold_s
    variability = variability_of(estimate, candidate.demand)
    slack_s = goal.deadline_s - latency_s
    return _Figures(
        multi_frame=frames,
        memory_bytes=tuple(candidate.model.peak_bytes(batch)),
        latency_s=latency_s,
        hold_s=hold_s,
        block_s=hold_s,
        slack_s=slack_s,
        variability=variability,
        confidence=estimate.confidence,
        limits=(("latency", latency_s + _charged_alone(batch, charged_s), goal.deadline_s),),
        allowed=utilisation_limit(slack_s - charged_s, hold_s / batch, variability, 1.0 - goal.attainment),
    )


def _of_answers(candidate: _Candidate, batch: int) -> _Figures:
    """Return what ``batch`` sequences in flight take: (3.7) to (3.10).

    A first token may wait up to the TTFT, further ones for a neighbour's pass up to the TPOT; the whole answer counts
    where a workflow leaves it less time than both. Without its phases a plan is served by the table of whole batches,
    whose answers start and end together: that mean must hold too.
    """
    service, goal, phases = candidate.service, candidate.goal, candidate.phases
    assert isinstance(service, GenerationService), "only these have phases"
    assert phases is not None, "the caller has looked"
    answers, whole = phases.at(batch, goal.attainment), candidate.model.at(batch)
    charged_s = candidate.problem.settings.blocking_factor * answers.pass_s
    alone_s = _charged_alone(batch, charged_s)
    variability = variability_of(phases.prefill.at(1), candidate.demand)
    patience_s = min(service.slo.ttft_s - answers.first_s, goal.deadline_s - answers.answer_s)
    next_s = answers.next_s if answers.steps else 0.0
    return _Figures(
        multi_frame=1,
        memory_bytes=phases.memory_bytes(batch, candidate.model.peak_bytes(batch)),
        latency_s=answers.answer_s,
        hold_s=answers.hold_s,
        block_s=answers.pass_s,
        slack_s=min(patience_s, service.slo.tpot_s - next_s),
        variability=variability,
        confidence=answers.confidence,
        limits=(
            ("latency", answers.first_s + alone_s, service.slo.ttft_s),
            ("latency", next_s, service.slo.tpot_s),
            ("latency", answers.answer_s + alone_s, goal.deadline_s),
            ("latency", whole.mean_s, goal.deadline_s),
        ),
        allowed=answers.utilisation(patience_s - charged_s, variability, 1.0 - goal.attainment),
        token_ratio=next_s / service.slo.tpot_s if candidate.problem.settings.blocking_factor > 0 else 0.0,
    )


def _charged_alone(batch: int, charged_s: float) -> float:
    """Return what a request is charged on an idle group: larger batches must leave time for the one before them."""
    return charged_s if batch > 1 else 0.0


def _frames_of_one_stream(service: Service, demand: ServiceDemand | None, batch: int) -> int:
    """Return how many frames of one stream a full batch holds: more than one where it is larger than the streams.

    Frames of a stream are 1 / fps apart, so the first of n waits (n - 1) / fps for the last: (3.6).
    """
    if not isinstance(service, FrequencyService) or demand is None or not demand.streams:
        return 1
    return math.ceil(batch / demand.streams)


def _running(problem: Problem) -> dict[tuple[str, str, str, int, int], frozenset[int]]:
    """Return the batches that the current plan runs, by all that an option's key holds before its batch.

    Those options stay, so that the current plan can be compared.
    """
    kinds = {node.name: node.gpus.type for node in problem.cluster.nodes}
    found: dict[tuple[str, str, str, int, int], set[int]] = {}
    for group in problem.current.groups if problem.current else ():
        if group.node in kinds:
            for entry in group.loadout:
                key = (entry.service, entry.variant, kinds[group.node], group.tp, group.pp)
                found.setdefault(key, set()).add(entry.max_batch)
    return {key: frozenset(batches) for key, batches in found.items()}


def _undominated(options: list[Option], *, keep: Collection[tuple[str, str, str, int, int, int]]) -> list[Option]:
    """Return the options that no other of the same service, GPU type and parallelism beats or equals in everything."""
    classes: dict[tuple[str, str, int, int], list[Option]] = {}
    for option in options:
        classes.setdefault((option.service, option.gpu_type, option.tp, option.pp), []).append(option)
    kept: list[Option] = []
    for members in classes.values():
        beaten = _beaten(members)
        kept.extend(option for option, lost in zip(members, beaten, strict=True) if not lost or option.key in keep)
    return kept


def _beaten(options: list[Option]) -> NDArray[np.bool_]:
    """Return which of ``options`` another one beats or equals in everything; of equals the first stays."""
    better_if_high = np.array([(each.sustained_rps, each.accuracy, each.slack_s) for each in options])
    better_if_low = np.array(
        [(each.hold_s, each.block_s, each.token_ratio, each.weight_bytes, *each.memory_bytes) for each in options]
    )
    dominates = (better_if_high[:, None] >= better_if_high[None]).all(axis=2)
    dominates &= (better_if_low[:, None] <= better_if_low[None]).all(axis=2)
    earlier = np.tri(len(options), k=-1, dtype=bool).T
    return np.asarray((dominates & (earlier | ~dominates.T)).any(axis=0), dtype=np.bool_)
