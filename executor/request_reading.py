"""Handlers that read their requests inside of the call.

Where gRPC reads a request before the call begins, bytes that are no such message end it with UNKNOWN, and a traceback
in the log. Read inside, they end it with INVALID_ARGUMENT.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

__all__ = ["reading"]

_Context = grpc.aio.ServicerContext[Any, Any]
_Parse = Callable[[bytes], Any]


def reading(handler: grpc.GenericRpcHandler[Any, Any]) -> grpc.GenericRpcHandler[Any, Any]:
    """Return ``handler`` with every method's requests read inside of the call."""
    return _Reading(handler)


class _Reading(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # not subscriptable when it runs
    def __init__(self, inner: grpc.GenericRpcHandler[Any, Any]) -> None:
        self._inner = inner
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return the handler of a method; called by gRPC for every call."""
        method = str(handler_call_details.method)
        known = self._handlers.get(method)
        if known is None:
            found = self._inner.service(handler_call_details)
            if found is None:
                return None  # not remembered: names are the caller's, and endless
            known = self._handlers[method] = _inside(method, found)
        return known


def _inside(method: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
    """Return ``handler`` with its requests read inside; its behaviour may be written in any way that gRPC takes."""
    parse = handler.request_deserializer
    if parse is None or handler.stream_unary is not None:  # no call of ours has many requests and one answer
        return handler  # type: ignore[no-any-return]
    if handler.unary_unary is not None:
        unary = functools.partial(_unary, method, parse, handler.unary_unary)
        return grpc.unary_unary_rpc_method_handler(unary, response_serializer=handler.response_serializer)
    if handler.unary_stream is not None:
        answers = functools.partial(_answers, method, parse, handler.unary_stream)
        return grpc.unary_stream_rpc_method_handler(answers, response_serializer=handler.response_serializer)
    both = functools.partial(_stream, method, parse, handler.stream_stream)
    return grpc.stream_stream_rpc_method_handler(both, response_serializer=handler.response_serializer)


async def _unary(method: str, parse: _Parse, inner: Callable[..., Any], data: bytes, context: _Context) -> Any:
    try:
        request = parse(data)
    except DecodeError as error:
        return await _abort(method, error, context)
    return await inner(request, context)


async def _answers(method: str, parse: _Parse, inner: Callable[..., Any], data: bytes, context: _Context) -> None:
    try:
        request = parse(data)
    except DecodeError as error:
        await _abort(method, error, context)
        return
    await _write(inner(request, context), context)


async def _stream(
    method: str, parse: _Parse, inner: Callable[..., Any], data: AsyncIterable[bytes], context: _Context
) -> None:
    """What comes after a request that cannot be read is not read; those before it get their answers."""
    failed: list[DecodeError] = []

    async def requests() -> AsyncIterator[Any]:
        async for one in data:
            try:
                request = parse(one)
            except DecodeError as error:
                failed.append(error)
                return
            yield request

    await _write(inner(requests(), context), context)
    if failed:
        await _abort(method, failed[0], context)


async def _write(answers: Any, context: _Context) -> None:
    if not hasattr(answers, "__aiter__"):  # it writes by itself
        await answers
        return
    async with contextlib.aclosing(answers) as found:
        async for answer in found:
            await context.write(answer)


async def _abort(method: str, error: DecodeError, context: _Context) -> Any:
    problem = f"expected the request message of {method} ({error})"
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
