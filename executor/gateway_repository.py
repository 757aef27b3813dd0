"""What a gateway says of itself and its services: ready or not, and why; and that only plans load and unload models."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

import grpc
import grpc.aio

from executor.answer_bytes import EXTENSIONS, MODEL_VERSION
from executor.forwarding import CallFailed
from executor.proto import open_inference_pb2 as messages
from executor.routing import Router

__all__ = ["ServiceRepository", "is_known_version", "typed"]

_Context = grpc.aio.ServicerContext
_Code = grpc.StatusCode


class ServiceRepository:
    """Answers the calls of ``inference.GRPCInferenceService`` that no agent is asked for.

    Args:
        router: Which services there are, and which have healthy targets.
    """

    def __init__(self, router: Router) -> None:
        self._router = router

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """Return the handler of each call by its name."""
        behaviours: dict[str, Callable[..., Awaitable[Any]]] = {
            "ServerLive": self.server_live,
            "ServerReady": self.server_ready,
            "ServerMetadata": self.server_metadata,
            "ModelReady": self.model_ready,
            "RepositoryIndex": self.repository_index,
            "RepositoryModelLoad": self.repository_model_load,
            "RepositoryModelUnload": self.repository_model_unload,
        }
        return {name: typed(name, behaviour) for name, behaviour in behaviours.items()}

    async def server_live(self, _: messages.ServerLiveRequest, __: _Context[Any, Any]) -> messages.ServerLiveResponse:
        """Say that the process answers."""
        return messages.ServerLiveResponse(live=True)

    async def server_ready(
        self, _: messages.ServerReadyRequest, __: _Context[Any, Any]
    ) -> messages.ServerReadyResponse:
        """Say whether every service of the plan in force has a healthy target."""
        return messages.ServerReadyResponse(ready=self.is_ready(""))

    async def server_metadata(
        self, _: messages.ServerMetadataRequest, __: _Context[Any, Any] | None
    ) -> messages.ServerMetadataResponse:
        """Name this server."""
        return messages.ServerMetadataResponse(
            name="foreplan-gateway",
            version=version("foreplan"),
            extensions=["binary_tensor_data", *EXTENSIONS],
        )

    async def model_ready(
        self, request: messages.ModelReadyRequest, _: _Context[Any, Any]
    ) -> messages.ModelReadyResponse:
        """Say whether a service has a healthy target; one that the plan does not have is not ready."""
        return messages.ModelReadyResponse(ready=bool(request.name) and self.is_ready(request.name, request.version))

    async def repository_index(
        self, request: messages.RepositoryIndexRequest, _: _Context[Any, Any]
    ) -> messages.RepositoryIndexResponse:
        """List the services of the plan in force, with the reason for each that is not ready."""
        return self.index(request.ready)

    async def repository_model_load(
        self, request: messages.RepositoryModelLoadRequest, context: _Context[Any, Any]
    ) -> messages.RepositoryModelLoadResponse:
        """Succeed for a service that is ready already: what runs where is the plan's to say, not a client's."""
        try:
            self.check_load(request.model_name)
        except CallFailed as failed:
            await context.abort(failed.code, failed.details)
        return messages.RepositoryModelLoadResponse()

    async def repository_model_unload(
        self, request: messages.RepositoryModelUnloadRequest, context: _Context[Any, Any]
    ) -> messages.RepositoryModelUnloadResponse:
        """Refuse: `foreplan apply` of a plan without the service unloads it."""
        try:
            self.check_unload(request.model_name)
        except CallFailed as failed:
            await context.abort(failed.code, failed.details)
        return messages.RepositoryModelUnloadResponse()

    def is_ready(self, service: str, version: str = "") -> bool:
        """Say whether ``service``, or with an empty name every service, has a healthy target; no other version has."""
        if not is_known_version(version):
            return False
        return not self._router.problem(service) if service else self._router.ready

    def index(self, only_ready: bool) -> messages.RepositoryIndexResponse:
        """Return the services of the plan in force, with the reason for each that is not ready."""
        problems = {service: self._router.problem(service) for service in self._router.services}
        return messages.RepositoryIndexResponse(
            models=[
                messages.RepositoryIndexResponse.ModelIndex(
                    name=service, version=MODEL_VERSION, state="UNAVAILABLE" if problem else "READY", reason=problem
                )
                for service, problem in problems.items()
                if not (only_ready and problem)
            ]
        )

    def check_load(self, service: str) -> None:
        """Refuse to load what is not ready.

        Raises:
            CallFailed: With the reason.
        """
        if problem := self._router.problem(service):
            details = f"{service!r} is not ready ({problem}); `foreplan apply` loads what a plan places"
            raise CallFailed(_Code.FAILED_PRECONDITION, details)

    def check_unload(self, service: str) -> None:
        """Refuse to unload anything.

        Raises:
            CallFailed: Always.
        """
        details = f"{service!r} leaves with `foreplan apply` of a plan that does not place it"
        raise CallFailed(_Code.FAILED_PRECONDITION, details)


def is_known_version(version: str) -> bool:
    """Say whether services have ``version``; an empty one is any."""
    return version in ("", MODEL_VERSION)


def typed(name: str, behaviour: Callable[..., Awaitable[Any]]) -> grpc.RpcMethodHandler[Any, Any]:
    """Return a handler of the call ``name`` that reads and writes its messages."""
    return grpc.unary_unary_rpc_method_handler(
        behaviour,
        request_deserializer=getattr(messages, f"{name}Request").FromString,
        response_serializer=getattr(messages, f"{name}Response").SerializeToString,
    )
