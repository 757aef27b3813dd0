"""Channels to every agent and gateway of a cluster, for as long as one command runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TypeAlias, TypeVar

import grpc.aio

from executor.control_client import AgentClient, GatewayClient, TimedOut, Unreachable, channel_options
from executor.state import AgentState, GatewayState
from executor.tls import Dialer
from plans.cluster import Cluster
from plans.errors import InvalidInput, RemoteFailure

__all__ = ["Call", "ClusterConnection", "check_gateway", "gather", "joined", "unheard"]

_MAX_MESSAGE_BYTES = 64 * 2**20
_Answer = TypeVar("_Answer")
Call: TypeAlias = Callable[[], Awaitable[_Answer]]
"""A call that is still to be made: one that was made and never awaited, for an interrupt came first, is a warning."""


async def gather(calls: Mapping[str, Call[_Answer]]) -> tuple[dict[str, _Answer], dict[str, RemoteFailure]]:
    """Make all ``calls`` together; return the answers, and the failures of the peers that failed, by their key."""
    outcomes = await asyncio.gather(*(_outcome(call) for call in calls.values()))
    pairs = list(zip(calls, outcomes, strict=True))
    answers = {key: answer for key, (answer, failure) in pairs if failure is None and answer is not None}
    return answers, {key: failure for key, (_, failure) in pairs if failure is not None}


def joined(failures: Iterable[RemoteFailure]) -> RemoteFailure:
    """Return several failures as one, which may pass when each of them may.

    Raises:
        ValueError: There is none.
    """
    first, *others = failures
    problem = "; ".join([first.problem, *map(str, others)])
    return RemoteFailure(first.peer, problem, retryable=all(one.retryable for one in (first, *others)))


def unheard(lost: Mapping[str, RemoteFailure], gateways: Container[str], *, longer: str) -> RemoteFailure:
    """Return what a user is told of peers whose state is needed before anything is changed.

    Args:
        lost: Why they do not tell it, by node or address; at least one.
        gateways: Addresses of gateways.
        longer: How to give peers more time, or what else to do with slow ones.
    """
    away = [name in gateways for name, failure in lost.items() if isinstance(failure, Unreachable)]
    remedies = [
        remedy
        for remedy, helps in (
            ("start the agent (`foreplan agent` on its node), or take its node out of the cluster file", False in away),
            ("start the gateway (`foreplan gateway`), or leave it out of the command", True in away),
            (longer, any(isinstance(failure, TimedOut) for failure in lost.values())),
        )
        if helps
    ]
    failure = joined(lost.values())
    problem = f"{failure.problem}; nothing was changed{': ' if remedies else ''}{'; '.join(remedies)}"
    return RemoteFailure(failure.peer, problem, retryable=failure.retryable)


async def _outcome(call: Call[_Answer]) -> tuple[_Answer | None, RemoteFailure | None]:
    try:
        return await call(), None
    except RemoteFailure as failure:
        return None, failure


def check_gateway(address: str) -> None:
    """Refuse what is no address of a gateway.

    Raises:
        InvalidInput: ``address`` is no ``host:port``.
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65536):  # gRPC would dial the rest by 65536
        raise InvalidInput.of("host:port, such as 127.0.0.1:8001", where="--gateway", found=repr(address))


class ClusterConnection:
    """Clients for the agents of ``cluster`` (by node name) and for the gateways (by address). An async context.

    Channels are opened by ``dialer``; without one, in the clear.

    Raises:
        InvalidInput: A gateway's address is no ``host:port``, or none is given.
    """

    def __init__(self, cluster: Cluster, gateways: Sequence[str], dialer: Dialer | None = None) -> None:
        if not gateways:
            raise InvalidInput.of("the host:port of at least one gateway", where="--gateway", found="none")
        for address in gateways:
            check_gateway(address)
        self._cluster = cluster
        self._dialer = dialer or Dialer()
        self._addresses = tuple(dict.fromkeys(gateways))
        self._channels: list[grpc.aio.Channel] = []
        self.agents: dict[str, AgentClient] = {}
        self.gateways: dict[str, GatewayClient] = {}

    async def __aenter__(self) -> ClusterConnection:
        self.agents = {
            node.name: AgentClient(self._open(node.address), f"agent of {node.name} at {node.address}")
            for node in self._cluster.nodes
        }
        self.gateways = {
            address: GatewayClient(self._open(address), f"gateway at {address}") for address in self._addresses
        }
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.gather(*(channel.close(None) for channel in self._channels))

    async def states(
        self, *, timeout_s: float, with_desired: bool = False
    ) -> tuple[dict[str, AgentState], dict[str, GatewayState], dict[str, RemoteFailure]]:
        """Ask every peer for its state; return agents by node, gateways by address, and the failures by peer.

        ``with_desired``: ask agents for what they shall run as well.
        """
        (agents, lost_agents), (gateways, lost_gateways) = await asyncio.gather(
            gather({node: partial(self._agent_state, node, timeout_s, with_desired) for node in self.agents}),
            gather({name: partial(client.state, timeout_s=timeout_s) for name, client in self.gateways.items()}),
        )
        return agents, gateways, lost_agents | lost_gateways

    async def _agent_state(self, node: str, timeout_s: float, with_desired: bool) -> AgentState:
        client = self.agents[node]
        state = await client.state(timeout_s=timeout_s, with_desired=with_desired)
        if state.node != node:
            raise RemoteFailure(
                client.name, f"the agent there is that of node {state.node!r}; correct the addresses", retryable=False
            )
        return state

    def _open(self, address: str) -> grpc.aio.Channel:
        channel = self._dialer.open(address, channel_options(_MAX_MESSAGE_BYTES))
        self._channels.append(channel)
        return channel
