"""The front door of a cluster: the process ``foreplan gateway``.

Clients speak the Open Inference Protocol to it, and it forwards each request to an agent by the weights of the plan. It
has no state of its own but the routing table in force, which it keeps in a file.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from executor.gateway_control import GatewayControl
from executor.gateway_inference import InferenceFrontDoor
from executor.gateway_journal import RoutingJournal
from executor.gateway_peer import INFERENCE, PeerTiming
from executor.gateway_switchboard import Switchboard
from executor.proto import control_pb2_grpc
from plans.errors import InvalidInput

__all__ = ["GatewayConfig", "running_gateway", "serve_gateway"]

_aio_health: Any = vars(health)["aio"]  # the published stubs do not know it
_CONTROL = "foreplan.control.v1.Gateway"
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """How to run a gateway.

    Attributes:
        listen: ``host:port``; port 0 takes a free one.
        state_dir: Folder for the routing table in force; made when missing.
        max_message_bytes: Largest request and answer.
        poll_interval_s: Seconds between two questions for an agent's state.
        poll_timeout_s: Seconds without an answer after which an agent counts as lost. Together with the interval this
            bounds how long a machine that hangs stays in the rotation.
        grace_s: Seconds that requests in flight get when the gateway is told to stop.
    """

    listen: str
    state_dir: Path
    max_message_bytes: int = 64 * 2**20
    poll_interval_s: float = 0.25
    poll_timeout_s: float = 0.7
    grace_s: float = 5.0


async def serve_gateway(config: GatewayConfig, on_ready: Callable[[str], None] = lambda _: None) -> None:
    """Serve until SIGTERM or SIGINT, then let requests in flight end.

    Args:
        config: How to run.
        on_ready: Called once with the ``host:port`` that is listened on.

    Raises:
        InvalidInput: The address cannot be listened on, or the state folder cannot be made.
        BadStoredData: The routing table stored in the state folder is damaged.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    try:
        async with running_gateway(config) as address:
            on_ready(address)
            await stop.wait()
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


@asynccontextmanager
async def running_gateway(config: GatewayConfig) -> AsyncIterator[str]:
    """Serve inside the block, without touching signals; yield the ``host:port`` that is listened on.

    Raises:
        InvalidInput: As for `serve_gateway`.
        BadStoredData: As for `serve_gateway`.
    """
    changed = asyncio.Event()
    switchboard = Switchboard(
        journal=RoutingJournal(_folder(config.state_dir)),
        timing=PeerTiming(poll_interval_s=config.poll_interval_s, poll_timeout_s=config.poll_timeout_s),
        max_message_bytes=config.max_message_bytes,
        on_change=changed.set,
    )
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", config.max_message_bytes),
            ("grpc.max_send_message_length", config.max_message_bytes),
        ]
    )
    checks = _aio_health.HealthServicer()
    server.add_generic_rpc_handlers((InferenceFrontDoor(switchboard).handler(),))
    control_pb2_grpc.add_GatewayServicer_to_server(GatewayControl(switchboard), server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((INFERENCE, _CONTROL, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    address = _bind(server, config.listen)
    switchboard.restore()
    reporter = asyncio.create_task(_report_health(switchboard, checks, changed), name="health")
    await server.start()
    try:
        yield address
    finally:
        reporter.cancel()
        await asyncio.gather(reporter, return_exceptions=True)
        await checks.enter_graceful_shutdown()
        await server.stop(config.grace_s)
        await switchboard.close(0.0)


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput.of("a folder that can be made", where="--state-dir", found=error) from error
    return path


def _bind(server: grpc.aio.Server, listen: str) -> str:
    """Listen on ``listen`` and return it with the port that was taken."""
    host, colon, port = listen.rpartition(":")
    if not (host and colon and port.isdigit() and int(port) < 65536):
        raise InvalidInput.of("host:port, such as 127.0.0.1:8001", where="--listen", found=repr(listen))
    try:
        bound = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise InvalidInput.of(
            "an address that is free",
            where="--listen",
            found=listen,
            remedy="another process listens there, or this machine has no such address; stop it, or choose another",
        ) from error
    return f"{host}:{bound}"


async def _report_health(switchboard: Switchboard, checks: Any, changed: asyncio.Event) -> None:
    """Keep grpc.health.v1 in step: one entry per service of the plan, and one per gRPC service."""
    reported: dict[str, int] = {}
    while True:
        changed.clear()
        router = switchboard.router
        wanted = dict.fromkeys(_gone(reported, router.services), _UNKNOWN)
        wanted |= {name: _NOT_SERVING if router.problem(name) else _SERVING for name in router.services}
        wanted |= {INFERENCE: _SERVING if router.ready else _NOT_SERVING, _CONTROL: _SERVING}
        for name, status in wanted.items():
            if reported.get(name) != status:
                await checks.set(name, status)
        reported = wanted
        await changed.wait()


def _gone(reported: Iterable[str], services: Iterable[str]) -> set[str]:
    return set(reported) - set(services) - {INFERENCE, _CONTROL}
