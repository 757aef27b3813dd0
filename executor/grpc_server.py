"""What the servers of agents and gateways have in common: TLS and roles, the address, health, and how they end.

Bytes that are no request are INVALID_ARGUMENT in every call.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer

from executor.logs import log_failure
from executor.request_reading import reading
from executor.roles import Guard, Role
from executor.tls import Credentials
from plans.errors import InvalidInput

__all__ = ["HealthServicer", "RpcServer", "check_free", "stop_signals"]


def _is_ours(record: logging.LogRecord) -> bool:
    """Say whether a problem is the server's: an answer that cannot be sent had a client that is gone by now."""
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, grpc.aio.InternalError) and type(error).__name__ == "ExecuteBatchError")


logging.getLogger("grpc._cython.cygrpc").addFilter(_is_ours)


class RpcServer:
    """A gRPC server that answers health checks and reflection, and lets everybody do what their role allows.

    It takes what the generated ``add_…_to_server`` functions give it.

    Args:
        role: `Role.AGENT` or `Role.GATEWAY`: decides who may call what.
        max_message_bytes: Largest message taken or sent.
        credentials: For TLS; without them everything is in the clear and open.
        shared_port: Whether other processes may listen on the same port and share its connections.

    Attributes:
        checks: Answers grpc.health.v1.
    """

    def __init__(
        self,
        role: Role,
        *,
        max_message_bytes: int,
        credentials: Credentials | None = None,
        shared_port: bool = False,
    ) -> None:
        self._server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", int(shared_port)),  # by accident a second process would silently share the port
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
            ]
        )
        self._shared_port = shared_port
        self._credentials = credentials
        self._guard = Guard(role) if credentials else None
        self.checks = HealthServicer()
        self._reminding: asyncio.Task[None] | None = None

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler[Any, Any]]) -> None:
        """Register handlers, behind the guard where there is one."""
        guard, inside = self._guard, [reading(one) for one in handlers]
        self._server.add_generic_rpc_handlers(tuple(guard.guarded(one) if guard else one for one in inside))

    def add_registered_method_handlers(self, service_name: str, method_handlers: Any) -> None:
        """Do nothing, as grpc.aio does: the generic handlers name the same methods."""

    def listen(self, address: str, services: tuple[str, ...]) -> int:
        """Listen on ``address`` (``host:port``, port 0 takes a free one), tell of ``services``, and return the port.

        Raises:
            InvalidInput: It is no address, or one that cannot be listened on.
        """
        names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        # Last: gRPC asks one after the other for the handler of a call.
        health_pb2_grpc.add_HealthServicer_to_server(self.checks, self)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(ReflectionServicer(names), self)
        host, _, port = address.rpartition(":")
        if not (host and port.isdigit() and int(port) < 65536):
            raise InvalidInput.of("host:port, such as 127.0.0.1:8001", where="--listen", found=repr(address))
        try:
            if not self._shared_port:
                check_free(host, int(port))  # gRPC would write of a taken one to stderr before it says so
            if self._credentials is None:
                bound = self._server.add_insecure_port(address)
            else:
                bound = self._server.add_secure_port(address, self._credentials.server())
        except (OSError, RuntimeError, UnicodeError) as error:
            raise _unusable(address) from error
        if bound == 0:
            raise _unusable(address)
        return int(bound)

    async def start(self) -> None:
        """Begin to answer."""
        await self._server.start()
        if self._credentials is not None:
            self._reminding = asyncio.create_task(_remind(self._credentials), name="certificates")
            self._reminding.add_done_callback(log_failure)

    async def stop(self, grace_s: float) -> None:
        """Stop; calls in flight get ``grace_s`` seconds to end."""
        if self._reminding is not None:
            self._reminding.cancel()
        await self._server.stop(grace_s)


async def _remind(credentials: Credentials) -> None:
    """Look after the certificate of a server that nobody may be connecting to."""
    while True:
        credentials.refresh()
        credentials.remind(datetime.now(UTC))
        await asyncio.sleep(_LOOK_S)


_LOOK_S = 60.0
"""How often the certificate in use is looked at."""


def check_free(host: str, port: int) -> None:
    """Bind a socket that shares its port with no other, and close it.

    Raises:
        OSError: That is not possible.
        UnicodeError: ``host`` can be no name.
    """
    found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, place = found[0]
    with socket.socket(family, kind, protocol) as alone:
        alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        alone.bind(place)


def _unusable(address: str) -> InvalidInput:
    remedy = "stop what listens there, or choose another address"
    expected = "an address of this machine with a free port"
    return InvalidInput.of(expected, where="--listen", found=address, remedy=remedy)


@contextlib.contextmanager
def stop_signals(stopping: asyncio.Event) -> Iterator[None]:
    """Set ``stopping`` on SIGTERM and SIGINT, where this thread may listen to signals."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    for number in signals:
        loop.add_signal_handler(number, stopping.set)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
