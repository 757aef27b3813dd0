"""The front door's data plane: the Open Inference Protocol, forwarded to agents without looking at tensors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from executor.errors import TOO_MUCH
from executor.first_tries import GivenUp
from executor.forwarding import CallFailed
from executor.gateway_metrics import GatewayMetrics
from executor.gateway_peer import INFERENCE, Peer
from executor.gateway_repository import ServiceRepository, is_known_version, typed
from executor.gateway_statistics import agents_statistics
from executor.gateway_switchboard import Switchboard
from executor.infer_header import (
    LONGEST_DEADLINE_S,
    InferHeader,
    deadline_in_s,
    group_message,
    read_infer_header,
    small_fields,
)
from executor.proto import open_inference_pb2 as messages
from executor.state import ServiceRoutes, Target
from executor.statistics import add_statistics
from executor.stream_inference import FINAL, STATUS_PARAMETER, error_response, failure_response, interleaved
from executor.tracing import NoSpans, join_trace, traceparent_in
from plans.errors import InvalidInput

__all__ = ["InferenceFrontDoor"]

_Context = grpc.aio.ServicerContext
_Send = Callable[[Peer, bytes, str, float], Awaitable[bytes]]
_Code = grpc.StatusCode
_CODES = {code.name: code for code in _Code}


@dataclass(slots=True)
class _Ended:
    """How a request ended: with no other word, by its client."""

    code: grpc.StatusCode = _Code.CANCELLED


class InferenceFrontDoor:
    """Answers ``inference.GRPCInferenceService``."""

    def __init__(self, switchboard: Switchboard, *, max_in_flight: int = 8192, spans: NoSpans | None = None) -> None:
        self._spans = spans
        self.metrics = GatewayMetrics()
        self._max_in_flight = max_in_flight
        self._switchboard = switchboard
        self._router = switchboard.router
        self.repository = ServiceRepository(switchboard.router)
        self._clock = asyncio.get_running_loop().time
        self._headers: dict[bytes, InferHeader] = {}

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """Return the handler to register. ``ModelInfer`` and ``ModelMetadata`` answer with the agent's own bytes."""
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "ModelInfer": grpc.unary_unary_rpc_method_handler(self.infer),
            "ModelMetadata": grpc.unary_unary_rpc_method_handler(self.metadata),
            "ModelConfig": grpc.unary_unary_rpc_method_handler(self.config),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self.stream),
            "ModelStatistics": typed("ModelStatistics", self.statistics),
            **self.repository.handlers(),
        }
        return grpc.method_handlers_generic_handler(INFERENCE, methods)

    async def infer(self, request: bytes, context: _Context[bytes, bytes]) -> bytes:
        """Forward one inference request to the replica whose turn it is; see `answer`."""
        if self._spans is not None:
            join_trace(traceparent_in(context))
        try:
            return await self.answer(request, context.time_remaining())
        except CallFailed as failed:
            await context.abort(failed.code, failed.details)

    async def stream(self, requests: AsyncIterable[bytes], context: _Context[bytes, bytes]) -> AsyncIterator[bytes]:
        """Forward the requests of one stream side by side, each to the replica whose turn it is; see `answers`."""
        answers = interleaved(
            requests,
            lambda request: self.answers(request, context.time_remaining()),
            failure=lambda request, error: failure_response(_parsed(request), error).SerializeToString(),
            size_bytes=len,
            around=lambda request: self._traced(request, context),
        )
        async with contextlib.aclosing(answers):
            async for answer in answers:
                yield answer

    @contextlib.contextmanager
    def _traced(self, request: bytes, context: _Context[bytes, bytes]) -> Iterator[None]:
        """Record what is done for one request of a stream, where spans are recorded."""
        if self._spans is None:
            yield
            return
        join_trace(traceparent_in(context))
        with self._spans.span("gateway.stream", service=_parsed(request).model_name, request_bytes=len(request)):
            yield

    async def metadata(self, request: bytes, context: _Context[bytes, bytes]) -> bytes:
        """Forward a question for a service's tensors to a replica of it."""
        try:
            return await self.describe(request, context.time_remaining())
        except CallFailed as failed:
            await context.abort(failed.code, failed.details)

    async def config(self, request: bytes, context: _Context[bytes, bytes]) -> bytes:
        """Forward a question for how a service is batched to a replica of it."""
        try:
            return await self.describe(request, context.time_remaining(), Peer.config)
        except CallFailed as failed:
            await context.abort(failed.code, failed.details)

    async def statistics(
        self, request: messages.ModelStatisticsRequest, context: _Context[Any, Any]
    ) -> messages.ModelStatisticsResponse:
        """Add up what the agents of a service, or of all services, say of it."""
        try:
            return await self.statistics_of(request.name, request.version, context.time_remaining())
        except CallFailed as failed:
            await context.abort(failed.code, failed.details)

    async def answer(self, request: bytes, time_remaining_s: float | None) -> bytes:
        """Return the answer to a serialised ``ModelInferRequest``, from the replica whose turn it is.

        Its time is the least of ``time_remaining_s`` and that in its parameters, and where it has neither, the
        service's deadline; all count from the arrival here.

        Raises:
            CallFailed: With the status and message for the client.
        """
        arrival_s = self._clock()
        header, timeout_s = self._admitted(request, time_remaining_s)
        service = header.service
        with self._counted(service, arrival_s) as ended:
            answered = await self._forward(service, request, Peer.infer, arrival_s + timeout_s, header.stream)
            ended.code = _Code.OK
            return answered

    async def answers(self, request: bytes, time_remaining_s: float | None) -> AsyncGenerator[bytes, None]:
        """Yield the serialised ``ModelStreamInferResponse`` to a serialised ``ModelInferRequest``; as for `answer`.

        Another replica is tried only while there is no answer yet.

        Raises:
            CallFailed: With the status and message for the client.
        """
        arrival_s = self._clock()
        header, timeout_s = self._admitted(request, time_remaining_s)
        service, without = header.service, ""
        with self._counted(service, arrival_s) as ended:
            for is_last_try in (False, True):
                remaining_s = arrival_s + timeout_s - self._clock()
                if remaining_s <= 0:
                    break
                target = self._router.choose(service, without=without, stream=header.stream)
                peer = self._switchboard.peer(target.node) if target else None
                if target is None or peer is None:
                    break
                if without:
                    self.metrics.retried(service)
                without = target.group
                mark = messages.ModelStreamInferResponse(infer_response=group_message(target.group)).SerializeToString()
                is_first = True
                first_try = self._switchboard.first_tries.at(target.node, service)
                try:
                    with contextlib.nullcontext() if is_last_try else first_try:
                        async with contextlib.aclosing(peer.stream(request, target.group, remaining_s)) as found:
                            async for answer in found:
                                first_try.keep()
                                status, is_final = _status(answer)
                                if is_first and not is_last_try and status is _Code.UNAVAILABLE:
                                    self._switchboard.suspect(service, target, "it answered UNAVAILABLE")
                                    break
                                is_first = False
                                if is_final:  # a client that leaves before has CANCELLED it
                                    ended.code = _shown(status)
                                yield _told_in_stream(answer, status) + mark
                                if is_final:
                                    return  # whatever becomes of the agent's call
                            else:
                                if is_first:
                                    raise CallFailed(
                                        _Code.INTERNAL, f"{target.group} ended its stream without an answer"
                                    )
                                ended.code = _shown(status)
                                return
                except CallFailed as failed:
                    if not is_first or is_last_try or failed.code is not _Code.UNAVAILABLE:
                        raise
                    self._suspect(service, target, failed)
            raise self._no_replica(service, arrival_s + timeout_s)

    @contextlib.contextmanager
    def _counted(self, service: str, arrival_s: float) -> Iterator[_Ended]:
        """Count a request and how it ends, inside the block; its failures are raised as clients are told of them."""
        ended = _Ended()
        self.metrics.begin()
        try:
            yield ended
        except CallFailed as failed:
            told = _told(failed)
            ended.code = told.code
            raise told from failed
        except Exception:
            ended.code = _Code.INTERNAL
            raise
        finally:
            self.metrics.end(service, ended.code, self._clock() - arrival_s)

    def _admitted(self, request: bytes, time_remaining_s: float | None) -> tuple[InferHeader, float]:
        """Return the header of a request and the seconds that it has.

        Raises:
            CallFailed: It is malformed, asks for a service that is not here, or too much is under way.
        """
        try:
            header = self._header(request)
        except InvalidInput as error:
            self.metrics.refused("", _Code.INVALID_ARGUMENT)
            raise CallFailed(_Code.INVALID_ARGUMENT, str(error)) from error
        routes = self.check_admission(header.service)
        default_s = routes.deadline_s if routes.first_token_s is None else LONGEST_DEADLINE_S
        return header, deadline_in_s(header.deadline_s, time_remaining_s, default_s)

    def check_admission(self, service: str) -> ServiceRoutes:
        """Return the routes of ``service``; refuse a request for it, whatever it holds, that cannot be taken now.

        Raises:
            CallFailed: The plan has no such service, or too much is under way.
        """
        try:
            routes = self._routes(service)
        except CallFailed as failed:
            self.metrics.refused("", failed.code)
            raise
        if self.metrics.in_flight >= self._max_in_flight:
            self.metrics.refused(service, _Code.RESOURCE_EXHAUSTED)
            problem = f"{self.metrics.in_flight} requests are in flight at this gateway, its limit; {TOO_MUCH}"
            raise CallFailed(_Code.RESOURCE_EXHAUSTED, problem)
        return routes

    async def describe(self, request: bytes, time_remaining_s: float | None, ask: _Send = Peer.metadata) -> bytes:
        """Return the answer to a serialised ``ModelMetadataRequest``, or to a ``ModelConfigRequest``, which is alike.

        Raises:
            CallFailed: With the status and message for the client.
        """
        try:
            service = messages.ModelMetadataRequest.FromString(request).name
        except DecodeError as error:
            expected = "name and version of a model in its request message"
            raise CallFailed(_Code.INVALID_ARGUMENT, f"request: expected {expected} ({error})") from error
        self._routes(service)
        deadline_s = self._clock() + (_ASK_S if time_remaining_s is None else time_remaining_s)
        return await self._forward(service, request, ask, deadline_s)

    async def statistics_of(
        self, service: str, version: str, time_remaining_s: float | None
    ) -> messages.ModelStatisticsResponse:
        """Return statistics of ``service``, or of every service when it is empty, added up over its agents.

        Agents that do not answer are left out.

        Raises:
            CallFailed: The plan has no such service or version, or none of its agents answers.
        """
        if service:
            self._routes(service)
        if not is_known_version(version):
            raise CallFailed(_Code.NOT_FOUND, f"no service has version {version!r}: leave it out")
        names = (service,) if service else self._router.services
        nodes = {target.node for name in names for target in self._routes(name).targets}
        timeout_s = _ASK_S if time_remaining_s is None else time_remaining_s / 2  # the rest is for those that answer
        return add_statistics(names, await agents_statistics(self._switchboard, service, nodes, timeout_s))

    async def _sent(
        self, send: _Send, peer: Peer, request: bytes, service: str, target: Target, remaining_s: float
    ) -> bytes:
        if self._spans is None:
            return await send(peer, request, target.group, remaining_s)
        with self._spans.span("gateway.forward", service=service, group=target.group, request_bytes=len(request)):
            return await send(peer, request, target.group, remaining_s)

    def _header(self, request: bytes) -> InferHeader:
        """Return what the gateway must know of a request; the same small fields are read once only."""
        small = small_fields(request)
        header = self._headers.get(small)
        if header is None:
            header = read_infer_header(small)
            if len(self._headers) >= _KNOWN_HEADERS:
                self._headers.clear()
            if len(small) <= _LONGEST_KNOWN:
                self._headers[small] = header
        return header

    def _routes(self, service: str) -> ServiceRoutes:
        routes = self._router.routes(service)
        if routes is None:
            known = ", ".join(self._router.services) or "none: no plan is applied yet"
            problem = f"no service {service!r} in the current plan; services: {known}"
            raise CallFailed(_Code.NOT_FOUND, problem)
        return routes

    async def _forward(self, service: str, request: bytes, send: _Send, deadline_s: float, stream: str = "") -> bytes:
        """Send ``request`` to a target of ``service``, and to another one when the first proves unavailable."""
        failed: CallFailed | None = None
        without = ""
        for is_last_try in (False, True):
            remaining_s = deadline_s - self._clock()
            if remaining_s <= 0:
                break
            target = self._router.choose(service, without=without, stream=stream)
            peer = self._switchboard.peer(target.node) if target else None
            if target is None or peer is None:
                break
            if failed is not None:
                self.metrics.retried(service)
            first_try = self._switchboard.first_tries.at(target.node, service)
            try:
                with contextlib.nullcontext() if is_last_try else first_try:
                    return await self._sent(send, peer, request, service, target, remaining_s)
            except CallFailed as error:
                failed = error
                if error.code is not _Code.UNAVAILABLE:
                    break
                self._suspect(service, target, error)
                without = target.group
        raise failed or self._no_replica(service, deadline_s)

    def _suspect(self, service: str, target: Target, error: CallFailed) -> None:
        if not isinstance(error, GivenUp):
            self._switchboard.suspect(service, target, f"it answered UNAVAILABLE: {error.details}")

    def _no_replica(self, service: str, deadline_s: float) -> CallFailed:
        """Return why a request was sent to no replica."""
        if self._clock() >= deadline_s:
            return CallFailed(_Code.DEADLINE_EXCEEDED, f"no time left for {service!r} when it arrived")
        problem = self._router.problem(service)
        return CallFailed(_Code.UNAVAILABLE, f"no replica of {service!r} can take requests: {problem}")


_ASK_S = 5.0
"""Seconds that a call about metadata may take when its caller sets no limit."""

_KNOWN_HEADERS, _LONGEST_KNOWN = 4096, 256
"""How many headers are remembered, and the longest of them in bytes."""


def _shown(code: grpc.StatusCode) -> grpc.StatusCode:
    """Return what a client is shown: ABORTED says, to gateways, that a later stage of a workflow was unavailable."""
    return _Code.UNAVAILABLE if code is _Code.ABORTED else code


def _told(failed: CallFailed) -> CallFailed:
    """Return what a client is told."""
    code = _shown(failed.code)
    return failed if code is failed.code else CallFailed(code, failed.details)


def _parsed(request: bytes) -> messages.ModelInferRequest:
    """Return what can be read of a request: nothing of bytes that are none."""
    try:
        return messages.ModelInferRequest.FromString(request)
    except DecodeError:
        return messages.ModelInferRequest()


def _status(answer: bytes) -> tuple[grpc.StatusCode, bool]:
    """Return the status that a ``ModelStreamInferResponse`` tells of, and whether it is the last to its request."""
    read = messages.ModelStreamInferResponse.FromString(answer)
    parameters = read.infer_response.parameters
    is_final = FINAL in parameters and parameters[FINAL].bool_param
    if not read.error_message:
        return _Code.OK, is_final
    return _CODES.get(parameters[STATUS_PARAMETER].string_param, _Code.UNKNOWN), is_final


def _told_in_stream(answer: bytes, status: grpc.StatusCode) -> bytes:
    """Return what a client is told with an answer of ``status``."""
    code = _shown(status)
    if code is status:
        return answer
    read = messages.ModelStreamInferResponse.FromString(answer)
    details = read.error_message.removeprefix(f"{status.name}: ")
    asked = read.infer_response
    return error_response(asked.id, asked.model_name, code, details).SerializeToString()
