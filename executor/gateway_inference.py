"""The front door's data plane: the Open Inference Protocol, forwarded to agents without looking at tensors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from executor.gateway_peer import INFERENCE, Peer
from executor.gateway_switchboard import Switchboard
from executor.infer_header import LONGEST_DEADLINE_S, read_infer_header
from executor.proto import open_inference_pb2 as messages
from executor.state import ServiceRoutes
from plans.errors import InvalidInput

__all__ = ["InferenceFrontDoor"]

_Context = grpc.aio.ServicerContext
_Send = Callable[[Peer, bytes, str, float], Awaitable[bytes]]
_Code = grpc.StatusCode


class InferenceFrontDoor:
    """Answers ``inference.GRPCInferenceService``."""

    def __init__(self, switchboard: Switchboard) -> None:
        self._switchboard = switchboard
        self._router = switchboard.router

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """Return the handler to register. ``ModelInfer`` and ``ModelMetadata`` answer with the agent's own bytes."""
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "ModelInfer": grpc.unary_unary_rpc_method_handler(self.infer),
            "ModelMetadata": grpc.unary_unary_rpc_method_handler(self.metadata),
        }
        for name, behaviour in (
            ("ServerLive", self.server_live),
            ("ServerReady", self.server_ready),
            ("ServerMetadata", self.server_metadata),
            ("ModelReady", self.model_ready),
            ("RepositoryIndex", self.repository_index),
            ("RepositoryModelLoad", self.repository_model_load),
            ("RepositoryModelUnload", self.repository_model_unload),
        ):
            methods[name] = _typed(name, behaviour)
        return grpc.method_handlers_generic_handler(INFERENCE, methods)

    async def infer(self, request: bytes, context: _Context[bytes, bytes]) -> bytes:
        """Forward one inference request to the replica whose turn it is.

        Its time is the least of the call's own timeout and the parameter ``deadline_ms``, and where it has neither, the
        service's deadline; all count from the arrival here.
        """
        arrival_s = asyncio.get_running_loop().time()
        try:
            header = read_infer_header(request)
        except InvalidInput as error:
            await context.abort(_Code.INVALID_ARGUMENT, str(error))
        routes = await self._routes(header.service, context)
        limits_s = [limit for limit in (context.time_remaining(), header.deadline_s) if limit is not None]
        deadline_s = arrival_s + min(LONGEST_DEADLINE_S, min(limits_s, default=routes.deadline_s))
        return await self._forward(routes.service, request, Peer.infer, deadline_s, context)

    async def metadata(self, request: bytes, context: _Context[bytes, bytes]) -> bytes:
        """Forward a question for a service's tensors to a replica of it."""
        try:
            service = messages.ModelMetadataRequest.FromString(request).name
        except DecodeError as error:
            await context.abort(_Code.INVALID_ARGUMENT, f"request: expected a ModelMetadataRequest ({error})")
        await self._routes(service, context)
        remaining_s = context.time_remaining()
        deadline_s = asyncio.get_running_loop().time() + (_ASK_S if remaining_s is None else remaining_s)
        return await self._forward(service, request, Peer.metadata, deadline_s, context)

    async def _routes(self, service: str, context: _Context[Any, Any]) -> ServiceRoutes:
        routes = self._router.routes(service)
        if routes is None:
            known = ", ".join(self._router.services) or "none: no plan is applied yet"
            await context.abort(_Code.NOT_FOUND, f"no service {service!r} in the current plan; services: {known}")
        return routes

    async def _forward(
        self, service: str, request: bytes, send: _Send, deadline_s: float, context: _Context[bytes, bytes]
    ) -> bytes:
        """Send ``request`` to a target of ``service``, and to another one when the first proves unavailable."""
        clock = asyncio.get_running_loop().time
        failed: grpc.aio.AioRpcError | None = None
        without = ""
        for _ in range(2):
            target = self._router.choose(service, without=without)
            peer = self._switchboard.peer(target.node) if target else None
            remaining_s = deadline_s - clock()
            if target is None or peer is None or remaining_s <= 0:
                break
            try:
                return await send(peer, request, target.group, remaining_s)
            except grpc.aio.AioRpcError as error:
                failed = error
                if error.code() is not _Code.UNAVAILABLE:
                    break
                self._switchboard.suspect(service, target.group, f"it answered UNAVAILABLE: {error.details()}")
                without = target.group
        return await self._refuse(service, failed, clock() >= deadline_s, context)

    async def _refuse(
        self, service: str, failed: grpc.aio.AioRpcError | None, is_late: bool, context: _Context[Any, Any]
    ) -> NoReturn:
        if failed is not None:
            metadata: Any = failed.trailing_metadata() or ()
            await context.abort(failed.code(), failed.details() or "", tuple(metadata))
        if is_late:
            await context.abort(_Code.DEADLINE_EXCEEDED, f"no time left for {service!r} when it arrived")
        problem = self._router.problem(service)
        await context.abort(_Code.UNAVAILABLE, f"no replica of {service!r} can take requests: {problem}")

    async def server_live(self, _: messages.ServerLiveRequest, __: _Context[Any, Any]) -> messages.ServerLiveResponse:
        """Say that the process answers."""
        return messages.ServerLiveResponse(live=True)

    async def server_ready(
        self, _: messages.ServerReadyRequest, __: _Context[Any, Any]
    ) -> messages.ServerReadyResponse:
        """Say whether every service of the plan in force has a healthy target."""
        return messages.ServerReadyResponse(ready=self._router.ready)

    async def server_metadata(
        self, _: messages.ServerMetadataRequest, __: _Context[Any, Any]
    ) -> messages.ServerMetadataResponse:
        """Name this server."""
        return messages.ServerMetadataResponse(
            name="foreplan-gateway", version=version("foreplan"), extensions=["model_repository"]
        )

    async def model_ready(
        self, request: messages.ModelReadyRequest, _: _Context[Any, Any]
    ) -> messages.ModelReadyResponse:
        """Say whether a service has a healthy target; one that the plan does not have is not ready."""
        return messages.ModelReadyResponse(ready=not self._router.problem(request.name))

    async def repository_index(
        self, request: messages.RepositoryIndexRequest, _: _Context[Any, Any]
    ) -> messages.RepositoryIndexResponse:
        """List the services of the plan in force, with the reason for each that is not ready."""
        problems = {service: self._router.problem(service) for service in self._router.services}
        return messages.RepositoryIndexResponse(
            models=[
                messages.RepositoryIndexResponse.ModelIndex(
                    name=service, version="1", state="UNAVAILABLE" if problem else "READY", reason=problem
                )
                for service, problem in problems.items()
                if not (request.ready and problem)
            ]
        )

    async def repository_model_load(
        self, request: messages.RepositoryModelLoadRequest, context: _Context[Any, Any]
    ) -> messages.RepositoryModelLoadResponse:
        """Succeed for a service that is ready already: what runs where is the plan's to say, not a client's."""
        problem = self._router.problem(request.model_name)
        if problem:
            details = f"{request.model_name!r} is not ready ({problem}); `foreplan apply` loads what a plan places"
            await context.abort(_Code.FAILED_PRECONDITION, details)
        return messages.RepositoryModelLoadResponse()

    async def repository_model_unload(
        self, request: messages.RepositoryModelUnloadRequest, context: _Context[Any, Any]
    ) -> messages.RepositoryModelUnloadResponse:
        """Refuse: `foreplan apply` of a plan without the service unloads it."""
        details = f"{request.model_name!r} leaves with `foreplan apply` of a plan that does not place it"
        await context.abort(_Code.FAILED_PRECONDITION, details)


_ASK_S = 5.0
"""Seconds that a call about metadata may take when its caller sets no limit."""


def _typed(name: str, behaviour: Callable[..., Awaitable[Any]]) -> grpc.RpcMethodHandler[Any, Any]:
    return grpc.unary_unary_rpc_method_handler(
        behaviour,
        request_deserializer=getattr(messages, f"{name}Request").FromString,
        response_serializer=getattr(messages, f"{name}Response").SerializeToString,
    )
