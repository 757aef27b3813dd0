"""The front door of a cluster: the process ``foreplan gateway``.

Clients speak the Open Inference Protocol to it, and it forwards each request to an agent by the weights of the plan. It
has no state of its own but the routing table in force, which it keeps in a file.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from grpc_health.v1 import health_pb2

from executor.gateway_control import GatewayControl
from executor.gateway_inference import InferenceFrontDoor
from executor.gateway_journal import RoutingJournal
from executor.gateway_peer import INFERENCE, PeerTiming
from executor.gateway_switchboard import Switchboard
from executor.grpc_server import HealthServicer, RpcServer, stop_signals
from executor.logs import log_failure
from executor.proto import control_pb2_grpc
from executor.roles import Role
from executor.state_folder import locked_folder
from executor.tls import Credentials, Dialer, TlsFiles, check_transport

__all__ = ["GatewayConfig", "running_gateway", "serve_gateway"]

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
        tls: Certificate, key and authorities, towards callers and agents; without them everything is in the clear.
        insecure: Whether it may be so off loopback.
    """

    listen: str
    state_dir: Path
    max_message_bytes: int = 64 * 2**20
    poll_interval_s: float = 0.25
    poll_timeout_s: float = 0.7
    grace_s: float = 5.0
    tls: TlsFiles | None = None
    insecure: bool = False


async def serve_gateway(config: GatewayConfig, on_ready: Callable[[str], None] = lambda _: None) -> None:
    """Serve until SIGTERM or SIGINT, then let requests in flight end.

    Args:
        config: How to run.
        on_ready: Called once with the ``host:port`` that is listened on.

    Raises:
        InvalidInput: The address cannot be listened on, or only with certificates; a certificate cannot be used; or the
            state folder cannot be used or is in use.
        BadStoredData: The routing table stored in the state folder is damaged.
    """
    stop = asyncio.Event()
    with stop_signals(stop):
        async with running_gateway(config) as address:
            on_ready(address)
            await stop.wait()


@asynccontextmanager
async def running_gateway(config: GatewayConfig) -> AsyncIterator[str]:
    """Serve inside the block, without touching signals; yield the ``host:port`` that is listened on.

    Raises:
        InvalidInput: As for `serve_gateway`.
        BadStoredData: As for `serve_gateway`.
    """
    changed = asyncio.Event()
    credentials = Credentials(config.tls) if config.tls else None
    check_transport(config.listen, credentials, insecure=config.insecure, where="--listen")
    with locked_folder(config.state_dir, "gateway") as folder:
        switchboard = Switchboard(
            journal=RoutingJournal(folder),
            timing=PeerTiming(poll_interval_s=config.poll_interval_s, poll_timeout_s=config.poll_timeout_s),
            max_message_bytes=config.max_message_bytes,
            dialer=Dialer(credentials),
            on_change=changed.set,
        )
        server = RpcServer(Role.GATEWAY, max_message_bytes=config.max_message_bytes, credentials=credentials)
        checks = server.checks
        server.add_generic_rpc_handlers((InferenceFrontDoor(switchboard).handler(),))
        control_pb2_grpc.add_GatewayServicer_to_server(GatewayControl(switchboard), server)  # type: ignore[no-untyped-call]
        port = server.listen(config.listen, (INFERENCE, _CONTROL))
        switchboard.restore()
        reporter = asyncio.create_task(_report_health(switchboard, checks, changed), name="health")
        reporter.add_done_callback(log_failure)
        await server.start()
        try:
            yield f"{config.listen.rpartition(':')[0]}:{port}"
        finally:
            reporter.cancel()
            await asyncio.gather(reporter, return_exceptions=True)
            await checks.enter_graceful_shutdown()
            await server.stop(config.grace_s)
            await switchboard.close(0.0)


async def _report_health(switchboard: Switchboard, checks: HealthServicer, changed: asyncio.Event) -> None:
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
