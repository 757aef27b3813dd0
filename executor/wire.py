"""The control plane at the wire: protobuf messages to inner types and back.

The one place that reads or builds messages of ``foreplan.control.v1``, with `routing_wire` for what gateways are told
and tell, and `workflow_wire` for workflows. For every inner type there is a pair ``*_to_proto`` and ``*_from_proto``;
decode after encode is the identity. What arrives is checked: a message that breaks the rules of its inner type raises
`InvalidInput` with every fault.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from executor.proto import control_pb2 as pb
from executor.routing_wire import (
    gateway_state_from_proto,
    gateway_state_to_proto,
    routing_table_from_proto,
    routing_table_to_proto,
)
from executor.state import (
    AgentState,
    DesiredGroup,
    DesiredReplica,
    DesiredState,
    GenerationRules,
    Phase,
    ReplicaKey,
    ReplicaState,
)
from executor.wire_fault import fault
from executor.workflow_wire import workflow_faults, workflow_from_proto, workflow_to_proto
from plans.errors import Fault, InvalidInput

__all__ = [
    "desired_state_to_proto",
    "desired_state_from_proto",
    "replica_key_to_proto",
    "replica_key_from_proto",
    "stage_response_to_proto",
    "stage_response_from_proto",
    "faults_to_proto",
    "faults_from_proto",
    "validation_from_proto",
    "replica_state_to_proto",
    "replica_state_from_proto",
    "agent_state_to_proto",
    "agent_state_from_proto",
    "routing_table_to_proto",
    "routing_table_from_proto",
    "gateway_state_to_proto",
    "gateway_state_from_proto",
]

_PHASES = {
    Phase.LOADING: pb.REPLICA_PHASE_LOADING,
    Phase.STAGED: pb.REPLICA_PHASE_STAGED,
    Phase.SERVING: pb.REPLICA_PHASE_SERVING,
    Phase.DRAINING: pb.REPLICA_PHASE_DRAINING,
    Phase.FAILED: pb.REPLICA_PHASE_FAILED,
}
_PHASE_OF = {number: phase for phase, number in _PHASES.items()}


# Desired state.


def desired_state_to_proto(state: DesiredState) -> pb.DesiredState:
    """Return the message for ``state``."""
    return pb.DesiredState(
        generation=state.generation,
        placement_digest=state.placement_digest,
        node=state.node,
        groups=[
            pb.Group(
                id=group.id,
                gpus=group.gpus,
                tensor_parallel=group.tensor_parallel,
                pipeline_parallel=group.pipeline_parallel,
                replicas=[_desired_replica_to_proto(replica) for replica in group.replicas],
            )
            for group in state.groups
        ],
        workflows=[workflow_to_proto(workflow) for workflow in state.workflows],
        handover=routing_table_to_proto(state.handover) if state.handover else None,
        underway=state.underway,
    )


def _desired_replica_to_proto(replica: DesiredReplica) -> pb.Replica:
    return pb.Replica(
        service=replica.service,
        variant=replica.variant,
        max_batch=replica.max_batch,
        multi_frame=replica.multi_frame,
        deadline_s=replica.deadline_s,
        batch_latency_s=replica.batch_latency_s,
        memory_bytes=replica.memory_bytes,
        generation=_generation_to_proto(replica.generation) if replica.generation else None,
        rate_rps=replica.rate_rps,
    )


def _generation_to_proto(rules: GenerationRules) -> pb.Generation:
    return pb.Generation(
        ttft_s=rules.ttft_s,
        tpot_s=rules.tpot_s,
        kv_bytes=rules.kv_bytes,
        max_prefill_tokens=rules.max_prefill_tokens,
        prefill_tokens=rules.prefill_tokens,
        prefill_s=rules.prefill_s,
    )


def _generation_from_proto(message: pb.Generation) -> GenerationRules:
    return GenerationRules(
        ttft_s=message.ttft_s,
        tpot_s=message.tpot_s,
        kv_bytes=message.kv_bytes,
        max_prefill_tokens=message.max_prefill_tokens,
        prefill_tokens=tuple(message.prefill_tokens),
        prefill_s=tuple(message.prefill_s),
    )


def desired_state_from_proto(message: pb.DesiredState) -> DesiredState:
    """Return the state in ``message``.

    Raises:
        InvalidInput: The message contradicts itself; with every fault.
    """
    faults = list(_desired_faults(message))
    if faults:
        raise InvalidInput(faults)
    return DesiredState(
        generation=message.generation,
        placement_digest=message.placement_digest,
        node=message.node,
        groups=tuple(
            DesiredGroup(
                id=group.id,
                gpus=tuple(group.gpus),
                tensor_parallel=group.tensor_parallel,
                pipeline_parallel=group.pipeline_parallel,
                replicas=tuple(
                    DesiredReplica(
                        service=replica.service,
                        variant=replica.variant,
                        max_batch=replica.max_batch,
                        multi_frame=replica.multi_frame,
                        deadline_s=replica.deadline_s,
                        batch_latency_s=tuple(replica.batch_latency_s),
                        memory_bytes=tuple(replica.memory_bytes),
                        shape=(group.tensor_parallel, group.pipeline_parallel),
                        generation=(
                            _generation_from_proto(replica.generation) if replica.HasField("generation") else None
                        ),
                        rate_rps=replica.rate_rps,
                    )
                    for replica in group.replicas
                ),
            )
            for group in message.groups
        ),
        workflows=tuple(workflow_from_proto(workflow) for workflow in message.workflows),
        handover=routing_table_from_proto(message.handover) if message.HasField("handover") else None,
        underway=message.underway,
    )


def _desired_faults(message: pb.DesiredState) -> Iterator[Fault]:
    if message.generation < 1:
        yield fault("generation", message.generation, "a generation of at least 1")
    if not message.node:
        yield fault("node", repr(message.node), "the name of a node")
    ids = [group.id for group in message.groups]
    for position, group in enumerate(message.groups):
        field = f"groups[{position}]"
        if not group.id or ids.index(group.id) < position:
            yield fault(f"{field}.id", repr(group.id), "an id of its own")
        size = group.tensor_parallel * group.pipeline_parallel
        if size < 1 or len(group.gpus) != size or len(set(group.gpus)) < size:
            expected = "tensor_parallel * pipeline_parallel different devices, at least one"
            yield fault(f"{field}.gpus", list(group.gpus), expected)
        services = [replica.service for replica in group.replicas]
        for index, replica in enumerate(group.replicas):
            yield from _replica_faults(replica, f"{field}.replicas[{index}]", len(group.gpus))
            if services.index(replica.service) < index:
                yield fault(f"{field}.replicas[{index}].service", repr(replica.service), "a service only once a group")
    names = [workflow.name for workflow in message.workflows]
    for position, workflow in enumerate(message.workflows):
        field = f"workflows[{position}]"
        if not workflow.name or names.index(workflow.name) < position:
            yield fault(f"{field}.name", repr(workflow.name), "a name of its own")
        yield from workflow_faults(workflow, field)


def _replica_faults(replica: pb.Replica, field: str, gpus: int) -> Iterator[Fault]:
    for name in ("service", "variant"):
        if not getattr(replica, name):
            yield fault(f"{field}.{name}", "''", "a name")
    for name in ("max_batch", "multi_frame"):
        if getattr(replica, name) < 1:
            yield fault(f"{field}.{name}", getattr(replica, name), "at least 1")
    if not 0 < replica.deadline_s < math.inf:
        yield fault(f"{field}.deadline_s", replica.deadline_s, "seconds above 0 and finite")
    if not 0 <= replica.rate_rps < math.inf:
        yield fault(f"{field}.rate_rps", replica.rate_rps, "requests per second, at least 0 and finite")
    if len(replica.batch_latency_s) != replica.max_batch:
        expected = f"one entry for each batch size up to max_batch ({replica.max_batch})"
        yield fault(f"{field}.batch_latency_s", f"{len(replica.batch_latency_s)} entries", expected)
    if not all(0 < latency < math.inf for latency in replica.batch_latency_s):
        yield fault(f"{field}.batch_latency_s", list(replica.batch_latency_s), "seconds above 0 and finite")
    if len(replica.memory_bytes) != gpus:
        expected = f"one entry for each of the group's {gpus} GPUs"
        yield fault(f"{field}.memory_bytes", f"{len(replica.memory_bytes)} entries", expected)
    if replica.HasField("generation"):
        yield from _generation_faults(replica.generation, f"{field}.generation")


def _generation_faults(rules: pb.Generation, field: str) -> Iterator[Fault]:
    for name in ("ttft_s", "tpot_s"):
        if not 0 < getattr(rules, name) < math.inf:
            yield fault(f"{field}.{name}", getattr(rules, name), "seconds above 0 and finite")
    if rules.max_prefill_tokens < 1:
        yield fault(f"{field}.max_prefill_tokens", rules.max_prefill_tokens, "at least 1")
    tokens, seconds = list(rules.prefill_tokens), list(rules.prefill_s)
    rising = all(a < b for a, b in zip([0.0, *tokens], tokens, strict=False))
    if len(tokens) != len(seconds) or not rising or not all(0 < each < math.inf for each in (*tokens, *seconds)):
        yield fault(f"{field}.prefill_tokens", tokens, "rising numbers above 0, with one of prefill_s for each")


# Answers of the agent.


def replica_key_to_proto(key: ReplicaKey) -> pb.ReplicaKey:
    """Return the message for ``key``."""
    return pb.ReplicaKey(group=key.group, service=key.service, variant=key.variant)


def replica_key_from_proto(message: pb.ReplicaKey) -> ReplicaKey:
    """Return the key in ``message``."""
    return ReplicaKey(group=message.group, service=message.service, variant=message.variant)


def stage_response_to_proto(deferred: Iterable[ReplicaKey]) -> pb.StageResponse:
    """Return the answer to ``Stage`` that names the replicas which must wait for memory."""
    return pb.StageResponse(deferred=[replica_key_to_proto(key) for key in deferred])


def stage_response_from_proto(message: pb.StageResponse) -> tuple[ReplicaKey, ...]:
    """Return the replicas that were not staged because they must wait for memory."""
    return tuple(replica_key_from_proto(key) for key in message.deferred)


def faults_to_proto(faults: Iterable[Fault], deferred: Iterable[ReplicaKey] = ()) -> pb.ValidateResponse:
    """Return the answer to ``Validate``. File and line have no meaning on another machine and are left out.

    ``deferred`` are the replicas that would have to wait for memory.
    """
    return pb.ValidateResponse(
        faults=[
            pb.Fault(field=fault.field, found=fault.found, expected=fault.expected, remedy=fault.remedy)
            for fault in faults
        ],
        deferred=[replica_key_to_proto(key) for key in deferred],
    )


def validation_from_proto(
    message: pb.ValidateResponse, *, where: str = ""
) -> tuple[tuple[Fault, ...], tuple[ReplicaKey, ...]]:
    """Return the faults in ``message`` (`faults_from_proto`), and the replicas that would have to wait for memory."""
    return faults_from_proto(message, where=where), tuple(replica_key_from_proto(key) for key in message.deferred)


def faults_from_proto(message: pb.ValidateResponse, *, where: str = "") -> tuple[Fault, ...]:
    """Return the faults in ``message``; ``where`` names the node that found them."""
    return tuple(
        Fault(where=where, field=fault.field, found=fault.found, expected=fault.expected, remedy=fault.remedy)
        for fault in message.faults
    )


def replica_state_to_proto(state: ReplicaState) -> pb.ReplicaState:
    """Return the message for ``state``."""
    return pb.ReplicaState(
        key=replica_key_to_proto(state.key),
        phase=_PHASES[state.phase],
        reason=state.reason,
        queued=state.queued,
        running=state.running,
        completed=state.completed,
        dropped=state.dropped,
        failed=state.failed,
        batches=state.batches,
        expected_wait_s=state.expected_wait_s,
        max_batch=state.max_batch,
        weight_bytes=state.weight_bytes,
        load_s=state.load_s,
        left_over=state.left_over,
    )


def replica_state_from_proto(message: pb.ReplicaState) -> ReplicaState:
    """Return the state in ``message``.

    Raises:
        InvalidInput: The phase is one that this version does not know.
    """
    if message.phase not in _PHASE_OF:
        known = ", ".join(phase.value for phase in Phase)
        raise InvalidInput.of(f"one of the phases {known}", field="phase", found=message.phase)
    return ReplicaState(
        key=replica_key_from_proto(message.key),
        phase=_PHASE_OF[message.phase],
        reason=message.reason,
        queued=message.queued,
        running=message.running,
        completed=message.completed,
        dropped=message.dropped,
        failed=message.failed,
        batches=message.batches,
        expected_wait_s=message.expected_wait_s,
        max_batch=message.max_batch,
        weight_bytes=message.weight_bytes,
        load_s=message.load_s,
        left_over=message.left_over,
    )


def agent_state_to_proto(state: AgentState) -> pb.AgentState:
    """Return the message for ``state``."""
    return pb.AgentState(
        node=state.node,
        version=state.version,
        generation=state.generation,
        placement_digest=state.placement_digest,
        staged_generation=state.staged_generation,
        replicas=[replica_state_to_proto(replica) for replica in state.replicas],
        device=state.device,
        device_count=state.device_count,
        resident_bytes=state.resident_bytes,
        ready=state.ready,
        drained=state.drained,
        leased_to=state.leased_to,
        device_used_bytes=state.device_used_bytes,
        forward_port=state.forward_port,
        committed=desired_state_to_proto(state.committed) if state.committed else None,
        staged=desired_state_to_proto(state.staged) if state.staged else None,
        underway=state.underway,
    )


def agent_state_from_proto(message: pb.AgentState) -> AgentState:
    """Return the state in ``message``.

    Raises:
        InvalidInput: A replica's phase is one that this version does not know, or what it shall run contradicts itself.
    """
    return AgentState(
        node=message.node,
        version=message.version,
        generation=message.generation,
        placement_digest=message.placement_digest,
        staged_generation=message.staged_generation,
        replicas=tuple(replica_state_from_proto(replica) for replica in message.replicas),
        device=message.device,
        device_count=message.device_count,
        resident_bytes=message.resident_bytes,
        ready=message.ready,
        drained=message.drained,
        leased_to=message.leased_to,
        device_used_bytes=tuple(message.device_used_bytes),
        forward_port=message.forward_port,
        committed=desired_state_from_proto(message.committed) if message.HasField("committed") else None,
        staged=desired_state_from_proto(message.staged) if message.HasField("staged") else None,
        underway=message.underway,
    )
