"""The things that the naive simulator moves about: what it is told, requests, replicas, groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from plans import Cluster, LoadoutEntry, Plan, Services
from plans import Group as PlannedGroup

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


# What the simulator is told ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a trace; `name` is a service's or a workflow's."""

    arrival_s: float
    name: str
    stream: str | None = None
    input_tokens: int = 128
    output_tokens: int = 128


@dataclass(frozen=True, kw_only=True)
class TokenCosts:
    """What tokens cost on a replica; `decode_s[b - 1]` for b sequences; no limit: None."""

    prefill: Sequence[tuple[float, float]]
    decode_s: Sequence[float]
    decode_token_s: float
    kv_limit_tokens: int | None = None

    def prefill_s(self, tokens: int) -> float:
        points = self.prefill
        if len(points) == 1:
            x, y = points[0]
            return y * tokens / x
        if tokens <= points[0][0]:
            return points[0][1]
        before = max(i for i in range(len(points) - 1) if points[i][0] < tokens)
        (x, y), (next_x, next_y) = points[before], points[before + 1]
        return y + (tokens - x) * (next_y - y) / (next_x - x)

    def decode_of(self, sequences: int, context: int) -> float:
        return self.decode_s[sequences - 1] + self.decode_token_s * context

    def holds(self, tokens: int) -> bool:
        return self.kv_limit_tokens is None or tokens <= self.kv_limit_tokens


@dataclass(frozen=True, kw_only=True)
class NewPlan:
    time_s: float
    plan: Plan


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A node (gpu None) or one of its GPUs stops."""

    time_s: float
    node: str
    gpu: int | None = None


@dataclass(frozen=True, kw_only=True)
class Recovery:
    time_s: float
    node: str
    gpu: int | None = None


@dataclass(frozen=True, kw_only=True)
class View:
    """What a controller sees: its time, arrivals by service since its last turn, and what is queued by group."""

    now_s: float
    arrivals: Mapping[str, int]
    queued: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """All that a run depends on. Factors are found by (service, variant), token costs by what is planned."""

    plan: Plan
    services: Services
    rows: Sequence[Row]
    cluster: Cluster | None = None
    routing: str = "weighted"
    order: str = "edf"
    early_drop: bool = True
    batch_delay_s: float = 0.0
    concurrency: int = 1
    interference: Mapping[tuple[str, str], Mapping[int, float]] = field(default_factory=dict)
    latency: str = "mean"
    ratios: Mapping[tuple[str, str], Sequence[tuple[float, float, float]]] = field(default_factory=dict)
    overhead_s: float = 0.0
    response_s: float = 0.0
    iteration_overhead_s: float = 0.0
    admission: str = "dispatch"
    admission_margin_s: float = 0.0
    credit_increase: float = 0.1
    credit_decrease: float = 0.7
    credit_target: int = 4
    max_prefill_tokens: int = 8192
    costs: Callable[[PlannedGroup, LoadoutEntry], TokenCosts | None] = lambda group, entry: None
    seed: int = 0
    changes: Sequence[NewPlan | Failure | Recovery] = ()
    detection_s: float = 1.0
    retries: int = 1
    controller: Callable[[View], tuple[Plan, float] | None] | None = None
    interval_s: float = 1.0
    until_s: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one row."""

    outcome: str
    reason: str | None = None
    finish_s: float | None = None
    group: str | None = None
    variant: str | None = None
    batch: int | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None


# Section 3: random draws ---------------------------------------------------------------------------------------------


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def uniform(seed: int, purpose: int, index: int) -> float:
    h = mix((seed + GOLDEN) & MASK)
    h = mix((h + GOLDEN * (purpose + 1)) & MASK)
    h = mix((h + GOLDEN * (index + 1)) & MASK)
    return (h >> 11) * 2.0**-53


def quantile(ratios: tuple[float, float, float], u: float) -> float:
    """Section 6: the quantile function through the percentiles at u."""
    r50, r95, r99 = ratios
    points = [(0.0, max(r50 / 2, 2 * r50 - r95)), (0.5, r50), (0.95, r95), (0.99, r99), (1.0, r99)]
    for (x, y), (next_x, next_y) in pairwise(points):
        if u <= next_x:
            return y + (next_y - y) * (u - x) / (next_x - x)
    raise AssertionError(u)


# Requests, replicas, groups ------------------------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True)
class Request:
    """A request of the trace, or a call of a workflow's instance."""

    position: int
    service: str
    arrival_s: float
    deadline_s: float
    due_s: float
    stream: str | None = None
    prompt: int = 128
    output: int = 128
    first_due_s: float = 0.0
    instance: object = None
    stage: int = 0
    call: int = 0
    replica: Replica | None = None
    retried: int = 0
    produced: int = 0
    first_s: float = 0.0
    ended: bool = False
    result: Result | None = None

    @property
    def context(self) -> int:
        return self.prompt + self.produced


@dataclass(eq=False, kw_only=True)
class Bundle:
    """What stands in a queue: one request, or frames of one stream. `sequence` is set when it enters the queue."""

    due_s: float
    entered_s: float
    frames: list[Request]
    sequence: int = 0


@dataclass(eq=False, kw_only=True)
class Batch:
    """A batch or an iteration that runs; `lost` when its group failed."""

    replica: Replica
    requests: list[Request]
    end_s: float
    iteration: bool = False
    lost: bool = False


@dataclass(eq=False)
class Replica:
    """One service on one group."""

    group: Group
    entry: LoadoutEntry
    costs: TokenCosts | None
    weight: float = 0.0
    loaded: bool = False
    balance: float = 0.0
    credit: float = 1.0
    outstanding: int = 0
    queue: list[Bundle] = field(default_factory=list)
    gathered: dict[str, Bundle] = field(default_factory=dict)
    sequences: list[Request] = field(default_factory=list)
    bundle_of: dict[Request, Bundle] = field(default_factory=dict)
    iteration_end_s: float = 0.0

    @property
    def routable(self) -> bool:
        return self.weight > 0 and not self.group.known_failed

    @property
    def waiting(self) -> int:
        return sum(len(bundle.frames) for bundle in self.queue)

    @property
    def share_s(self) -> float:
        return max(self.entry.stage_latency_s[-1]) / self.entry.max_batch

    def latency_s(self, batch: int) -> float:
        total = 0.0
        for stage_s in self.entry.stage_latency_s[batch - 1]:
            total += stage_s
        return total

    @property
    def largest_s(self) -> float:
        return self.latency_s(self.entry.max_batch)


@dataclass(eq=False)
class Group:
    """GPUs that work as one unit."""

    id: str
    node: str
    gpus: tuple[int, ...]
    tp: int
    pp: int
    position: int = 0
    started: int = 0
    replicas: list[Replica] = field(default_factory=list)
    stage_free_s: list[float] = field(default_factory=list)
    reserved_s: list[float] = field(default_factory=list)
    running: list[Batch] = field(default_factory=list)
    lost: list[Batch] = field(default_factory=list)
    work_s: float = 0.0
    failed: bool = False
    known_failed: bool = False
    outages: int = 0
    detection_s: float = 0.0
    held: list[list[tuple[float, float]]] = field(default_factory=list)
    """For each stage from when to when it is held by what."""

    def slots(self, concurrency: int) -> int:
        """How many batches may run at once, for groups of one stage."""
        one_at_a_time = self.pp > 1 or any(replica.costs for replica in self.replicas)
        return 1 if one_at_a_time else concurrency

    def first_stage_free_s(self, concurrency: int, now: float) -> float:
        slots = self.slots(concurrency)
        if slots == 1:
            return self.stage_free_s[0]
        ends = sorted(batch.end_s for batch in self.running + self.lost if batch.end_s > now)
        return ends[0] if len(ends) >= slots else now

    def fail(self, now: float) -> None:
        """What runs is lost, and holds nothing any more."""
        self.failed = True
        self.lost, self.running = self.running, []
        for batch in self.lost:
            batch.lost = True
        for stage, held in enumerate(self.held):
            self.held[stage] = [(start_s, min(end_s, now)) for start_s, end_s in held if start_s < now]

    def busy_s(self, until_s: float) -> float:
        """Section 12: how long the busiest stage is held, by one batch or several."""
        stages_s = []
        for held in self.held:
            total_s = 0.0
            for start_s, end_s in without_overlap(held):
                total_s += max(0.0, min(end_s, until_s) - start_s)
            stages_s.append(total_s)
        return max(stages_s)

    def shares_a_gpu_with(self, other: Group) -> bool:
        return self.node == other.node and bool(set(self.gpus) & set(other.gpus))


def without_overlap(held: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Yield the spans, in the order of their starts, each from where those before it have ended."""
    upto_s = 0.0
    for start_s, end_s in held:
        yield max(start_s, upto_s), end_s
        upto_s = max(upto_s, end_s)
