"""The plan: what every GPU group runs, how requests are routed, what is predicted, and how good it provably is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from pydantic import AliasChoices, Field, field_validator, model_validator

from plans.cluster import Name, group_id
from plans.documents import FORMAT_VERSION, Document, canonical_digest
from plans.service import Workflow

__all__ = [
    "Confidence",
    "Contingency",
    "Group",
    "LatencyPercentiles",
    "LoadoutEntry",
    "Plan",
    "Polish",
    "Prediction",
    "Prior",
    "Route",
    "SolverReport",
    "Tier",
    "TokenRules",
    "TransitionStep",
    "Unserved",
]

Confidence = Literal["measured", "interpolated", "extrapolated", "modelled"]
"""What a prediction rests on, best first."""


class TokenRules(Document):
    """How a service that generates is run, token by token, and when its answers are good (docs/evaluator.md, 9).

    Attributes:
        ttft_s: Seconds from arrival to the first token.
        tpot_s: Seconds per token after the first.
        max_prefill_tokens: Prompt tokens of one prefill, unless its first sequence alone has more.
        prefill_tokens: Shape (point,), rising: prompt tokens for which the time of a prefill is known; none where no
            profile tells it.
        prefill_s: Shape (point,), never falling: seconds of a prefill of so many.
    """

    ttft_s: float = Field(gt=0, allow_inf_nan=False)
    tpot_s: float = Field(gt=0, allow_inf_nan=False)
    max_prefill_tokens: int = Field(default=8192, ge=1)
    prefill_tokens: tuple[float, ...] = ()
    prefill_s: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _a_curve(self) -> TokenRules:
        if len(self.prefill_tokens) != len(self.prefill_s):
            raise ValueError(
                f"one prefill_s for each of {len(self.prefill_tokens)} prefill_tokens: found {len(self.prefill_s)}"
            )
        pairs = zip(self.prefill_tokens, self.prefill_tokens[1:], strict=False)
        if any(not 0 < tokens < float("inf") for tokens in self.prefill_tokens) or any(a >= b for a, b in pairs):
            raise ValueError("prefill_tokens above 0, finite and rising")
        falls = any(a > b for a, b in zip(self.prefill_s, self.prefill_s[1:], strict=False))
        if falls or any(not 0 < seconds < float("inf") for seconds in self.prefill_s):
            raise ValueError("prefill_s above 0, finite and never falling")
        return self


class LoadoutEntry(Document):
    """One service on one group.

    Attributes:
        service: Name of the service.
        variant: The model that serves it.
        max_batch: Largest batch the worker may form.
        multi_frame: Frames of one stream that are batched together.
        rate_rps: Rate that the plan routes here, requests per second.
        memory_bytes: Peak bytes on each GPU of the group, weights included, in the order of the group's GPUs.
        weight_bytes: Bytes of weights that a load moves, over all GPUs of the group.
        load_s: Seconds that loading takes.
        deadline_s: Seconds from arrival within which a request of this service counts as good.
        stage_latency_s: Shape (max_batch, pp): seconds that a batch of b holds each pipeline stage, in row b - 1. A
            row's sum is the batch's latency from start to end.
        tokens: Of a service that generates; without them its requests are batched whole.
    """

    service: Name
    variant: Name
    max_batch: int = Field(ge=1, le=4096)
    multi_frame: int = Field(default=1, ge=1)
    rate_rps: float = Field(ge=0, allow_inf_nan=False)
    memory_bytes: tuple[int, ...] = Field(min_length=1)
    weight_bytes: int = Field(default=0, ge=0)
    load_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    deadline_s: float = Field(gt=0, allow_inf_nan=False)
    stage_latency_s: tuple[tuple[float, ...], ...] = Field(min_length=1)
    # Left out where there are none, so that the digest of a plan without generation is what it was before.
    tokens: TokenRules | None = Field(default=None, exclude_if=lambda tokens: tokens is None)

    @model_validator(mode="after")
    def _shapes(self) -> LoadoutEntry:
        if len(self.stage_latency_s) != self.max_batch:
            raise ValueError(
                f"stage_latency_s with max_batch = {self.max_batch} rows: found {len(self.stage_latency_s)}"
            )
        if len({len(row) for row in self.stage_latency_s}) > 1:
            raise ValueError("the same number of pipeline stages in every row of stage_latency_s")
        if any(not 0 < latency < float("inf") for row in self.stage_latency_s for latency in row):
            raise ValueError("stage latencies above 0 and finite")
        if any(size < 0 for size in self.memory_bytes):
            raise ValueError("memory_bytes of at least 0")
        return self

    def batch_latency_s(self, batch: int) -> float:
        """Return the seconds that a batch of ``batch`` takes from start to end."""
        return sum(self.stage_latency_s[batch - 1])


class Group(Document):
    """GPUs of one node that work as one serving unit, and what they run."""

    id: str
    node: Name
    gpus: tuple[int, ...] = Field(min_length=1)
    tp: int = Field(default=1, ge=1)
    pp: int = Field(default=1, ge=1)
    loadout: tuple[LoadoutEntry, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Group:
        if len(self.gpus) != self.tp * self.pp or len(set(self.gpus)) < len(self.gpus) or min(self.gpus) < 0:
            raise ValueError(f"tp * pp = {self.tp * self.pp} different GPUs: found {list(self.gpus)}")
        if self.id != group_id(self.node, self.gpus):
            raise ValueError(f"the id {group_id(self.node, self.gpus)!r}: found {self.id!r}")
        services = [entry.service for entry in self.loadout]
        if len(set(services)) < len(services):
            raise ValueError("every service at most once in a loadout")
        for entry in self.loadout:
            if len(entry.memory_bytes) != len(self.gpus):
                raise ValueError(f"one entry of memory_bytes per GPU ({len(self.gpus)}) for {entry.service!r}")
            if len(entry.stage_latency_s[0]) != self.pp:
                raise ValueError(f"one stage latency per pipeline stage ({self.pp}) for {entry.service!r}")
        return self

    def entry(self, service: str) -> LoadoutEntry | None:
        """Return what the group runs for ``service``, or None."""
        return next((entry for entry in self.loadout if entry.service == service), None)


class Route(Document):
    """A share of a service's requests that goes to a group; weights of one service sum to 1."""

    group: str
    weight: float = Field(gt=0, le=1)


class Prior(Document):
    """The running plan that this one was made against."""

    generation: int = Field(ge=0)
    digest: str


class Tier(Document):
    """One lexicographic objective: its value, the proven bound on it, and the gap between the two."""

    name: str
    objective: float
    bound: float
    gap: float = Field(ge=0)


class SolverReport(Document):
    """The certificate. ``objective``, ``bound`` and ``gap`` are those of the first tier, goodput.

    ``gap`` is ``|bound - objective| / max(|objective|, 1e-9)``.
    """

    name: str
    status: Literal["optimal", "feasible"]
    objective: float
    bound: float
    gap: float = Field(ge=0)
    wall_s: float = Field(ge=0)
    seed: int
    tiers: tuple[Tier, ...] = ()


class Polish(Document):
    """How simulation improved the plan. The certificate in ``solver`` is that of the placement it started from.

    Attributes:
        scorer: What simulated the candidates.
        arrivals: Where the sampled arrivals come from.
        traces: Sampled traces that the predictions rest on; neither the search nor the choice has seen them.
        requests: Requests of these.
        candidates: Placements that were simulated.
        start_attainment: Weighted share served in time by the start, on the traces by which one of what the search
            found was chosen; under another objective than goodput, what it is worth as a share of the most that there
            is to have.
        attainment: The same of this plan, on the same traces.
        wall_s: Seconds that it took.
        objective: What was raised.
        moves: Moves that were made, with the simulations beside them; None in older plans.
    """

    scorer: str
    arrivals: str
    traces: int = Field(ge=1)
    requests: int = Field(ge=0)
    candidates: int = Field(ge=0)
    start_attainment: float = Field(ge=0, le=1)
    attainment: float = Field(ge=0, le=1)
    wall_s: float = Field(ge=0)
    objective: str = "goodput"
    moves: int | None = Field(default=None, ge=0)


class LatencyPercentiles(Document):
    """Median and 99th percentile of a latency, seconds; None where nothing was served."""

    p50: float | None
    p99: float | None


class Prediction(Document):
    """What the planner expects for one service.

    ``attainment_interval`` is a 95 % confidence interval where the prediction was simulated on several sampled traces.
    """

    service: Name
    offered_rps: float = Field(ge=0)
    goodput_rps: float = Field(ge=0)
    attainment: float = Field(ge=0, le=1)
    attainment_interval: tuple[float, float] | None = None
    latency_s: LatencyPercentiles
    accuracy: float | None = Field(default=None, ge=0, le=1)
    confidence: Confidence


class Unserved(Document):
    """Demand that the plan leaves out, and why."""

    service: Name
    rate_rps: float = Field(gt=0)
    reason: Literal["memory", "compute", "latency", "budget", "accuracy"]
    detail: str


class TransitionStep(Document):
    """One step from the running plan to this one; of a load or a drain, ``rate_rps`` is what its plan routes there."""

    step: int = Field(ge=1)
    action: Literal["load", "route", "drain", "unload"]
    group: str = ""
    service: str = ""
    moved_bytes: int = Field(
        default=0, ge=0, validation_alias=AliasChoices("bytes", "moved_bytes"), serialization_alias="bytes"
    )
    est_s: float = Field(default=0.0, ge=0)
    rate_rps: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class Contingency(Document):
    """What the same replicas serve otherwise: under another demand, or after the loss of a node.

    ``name`` is that of the scenario or of the node lost; ``goodput_rps`` is weighted, like the plan's objective, and
    ``routes`` are those at which it is reached.
    """

    kind: Literal["scenario", "loss"]
    name: str
    offered_rps: float = Field(ge=0)
    goodput_rps: float = Field(ge=0)
    routes: Mapping[Name, tuple[Route, ...]] = {}


class Plan(Document):
    """A whole plan. Groups are kept sorted by node and GPU, so equal plans are equal documents.

    ``inputs`` holds the digests of the documents that it was made from, ``settings`` how it was planned, ``workflows``
    those of the services that gateways and agents shall run.
    """

    format_version: str = FORMAT_VERSION
    tool_version: str = ""
    created_at: str = ""
    inputs: Mapping[Literal["cluster", "services", "profiles", "demand"], str] = {}
    settings: Mapping[str, str | int | float] = {}
    prior: Prior | None = None
    solver: SolverReport
    polish: Polish | None = None
    groups: tuple[Group, ...] = ()
    routes: Mapping[Name, tuple[Route, ...]] = {}
    workflows: tuple[Workflow, ...] = Field(default=(), exclude_if=lambda workflows: not workflows)
    predicted: tuple[Prediction, ...] = ()
    shadow_prices: Mapping[str, float] = {}
    contingencies: tuple[Contingency, ...] = ()
    unserved: tuple[Unserved, ...] = ()
    transition: tuple[TransitionStep, ...] = ()
    warnings: tuple[str, ...] = ()

    @field_validator("groups")
    @classmethod
    def _sorted(cls, groups: tuple[Group, ...]) -> tuple[Group, ...]:
        return tuple(sorted(groups, key=lambda group: (_natural(group.node), group.gpus)))

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        taken: dict[tuple[str, int], str] = {}
        for group in self.groups:
            for gpu in group.gpus:
                other = taken.setdefault((group.node, gpu), group.id)
                if other != group.id:
                    raise ValueError(f"every GPU in one group: {group.node}/{gpu} is in {other!r} and {group.id!r}")
        hosts = {(entry.service, group.id) for group in self.groups for entry in group.loadout}
        for service, routes in self.routes.items():
            for route in routes:
                if (service, route.group) not in hosts:
                    raise ValueError(f"routes of {service!r} to groups that run it: {route.group!r} does not")
            total = sum(route.weight for route in routes)
            if routes and abs(total - 1) > 1e-6:
                raise ValueError(f"routing weights of {service!r} that sum to 1: found {total:.6g}")
        return self

    @property
    def placement_digest(self) -> str:
        """Digest of what nodes would run and gateways would route, and of nothing else."""
        return canonical_digest([_Placement(groups=self.groups, routes=self.routes, workflows=self.workflows)])

    @property
    def gpus_used(self) -> int:
        """Number of GPUs in some group."""
        return sum(len(group.gpus) for group in self.groups)

    def group(self, identifier: str) -> Group:
        """Return the group with that id.

        Raises:
            KeyError: There is none.
        """
        for group in self.groups:
            if group.id == identifier:
                return group
        raise KeyError(identifier)


class _Placement(Document):
    groups: tuple[Group, ...]
    routes: Mapping[Name, tuple[Route, ...]]
    # Left out where there are none, so that the digest of a plan without workflows is what it was before.
    workflows: tuple[Workflow, ...] = Field(exclude_if=lambda workflows: not workflows)


def _natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which ``node-10`` comes after ``node-9``."""
    parts = re.split(r"(\d+)", text)
    return tuple((1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts)
