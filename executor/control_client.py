"""Calls of the control plane, with inner types on both sides and one kind of error."""

from __future__ import annotations

import re
from collections.abc import Awaitable
from typing import Any

import grpc
import grpc.aio

from executor import wire
from executor.proto import control_pb2, control_pb2_grpc
from executor.state import AgentState, DesiredState, GatewayState, ReplicaKey, RoutingTable
from plans.errors import Fault, InvalidInput, RemoteFailure

__all__ = [
    "LEASE_METADATA",
    "AgentClient",
    "GatewayClient",
    "TimedOut",
    "Unreachable",
    "channel_options",
    "remote_failure",
]

LEASE_METADATA = "foreplan-lease"
"""Metadata key by which a controller says under which name it calls."""

_PASSING = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
}


_LAST_ERROR = "failed to connect to all addresses; last error: "
_PLACE = re.compile(r"([A-Z_]+: )?(ipv4|ipv6|unix):\S+: ")
"""What gRPC puts before a reason: a status that is not the call's, and where it was, which the peer's name says."""
_HINTS = {
    grpc.StatusCode.UNIMPLEMENTED: "another kind of process answers at this address, or an older one",
    grpc.StatusCode.PERMISSION_DENIED: "give an operator's certificate with --grpc-client-cert",
}
_SIGNS = {
    "CERTIFICATE_VERIFY_FAILED": "its certificate is of no authority in --grpc-root-cert, or has expired",
    "Hostname Verification": "its certificate is for other hosts: issue it with --host for this one",
    "before receiving SETTINGS": "it takes connections and says nothing: see its log, or start it again",
    "WRONG_VERSION_NUMBER": "it speaks in the clear: leave the certificates out",
    "Stream removed": "its connection broke: it ended, or its network",
    "Socket closed": "it may ask for a certificate that it trusts: --grpc-client-cert",
}
"""What words of gRPC and of its TLS library mean for the user; without the words there is no hint."""
_UNREACHABLE = ("Failed to connect", "errors resolving")


def channel_options(max_message_bytes: int) -> list[tuple[str, Any]]:
    """Return the options of every channel of the executor.

    Message limits; quick reconnects to a peer that was restarted; and a connection of its own for each channel, since a
    shared one would hand the failed attempts of a channel closed earlier on to the next.
    """
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 500),
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]


def remote_failure(peer: str, error: grpc.aio.AioRpcError) -> RemoteFailure:
    """Return a failed call to ``peer`` as one of our errors, retryable when its status is one that may pass."""
    code = error.code()
    details = (error.details() or "").strip() or "no details"
    details = details.rpartition(_LAST_ERROR)[2]  # what comes before it says no more
    place = _PLACE.match(details)
    details = details[place.end() :] if place else details
    hint = _HINTS.get(code, "") or next((hint for sign, hint in _SIGNS.items() if sign in details), "")
    details = f"{details} ({hint})" if hint else details
    return RemoteFailure(peer, f"{code.name}: {details}", retryable=code in _PASSING)


class TimedOut(RemoteFailure):
    """A call took longer than it was given."""


class Unreachable(RemoteFailure):
    """No connection came about: nothing runs there, or not there."""


async def _answer(peer: str, call: Awaitable[Any], timeout_s: float) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        failure = remote_failure(peer, error)
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            failure = TimedOut(peer, f"DEADLINE_EXCEEDED: not done within {timeout_s:g} s", retryable=True)
        elif any(sign in failure.problem for sign in _UNREACHABLE):
            failure = Unreachable(peer, failure.problem, retryable=True)
        raise failure from error


class AgentClient:
    """Calls to one agent; ``name`` is how failures call it. Every method raises `RemoteFailure` when its call fails.

    Attributes:
        holder: The controller under whose name the calls are made; see `executor.lease`.
    """

    def __init__(self, channel: grpc.aio.Channel, name: str) -> None:
        self.name = name
        self.holder = ""
        self._stub = control_pb2_grpc.AgentStub(channel)  # type: ignore[no-untyped-call]

    async def state(self, *, timeout_s: float, with_desired: bool = False) -> AgentState:
        """Return what the agent reports of its node; with what it shall run, if that is asked for."""
        call = self._stub.GetState(control_pb2.GetStateRequest(with_desired=with_desired), timeout=timeout_s)
        message = await _answer(self.name, call, timeout_s)
        try:
            return wire.agent_state_from_proto(message)
        except InvalidInput as error:
            problem = f"its answer is not one that this version knows: {error}"
            raise RemoteFailure(self.name, problem, retryable=False) from error

    async def validate(
        self, desired: DesiredState, *, timeout_s: float
    ) -> tuple[tuple[Fault, ...], tuple[ReplicaKey, ...]]:
        """Return every reason why the node cannot run ``desired``, and what would have to wait for memory.

        The agent changes nothing.
        """
        call = self._stub.Validate(wire.desired_state_to_proto(desired), timeout=timeout_s, metadata=self._metadata)
        return wire.validation_from_proto(await _answer(self.name, call, timeout_s), where=self.name)

    async def stage(self, desired: DesiredState, *, timeout_s: float) -> tuple[ReplicaKey, ...]:
        """Load what ``desired`` adds beside what runs; return the replicas that must wait for memory."""
        call = self._stub.Stage(wire.desired_state_to_proto(desired), timeout=timeout_s, metadata=self._metadata)
        return wire.stage_response_from_proto(await _answer(self.name, call, timeout_s))

    async def commit(self, generation: int, digest: str, *, timeout_s: float) -> None:
        """Let replicas staged for the plan ``digest`` as ``generation`` take requests."""
        await self._move(self._stub.Commit, generation, digest, timeout_s)

    async def finish(self, generation: int, digest: str, *, timeout_s: float) -> None:
        """Drain and unload what left the plan, then load what waited for memory."""
        await self._move(self._stub.Finish, generation, digest, timeout_s)

    async def abort(self, generation: int, digest: str, *, timeout_s: float) -> None:
        """Take everything of the plan ``digest`` as ``generation`` back."""
        await self._move(self._stub.Abort, generation, digest, timeout_s)

    async def lease(self, holder: str, ttl_s: float, *, timeout_s: float) -> str:
        """Ask for the node's lease, or with 0 seconds give it back; return who else has it, or nothing."""
        call = self._stub.Lease(control_pb2.LeaseRequest(holder=holder, ttl_s=ttl_s), timeout=timeout_s)
        answer = await _answer(self.name, call, timeout_s)
        return "" if answer.granted else str(answer.holder)

    async def drain(self, drained: bool, *, timeout_s: float) -> None:
        """Take the node out of the rotation of every gateway, or back into it."""
        request = control_pb2.DrainRequest(drained=drained)
        call = self._stub.Drain(request, timeout=timeout_s, metadata=self._metadata)
        await _answer(self.name, call, timeout_s)

    async def _move(self, call: Any, generation: int, digest: str, timeout_s: float) -> None:
        request = control_pb2.GenerationRequest(generation=generation, placement_digest=digest)
        await _answer(self.name, call(request, timeout=timeout_s, metadata=self._metadata), timeout_s)

    @property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return ((LEASE_METADATA, self.holder),) if self.holder else ()


class GatewayClient:
    """Calls to one gateway; as `AgentClient`."""

    def __init__(self, channel: grpc.aio.Channel, name: str) -> None:
        self.name = name
        self._stub = control_pb2_grpc.GatewayStub(channel)  # type: ignore[no-untyped-call]

    async def state(self, *, timeout_s: float) -> GatewayState:
        """Return what the gateway reports of itself."""
        call = self._stub.GetState(control_pb2.GetStateRequest(), timeout=timeout_s)
        return wire.gateway_state_from_proto(await _answer(self.name, call, timeout_s))

    async def set_routes(self, table: RoutingTable, *, timeout_s: float) -> None:
        """Put ``table`` in force."""
        call = self._stub.SetRoutes(wire.routing_table_to_proto(table), timeout=timeout_s)
        await _answer(self.name, call, timeout_s)
