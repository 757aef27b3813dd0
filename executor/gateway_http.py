"""The gateway by HTTP: the JSON form of the Open Inference Protocol under ``/v2``, with binary tensors.

Every call becomes the one that gRPC would have made, so that routing, deadlines, refusals and counters are the same.
"""

from __future__ import annotations

import asyncio
import logging
import reprlib
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from aiohttp import web
from google.protobuf import json_format

from executor.errors import TOO_MUCH
from executor.forwarding import CallFailed
from executor.gateway_bodies import Bodies
from executor.gateway_inference import InferenceFrontDoor
from executor.gateway_peer import Peer
from executor.http_server import role_check
from executor.http_tensors import answer_to_http, parsed_json, request_from_http
from executor.proto import open_inference_pb2 as messages
from executor.roles import Guard
from executor.tensors import TensorLimits
from executor.tracing import join_trace
from plans.errors import InvalidInput

__all__ = ["gateway_application"]

_log = logging.getLogger("executor.gateway")

_Code = grpc.StatusCode
_STATUS = {
    _Code.INVALID_ARGUMENT: 400,
    _Code.FAILED_PRECONDITION: 400,
    _Code.PERMISSION_DENIED: 403,
    _Code.NOT_FOUND: 404,
    _Code.RESOURCE_EXHAUSTED: 429,
    _Code.CANCELLED: 499,
    _Code.UNIMPLEMENTED: 501,
    _Code.UNAVAILABLE: 503,
    _Code.DEADLINE_EXCEEDED: 504,
}
_HEADER_LENGTH = "Inference-Header-Content-Length"
_LONGEST_NUMBER = 15
_LONG_BYTES = 1 << 18
"""An answer that is larger is written by another thread."""

_METHOD = "/inference.GRPCInferenceService/"

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def gateway_application(door: InferenceFrontDoor, guard: Guard | None, max_message_bytes: int) -> web.Application:
    """Return the application to serve.

    Args:
        door: Answers the calls.
        guard: Says who may call, or None without TLS.
        max_message_bytes: Largest request.
    """
    bodies = Bodies(max_message_bytes + _JSON_OVERHEAD_BYTES)
    routes = _Routes(door, bodies, TensorLimits(total_bytes=max_message_bytes))
    stopping = asyncio.Event()
    application = web.Application(middlewares=[_sending(bodies, stopping), _answering_errors(guard)])

    async def stop(_: web.Application) -> None:
        stopping.set()

    application.on_shutdown.append(stop)
    add = application.router
    add.add_get("/v2", routes.server)
    add.add_get("/v2/health/live", routes.live)
    add.add_get("/v2/health/ready", routes.ready)
    add.add_get("/v2/models/stats", routes.statistics)
    for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        add.add_get(prefix, routes.metadata)
        add.add_get(f"{prefix}/config", routes.config)
        add.add_get(f"{prefix}/ready", routes.model_ready)
        add.add_get(f"{prefix}/stats", routes.statistics)
        add.add_post(f"{prefix}/infer", routes.infer)
    add.add_post("/v2/repository/index", routes.index)
    add.add_post("/v2/repository/models/{model}/load", routes.load)
    add.add_post("/v2/repository/models/{model}/unload", routes.unload)
    return application


_JSON_OVERHEAD_BYTES = 1 << 20


def _sending(bodies: Bodies, stopping: asyncio.Event) -> Any:
    """Return a middleware that sends the answers.

    Once it is ``stopping``, they say that they are the last on their connection: what a client sent on it after that
    would be lost.
    """

    async def send(request: web.Request, answer: web.StreamResponse) -> web.StreamResponse:
        if stopping.is_set():
            answer.force_close()
        await bodies.send(request, answer)
        return answer

    @web.middleware
    async def sending(request: web.Request, handler: _Handler) -> web.StreamResponse:
        try:
            return await send(request, await handler(request))
        except CallFailed as failed:  # there is no room for the answer
            return await send(request, _problem(failed.code, failed.details))

    return sending


def _answering_errors(guard: Guard | None) -> Any:
    """Return a middleware that lets callers in by their role, and tells of errors as JSON."""

    @web.middleware
    async def answering(request: web.Request, handler: _Handler) -> web.StreamResponse:
        if guard is not None and (problem := role_check(guard, f"{_METHOD}Http", request)):
            return _problem(_Code.PERMISSION_DENIED, problem)
        try:
            return await handler(request)
        except CallFailed as failed:
            return _problem(failed.code, failed.details)
        except InvalidInput as error:
            return _problem(_Code.INVALID_ARGUMENT, str(error))
        except web.RequestPayloadError:
            answer = _problem(_Code.INVALID_ARGUMENT, "request: the body cannot be read: it is not encoded as it says")
            answer.force_close()  # where the next request would begin is not known
            return answer
        except web.HTTPException as error:
            return _not_served(request, error)
        except MemoryError:
            _log.exception("event=http_out_of_memory path=%s", request.path)
            return _problem(_Code.RESOURCE_EXHAUSTED, f"this gateway has no memory for the request; {TOO_MUCH}")
        except Exception:  # noqa: BLE001 - the edge of the process, and the server's own answer would be no JSON
            _log.exception("event=http_failed path=%s", request.path)
            return _problem(_Code.INTERNAL, "a bug in the gateway; see its log")

    return answering


def _not_served(request: web.Request, error: web.HTTPException) -> web.Response:
    """Return the answer to a request that no handler takes, or whose body is too large or does not come."""
    headers = {}
    match error:
        case web.HTTPMethodNotAllowed():
            headers["Allow"] = ", ".join(sorted(error.allowed_methods))
            problem = f"{request.method} is not for {request.path}, but {headers['Allow']}"
        case web.HTTPNotFound():
            problem = f"nothing is at {request.path}; the protocol begins at /v2"
        case _:
            problem = error.text or error.reason
    answer = web.json_response({"error": problem}, status=error.status, headers=headers)
    if error.status in (408, 413):
        answer.force_close()  # what is left of the body is not read
    return answer


def _problem(code: grpc.StatusCode, details: str) -> web.Response:
    return web.json_response({"error": details}, status=_STATUS.get(code, 500))


class _Routes:
    def __init__(self, door: InferenceFrontDoor, bodies: Bodies, limits: TensorLimits) -> None:
        self._door = door
        self._bodies = bodies
        self._limits = limits

    async def live(self, _: web.Request) -> web.Response:
        return web.Response()

    async def ready(self, _: web.Request) -> web.Response:
        return web.Response(status=200 if self._door.repository.is_ready("") else 503)

    async def model_ready(self, request: web.Request) -> web.Response:
        model, version = _asked(request)
        return web.Response(status=200 if self._door.repository.is_ready(model, version) else 503)

    async def server(self, request: web.Request) -> web.Response:
        return _message(await self._door.repository.server_metadata(messages.ServerMetadataRequest(), None))

    async def metadata(self, request: web.Request) -> web.Response:
        model, version = _asked(request)
        asked = messages.ModelMetadataRequest(name=model, version=version)
        answer = await self._door.describe(asked.SerializeToString(), None)
        return _message(messages.ModelMetadataResponse.FromString(answer))

    async def config(self, request: web.Request) -> web.Response:
        model, version = _asked(request)
        asked = messages.ModelConfigRequest(name=model, version=version)
        answer = await self._door.describe(asked.SerializeToString(), None, Peer.config)
        return _message(messages.ModelConfigResponse.FromString(answer).config)

    async def statistics(self, request: web.Request) -> web.Response:
        return _message(await self._door.statistics_of(*_asked(request), None))

    async def infer(self, request: web.Request) -> web.Response:
        model, version = _asked(request)
        self._door.check_admission(model)  # before its body costs anything
        try:
            body = await self._bodies.read(request)
            asked = request_from_http(model, version, body, _json_bytes(request), self._limits)
        except CallFailed as failed:
            self._door.metrics.refused(model, failed.code)
            raise
        except (InvalidInput, web.RequestPayloadError):
            self._door.metrics.refused(model, _Code.INVALID_ARGUMENT)
            raise
        message = asked.message.SerializeToString()
        most_bytes = self._limits.total_bytes
        if len(message) > most_bytes:  # no agent takes it
            self._door.metrics.refused(model, _Code.RESOURCE_EXHAUSTED)
            raise web.HTTPRequestEntityTooLarge(most_bytes, len(message))
        join_trace(request.headers.get("traceparent", ""))  # for this request: each has a task of its own
        answer = await self._door.answer(message, None)
        found = messages.ModelInferResponse.FromString(answer)
        # What takes long to write is written beside the requests of others.
        if len(answer) > _LONG_BYTES:
            sent, header_bytes = await asyncio.to_thread(answer_to_http, found, asked)
        else:
            sent, header_bytes = answer_to_http(found, asked)
        headers = {"Content-Type": "application/json"}
        if header_bytes is not None:
            headers = {"Content-Type": "application/octet-stream", _HEADER_LENGTH: str(header_bytes)}
        return web.Response(body=sent, headers=headers)

    async def index(self, request: web.Request) -> web.Response:
        text = await self._bodies.read(request)
        wanted = parsed_json(text, self._limits) if text else {}
        only_ready = isinstance(wanted, dict) and wanted.get("ready") is True
        return web.json_response(
            [
                {"name": model.name, "version": model.version, "state": model.state, "reason": model.reason}
                for model in self._door.repository.index(only_ready).models
            ]
        )

    async def load(self, request: web.Request) -> web.Response:
        self._door.repository.check_load(request.match_info["model"])
        return web.Response()

    async def unload(self, request: web.Request) -> web.Response:
        self._door.repository.check_unload(request.match_info["model"])
        return web.Response()


def _json_bytes(request: web.Request) -> int | None:
    """Return how long the JSON part of a request is said to be; None when nothing is said."""
    length = request.headers.get(_HEADER_LENGTH)
    if length is None:
        return None
    if not (length.isascii() and length.isdigit() and len(length) <= _LONGEST_NUMBER):
        raise InvalidInput.of("a number of bytes", where=_HEADER_LENGTH, found=reprlib.repr(length))
    return int(length)


def _asked(request: web.Request) -> tuple[str, str]:
    """Return the model and the version in a path; empty where it names none."""
    return request.match_info.get("model", ""), request.match_info.get("version", "")


def _message(message: Any) -> web.Response:
    """Return a protobuf message as the protocol's JSON: its own field names, 64-bit integers as numbers."""
    found = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return web.json_response(_plain(found, message.DESCRIPTOR))


def _plain(value: Any, descriptor: Any) -> Any:
    """Undo what protobuf's JSON does to 64-bit integers, which it writes as texts."""
    plain = {}
    for name, one in value.items():
        field = descriptor.fields_by_name[name]
        if field.message_type is not None:
            plain[name] = (
                [_plain(item, field.message_type) for item in one]
                if isinstance(one, list)
                else _plain(one, field.message_type)
            )
        elif field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64):
            plain[name] = [int(item) for item in one] if isinstance(one, list) else int(one)
        else:
            plain[name] = one
    return plain
