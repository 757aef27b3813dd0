"""The processes of one gateway: they share a port, a routing table, and answer controllers as one.

Connections to a shared port land on any of the processes, control calls too. The first process is the *leader*: it
alone checks a new table, stores it, and has it put in force by the others before it answers; they pass tables on to
it. A process that was restarted starts from the stored table, so it never serves older routes than the others. They
talk over Unix sockets in a folder that only their user may enter.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc.aio

from executor.control_client import GatewayClient, channel_options
from executor.gateway_control import GatewayControl
from executor.gateway_switchboard import Switchboard
from executor.proto import control_pb2_grpc
from executor.state import GatewayState, RoutingTable
from plans.errors import RemoteFailure

__all__ = ["Family", "Member", "merged"]

_STATE_S = 1.0
_INSTALL_S = 5.0
_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """Which of ``count`` processes this is, from 0, and the folder of their sockets."""

    index: int
    count: int
    sockets: Path

    def address(self, index: int) -> str:
        """Return the address of the process ``index`` for the others."""
        return f"unix:{self.sockets / str(index)}"


class Family:
    """This process among the others.

    Args:
        member: Which one it is.
        switchboard: Its routes.
        state: Returns its state.
        max_message_bytes: Largest routing table.
    """

    def __init__(
        self, member: Member, switchboard: Switchboard, state: Callable[[], GatewayState], *, max_message_bytes: int
    ) -> None:
        self._member = member
        self._switchboard = switchboard
        self._state = state
        options = channel_options(max_message_bytes)
        self._channels = {
            index: grpc.aio.insecure_channel(member.address(index), options=options)
            for index in range(member.count)
            if index != member.index
        }
        self._others = {
            index: GatewayClient(channel, f"gateway process {index}") for index, channel in self._channels.items()
        }
        self._server = grpc.aio.server()
        inside = GatewayControl(self.install_here, self.state_here)
        control_pb2_grpc.add_GatewayServicer_to_server(inside, self._server)  # type: ignore[no-untyped-call]

    async def start(self) -> None:
        """Listen to the others."""
        path = self._member.sockets / str(self._member.index)
        path.unlink(missing_ok=True)  # of a process that this one replaces
        self._server.add_insecure_port(self._member.address(self._member.index))
        await self._server.start()

    async def close(self) -> None:
        """Stop listening to the others."""
        await self._server.stop(None)
        await asyncio.gather(*(channel.close(None) for channel in self._channels.values()))

    async def install(self, table: RoutingTable) -> None:
        """Put ``table`` in force in every process.

        Raises:
            StalePlan: It may not follow the one in force.
            RoutesRefused: A service that is served now would have no healthy target.
            StateNotStored: It cannot be stored.
            RemoteFailure: The leader, or another process, does not answer; asking again goes on from there.
        """
        if self._member.index != 0:
            await self._others[0].set_routes(table, timeout_s=_INSTALL_S + _STATE_S)
            return
        await self._switchboard.install(table)
        await asyncio.gather(*(self._give(other, table) for other in self._others.values()))

    async def install_here(self, table: RoutingTable) -> None:
        """Do what `install` does when this is the leader; otherwise put ``table`` in force here, stored already."""
        if self._member.index == 0:
            await self.install(table)
        else:
            await self._switchboard.install(table, stored=True)

    async def state(self) -> GatewayState:
        """Return the state of all processes as one; one that does not answer is left out, for it serves nobody."""
        answers = await asyncio.gather(
            *(other.state(timeout_s=_STATE_S) for other in self._others.values()), return_exceptions=True
        )
        return merged([self._state(), *(answer for answer in answers if isinstance(answer, GatewayState))])

    async def state_here(self) -> GatewayState:
        """Return the state of this process."""
        return self._state()

    async def _give(self, other: GatewayClient, table: RoutingTable) -> None:
        """Have ``table`` put in force by another process, which may just be restarting."""
        clock = asyncio.get_running_loop().time
        end_s = clock() + _INSTALL_S
        while True:
            try:
                return await other.set_routes(table, timeout_s=_INSTALL_S)
            except RemoteFailure as failure:
                if clock() >= end_s or not failure.retryable:
                    raise
            await asyncio.sleep(_PAUSE_S)


def merged(states: Sequence[GatewayState]) -> GatewayState:
    """Return several processes' states as one: the oldest generation, the worst health, counters added up."""
    oldest = min(states, key=lambda state: state.generation)
    targets = []
    for position, target in enumerate(oldest.targets):
        same = [
            state.targets[position]
            for state in states
            if state.generation == oldest.generation and len(state.targets) > position
        ]
        worst = next((one for one in same if not one.healthy), target)
        targets.append(
            dataclasses.replace(
                target,
                healthy=worst.healthy,
                reason=worst.reason,
                sent=sum(one.sent for one in same),
                failed=sum(one.failed for one in same),
            )
        )
    return GatewayState(
        version=oldest.version,
        generation=oldest.generation,
        placement_digest=oldest.placement_digest,
        targets=tuple(targets),
        ready=all(state.ready for state in states),
    )
