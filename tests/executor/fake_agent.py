# ruff: noqa: N802 - the methods carry the protocol's names
"""An agent without workers, and a gateway without clients: the control protocol's state machines, made to fail at will.

They run in the test's own event loop on loopback ports. `fail` makes the next calls of a method end with a
status, before or after the method had its effect.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Self

import grpc
import grpc.aio
from google.protobuf.message import Message

from executor import wire
from executor.forwarding import Body, CallFailed, ForwardServer
from executor.gateway_peer import INFERENCE
from executor.infer_header import GROUP_METADATA
from executor.lease import Lease
from executor.proto import control_pb2, control_pb2_grpc
from executor.proto import open_inference_pb2 as inference
from executor.state import (
    AgentState,
    DesiredState,
    GatewayState,
    Phase,
    ReplicaKey,
    ReplicaState,
    RoutingTable,
    TargetState,
)
from plans.errors import Fault


class _Scripted:
    """A gRPC server on a loopback port whose methods fail when told to."""

    def __init__(self) -> None:
        self.address = ""
        self.calls: list[str] = []
        self.held: dict[str, asyncio.Event] = {}
        self._failures: dict[str, list[tuple[grpc.StatusCode, bool]]] = defaultdict(list)
        self._server: grpc.aio.Server | None = None

    def register(self, server: grpc.aio.Server) -> None:
        raise NotImplementedError

    async def start(self) -> Self:
        """Listen: on a free port the first time, on the same one after `kill`."""
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self.register(server)
        port = server.add_insecure_port(self.address or "127.0.0.1:0")
        self.address = self.address or f"127.0.0.1:{port}"
        await server.start()
        self._server = server
        return self

    async def kill(self) -> None:
        """Stop at once, and keep the state, as a journal would."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(None)

    def fail(self, method: str, status: grpc.StatusCode, *, times: int = 1, after_effect: bool = False) -> None:
        self._failures[method] += [(status, after_effect)] * times

    def heal(self) -> None:
        self._failures.clear()

    def hold(self, method: str) -> asyncio.Event:
        """Let calls of ``method`` wait until the event returned is set."""
        return self.held.setdefault(method, asyncio.Event())

    async def answer(self, method: str, context: Any, effect: Callable[[], Any]) -> Any:
        self.calls.append(method)
        if method in self.held:
            await self.held[method].wait()
        status, after_effect = self._failures[method].pop(0) if self._failures[method] else (None, False)
        if status is not None and not after_effect:
            await context.abort(status, f"{method} fails on purpose")
        answer = effect()
        if status is not None:
            await context.abort(status, f"{method} fails on purpose, after its effect")
        return answer


class FakeAgent(_Scripted, control_pb2_grpc.AgentServicer):
    def __init__(self, node: str) -> None:
        super().__init__()
        self.node = node
        self.generation = 0
        self.digest = ""
        self.desired: DesiredState | None = None
        self.staged: DesiredState | None = None
        self.before: tuple[int, str, DesiredState | None, dict[ReplicaKey, Phase]] | None = None
        self.phases: dict[ReplicaKey, Phase] = {}
        self.no_room_for: set[ReplicaKey] = set()
        self.faults: list[Fault] = []
        self.served: list[tuple[str, bytes]] = []
        self.infer_status: grpc.StatusCode | None = None
        self.infer_waits_for: asyncio.Event | None = None
        self.remaining_s: list[float | None] = []
        self.wait_s = 0.0
        self.drained = False
        self.lease = Lease()
        self.forward: ForwardServer | None = None

    async def start(self) -> Self:
        self.forward = ForwardServer(self._forwarded, lambda group: self.wait_s, max_message_bytes=1 << 26)
        await self.forward.listen("127.0.0.1")
        return await super().start()

    async def kill(self) -> None:
        if self.forward is not None:
            await self.forward.close()
        await super().kill()

    def register(self, server: grpc.aio.Server) -> None:
        control_pb2_grpc.add_AgentServicer_to_server(self, server)
        methods = {
            "ModelInfer": grpc.unary_unary_rpc_method_handler(self._infer),
            "ModelMetadata": grpc.unary_unary_rpc_method_handler(self._metadata),
            "ModelStatistics": grpc.unary_unary_rpc_method_handler(self._statistics),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._stream),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(INFERENCE, methods),))

    def serve(self, *keys: ReplicaKey) -> None:
        """Report these replicas as serving, without any apply."""
        self.phases |= dict.fromkeys(keys, Phase.SERVING)

    @property
    def state(self) -> AgentState:
        wanted = set(self.desired.keys()) if self.desired else set()
        return AgentState(
            node=self.node,
            version="fake",
            generation=self.generation,
            placement_digest=self.digest,
            staged_generation=self.staged.generation if self.staged else 0,
            replicas=tuple(ReplicaState(key=key, phase=phase) for key, phase in sorted(self.phases.items())),
            drained=self.drained,
            leased_to=self.lease.holder(time.monotonic()),
            forward_port=self.forward.port if self.forward else 0,
            committed=self.desired,
            staged=self.staged,
            underway=self.desired.underway if self.desired else False,
            ready=wanted <= {key for key, phase in self.phases.items() if phase is Phase.SERVING},
        )

    # The control protocol.

    async def GetState(self, _: Any, context: Any) -> control_pb2.AgentState:
        return await self.answer("GetState", context, lambda: wire.agent_state_to_proto(self.state))

    async def Validate(self, request: control_pb2.DesiredState, context: Any) -> control_pb2.ValidateResponse:
        wire.desired_state_from_proto(request)
        return await self.answer("Validate", context, lambda: wire.faults_to_proto(self.faults))

    async def Stage(self, request: control_pb2.DesiredState, context: Any) -> control_pb2.StageResponse:
        desired = wire.desired_state_from_proto(request)
        await self._fence(desired.generation, context)
        return await self.answer("Stage", context, lambda: wire.stage_response_to_proto(self._stage(desired)))

    async def Commit(self, request: control_pb2.GenerationRequest, context: Any) -> control_pb2.GenerationResponse:
        await self._fence(request.generation, context)
        named = (request.generation, request.placement_digest)
        if named not in ((self.generation, self.digest), self._staged_name):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this generation is not staged")
        return await self.answer("Commit", context, lambda: self._commit(request.generation))

    async def Finish(self, request: control_pb2.GenerationRequest, context: Any) -> control_pb2.GenerationResponse:
        if (self.generation, self.digest) != (request.generation, request.placement_digest):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this generation is not committed")
        return await self.answer("Finish", context, lambda: self._finish(request.generation))

    async def Abort(self, request: control_pb2.GenerationRequest, context: Any) -> control_pb2.GenerationResponse:
        await self._fence(request.generation, context)
        return await self.answer("Abort", context, lambda: self._abort((request.generation, request.placement_digest)))

    async def Lease(self, request: control_pb2.LeaseRequest, context: Any) -> control_pb2.LeaseResponse:
        now_s = time.monotonic()

        def effect() -> control_pb2.LeaseResponse:
            granted = self.lease.ask(request.holder, request.ttl_s, now_s)
            return control_pb2.LeaseResponse(granted=granted, holder=self.lease.holder(now_s))

        return await self.answer("Lease", context, effect)

    async def Drain(self, request: control_pb2.DrainRequest, context: Any) -> control_pb2.DrainResponse:
        def effect() -> control_pb2.DrainResponse:
            self.drained = request.drained
            return control_pb2.DrainResponse(drained=request.drained)

        return await self.answer("Drain", context, effect)

    def _stage(self, desired: DesiredState) -> Iterable[ReplicaKey]:
        if desired.generation == self.generation:
            return ()
        self.staged = desired
        wanted = desired.keys()
        missing = [key for key in wanted if key not in self.phases]
        deferred = [key for key in missing if key in self.no_room_for and self.phases]
        self.phases |= {key: Phase.STAGED for key in missing if key not in deferred}
        return deferred

    def _commit(self, generation: int) -> Message:
        if self.staged is not None:
            self.before = (self.generation, self.digest, self.desired, dict(self.phases))
            self.desired, self.staged = self.staged, None
            self.generation, self.digest = generation, self.desired.placement_digest
            self.phases = dict.fromkeys(self.phases, Phase.SERVING)
        return control_pb2.GenerationResponse(generation=generation)

    def _finish(self, generation: int) -> Message:
        assert self.desired is not None
        self.before = None
        self.phases = dict.fromkeys(self.desired.keys(), Phase.SERVING)
        return control_pb2.GenerationResponse(generation=generation)

    @property
    def _staged_name(self) -> tuple[int, str]:
        return (self.staged.generation, self.staged.placement_digest) if self.staged else (0, "")

    def _abort(self, named: tuple[int, str]) -> Message:
        is_committed, is_staged = named == (self.generation, self.digest), named == self._staged_name
        if self.before is not None and is_committed:
            self.generation, self.digest, self.desired, _ = self.before
        if is_staged or (self.before is not None and is_committed):
            self.before, self.staged = None, None
            wanted = set(self.desired.keys()) if self.desired else set()
            self.phases = {key: phase for key, phase in self.phases.items() if key in wanted}
        return control_pb2.GenerationResponse(generation=self.generation)

    async def _fence(self, generation: int, context: Any) -> None:
        seen = max(self.generation, self.staged.generation if self.staged else 0)
        if generation < seen:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"generation {seen} was seen already")

    # The data plane.

    async def _infer(self, request: bytes, context: Any) -> bytes:
        metadata = dict(context.invocation_metadata())
        try:
            return await self._forwarded(request, metadata[GROUP_METADATA], context.time_remaining())
        except CallFailed as failed:
            await context.abort(failed.code, failed.details)

    async def _statistics(self, _: bytes, context: Any) -> bytes:
        def effect() -> bytes:
            stats = inference.ModelStatistics(name="chat", version="1", inference_count=len(self.served))
            return inference.ModelStatisticsResponse(model_stats=[stats]).SerializeToString()

        return bytes(await self.answer("ModelStatistics", context, effect))

    async def _stream(self, requests: Any, context: Any) -> Any:
        async for request in requests:
            answer = inference.ModelInferResponse.FromString(await self._infer(request, context))
            yield inference.ModelStreamInferResponse(infer_response=answer).SerializeToString()

    async def _forwarded(self, body: Body, group: str, timeout_s: float) -> bytes:
        request = bytes(body)
        self.served.append((group, request))
        self.remaining_s.append(timeout_s)
        if self.infer_waits_for is not None:
            await self.infer_waits_for.wait()
        if self.infer_status is not None:
            raise CallFailed(self.infer_status, f"{self.node} answers so on purpose")
        asked = inference.ModelInferRequest.FromString(request)
        answer = inference.ModelInferResponse(model_name=asked.model_name, id=asked.id)
        answer.parameters["variant"].string_param = self.node
        answer.raw_output_contents.extend(asked.raw_input_contents)
        return answer.SerializeToString()

    async def _metadata(self, request: bytes, context: Any) -> bytes:
        asked = inference.ModelMetadataRequest.FromString(request)
        answer = inference.ModelMetadataResponse(name=asked.name, versions=["1"], platform="fake")
        for field, name in ((answer.inputs, "x"), (answer.outputs, "y")):
            field.add(name=name, datatype="FP32", shape=[-1, 4])
        return answer.SerializeToString()


class FakeGateway(_Scripted, control_pb2_grpc.GatewayServicer):
    """A gateway that keeps every table it was given, and forwards nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[RoutingTable] = []

    def register(self, server: grpc.aio.Server) -> None:
        control_pb2_grpc.add_GatewayServicer_to_server(self, server)

    @property
    def table(self) -> RoutingTable | None:
        return self.tables[-1] if self.tables else None

    @property
    def generation(self) -> int:
        return self.table.generation if self.table else 0

    @property
    def state(self) -> GatewayState:
        services = self.table.services if self.table else ()
        addresses = {backend.node: backend.address for backend in self.table.backends} if self.table else {}
        return GatewayState(
            version="fake",
            generation=self.generation,
            placement_digest=self.table.placement_digest if self.table else "",
            targets=tuple(
                TargetState(service=routes.service, group=target.group, healthy=True, address=addresses[target.node])
                for routes in services
                for target in routes.targets
            ),
            ready=True,
        )

    async def GetState(self, _: Any, context: Any) -> control_pb2.GatewayState:
        return await self.answer("GetState", context, lambda: wire.gateway_state_to_proto(self.state))

    async def SetRoutes(self, request: control_pb2.RoutingTable, context: Any) -> control_pb2.GenerationResponse:
        table = wire.routing_table_from_proto(request)
        if table.generation < self.generation:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "older than the table in force")

        def effect() -> control_pb2.GenerationResponse:
            self.tables.append(table)
            return control_pb2.GenerationResponse(generation=table.generation)

        return await self.answer("SetRoutes", context, effect)
