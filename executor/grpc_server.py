"""What the servers of agents and gateways have in common: options, the address, health checks, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Iterator

import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from plans.errors import InvalidInput

__all__ = ["HealthServicer", "listen", "new_server", "stop_signals"]


def new_server(max_message_bytes: int) -> tuple[grpc.aio.Server, HealthServicer]:
    """Return a server that answers health checks, and what these answer."""
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),  # or a second process would silently share the port
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
        ]
    )
    checks = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    return server, checks


def listen(server: grpc.aio.Server, address: str, services: tuple[str, ...]) -> int:
    """Listen on ``address`` (``host:port``, port 0 takes a free one), tell of ``services``, and return the port.

    Raises:
        InvalidInput: It is no address, or one that cannot be listened on.
    """
    names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit() and int(port) < 65536):
        raise InvalidInput.of("host:port, such as 127.0.0.1:8001", where="--listen", found=repr(address))
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise _unusable(address) from error
    if bound == 0:
        raise _unusable(address)
    return int(bound)


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
