"""Routes at the wire: the part of `executor.wire` that turns a gateway's messages into inner types and back."""

from __future__ import annotations

import math
from collections.abc import Iterator

from executor.proto import control_pb2 as pb
from executor.state import Backend, GatewayState, RoutingTable, ServiceRoutes, Target, TargetState
from executor.wire_fault import fault
from plans.errors import Fault, InvalidInput

__all__ = [
    "gateway_state_from_proto",
    "gateway_state_to_proto",
    "routing_table_from_proto",
    "routing_table_to_proto",
]


def routing_table_to_proto(table: RoutingTable) -> pb.RoutingTable:
    """Return the message for ``table``."""
    return pb.RoutingTable(
        generation=table.generation,
        placement_digest=table.placement_digest,
        backends=[pb.Backend(node=backend.node, address=backend.address) for backend in table.backends],
        services=[
            pb.ServiceRoutes(
                service=routes.service,
                deadline_s=routes.deadline_s,
                targets=[
                    pb.Target(
                        group=target.group,
                        node=target.node,
                        weight=target.weight,
                        variant=target.variant,
                        share_s=target.share_s,
                        alone_s=target.alone_s,
                    )
                    for target in routes.targets
                ],
                first_token_s=routes.first_token_s,
                stage=routes.stage,
            )
            for routes in table.services
        ],
    )


def routing_table_from_proto(message: pb.RoutingTable) -> RoutingTable:
    """Return the table in ``message``.

    Raises:
        InvalidInput: The message contradicts itself; with every fault.
    """
    faults = list(_routing_faults(message))
    if faults:
        raise InvalidInput(faults)
    return RoutingTable(
        generation=message.generation,
        placement_digest=message.placement_digest,
        backends=tuple(Backend(node=backend.node, address=backend.address) for backend in message.backends),
        services=tuple(
            ServiceRoutes(
                service=routes.service,
                deadline_s=routes.deadline_s,
                targets=tuple(
                    Target(
                        group=target.group,
                        node=target.node,
                        weight=target.weight,
                        variant=target.variant,
                        share_s=target.share_s,
                        alone_s=target.alone_s,
                    )
                    for target in routes.targets
                ),
                first_token_s=routes.first_token_s if routes.HasField("first_token_s") else None,
                stage=routes.stage,
            )
            for routes in message.services
        ),
    )


def _routing_faults(message: pb.RoutingTable) -> Iterator[Fault]:
    if message.generation < 1:
        yield fault("generation", message.generation, "a generation of at least 1")
    nodes = [backend.node for backend in message.backends]
    for position, backend in enumerate(message.backends):
        if not backend.node or nodes.index(backend.node) < position:
            yield fault(f"backends[{position}].node", repr(backend.node), "a node only once")
        if not backend.address:
            yield fault(f"backends[{position}].address", "''", "host:port")
    services = [routes.service for routes in message.services]
    for position, routes in enumerate(message.services):
        field = f"services[{position}]"
        if not routes.service or services.index(routes.service) < position:
            yield fault(f"{field}.service", repr(routes.service), "a service only once")
        if not 0 <= routes.deadline_s < math.inf:
            yield fault(f"{field}.deadline_s", routes.deadline_s, "seconds of at least 0, finite")
        for index, target in enumerate(routes.targets):
            if target.node not in nodes:
                yield fault(f"{field}.targets[{index}].node", repr(target.node), "a node among the backends")
            if not 0 < target.weight < math.inf:
                yield fault(f"{field}.targets[{index}].weight", target.weight, "a weight above 0, finite")


def gateway_state_to_proto(state: GatewayState) -> pb.GatewayState:
    """Return the message for ``state``."""
    return pb.GatewayState(
        version=state.version,
        generation=state.generation,
        placement_digest=state.placement_digest,
        targets=[
            pb.TargetState(
                service=target.service,
                group=target.group,
                healthy=target.healthy,
                reason=target.reason,
                sent=target.sent,
                failed=target.failed,
                stage=target.stage,
                address=target.address,
            )
            for target in state.targets
        ],
        ready=state.ready,
    )


def gateway_state_from_proto(message: pb.GatewayState) -> GatewayState:
    """Return the state in ``message``."""
    return GatewayState(
        version=message.version,
        generation=message.generation,
        placement_digest=message.placement_digest,
        targets=tuple(
            TargetState(
                service=target.service,
                group=target.group,
                healthy=target.healthy,
                reason=target.reason,
                sent=target.sent,
                failed=target.failed,
                stage=target.stage,
                address=target.address,
            )
            for target in message.targets
        ),
        ready=message.ready,
    )
