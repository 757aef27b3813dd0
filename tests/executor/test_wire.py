from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor import wire
from executor.proto import control_pb2
from executor.proto import control_pb2 as pb
from executor.state import (
    AgentState,
    Backend,
    DesiredGroup,
    DesiredReplica,
    DesiredState,
    GatewayState,
    GenerationRules,
    Phase,
    ReplicaKey,
    ReplicaState,
    RoutingTable,
    ServiceRoutes,
    Target,
    TargetState,
)
from plans.errors import Fault, InvalidInput

names = st.text("abcdefgh-0123456789", min_size=1, max_size=8)
texts = st.text(max_size=12)
counts = st.integers(0, 2**31)
seconds = st.floats(1e-9, 1e6)
keys = st.builds(ReplicaKey, group=names, service=names, variant=names)


@st.composite
def generations(draw):
    points = sorted(draw(st.sets(st.floats(1, 1e6), max_size=3)))
    return GenerationRules(
        ttft_s=draw(seconds),
        tpot_s=draw(seconds),
        kv_bytes=draw(st.integers(0, 2**40)),
        max_prefill_tokens=draw(st.integers(1, 2**20)),
        prefill_tokens=tuple(points),
        prefill_s=tuple(draw(st.lists(seconds, min_size=len(points), max_size=len(points)))),
    )


@st.composite
def desired_groups(draw, identifier):
    gpus = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True))
    replicas = []
    for service in draw(st.lists(names, max_size=3, unique=True)):
        max_batch = draw(st.integers(1, 4))
        replicas.append(
            DesiredReplica(
                service=service,
                variant=draw(names),
                max_batch=max_batch,
                multi_frame=draw(st.integers(1, 4)),
                deadline_s=draw(seconds),
                batch_latency_s=tuple(draw(st.lists(seconds, min_size=max_batch, max_size=max_batch))),
                memory_bytes=tuple(draw(st.integers(0, 2**40)) for _ in gpus),
                shape=(len(gpus), 1),
                generation=draw(st.none() | generations()),
                rate_rps=draw(st.floats(0, 1e6)),
            )
        )
    return DesiredGroup(
        id=identifier, gpus=tuple(gpus), tensor_parallel=len(gpus), pipeline_parallel=1, replicas=tuple(replicas)
    )


@st.composite
def desired_states(draw):
    identifiers = draw(st.lists(names, max_size=3, unique=True))
    return DesiredState(
        generation=draw(st.integers(1, 2**63)),
        placement_digest=draw(texts),
        node=draw(names),
        groups=tuple(draw(desired_groups(identifier)) for identifier in identifiers),
        underway=draw(st.booleans()),
    )


replica_states = st.builds(
    ReplicaState,
    key=keys,
    phase=st.sampled_from(Phase),
    reason=texts,
    queued=counts,
    running=counts,
    completed=counts,
    dropped=counts,
    failed=counts,
    batches=counts,
    expected_wait_s=seconds,
    max_batch=st.integers(1, 512),
    weight_bytes=st.integers(0, 2**40),
    load_s=seconds,
    left_over=st.booleans(),
)
agent_states = st.builds(
    AgentState,
    node=names,
    version=texts,
    generation=counts,
    placement_digest=texts,
    staged_generation=counts,
    replicas=st.lists(replica_states, max_size=3).map(tuple),
    device=texts,
    device_count=counts,
    resident_bytes=counts,
    ready=st.booleans(),
    drained=st.booleans(),
    leased_to=texts,
    device_used_bytes=st.lists(counts, max_size=3).map(tuple),
    forward_port=st.integers(0, 65535),
    committed=st.none() | desired_states(),
    staged=st.none() | desired_states(),
    underway=st.booleans(),
)
gateway_states = st.builds(
    GatewayState,
    version=texts,
    generation=counts,
    placement_digest=texts,
    targets=st.lists(
        st.builds(
            TargetState, service=names, group=names, healthy=st.booleans(), reason=texts, sent=counts, failed=counts
        ),
        max_size=3,
    ).map(tuple),
    ready=st.booleans(),
)


@st.composite
def routing_tables(draw):
    nodes = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    targets = st.builds(Target, group=names, node=st.sampled_from(nodes), weight=seconds, variant=names)
    services = draw(st.lists(names, max_size=3, unique=True))
    return RoutingTable(
        generation=draw(st.integers(1, 2**63)),
        placement_digest=draw(texts),
        backends=tuple(Backend(node=node, address=draw(names)) for node in nodes),
        services=tuple(
            ServiceRoutes(
                service=service,
                deadline_s=draw(seconds),
                targets=tuple(draw(st.lists(targets, max_size=3))),
                first_token_s=draw(st.none() | seconds),
            )
            for service in services
        ),
    )


def over_the_wire(message):
    return type(message).FromString(message.SerializeToString())


@given(desired_states())
def test_decode_after_encode_is_the_identity_for_desired_states(state):
    assert wire.desired_state_from_proto(over_the_wire(wire.desired_state_to_proto(state))) == state


@given(agent_states)
def test_decode_after_encode_is_the_identity_for_agent_states(state):
    assert wire.agent_state_from_proto(over_the_wire(wire.agent_state_to_proto(state))) == state


@given(routing_tables())
def test_decode_after_encode_is_the_identity_for_routing_tables(table):
    assert wire.routing_table_from_proto(over_the_wire(wire.routing_table_to_proto(table))) == table


@given(gateway_states)
def test_decode_after_encode_is_the_identity_for_gateway_states(state):
    assert wire.gateway_state_from_proto(over_the_wire(wire.gateway_state_to_proto(state))) == state


@given(st.lists(keys, max_size=3).map(tuple))
def test_decode_after_encode_is_the_identity_for_deferred_replicas(deferred):
    assert wire.stage_response_from_proto(over_the_wire(wire.stage_response_to_proto(deferred))) == deferred


@given(st.lists(st.builds(Fault, field=texts, found=texts, expected=texts, remedy=texts), max_size=3).map(tuple))
def test_decode_after_encode_is_the_identity_for_faults(faults):
    assert wire.faults_from_proto(over_the_wire(wire.faults_to_proto(faults))) == faults


def test_faults_name_the_node_that_found_them():
    message = wire.faults_to_proto([Fault(field="groups[0]", expected="a device")])
    assert wire.faults_from_proto(message, where="node-a")[0].where == "node-a"


def test_every_phase_has_a_number_on_the_wire():
    numbers = {wire.replica_state_to_proto(ReplicaState(key=KEY, phase=phase)).phase for phase in Phase}
    assert numbers == set(pb.ReplicaPhase.values()) - {pb.REPLICA_PHASE_UNSPECIFIED}


KEY = ReplicaKey(group="node-a/0", service="detect", variant="yolos-tiny")


def test_an_unknown_phase_is_refused():
    message = wire.replica_state_to_proto(ReplicaState(key=KEY, phase=Phase.SERVING))
    message.phase = 99
    with pytest.raises(InvalidInput, match="phase: found 99"):
        wire.replica_state_from_proto(message)


def _generating(message, **damage):
    settings = {"ttft_s": 1.0, "tpot_s": 1.0, "max_prefill_tokens": 1} | damage
    message.groups[0].replicas[0].generation.CopyFrom(control_pb2.Generation(**settings))


def desired_message():
    replica = DesiredReplica(
        service="detect",
        variant="yolos-tiny",
        max_batch=2,
        deadline_s=0.1,
        batch_latency_s=(0.01, 0.02),
        memory_bytes=(5,),
    )
    group = DesiredGroup(id="node-a/0", gpus=(0,), replicas=(replica,))
    state = DesiredState(generation=1, placement_digest="sha256:0", node="node-a", groups=(group,))
    return wire.desired_state_to_proto(state)


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        (lambda m: setattr(m, "generation", 0), "generation"),
        (lambda m: setattr(m, "node", ""), "node"),
        (lambda m: m.groups[0].replicas[0].generation.SetInParent(), "groups[0].replicas[0].generation.ttft_s"),
        (lambda m: _generating(m, prefill_s=[1.0]), "groups[0].replicas[0].generation.prefill_tokens"),
        (
            lambda m: _generating(m, prefill_tokens=[2.0, 2.0], prefill_s=[1.0, 1.0]),
            "groups[0].replicas[0].generation.prefill_tokens",
        ),
        (lambda m: _generating(m, max_prefill_tokens=0), "groups[0].replicas[0].generation.max_prefill_tokens"),
        (lambda m: m.groups.add().CopyFrom(m.groups[0]), "groups[1].id"),
        (lambda m: m.groups[0].gpus.pop(), "groups[0].gpus"),
        (lambda m: setattr(m.groups[0], "tensor_parallel", 2), "groups[0].gpus"),
        (lambda m: m.groups[0].replicas.add().CopyFrom(m.groups[0].replicas[0]), "groups[0].replicas[1].service"),
        (lambda m: setattr(m.groups[0].replicas[0], "variant", ""), "groups[0].replicas[0].variant"),
        (lambda m: setattr(m.groups[0].replicas[0], "max_batch", 3), "groups[0].replicas[0].batch_latency_s"),
        (lambda m: setattr(m.groups[0].replicas[0], "deadline_s", float("nan")), "groups[0].replicas[0].deadline_s"),
        (lambda m: m.groups[0].replicas[0].memory_bytes.append(1), "groups[0].replicas[0].memory_bytes"),
    ],
)
def test_a_desired_state_that_contradicts_itself_is_refused(damage, field):
    message = desired_message()
    damage(message)
    with pytest.raises(InvalidInput) as caught:
        wire.desired_state_from_proto(message)
    assert field in [fault.field for fault in caught.value.faults]


TARGET = Target(group="node-a/0", node="node-a", weight=1.0, variant="v")
TABLE = RoutingTable(
    generation=3,
    placement_digest="sha256:3",
    backends=(Backend(node="node-a", address="127.0.0.1:1"),),
    services=tuple(ServiceRoutes(service=name, deadline_s=0.1, targets=(TARGET,)) for name in ("detect", "read")),
)


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        (lambda m: setattr(m, "generation", 0), "generation"),
        (lambda m: setattr(m.backends[0], "address", ""), "backends[0].address"),
        (lambda m: setattr(m.services[0].targets[0], "node", "node-z"), "services[0].targets[0].node"),
        (lambda m: setattr(m.services[0].targets[0], "weight", -1.0), "services[0].targets[0].weight"),
        (lambda m: setattr(m.services[0], "deadline_s", -1.0), "services[0].deadline_s"),
        (lambda m: m.services.add().CopyFrom(m.services[0]), "services[2].service"),
    ],
)
def test_a_routing_table_that_contradicts_itself_is_refused(damage, field):
    message = wire.routing_table_to_proto(TABLE)
    damage(message)
    with pytest.raises(InvalidInput) as caught:
        wire.routing_table_from_proto(message)
    assert [fault.field for fault in caught.value.faults] == [field]
