"""Who may call what: roles, which a peer proves with its certificate, and the guard in front of every method.

A role is a URI among the subject alternative names of a certificate, ``urn:foreplan:role:<role>``. Without TLS (on
loopback, or where the user insists) nobody has a role and nothing is guarded.

============  ==========================================================================================
role          may call
============  ==========================================================================================
``operator``  everything
``gateway``   an agent's state, its inference, forwarded or called
``agent``     an agent's state, its inference, forwarded or called: the next stage of a workflow
``client``    a gateway's inference
============  ==========================================================================================

Health checks, reflection and metrics are open to every role, and to nobody without one. A method that the table does
not know is refused.
"""

from __future__ import annotations

import enum
import functools
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import grpc
import grpc.aio

__all__ = ["METRICS", "Guard", "Role", "role_uri", "roles_of_names"]

_log = logging.getLogger("executor.security")

_PREFIX = "urn:foreplan:role:"
_SAN = "x509_subject_alternative_name"
_NAME = "x509_common_name"

_Context = grpc.aio.ServicerContext


class Role(enum.StrEnum):
    """What a process or person is to the cluster."""

    OPERATOR = "operator"
    GATEWAY = "gateway"
    AGENT = "agent"
    CLIENT = "client"


_INFERENCE = "/inference.GRPCInferenceService/"
_ANY = frozenset(Role)
_OPERATOR = frozenset({Role.OPERATOR})

METRICS = "/metrics"
"""Stands for the page that Prometheus reads, as if it were a method."""

_OPEN: Mapping[str, frozenset[Role]] = {
    METRICS: _ANY,
    "/grpc.health.v1.Health/": _ANY,
    "/grpc.reflection.v1alpha.ServerReflection/": _ANY,
}

_RULES: Mapping[Role, Mapping[str, frozenset[Role]]] = {
    Role.AGENT: {
        **_OPEN,
        "/foreplan.control.v1.Agent/GetState": frozenset({Role.OPERATOR, Role.GATEWAY, Role.AGENT}),
        "/foreplan.control.v1.Agent/": _OPERATOR,
        _INFERENCE: frozenset({Role.OPERATOR, Role.GATEWAY, Role.AGENT}),
    },
    Role.GATEWAY: {
        **_OPEN,
        "/foreplan.control.v1.Gateway/": _OPERATOR,
        _INFERENCE: frozenset({Role.OPERATOR, Role.CLIENT}),
    },
}
"""For a server of each role, who may call a method, or every method of a service (names that end in ``/``)."""


def role_uri(role: Role) -> str:
    """Return the URI that stands for ``role`` in a certificate."""
    return f"{_PREFIX}{role.value}"


def roles_of_names(names: Iterable[str]) -> frozenset[Role]:
    """Return the roles among the subject alternative names of a certificate; an unknown role is none."""
    claimed = {name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX)}
    return frozenset(role for role in Role if role.value in claimed)


class Guard:
    """Lets through the callers that the server's role allows, and refuses and logs the others.

    Args:
        server: Role of the server: `Role.AGENT` or `Role.GATEWAY`.
    """

    def __init__(self, server: Role) -> None:
        self._rules = _RULES[server]

    def allowed(self, method: str) -> frozenset[Role]:
        """Return who may call ``method`` (``/package.Service/Method``): nobody, when no rule names it."""
        service = method[: method.rfind("/") + 1]
        return self._rules.get(method) or self._rules.get(service) or frozenset()

    def refusal(self, method: str, roles: frozenset[Role], *, peer: str, name: str) -> str:
        """Return why a caller with ``roles`` may not call ``method``, after logging it; empty when it may."""
        allowed = self.allowed(method)
        if roles & allowed:
            return ""
        has = ", ".join(sorted(roles)) or "no role"
        _log.warning("event=refused method=%s peer=%s name=%r roles=%r", method, peer, name, has)
        wanted = " or ".join(sorted(allowed)) or "a later version"
        return f"{method} is for {wanted}; the certificate of {name!r} has {has}"

    def check(self, method: str, context: _Context[Any, Any]) -> str:
        """Return why the caller of ``method`` is refused; empty when it is let through."""
        proven = context.auth_context()
        names = (value.decode(errors="replace") for value in proven.get(_SAN, ()))
        roles = roles_of_names(names)
        if roles & self.allowed(method):
            return ""
        name = next((value.decode(errors="replace") for value in proven.get(_NAME, ())), "")
        return self.refusal(method, roles, peer=str(context.peer()), name=name)

    def guarded(self, handler: grpc.GenericRpcHandler[Any, Any]) -> grpc.GenericRpcHandler[Any, Any]:
        """Return ``handler`` behind this guard."""
        return _Guarded(self, handler)


class _Guarded(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # not subscriptable when it runs
    def __init__(self, guard: Guard, inner: grpc.GenericRpcHandler[Any, Any]) -> None:
        self._guard = guard
        self._inner = inner
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any] | None] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return the handler of a method, behind the guard; called by gRPC for every call."""
        method = str(handler_call_details.method)
        if method not in self._handlers:
            found = self._inner.service(handler_call_details)
            if found is None:
                return None  # not remembered: names are the caller's, and endless
            self._handlers[method] = _wrapped(self._guard, method, found)
        return self._handlers[method]


def _wrapped(guard: Guard, method: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
    if handler.response_streaming:
        make = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
        behaviour: Callable[..., Any] = functools.partial(_stream, guard, method, inner)
    else:
        make = (
            grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        )
        inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
        behaviour = functools.partial(_unary, guard, method, inner)
    return make(
        behaviour, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
    )


async def _unary(
    guard: Guard, method: str, inner: Callable[[Any, Any], Awaitable[Any]], request: Any, context: _Context[Any, Any]
) -> Any:
    if problem := guard.check(method, context):
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, problem)
    return await inner(request, context)


async def _stream(
    guard: Guard, method: str, inner: Callable[[Any, Any], Any], request: Any, context: _Context[Any, Any]
) -> Any:
    if problem := guard.check(method, context):
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, problem)
    answers = inner(request, context)
    if hasattr(answers, "__aiter__"):
        async for answer in answers:
            await context.write(answer)
    else:
        await answers
