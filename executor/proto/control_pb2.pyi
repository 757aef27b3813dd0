from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReplicaPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLICA_PHASE_UNSPECIFIED: _ClassVar[ReplicaPhase]
    REPLICA_PHASE_LOADING: _ClassVar[ReplicaPhase]
    REPLICA_PHASE_STAGED: _ClassVar[ReplicaPhase]
    REPLICA_PHASE_SERVING: _ClassVar[ReplicaPhase]
    REPLICA_PHASE_DRAINING: _ClassVar[ReplicaPhase]
    REPLICA_PHASE_FAILED: _ClassVar[ReplicaPhase]
REPLICA_PHASE_UNSPECIFIED: ReplicaPhase
REPLICA_PHASE_LOADING: ReplicaPhase
REPLICA_PHASE_STAGED: ReplicaPhase
REPLICA_PHASE_SERVING: ReplicaPhase
REPLICA_PHASE_DRAINING: ReplicaPhase
REPLICA_PHASE_FAILED: ReplicaPhase

class GetStateRequest(_message.Message):
    __slots__ = ("with_desired",)
    WITH_DESIRED_FIELD_NUMBER: _ClassVar[int]
    with_desired: bool
    def __init__(self, with_desired: _Optional[bool] = ...) -> None: ...

class DesiredState(_message.Message):
    __slots__ = ("generation", "placement_digest", "node", "groups", "workflows", "handover", "underway")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    WORKFLOWS_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_FIELD_NUMBER: _ClassVar[int]
    UNDERWAY_FIELD_NUMBER: _ClassVar[int]
    generation: int
    placement_digest: str
    node: str
    groups: _containers.RepeatedCompositeFieldContainer[Group]
    workflows: _containers.RepeatedCompositeFieldContainer[Workflow]
    handover: RoutingTable
    underway: bool
    def __init__(self, generation: _Optional[int] = ..., placement_digest: _Optional[str] = ..., node: _Optional[str] = ..., groups: _Optional[_Iterable[_Union[Group, _Mapping]]] = ..., workflows: _Optional[_Iterable[_Union[Workflow, _Mapping]]] = ..., handover: _Optional[_Union[RoutingTable, _Mapping]] = ..., underway: _Optional[bool] = ...) -> None: ...

class Workflow(_message.Message):
    __slots__ = ("name", "deadline_s", "stages", "edges")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    EDGES_FIELD_NUMBER: _ClassVar[int]
    name: str
    deadline_s: float
    stages: _containers.RepeatedCompositeFieldContainer[WorkflowStage]
    edges: _containers.RepeatedCompositeFieldContainer[WorkflowEdge]
    def __init__(self, name: _Optional[str] = ..., deadline_s: _Optional[float] = ..., stages: _Optional[_Iterable[_Union[WorkflowStage, _Mapping]]] = ..., edges: _Optional[_Iterable[_Union[WorkflowEdge, _Mapping]]] = ...) -> None: ...

class WorkflowStage(_message.Message):
    __slots__ = ("service", "tail_s", "join_any")
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    TAIL_S_FIELD_NUMBER: _ClassVar[int]
    JOIN_ANY_FIELD_NUMBER: _ClassVar[int]
    service: str
    tail_s: float
    join_any: bool
    def __init__(self, service: _Optional[str] = ..., tail_s: _Optional[float] = ..., join_any: _Optional[bool] = ...) -> None: ...

class WorkflowEdge(_message.Message):
    __slots__ = ("source", "target", "fanout", "probability", "inputs", "scatter")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    FANOUT_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    SCATTER_FIELD_NUMBER: _ClassVar[int]
    source: str
    target: str
    fanout: float
    probability: float
    inputs: _containers.RepeatedCompositeFieldContainer[TensorMap]
    scatter: bool
    def __init__(self, source: _Optional[str] = ..., target: _Optional[str] = ..., fanout: _Optional[float] = ..., probability: _Optional[float] = ..., inputs: _Optional[_Iterable[_Union[TensorMap, _Mapping]]] = ..., scatter: _Optional[bool] = ...) -> None: ...

class TensorMap(_message.Message):
    __slots__ = ("input", "output")
    INPUT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    input: str
    output: str
    def __init__(self, input: _Optional[str] = ..., output: _Optional[str] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("id", "gpus", "tensor_parallel", "pipeline_parallel", "replicas")
    ID_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    id: str
    gpus: _containers.RepeatedScalarFieldContainer[int]
    tensor_parallel: int
    pipeline_parallel: int
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    def __init__(self, id: _Optional[str] = ..., gpus: _Optional[_Iterable[int]] = ..., tensor_parallel: _Optional[int] = ..., pipeline_parallel: _Optional[int] = ..., replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("service", "variant", "max_batch", "multi_frame", "deadline_s", "batch_latency_s", "memory_bytes", "generation", "rate_rps")
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    MULTI_FRAME_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    BATCH_LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    RATE_RPS_FIELD_NUMBER: _ClassVar[int]
    service: str
    variant: str
    max_batch: int
    multi_frame: int
    deadline_s: float
    batch_latency_s: _containers.RepeatedScalarFieldContainer[float]
    memory_bytes: _containers.RepeatedScalarFieldContainer[int]
    generation: Generation
    rate_rps: float
    def __init__(self, service: _Optional[str] = ..., variant: _Optional[str] = ..., max_batch: _Optional[int] = ..., multi_frame: _Optional[int] = ..., deadline_s: _Optional[float] = ..., batch_latency_s: _Optional[_Iterable[float]] = ..., memory_bytes: _Optional[_Iterable[int]] = ..., generation: _Optional[_Union[Generation, _Mapping]] = ..., rate_rps: _Optional[float] = ...) -> None: ...

class Generation(_message.Message):
    __slots__ = ("ttft_s", "tpot_s", "kv_bytes", "max_prefill_tokens", "prefill_tokens", "prefill_s")
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    TPOT_S_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    ttft_s: float
    tpot_s: float
    kv_bytes: int
    max_prefill_tokens: int
    prefill_tokens: _containers.RepeatedScalarFieldContainer[float]
    prefill_s: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, ttft_s: _Optional[float] = ..., tpot_s: _Optional[float] = ..., kv_bytes: _Optional[int] = ..., max_prefill_tokens: _Optional[int] = ..., prefill_tokens: _Optional[_Iterable[float]] = ..., prefill_s: _Optional[_Iterable[float]] = ...) -> None: ...

class Fault(_message.Message):
    __slots__ = ("field", "found", "expected", "remedy")
    FIELD_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    REMEDY_FIELD_NUMBER: _ClassVar[int]
    field: str
    found: str
    expected: str
    remedy: str
    def __init__(self, field: _Optional[str] = ..., found: _Optional[str] = ..., expected: _Optional[str] = ..., remedy: _Optional[str] = ...) -> None: ...

class ValidateResponse(_message.Message):
    __slots__ = ("faults", "deferred")
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    DEFERRED_FIELD_NUMBER: _ClassVar[int]
    faults: _containers.RepeatedCompositeFieldContainer[Fault]
    deferred: _containers.RepeatedCompositeFieldContainer[ReplicaKey]
    def __init__(self, faults: _Optional[_Iterable[_Union[Fault, _Mapping]]] = ..., deferred: _Optional[_Iterable[_Union[ReplicaKey, _Mapping]]] = ...) -> None: ...

class StageResponse(_message.Message):
    __slots__ = ("deferred",)
    DEFERRED_FIELD_NUMBER: _ClassVar[int]
    deferred: _containers.RepeatedCompositeFieldContainer[ReplicaKey]
    def __init__(self, deferred: _Optional[_Iterable[_Union[ReplicaKey, _Mapping]]] = ...) -> None: ...

class ReplicaKey(_message.Message):
    __slots__ = ("group", "service", "variant")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    group: str
    service: str
    variant: str
    def __init__(self, group: _Optional[str] = ..., service: _Optional[str] = ..., variant: _Optional[str] = ...) -> None: ...

class GenerationRequest(_message.Message):
    __slots__ = ("generation", "placement_digest")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    generation: int
    placement_digest: str
    def __init__(self, generation: _Optional[int] = ..., placement_digest: _Optional[str] = ...) -> None: ...

class GenerationResponse(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: int
    def __init__(self, generation: _Optional[int] = ...) -> None: ...

class LeaseRequest(_message.Message):
    __slots__ = ("holder", "ttl_s")
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    holder: str
    ttl_s: float
    def __init__(self, holder: _Optional[str] = ..., ttl_s: _Optional[float] = ...) -> None: ...

class LeaseResponse(_message.Message):
    __slots__ = ("granted", "holder", "remaining_s")
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    REMAINING_S_FIELD_NUMBER: _ClassVar[int]
    granted: bool
    holder: str
    remaining_s: float
    def __init__(self, granted: _Optional[bool] = ..., holder: _Optional[str] = ..., remaining_s: _Optional[float] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("drained",)
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    drained: bool
    def __init__(self, drained: _Optional[bool] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("drained",)
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    drained: bool
    def __init__(self, drained: _Optional[bool] = ...) -> None: ...

class ReplicaState(_message.Message):
    __slots__ = ("key", "phase", "reason", "queued", "running", "completed", "dropped", "failed", "batches", "expected_wait_s", "max_batch", "weight_bytes", "load_s", "left_over")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    LEFT_OVER_FIELD_NUMBER: _ClassVar[int]
    key: ReplicaKey
    phase: ReplicaPhase
    reason: str
    queued: int
    running: int
    completed: int
    dropped: int
    failed: int
    batches: int
    expected_wait_s: float
    max_batch: int
    weight_bytes: int
    load_s: float
    left_over: bool
    def __init__(self, key: _Optional[_Union[ReplicaKey, _Mapping]] = ..., phase: _Optional[_Union[ReplicaPhase, str]] = ..., reason: _Optional[str] = ..., queued: _Optional[int] = ..., running: _Optional[int] = ..., completed: _Optional[int] = ..., dropped: _Optional[int] = ..., failed: _Optional[int] = ..., batches: _Optional[int] = ..., expected_wait_s: _Optional[float] = ..., max_batch: _Optional[int] = ..., weight_bytes: _Optional[int] = ..., load_s: _Optional[float] = ..., left_over: _Optional[bool] = ...) -> None: ...

class AgentState(_message.Message):
    __slots__ = ("node", "version", "generation", "placement_digest", "staged_generation", "replicas", "device", "device_count", "resident_bytes", "ready", "drained", "leased_to", "device_used_bytes", "forward_port", "committed", "underway", "staged")
    NODE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STAGED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_COUNT_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    LEASED_TO_FIELD_NUMBER: _ClassVar[int]
    DEVICE_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    FORWARD_PORT_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    UNDERWAY_FIELD_NUMBER: _ClassVar[int]
    STAGED_FIELD_NUMBER: _ClassVar[int]
    node: str
    version: str
    generation: int
    placement_digest: str
    staged_generation: int
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaState]
    device: str
    device_count: int
    resident_bytes: int
    ready: bool
    drained: bool
    leased_to: str
    device_used_bytes: _containers.RepeatedScalarFieldContainer[int]
    forward_port: int
    committed: DesiredState
    underway: bool
    staged: DesiredState
    def __init__(self, node: _Optional[str] = ..., version: _Optional[str] = ..., generation: _Optional[int] = ..., placement_digest: _Optional[str] = ..., staged_generation: _Optional[int] = ..., replicas: _Optional[_Iterable[_Union[ReplicaState, _Mapping]]] = ..., device: _Optional[str] = ..., device_count: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., ready: _Optional[bool] = ..., drained: _Optional[bool] = ..., leased_to: _Optional[str] = ..., device_used_bytes: _Optional[_Iterable[int]] = ..., forward_port: _Optional[int] = ..., committed: _Optional[_Union[DesiredState, _Mapping]] = ..., underway: _Optional[bool] = ..., staged: _Optional[_Union[DesiredState, _Mapping]] = ...) -> None: ...

class Backend(_message.Message):
    __slots__ = ("node", "address")
    NODE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    node: str
    address: str
    def __init__(self, node: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class ServiceRoutes(_message.Message):
    __slots__ = ("service", "deadline_s", "targets", "first_token_s", "stage")
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    service: str
    deadline_s: float
    targets: _containers.RepeatedCompositeFieldContainer[Target]
    first_token_s: float
    stage: str
    def __init__(self, service: _Optional[str] = ..., deadline_s: _Optional[float] = ..., targets: _Optional[_Iterable[_Union[Target, _Mapping]]] = ..., first_token_s: _Optional[float] = ..., stage: _Optional[str] = ...) -> None: ...

class Target(_message.Message):
    __slots__ = ("group", "node", "weight", "variant", "share_s", "alone_s")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    SHARE_S_FIELD_NUMBER: _ClassVar[int]
    ALONE_S_FIELD_NUMBER: _ClassVar[int]
    group: str
    node: str
    weight: float
    variant: str
    share_s: float
    alone_s: float
    def __init__(self, group: _Optional[str] = ..., node: _Optional[str] = ..., weight: _Optional[float] = ..., variant: _Optional[str] = ..., share_s: _Optional[float] = ..., alone_s: _Optional[float] = ...) -> None: ...

class RoutingTable(_message.Message):
    __slots__ = ("generation", "placement_digest", "backends", "services")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    SERVICES_FIELD_NUMBER: _ClassVar[int]
    generation: int
    placement_digest: str
    backends: _containers.RepeatedCompositeFieldContainer[Backend]
    services: _containers.RepeatedCompositeFieldContainer[ServiceRoutes]
    def __init__(self, generation: _Optional[int] = ..., placement_digest: _Optional[str] = ..., backends: _Optional[_Iterable[_Union[Backend, _Mapping]]] = ..., services: _Optional[_Iterable[_Union[ServiceRoutes, _Mapping]]] = ...) -> None: ...

class TargetState(_message.Message):
    __slots__ = ("service", "group", "healthy", "reason", "sent", "failed", "stage", "address")
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    HEALTHY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SENT_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    service: str
    group: str
    healthy: bool
    reason: str
    sent: int
    failed: int
    stage: str
    address: str
    def __init__(self, service: _Optional[str] = ..., group: _Optional[str] = ..., healthy: _Optional[bool] = ..., reason: _Optional[str] = ..., sent: _Optional[int] = ..., failed: _Optional[int] = ..., stage: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class GatewayState(_message.Message):
    __slots__ = ("version", "generation", "placement_digest", "targets", "ready")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    version: str
    generation: int
    placement_digest: str
    targets: _containers.RepeatedCompositeFieldContainer[TargetState]
    ready: bool
    def __init__(self, version: _Optional[str] = ..., generation: _Optional[int] = ..., placement_digest: _Optional[str] = ..., targets: _Optional[_Iterable[_Union[TargetState, _Mapping]]] = ..., ready: _Optional[bool] = ...) -> None: ...
