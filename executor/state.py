"""What nodes shall run, what they do run, and where requests go: the executor's own vocabulary.

Plain values. `executor.wire` turns them into protobuf and back, so that nothing else handles generated messages of the
control plane.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

__all__ = [
    "AgentState",
    "Backend",
    "DesiredGroup",
    "DesiredReplica",
    "DesiredState",
    "GatewayState",
    "GenerationRules",
    "Phase",
    "ReplicaKey",
    "ReplicaState",
    "RoutingTable",
    "ServiceRoutes",
    "Target",
    "TargetState",
    "WorkflowEdge",
    "WorkflowRules",
]


class Phase(enum.Enum):
    """Where a replica is in its life; `executor.replica` holds the transitions."""

    LOADING = "loading"
    STAGED = "staged"
    SERVING = "serving"
    DRAINING = "draining"
    FAILED = "failed"


class ReplicaKey(NamedTuple):
    """A replica's identity: one variant of one service on one group of GPUs. Looked up often."""

    group: str
    service: str
    variant: str

    def __str__(self) -> str:
        return f"{self.service} ({self.variant}) on {self.group}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRules:
    """How a replica generates; see `plans.plan.TokenRules`.

    Attributes:
        ttft_s: Seconds from arrival to the first token; sequences go by that deadline.
        tpot_s: Seconds per token after the first.
        kv_bytes: Key-value memory over all GPUs of the group.
        max_prefill_tokens: Prompt tokens of one prefill, unless its first sequence alone has more.
        prefill_tokens: Shape (point,), rising: prompt tokens for which the time of a prefill is known.
        prefill_s: Shape (point,): seconds of a prefill of so many. Without points nothing is dropped ahead.
    """

    ttft_s: float
    tpot_s: float
    kv_bytes: int
    max_prefill_tokens: int = 8192
    prefill_tokens: tuple[float, ...] = ()
    prefill_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredReplica:
    """One service that a group shall run.

    Attributes:
        service: Name of the service.
        variant: The model that serves it.
        max_batch: Largest batch, at least 1.
        multi_frame: Frames of one stream that are batched together, at least 1.
        deadline_s: Seconds from arrival within which a request counts as good; used when a request carries none.
        batch_latency_s: Shape (max_batch,): seconds that a batch of b takes from start to end, in entry b - 1.
        memory_bytes: Peak bytes per GPU of the group, weights included.
        shape: Tensor and pipeline parallelism of the group.
        generation: Of a service that generates; ``max_batch`` then limits the sequences that run together.
        rate_rps: What the plan routes here, requests per second; agents only remember it.
    """

    service: str
    variant: str
    max_batch: int
    multi_frame: int = 1
    deadline_s: float
    batch_latency_s: tuple[float, ...]
    memory_bytes: tuple[int, ...]
    shape: tuple[int, int] = (1, 1)
    generation: GenerationRules | None = None
    rate_rps: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredGroup:
    """GPUs of one node that shall work as one serving unit, and what they shall run."""

    id: str
    gpus: tuple[int, ...]
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    replicas: tuple[DesiredReplica, ...] = ()

    def key_of(self, replica: DesiredReplica) -> ReplicaKey:
        """Return the identity of one of this group's replicas."""
        return ReplicaKey(group=self.id, service=replica.service, variant=replica.variant)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowEdge:
    """What follows a stage of a workflow; see `plans.service.Edge`.

    Attributes:
        source: Service of the stage that it leaves.
        target: Service of the stage that it leads to.
        fanout: Calls per call of the source.
        probability: Of a switch; None on edges that are always taken.
        inputs: Pairs of an input of the target and the output of the source that becomes it.
        scatter: Whether the rows of what is handed over say how many calls there are.
    """

    source: str
    target: str
    fanout: float = 1.0
    probability: float | None = None
    inputs: tuple[tuple[str, str], ...] = ()
    scatter: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowRules:
    """A workflow as agents run it.

    Attributes:
        name: By which clients ask for it.
        deadline_s: Seconds from arrival to the end; used when a request carries none.
        edges: In the order of the document, by which draws are numbered.
        stages: Services of its stages, in topological order.
        tails_s: Shape (stage,): the least seconds that the stages behind each take.
        any_joins: Services of the stages that start with the first of their inputs.
    """

    name: str
    deadline_s: float
    edges: tuple[WorkflowEdge, ...]
    stages: tuple[str, ...]
    tails_s: tuple[float, ...]
    any_joins: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredState:
    """What one node shall run. ``placement_digest`` names the whole plan; ``generation`` is its number, from 1.

    ``workflows`` are those of which a stage here hands over to others. ``handover`` says where calls of stages go, also
    where none does: what a stage that has moved away still does is handed over too. None for a plan without workflows.
    ``underway``: a stop on the way to the plan; see `executor.rounds`.
    """

    generation: int
    placement_digest: str
    node: str
    groups: tuple[DesiredGroup, ...] = ()
    workflows: tuple[WorkflowRules, ...] = ()
    handover: RoutingTable | None = None
    underway: bool = False

    def keys(self) -> tuple[ReplicaKey, ...]:
        """Return the identity of every replica, in the order of the state."""
        return tuple(group.key_of(replica) for group in self.groups for replica in group.replicas)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaState:
    """What an agent reports of one replica.

    Attributes:
        key: Which replica.
        phase: Where it is in its life.
        reason: Why it failed, or is not serving yet; empty otherwise.
        queued: Requests that wait.
        running: Requests in the batch that runs.
        completed: Requests answered since the replica was made.
        dropped: Requests dropped because they could not be met.
        failed: Requests that failed for another reason.
        batches: Batches run.
        expected_wait_s: Seconds until a request that arrives now would start.
        max_batch: Largest batch allowed.
        weight_bytes: Bytes of the loaded weights; 0 before the load.
        load_s: Seconds that the load took; 0 before it.
        left_over: Whether it runs without being part of what is committed or staged, so that `finish` unloads it.
    """

    key: ReplicaKey
    phase: Phase
    reason: str = ""
    queued: int = 0
    running: int = 0
    completed: int = 0
    dropped: int = 0
    failed: int = 0
    batches: int = 0
    expected_wait_s: float = 0.0
    max_batch: int = 1
    weight_bytes: int = 0
    load_s: float = 0.0
    left_over: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentState:
    """What an agent reports of its node.

    ``generation`` and ``placement_digest`` are those committed last (0 and empty before the first commit);
    ``staged_generation`` is 0 when nothing is staged. ``ready``: everything desired is serving.
    ``resident_bytes``: memory of the agent and its workers. ``drained``: an operator took the node out of the rotation.
    ``leased_to``: the controller that may change the node now; empty when none does.
    ``device_used_bytes``: memory in use on each device, by whomever; empty where it cannot be told (CPU).
    ``forward_port``: where gateways hand over requests; 0 for by gRPC calls.
    ``committed`` and ``staged``: what is, told only where it was asked for. ``underway``: what is committed is a stop
    on the way to the plan.
    """

    node: str
    version: str
    generation: int = 0
    placement_digest: str = ""
    staged_generation: int = 0
    replicas: tuple[ReplicaState, ...] = ()
    device: str = ""
    device_count: int = 0
    resident_bytes: int = 0
    ready: bool = False
    drained: bool = False
    leased_to: str = ""
    device_used_bytes: tuple[int, ...] = ()
    forward_port: int = 0
    committed: DesiredState | None = None
    staged: DesiredState | None = None
    underway: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """An agent that a gateway may send to; ``address`` is ``host:port``."""

    node: str
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One replica that requests of a service may go to, and its share of them (weights of a service sum to 1).

    ``share_s``: seconds that one request keeps the slowest stage of the group busy, in full batches; ``alone_s``:
    seconds that a batch of one takes. Both are the plan's, and 0 where they are not known.
    """

    group: str
    node: str
    weight: float
    variant: str
    share_s: float = 0.0
    alone_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceRoutes:
    """Where the requests of one service go. ``deadline_s`` applies to requests that carry no deadline.

    A service that generates has ``first_token_s`` seconds for its first token, and its answers are not cut short.
    Where ``service`` names a workflow, ``stage`` is the service of its first stage, whose replicas are the targets.
    """

    service: str
    deadline_s: float
    targets: tuple[Target, ...] = ()
    first_token_s: float | None = None
    stage: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTable:
    """All routes of one generation."""

    generation: int
    placement_digest: str
    backends: tuple[Backend, ...] = ()
    services: tuple[ServiceRoutes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetState:
    """What a gateway reports of one target: ``stage`` as in `ServiceRoutes`, ``address`` where it reaches the agent."""

    service: str
    group: str
    healthy: bool
    reason: str = ""
    sent: int = 0
    failed: int = 0
    stage: str = ""
    address: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayState:
    """What a gateway reports of itself; ``ready``: every routed service has a healthy target."""

    version: str
    generation: int = 0
    placement_digest: str = ""
    targets: tuple[TargetState, ...] = ()
    ready: bool = False
