"""One process of the front door of a cluster. ``foreplan gateway`` runs one, or several on one port.

Clients speak the Open Inference Protocol to it, by gRPC or HTTP, and it forwards each request to an agent by the
weights of the plan. It has no state of its own but the routing table in force, which it keeps in a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from grpc_health.v1 import health_pb2

from executor.gateway_control import GatewayControl
from executor.gateway_family import Family, Member
from executor.gateway_http import gateway_application
from executor.gateway_inference import InferenceFrontDoor
from executor.gateway_journal import RoutingJournal
from executor.gateway_peer import INFERENCE, PeerTiming
from executor.gateway_switchboard import Switchboard
from executor.grpc_server import HealthServicer, RpcServer, stop_signals
from executor.http_server import http_server, metrics_application
from executor.logs import log_failure
from executor.metrics import exposition
from executor.proto import control_pb2_grpc
from executor.roles import Guard, Role
from executor.routing import Routing
from executor.state import GatewayState
from executor.state_folder import locked_folder, made_folder
from executor.tls import Credentials, Dialer, TlsFiles, check_transport
from executor.tracing import Spans, start_tracing

__all__ = ["GatewayConfig", "running_gateway", "serve_gateway"]

_log = logging.getLogger("executor.gateway")

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
        http: ``host:port`` of the HTTP form of the protocol; empty for none.
        metrics: ``host:port`` where Prometheus is answered; empty for none. Of several processes the first one listens
            there, and the others on the ports that follow.
        max_message_bytes: Largest request and answer.
        routing: How a request finds its replica (`executor.routing`).
        max_in_flight: Requests that one process holds at once; more are refused with RESOURCE_EXHAUSTED.
        poll_interval_s: Seconds between two questions for an agent's state.
        poll_timeout_s: Seconds without an answer after which an agent counts as lost. Together with the interval this
            bounds how long a machine that hangs stays in the rotation.
        pin_cores: Whether each process keeps to a processor core of its own, the last ones of those it may use: the
            threads that hand a request on then wake each other without a way from core to core.
        grace_s: Seconds that requests in flight get when the gateway is told to stop.
        tls: Certificate, key and authorities, towards callers and agents; without them everything is in the clear.
        insecure: Whether it may be so off loopback.
    """

    listen: str
    state_dir: Path
    http: str = ""
    metrics: str = ""
    max_message_bytes: int = 64 * 2**20
    routing: Routing = "corrected"
    max_in_flight: int = 8192
    poll_interval_s: float = 0.25
    poll_timeout_s: float = 0.7
    pin_cores: bool = False
    grace_s: float = 5.0
    tls: TlsFiles | None = None
    insecure: bool = False


async def serve_gateway(
    config: GatewayConfig,
    on_ready: Callable[[str], None] = lambda _: None,
    *,
    member: Member | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, or until ``stop`` is set, then let requests in flight end.

    Args:
        config: How to run.
        on_ready: Called once with the ``host:port`` that is listened on.
        member: Which of several processes this is; None for the only one.
        stop: Ends it from the same process.

    Raises:
        InvalidInput: The address cannot be listened on, or only with certificates; a certificate cannot be used, or is
            of another role; or the state folder cannot be used or is in use.
        BadStoredData: The routing table stored in the state folder is damaged.
    """
    stopping = stop or asyncio.Event()
    with stop_signals(stopping):
        async with running_gateway(config, member=member) as address:
            on_ready(address)
            await stopping.wait()


@asynccontextmanager
async def running_gateway(config: GatewayConfig, *, member: Member | None = None) -> AsyncIterator[str]:
    """Serve inside the block, without touching signals; yield the ``host:port`` that is listened on.

    Raises:
        InvalidInput: As for `serve_gateway`.
        BadStoredData: As for `serve_gateway`.
    """
    credentials = Credentials(config.tls, Role.GATEWAY) if config.tls else None
    check_transport(config.listen, credentials, insecure=config.insecure, where="--listen")
    async with contextlib.AsyncExitStack() as running:
        alone = member is None  # of several, the process that started them holds the folder
        folder = (
            running.enter_context(locked_folder(config.state_dir, "gateway"))
            if alone
            else made_folder(config.state_dir)
        )
        process = _Process(config, folder, credentials, member)
        port = process.server.listen(config.listen, (INFERENCE, _CONTROL))
        process.switchboard.restore()
        await running.enter_async_context(process.serving())
        yield f"{config.listen.rpartition(':')[0]}:{port}"


class _Process:
    """What one gateway process is made of."""

    def __init__(
        self, config: GatewayConfig, folder: Path, credentials: Credentials | None, member: Member | None
    ) -> None:
        self._config = config
        self._member = member
        self._credentials = credentials
        self._changed = asyncio.Event()
        self.switchboard = Switchboard(
            journal=RoutingJournal(folder),
            timing=PeerTiming(poll_interval_s=config.poll_interval_s, poll_timeout_s=config.poll_timeout_s),
            max_message_bytes=config.max_message_bytes,
            dialer=Dialer(credentials),
            on_change=self._changed.set,
            routing=config.routing,
        )
        self._spans = start_tracing("foreplan-gateway")
        recorded = self._spans if isinstance(self._spans, Spans) else None  # a span around nothing costs too
        self._door = InferenceFrontDoor(self.switchboard, max_in_flight=config.max_in_flight, spans=recorded)
        self._family = (
            Family(member, self.switchboard, self._state, max_message_bytes=config.max_message_bytes)
            if member
            else None
        )
        self.server = RpcServer(
            Role.GATEWAY,
            max_message_bytes=config.max_message_bytes,
            credentials=credentials,
            shared_port=member is not None,
        )
        self.server.add_generic_rpc_handlers((self._door.handler(),))
        if self._family is None:
            control = GatewayControl(self.switchboard.install, self._state_of_all)
        else:
            control = GatewayControl(self._family.install, self._family.state)
        control_pb2_grpc.add_GatewayServicer_to_server(control, self.server)  # type: ignore[no-untyped-call]

    def _state(self) -> GatewayState:
        router = self.switchboard.router
        table = router.table
        return GatewayState(
            version=version("foreplan"),
            generation=table.generation if table else 0,
            placement_digest=table.placement_digest if table else "",
            targets=tuple(router.health()),
            ready=router.ready,
        )

    async def _state_of_all(self) -> GatewayState:
        return self._state()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Answer everything inside the block; then let requests in flight end."""
        reporter = asyncio.create_task(
            _report_health(self.switchboard, self.server.checks, self._changed), name="health"
        )
        reporter.add_done_callback(log_failure)
        async with contextlib.AsyncExitStack() as beside:
            try:
                if self._family is not None:
                    await self._family.start()
                    beside.push_async_callback(self._family.close)
                for name, server in self._http_servers():
                    port = await beside.enter_async_context(server)
                    _log.info("event=%s_listening port=%d", name, port)
                await self.server.start()
                yield
            finally:
                reporter.cancel()
                await asyncio.gather(reporter, return_exceptions=True)
                await self.server.checks.enter_graceful_shutdown()
                stopping = asyncio.create_task(self.server.stop(self._config.grace_s))
                await beside.aclose()  # meanwhile: calls by HTTP get as long, and not after those by gRPC
                await stopping
                await self.switchboard.close(0.0)
                self._spans.close()

    def _http_servers(self) -> list[tuple[str, contextlib.AbstractAsyncContextManager[int]]]:
        config, member = self._config, self._member
        servers: list[tuple[str, contextlib.AbstractAsyncContextManager[int]]] = []
        guard = Guard(Role.GATEWAY) if self._credentials else None
        if config.http:
            http = http_server(
                gateway_application(self._door, guard, config.max_message_bytes),
                config.http,
                where="--http",
                credentials=self._credentials,
                insecure=config.insecure,
                shared_port=member is not None,
            )
            servers.append(("http", http))
        if config.metrics:
            host, _, port = config.metrics.rpartition(":")
            address = (
                f"{host}:{int(port) + member.index}" if member and port.isdigit() and port != "0" else config.metrics
            )
            metrics = http_server(
                metrics_application(self._metrics, guard),
                address,
                where="--metrics",
                credentials=self._credentials,
                insecure=config.insecure,
            )
            servers.append(("metrics", metrics))
        return servers

    async def _metrics(self) -> bytes:
        return exposition(
            self._door.metrics.collect(self.switchboard.router),
            self._credentials.expires if self._credentials else None,
        )


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
