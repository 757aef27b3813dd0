"""The process on each node: ``foreplan agent``."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from grpc_health.v1 import health_pb2

from executor.agent_control import AgentServicer
from executor.agent_inference import InferenceServicer
from executor.agent_metrics import agent_metrics
from executor.cores import own_cores
from executor.forwarding import ForwardServer
from executor.grpc_server import HealthServicer, RpcServer, stop_signals
from executor.http_server import http_server, metrics_application
from executor.journal import Journal
from executor.logs import log_failure
from executor.metrics import exposition
from executor.mps import mps_is_running
from executor.node import Node, NodeSettings
from executor.proto import control_pb2, control_pb2_grpc, open_inference_pb2, open_inference_pb2_grpc
from executor.roles import Guard, Role
from executor.state import Phase
from executor.state_folder import locked_folder
from executor.tensors import TensorLimits
from executor.tls import Credentials, Dialer, TlsFiles, check_transport
from executor.tracing import NoSpans, Spans, start_tracing
from executor.worker_link import WorkerSettings
from executor.workflow_service import Workflows
from plans.errors import Fault, InvalidInput

__all__ = ["AgentConfig", "serve_agent"]

_log = logging.getLogger("executor.agent")

_Status = health_pb2.HealthCheckResponse

_CONTROL = control_pb2.DESCRIPTOR.services_by_name["Agent"].full_name
_INFERENCE = open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name

_STOP_GRACE_S = 2.0
"""How long calls may go on once the agent was told to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """What an agent is told at its start.

    Attributes:
        node: Name of the node.
        address: ``host:port`` to listen on; port 0 takes a free one.
        device_count: Devices of the node, numbered from 0.
        memory_bytes: Memory of one device.
        state_dir: Folder of the journal, made when missing.
        device: ``cpu`` or ``cuda``.
        runtime: ``module:factory`` of the runtime.
        dtype: Element type of weights and activations.
        threads: Threads that one device's worker may use for one operation on the CPU.
        model_dir: Folder of local models, or None.
        compiled: Whether workers run batches by torch.compile.
        cuda_graphs: Whether workers replay CUDA graphs.
        host_cache_bytes: Weights that each worker of one device keeps in host memory, to load models again quickly.
        swap_models: Whether models of a one-device group that the device cannot hold together are swapped between
            batches, from the host cache; without it such a plan is refused.
        pin_cores: Whether each device's worker gets processor cores of its own, as many as ``threads``.
        max_message_bytes: Largest message taken or sent.
        drain_s: How long a replica that left the plan may go on answering what it has taken.
        log_level: Of the workers.
        tls: Certificate, key and authorities; without them the agent speaks in the clear.
        insecure: Whether it may do so off loopback.
        metrics: ``host:port`` where Prometheus is answered; empty for nowhere.
        forward_port: Where gateways hand over requests; 0 takes a free port, which gateways are told.
        spare_worker: Whether to start a worker ahead, for the first model; without it an idle agent is one process.

    Raises:
        InvalidInput: A value is impossible; with every fault.
    """

    node: str
    address: str
    device_count: int
    memory_bytes: int
    state_dir: Path
    device: str = "cpu"
    runtime: str = "executor.runtime.group_runtime:TorchGroupRuntime"
    dtype: str = "fp32"
    threads: int = 1
    model_dir: Path | None = None
    compiled: bool = False
    cuda_graphs: bool = False
    host_cache_bytes: int = 0
    swap_models: bool = False
    pin_cores: bool = False
    max_message_bytes: int = 64 * 2**20
    drain_s: float = 30.0
    log_level: str = "INFO"
    tls: TlsFiles | None = None
    insecure: bool = False
    metrics: str = ""
    forward_port: int = 0
    spare_worker: bool = True

    def __post_init__(self) -> None:
        faults = [
            Fault(field=name, found=str(getattr(self, name)), expected="at least 1")
            for name in ("device_count", "memory_bytes", "threads", "max_message_bytes")
            if getattr(self, name) < 1
        ]
        if not self.node:
            faults.append(Fault(field="node", found="''", expected="the name of the node in the cluster document"))
        if self.host_cache_bytes < 0:
            faults.append(Fault(field="host_cache_bytes", found=str(self.host_cache_bytes), expected="at least 0"))
        if self.swap_models and (self.host_cache_bytes < 1 or self.compiled or self.cuda_graphs):
            expected = "a host cache, and neither compiled models nor CUDA graphs"
            faults.append(Fault(field="swap_models", found="swapping without", expected=expected))
        if self.drain_s < 0:
            faults.append(Fault(field="drain_s", found=str(self.drain_s), expected="at least 0 seconds"))
        if faults:
            raise InvalidInput(faults)


async def serve_agent(
    config: AgentConfig,
    *,
    on_ready: Callable[[int], None] = lambda port: None,
    stop: asyncio.Event | None = None,
) -> None:
    """Run an agent until it gets SIGTERM or SIGINT, or ``stop`` is set; then end its workers and return.

    Args:
        config: What the agent is.
        on_ready: Called with the port once the agent listens. Models may still be loading then.
        stop: Ends the agent from the same process.

    Raises:
        InvalidInput: The address cannot be listened on, or only with certificates; a certificate cannot be used, or is
            of another role; the state folder cannot be used or is in use; there are too few processor cores to pin
            workers to; or spans are asked for and cannot be recorded.
        BadStoredData: The journal is damaged, or that of another node.
    """
    stopping = stop or asyncio.Event()
    credentials = Credentials(config.tls, Role.AGENT) if config.tls else None
    check_transport(config.address, credentials, insecure=config.insecure, where="--listen")
    with locked_folder(config.state_dir, "agent") as folder, stop_signals(stopping):
        server = RpcServer(Role.AGENT, max_message_bytes=config.max_message_bytes, credentials=credentials)
        readiness = _Readiness(server.checks)
        node = Node(
            _node_settings(config),
            Journal(folder),
            on_change=lambda: readiness.update(node),
            on_move=lambda: services.workflows.follow(),
        )
        spans = start_tracing("foreplan-agent")
        services = _Services(config, node, server, credentials, spans)
        try:
            port = server.listen(config.address, (_CONTROL, _INFERENCE))
            await services.forward.listen(config.address.rpartition(":")[0], config.forward_port)
            await node.start()
            await server.checks.set("", _Status.SERVING)
            readiness.update(node)
            await server.start()
            async with services.metrics_server():
                _log.info("event=agent_listening node=%s port=%d", config.node, port)
                if config.device == "cuda":
                    _log.info("event=mps running=%s", mps_is_running())
                on_ready(port)
                await stopping.wait()
            _log.info("event=agent_stopping node=%s", config.node)
            services.forward.refuse()
            await server.checks.enter_graceful_shutdown()
        finally:
            await server.stop(_STOP_GRACE_S)
            await node.stop()
            await services.forward.close()
            await services.workflows.close()
            await readiness.close()
            spans.close()


class _Services:
    """What one agent answers with."""

    def __init__(
        self, config: AgentConfig, node: Node, server: RpcServer, credentials: Credentials | None, spans: NoSpans
    ) -> None:
        version = importlib.metadata.version("foreplan")
        self._config = config
        self._credentials = credentials
        limits = TensorLimits(total_bytes=config.max_message_bytes)
        recorded = spans if isinstance(spans, Spans) else None  # a span around nothing costs too
        self._inference = InferenceServicer(node, version=version, limits=limits, spans=recorded)
        self.workflows = self._inference.workflows = Workflows(
            node,
            self._inference.describe,
            dialer=Dialer(credentials),
            limits=limits,
            max_message_bytes=config.max_message_bytes,
            spans=recorded,
        )
        self.forward = ForwardServer(
            self._inference.forwarded,
            self._inference.wait_s,
            max_message_bytes=config.max_message_bytes,
            credentials=credentials,
        )
        self._control = AgentServicer(node, version=version, forward_port=lambda: self.forward.port)
        control_pb2_grpc.add_AgentServicer_to_server(self._control, server)  # type: ignore[no-untyped-call]
        register = open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server
        register(self._inference, server)  # type: ignore[no-untyped-call]

    @contextlib.asynccontextmanager
    async def metrics_server(self) -> AsyncIterator[None]:
        """Answer Prometheus inside the block, where an address for it is given."""
        if not self._config.metrics:
            yield
            return
        async with http_server(
            metrics_application(self._metrics, Guard(Role.AGENT) if self._credentials else None),
            self._config.metrics,
            where="--metrics",
            credentials=self._credentials,
            insecure=self._config.insecure,
        ) as port:
            _log.info("event=metrics_listening port=%d", port)
            yield

    async def _metrics(self) -> bytes:
        state, devices = await self._control.state(), await self._control.devices()
        ends = self._credentials.expires if self._credentials else None
        return exposition(agent_metrics(state, self._inference.counters(), devices), ends)


def _node_settings(config: AgentConfig) -> NodeSettings:
    return NodeSettings(
        node=config.node,
        device_count=config.device_count,
        memory_bytes=config.memory_bytes,
        drain_s=config.drain_s,
        spare_worker=config.spare_worker,
        worker=WorkerSettings(
            runtime=config.runtime,
            device=config.device,
            dtype=config.dtype,
            threads=config.threads,
            model_dir=config.model_dir,
            compiled=config.compiled,
            cuda_graphs=config.cuda_graphs,
            host_cache_bytes=config.host_cache_bytes,
            swap_bytes=config.memory_bytes if config.swap_models else 0,
            cores=own_cores(config.device_count, config.threads) if config.pin_cores else (),
            log_level=config.log_level,
        ),
    )


class _Readiness:
    """Keeps grpc.health.v1 in step with what serves; the empty name is the process, and serves from the start."""

    def __init__(self, checks: HealthServicer) -> None:
        self._checks = checks
        self._told: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def update(self, node: Node) -> None:
        """Tell what changed."""
        now = dict.fromkeys(self._told, _Status.SERVICE_UNKNOWN)
        for key, replica in node.upkeep.replicas.items():
            if replica.phase is Phase.SERVING:
                now[key.service] = _Status.SERVING
            elif now.get(key.service) != _Status.SERVING:
                now[key.service] = _Status.NOT_SERVING
        now |= {_CONTROL: _Status.SERVING, _INFERENCE: _Status.SERVING if node.ready else _Status.NOT_SERVING}
        for service, status in now.items():
            if self._told.get(service) != status:
                task = asyncio.get_running_loop().create_task(self._checks.set(service, status))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                task.add_done_callback(log_failure)
        self._told = now

    async def close(self) -> None:
        """Wait for what is being told."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
