"""Taking a node out of the rotation, and back: ``foreplan drain`` and ``foreplan undrain``.

Nothing is unloaded and the plan stays as it is: gateways stop sending to the node, which answers what it has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from executor.cluster_connection import ClusterConnection, unheard
from executor.lease import LeaseTiming, holding, new_holder
from executor.state import AgentState, GatewayState, Phase, ReplicaKey
from executor.tls import Dialer
from plans.cluster import Cluster
from plans.errors import Fault, InvalidInput, RemoteFailure

__all__ = ["Drained", "set_drained", "sole_services"]

_CALL_S = 5.0
_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained:
    """How a drain, or its end, went: ``services`` are those of the node, ``wall_s`` how long it took.

    ``ready``: everything that the node shall run serves; after a restart it may still be loading.
    """

    node: str
    drained: bool
    services: tuple[str, ...]
    wall_s: float
    ready: bool = True


async def set_drained(
    cluster: Cluster,
    gateways: Sequence[str],
    node: str,
    drained: bool,
    *,
    force: bool = False,
    timeout_s: float = 60.0,
    dialer: Dialer | None = None,
    lease: LeaseTiming | None = None,
) -> Drained:
    """Take ``node`` out of the rotation of ``gateways`` and wait until it is idle; or take it back.

    Args:
        cluster: The inventory.
        gateways: ``host:port`` of each gateway.
        node: Which.
        drained: True to take it out.
        force: Also when services then have no replica elsewhere, and fail.
        timeout_s: How long to wait until every gateway follows, and no request waits or runs on the node.
        dialer: Opens the channels; without one, in the clear.
        lease: How long to wait for a controller at work.

    Raises:
        InvalidInput: The cluster has no such node, or a service would be left without a replica.
        RemoteFailure: A peer does not answer, or it took too long; the node stays as asked.
        StalePlan: Another controller is at work.
    """
    known = [one.name for one in cluster.nodes]
    if node not in known:
        raise InvalidInput.of(f"one of {', '.join(known)}", where="cluster", field="NODE", found=repr(node))
    clock = asyncio.get_running_loop().time
    start_s = clock()
    async with (
        ClusterConnection(cluster, gateways, dialer) as connection,
        holding(connection, new_holder(), lease or LeaseTiming()),
    ):
        agents, doors, lost = await connection.states(timeout_s=_CALL_S)
        if absent := {name: lost[name] for name in (node, *gateways) if name in lost}:
            raise unheard(absent, connection.gateways, longer="see whether it is busy, and try again")
        services = tuple(sorted({replica.key.service for replica in agents[node].replicas}))
        if drained and not force and (alone := sole_services(node, agents, doors)):
            remedy = "plan a replica elsewhere first, or give --force and let its requests fail"
            raise InvalidInput(
                [
                    Fault(
                        where=node,
                        found=f"the only serving replica of {one!r}",
                        expected="another one elsewhere",
                        remedy=remedy,
                    )
                    for one in alone
                ]
            )
        await connection.agents[node].drain(drained, timeout_s=_CALL_S)
        while problem := await _remaining(connection, node, drained):
            if clock() - start_s > timeout_s:
                stays = f"it stays {'drained' if drained else 'in the rotation'}; `foreplan status` tells more"
                raise RemoteFailure(node, f"after {timeout_s:g} s: {problem}; {stays}", retryable=True)
            await asyncio.sleep(_PAUSE_S)
        ready = (await connection.agents[node].state(timeout_s=_CALL_S)).ready
    return Drained(node=node, drained=drained, services=services, wall_s=clock() - start_s, ready=ready)


def sole_services(node: str, agents: Mapping[str, AgentState], doors: Mapping[str, GatewayState]) -> tuple[str, ...]:
    """Return the services that ``node`` serves, or is about to, and that no other node serves.

    Another node counts where it is in rotation, for a gateway that sends to it: one may have lost the way there.
    """
    alone: set[str] = set()
    here = {
        replica.key.service
        for replica in agents[node].replicas
        if replica.phase in (Phase.SERVING, Phase.LOADING) and not replica.left_over
    }
    elsewhere = [
        replica.key
        for name, state in agents.items()
        if name != node and not state.drained
        for replica in state.replicas
        if replica.phase is Phase.SERVING and not replica.left_over  # nobody is routed to what has left the plan
    ]
    for door in doors.values():
        alone |= here - {key.service for key in elsewhere if _sends_to(door, key)}
    return tuple(sorted(alone))


def _sends_to(door: GatewayState, key: ReplicaKey) -> bool:
    return any(
        target.healthy and not target.stage and (target.service, target.group) == (key.service, key.group)
        for target in door.targets
    )


async def _remaining(connection: ClusterConnection, node: str, drained: bool) -> str:
    """Return what is not yet as asked; empty when all is."""
    agents, doors, lost = await connection.states(timeout_s=_CALL_S)
    for name, failure in lost.items():
        if name == node or name in connection.gateways:  # other nodes have no say in it
            return str(failure)
    for address, door in doors.items():
        behind = [target.group for target in door.targets if _is_of(target.group, node) and target.healthy is drained]
        ready = agents[node].ready or drained
        if behind and ready:
            return f"gateway {address} {'still' if drained else 'does not yet'} send to {', '.join(behind)}"
    if drained:
        busy = [str(one.key) for one in agents[node].replicas if one.queued or one.running]
        return f"requests wait or run: {', '.join(busy)}" if busy else ""
    return ""


def _is_of(group: str, node: str) -> bool:
    return group.rpartition("/")[0] == node
