"""The connection over which a gateway hands requests to an agent (`executor.forward_wire`).

A gRPC call of its own for every request costs a gateway more than all else that it does for it. Here requests are
frames on one connection, and those that are due at one moment share a frame. `ForwardLink` is the gateway's end,
`ForwardServer` the agent's. With TLS the agent asks once, when a connection is made, for the role
of a gateway, or of another agent, which hands over the next stage of a workflow.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from executor.delay import Delay
from executor.errors import details_of, shortened, status_of
from executor.forward_frames import Body, Frames
from executor.forward_wire import Answer, Request, decode_answers, decode_requests, encode_answers, encode_requests
from executor.logs import log_failure
from executor.roles import Role
from executor.tls import Credentials, peer_identity
from executor.tracing import current_traceparent, join_trace
from plans.errors import ForeplanError, InvalidInput

__all__ = ["Body", "CallFailed", "ForwardLink", "ForwardServer", "shared_bytes"]

_log = logging.getLogger("executor.forwarding")

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_ENVELOPE_BYTES = 1 << 16
_CONNECT_S = 2.0
_MOST_UNSENT_BYTES = 1 << 26
"""Bytes that may wait for an agent to read them. One that hangs reads nothing, and keeps its connection for minutes."""
_LONGEST_TRANSIT_S, _MOST_OF_TIMEOUT = 0.02, 0.1
"""What is allowed for the way between a gateway and an agent: seconds, and the part of a request's time, at most."""


def shared_bytes(max_message_bytes: int) -> int:
    """Return the largest request for the connection: a larger one would hold up the small ones behind it."""
    return min(1 << 20, max_message_bytes)


class CallFailed(Exception):
    """A request ended with a status other than OK; its details are what a client may be told."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = shortened(details)


@dataclass(frozen=True, slots=True)
class _Sent:
    """A request under way: the future of its answer, the group, and when it was sent."""

    answer: asyncio.Future[bytes]
    group: str
    at_s: float


class ForwardLink:
    """A gateway's end: `send` requests over one connection, which is made when needed.

    Args:
        host: Of the agent; its certificate must be for it.
        credentials: For TLS, or None.
        on_wait: Told the expected wait of a group, seconds, with every answer from it.
        max_message_bytes: Largest request and answer.
        most_unsent_bytes: Bytes that may wait for the agent to read them; requests beyond are refused.

    Attributes:
        port: Where the agent takes connections; 0 while that is not known.
    """

    def __init__(
        self,
        host: str,
        credentials: Credentials | None,
        on_wait: Callable[[str, float], None],
        *,
        max_message_bytes: int,
        most_unsent_bytes: int = _MOST_UNSENT_BYTES,
    ) -> None:
        self.port = 0
        self._host = host
        self._credentials = credentials
        self._on_wait = on_wait
        self._limit_bytes = max_message_bytes + _ENVELOPE_BYTES
        self._full_bytes = shared_bytes(max_message_bytes)
        self._most_unsent_bytes = most_unsent_bytes
        self._numbers = itertools.count(1)
        self._pending: dict[int, _Sent] = {}
        self._transit = Delay()
        self._frames: Frames | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    async def send(self, body: bytes, group: str, timeout_s: float) -> bytes:
        """Return the answer of ``group`` to a serialised request.

        The agent is told of less time: what requests lately spent on the way to it and back, twice, because the way
        from the client and back takes time too, as much as far as can be seen from here.

        Raises:
            CallFailed: It was refused, the connection broke or takes nothing more, or ``timeout_s`` passed.
        """
        frames = self._frames or self._connect()
        if frames.unsent_bytes > self._most_unsent_bytes:
            problem = f"its agent does not read: {frames.unsent_bytes} bytes wait to be sent to it"
            raise CallFailed(grpc.StatusCode.UNAVAILABLE, problem)
        number = next(self._numbers)
        answer: asyncio.Future[bytes] = self._loop.create_future()
        self._pending[number] = _Sent(answer, group, self._loop.time())
        left_s = timeout_s - min(2 * self._transit.expected_s, _MOST_OF_TIMEOUT * timeout_s)
        frames.put(Request(number, group, left_s, len(body), current_traceparent()), body)
        timer = self._loop.call_later(timeout_s, self._late, number)
        try:
            return await answer
        except asyncio.CancelledError:  # the client gave up
            self._forget(number)
            raise
        finally:
            timer.cancel()

    async def close(self, grace_s: float) -> None:
        """End the connection once all is answered, or after ``grace_s`` seconds; what waits then fails."""
        waiting = [sent.answer for sent in self._pending.values()]
        if waiting and grace_s > 0:
            await asyncio.wait(waiting, timeout=grace_s)
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
        frames = self._frames
        if frames is not None:
            self._end(frames, "the connection was closed")
            if frames.transport is not None:
                frames.transport.close()

    def _connect(self) -> Frames:
        frames = Frames(
            limit_bytes=self._limit_bytes,
            full_bytes=self._full_bytes,
            pack=encode_requests,
            unpack=decode_answers,
            on_item=self._answered,
            on_end=lambda reason: self._end(frames, reason),
        )
        self._frames = frames
        self._connecting = self._loop.create_task(self._open(frames))
        self._connecting.add_done_callback(log_failure)
        return frames

    async def _open(self, frames: Frames) -> None:
        context = self._credentials.client_context() if self._credentials else None
        try:
            async with asyncio.timeout(_CONNECT_S):
                await self._loop.create_connection(
                    lambda: frames,
                    self._host,
                    self.port,
                    ssl=context,
                    server_hostname=self._host if context else None,
                )
        except (OSError, TimeoutError) as error:
            self._end(frames, f"cannot connect to port {self.port}: {error}")

    def _answered(self, answer: Answer, body: memoryview) -> None:
        sent = self._pending.pop(answer.number, None)
        if sent is None:
            return
        future = sent.answer
        self._on_wait(sent.group, answer.expected_wait_s)
        if answer.held_s > 0:
            self._transit.note(self._loop.time() - sent.at_s - answer.held_s, most_s=_LONGEST_TRANSIT_S)
        if future.done():
            return
        if answer.status:
            code = _CODES.get(answer.status, grpc.StatusCode.UNKNOWN)
            future.set_exception(CallFailed(code, answer.details))
        else:
            future.set_result(bytes(body))

    def _late(self, number: int) -> None:
        sent = self._pending.get(number)
        self._forget(number)
        if sent is not None and not sent.answer.done():
            sent.answer.set_exception(CallFailed(grpc.StatusCode.DEADLINE_EXCEEDED, "no answer within the deadline"))

    def _forget(self, number: int) -> None:
        if self._pending.pop(number, None) is not None and self._frames is not None:
            self._frames.put(Request(number))

    def _end(self, frames: Frames, reason: str) -> None:
        if self._frames is not frames:
            return
        self._frames = None
        pending, self._pending = self._pending, {}
        for sent in pending.values():
            if not sent.answer.done():
                sent.answer.set_exception(CallFailed(grpc.StatusCode.UNAVAILABLE, reason))


class Answering(Protocol):
    """What an agent does with a forwarded request."""

    async def __call__(self, body: Body, group: str, timeout_s: float) -> bytes:
        """Return the serialised answer; raise `ForeplanError` or `CallFailed` to refuse."""


class ForwardServer:
    """An agent's end.

    Args:
        answer: Runs one request.
        wait_s: Returns the expected wait of a group, seconds.
        max_message_bytes: Largest request and answer.
        credentials: For TLS, or None.

    Attributes:
        port: Where it listens; 0 before.
    """

    def __init__(
        self,
        answer: Answering,
        wait_s: Callable[[str], float],
        *,
        max_message_bytes: int,
        credentials: Credentials | None = None,
    ) -> None:
        self.port = 0
        self._answer = answer
        self._wait_s = wait_s
        self._max_message_bytes = max_message_bytes
        self._credentials = credentials
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._closing = False

    async def listen(self, host: str, port: int = 0) -> None:
        """Take connections on ``host``; port 0 takes a free one.

        Raises:
            InvalidInput: The address cannot be listened on.
        """
        context = self._credentials.ssl_context() if self._credentials else None
        try:
            self._server = await asyncio.get_running_loop().create_server(
                lambda: self._connection().frames, host.strip("[]"), port, ssl=context
            )
        except OSError as error:
            expected = "an address of this machine with a free port"
            raise InvalidInput.of(expected, where="--forward-port", found=f"{host}:{port}") from error
        self.port = int(self._server.sockets[0].getsockname()[1])

    def refuse(self) -> None:
        """Refuse what arrives from now on; a gateway tries elsewhere."""
        self._closing = True

    async def close(self) -> None:
        """End every connection."""
        if self._server is not None:
            self._server.close()
        for connection in tuple(self._connections):
            connection.abort()

    def _connection(self) -> _Connection:
        return _Connection(self)

    def admits(self, transport: Any) -> bool:
        """Say whether the other end may forward requests, and log it when not."""
        if self._credentials is None:
            return True
        name, roles = peer_identity(transport.get_extra_info("ssl_object"))
        if roles & {Role.GATEWAY, Role.OPERATOR, Role.AGENT}:
            return True
        peer, has = transport.get_extra_info("peername"), ", ".join(sorted(roles)) or "no role"
        _log.warning("event=refused method=forward peer=%s name=%r roles=%r", peer, name, has)
        return False

    def taking(self, connection: _Connection, here: bool) -> None:
        """Note that a connection is here, or gone."""
        (self._connections.add if here else self._connections.discard)(connection)

    @property
    def is_closing(self) -> bool:
        """Whether requests are refused."""
        return self._closing

    @property
    def limits_bytes(self) -> tuple[int, int]:
        """Largest message, and when a frame is full."""
        return self._max_message_bytes, shared_bytes(self._max_message_bytes)

    async def answer_to(self, request: Request, body: memoryview, taken_s: float) -> tuple[Answer, bytes]:
        """Return the answer to one request, taken at ``taken_s``, and its body, whatever becomes of it."""
        join_trace(request.traceparent)
        status, details, found = grpc.StatusCode.OK, "", b""
        try:
            found = await self._answer(body, request.group, request.timeout_s)
        except ForeplanError as error:
            status, details = status_of(error), details_of(error)
        except CallFailed as error:
            status, details = error.code, error.details
        except Exception:  # noqa: BLE001 - the edge of the process: one request must not end the connection of all
            _log.exception("event=bug request=%d", request.number)
            status, details = grpc.StatusCode.INTERNAL, "a bug in the agent; see its log"
        if len(found) > self._max_message_bytes:
            details = f"the answer has {len(found)} bytes, above the limit of {self._max_message_bytes}"
            status, found = grpc.StatusCode.RESOURCE_EXHAUSTED, b""
        wait_s = self._wait_s(request.group)
        held_s = asyncio.get_running_loop().time() - taken_s
        return Answer(request.number, len(found), status.value[0], details, wait_s, held_s), found


class _Connection:
    """The requests of one gateway."""

    def __init__(self, server: ForwardServer) -> None:
        self._server = server
        self._running: dict[int, asyncio.Task[None]] = {}
        largest_bytes, full_bytes = server.limits_bytes
        self.frames = Frames(
            limit_bytes=largest_bytes + _ENVELOPE_BYTES,
            full_bytes=full_bytes,
            pack=encode_answers,
            unpack=decode_requests,
            on_item=self._take,
            on_end=self._ended,
            admits=self._admits,
        )

    def abort(self) -> None:
        """End the connection now."""
        if self.frames.transport is not None:
            self.frames.transport.abort()

    def _admits(self, transport: Any) -> bool:
        admitted = self._server.admits(transport)
        if admitted:
            self._server.taking(self, True)
        return admitted

    def _take(self, request: Request, body: memoryview) -> None:
        number = request.number
        if not body:
            if task := self._running.get(number):
                task.cancel()
        elif self._server.is_closing:
            code = grpc.StatusCode.UNAVAILABLE.value[0]
            self.frames.put(Answer(number, status=code, details="the agent is stopping"))
        elif number not in self._running:
            taken_s = asyncio.get_running_loop().time()
            self._running[number] = task = asyncio.create_task(self._one(request, body, taken_s))
            task.add_done_callback(lambda _: self._running.pop(number, None))

    async def _one(self, request: Request, body: memoryview, taken_s: float) -> None:
        self.frames.put(*await self._server.answer_to(request, body, taken_s))

    def _ended(self, _: str) -> None:
        self._server.taking(self, False)
        for task in self._running.values():
            task.cancel()
