"""The connection over which a gateway hands requests to an agent (``executor/proto/forward.proto``).

A gRPC call of its own for every request costs a gateway more than all else that it does for it. Here requests are
frames on one connection, and those that are due at one moment share a frame. `ForwardLink` is the gateway's end,
`ForwardServer` the agent's. With TLS the agent asks once, when a connection is made, for the role
of a gateway, or of another agent, which hands over the next stage of a workflow.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from google.protobuf.message import DecodeError

from executor.delay import Delay
from executor.errors import details_of, status_of
from executor.logs import log_failure
from executor.proto import forward_pb2 as pb
from executor.roles import Role
from executor.tls import Credentials, peer_identity
from executor.tracing import current_traceparent, join_trace
from plans.errors import ForeplanError, InvalidInput

__all__ = ["Body", "CallFailed", "ForwardLink", "ForwardServer", "shared_bytes"]

_log = logging.getLogger("executor.forwarding")

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_LENGTHS = struct.Struct("<II")  # of the message, and of all bodies
_READ_BYTES = 1 << 16
_JOINED_BYTES = 1 << 14
"""Bodies up to here are joined: a call to send more costs more than a copy."""
_ENVELOPE_BYTES = 1 << 16
_CONNECT_S = 2.0
_LONGEST_TRANSIT_S, _MOST_OF_TIMEOUT = 0.02, 0.1
"""What is allowed for the way between a gateway and an agent: seconds, and the part of a request's time, at most."""

Body = bytes | memoryview
"""A serialised message; what is not bytes is a part of a frame."""


def shared_bytes(max_message_bytes: int) -> int:
    """Return the largest request for the connection: a larger one would hold up the small ones behind it."""
    return min(1 << 20, max_message_bytes)


class CallFailed(Exception):
    """A request ended with a status other than OK."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details


@dataclass(frozen=True, slots=True)
class _Item:
    """A request or an answer in a frame, and its body."""

    message: Any
    body: Body


@dataclass(frozen=True, slots=True)
class _Sent:
    """A request under way: the future of its answer, the group, and when it was sent."""

    answer: asyncio.Future[bytes]
    group: str
    at_s: float


class _Frames(asyncio.BufferedProtocol):
    """Frames over one connection: what is sent within one turn of the event loop leaves in one frame, up to a size.

    Large bodies are neither joined when sent nor moved when received: they are read to where they stay.

    Args:
        limit_bytes: Longest frame taken; a longer one ends the connection.
        full_bytes: When a frame to be sent is full.
        pack: Makes the message of a frame out of items.
        unpack: Returns the items of the message of a frame.
        on_item: Told every item that arrives, with its body, which stays valid; a `DecodeError` ends the connection.
        on_end: Told why when the connection is gone.
        admits: Asked once, before anything is read, whether the other end is welcome.
    """

    def __init__(
        self,
        *,
        limit_bytes: int,
        full_bytes: int,
        pack: Callable[[list[Any]], bytes],
        unpack: Callable[[bytes], Iterable[Any]],
        on_item: Callable[[Any, memoryview], None],
        on_end: Callable[[str], None],
        admits: Callable[[Any], bool] = lambda _: True,
    ) -> None:
        self.transport: Any = None
        self._limit_bytes = limit_bytes
        self._full_bytes = full_bytes
        self._pack = pack
        self._unpack = unpack
        self._on_item = on_item
        self._on_end = on_end
        self._admits = admits
        self._waiting: list[_Item] = []
        self._small = memoryview(bytearray(_READ_BYTES))  # what arrives, until it is known to be a long frame
        self._large: memoryview | None = None  # a frame that is read to its place
        self._filled = 0
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send what waited for the connection; called by the event loop."""
        self.transport = transport
        if self._admits(transport):
            self._flush()
        else:
            self.transport.abort()

    def put(self, message: Any, body: Body = b"") -> None:
        """Send ``message`` within this turn of the event loop, or once the connection is there."""
        if not self._waiting and self.transport is not None:
            self._loop.call_soon(self._flush)
        self._waiting.append(_Item(message, body))

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if self.transport.is_closing():
            return
        for items in _parts(waiting, self._full_bytes):
            message = self._pack([item.message for item in items])
            bodies = [item.body for item in items]
            bodies_bytes = sum(map(len, bodies))
            head = _LENGTHS.pack(len(message), bodies_bytes) + message
            if bodies_bytes <= _JOINED_BYTES:
                self.transport.write(b"".join((head, *bodies)))
            else:
                self.transport.write(head)
                for body in bodies:
                    self.transport.write(body)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes go; called by the event loop."""
        return (self._small if self._large is None else self._large)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take frames apart; called by the event loop."""
        self._filled += nbytes
        try:
            if self._large is None:
                self._take_small()
            elif self._filled == len(self._large):
                frame, self._large, self._filled = self._large, None, 0
                self._take(frame)
        except DecodeError as error:
            _log.warning("event=bad_frame problem=%r", str(error))
            self.transport.abort()

    def _take_small(self) -> None:
        start = 0
        while self._filled - start >= _LENGTHS.size:
            size_bytes = _LENGTHS.size + sum(_LENGTHS.unpack_from(self._small, start))
            if size_bytes > self._limit_bytes:
                raise DecodeError(f"a frame of {size_bytes} bytes")
            end = start + size_bytes
            if end > self._filled:
                break
            self._take(memoryview(bytes(self._small[start:end])))
            start = end
        left_bytes = self._filled - start
        if left_bytes >= _LENGTHS.size and size_bytes > _READ_BYTES // 2:
            self._large = memoryview(bytearray(size_bytes))
            self._large[:left_bytes] = self._small[start : self._filled]
        elif start:
            self._small[:left_bytes] = bytes(self._small[start : self._filled])
        self._filled = left_bytes

    def _take(self, frame: memoryview) -> None:
        message_bytes, _ = _LENGTHS.unpack_from(frame)
        start = _LENGTHS.size + message_bytes
        for item in self._unpack(bytes(frame[_LENGTHS.size : start])):
            end = start + item.body_bytes
            if end > len(frame):
                raise DecodeError("a body that reaches beyond its frame")
            self._on_item(item, frame[start:end].toreadonly())
            start = end

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell why; called by the event loop."""
        self._on_end(str(exc) if exc else "the connection was closed")


def _parts(items: Iterable[_Item], full_bytes: int) -> Iterator[list[_Item]]:
    part: list[_Item] = []
    total = 0
    for item in items:
        if part and total + len(item.body) > full_bytes:
            yield part
            part, total = [], 0
        part.append(item)
        total += len(item.body)
    if part:
        yield part


class ForwardLink:
    """A gateway's end: `send` requests over one connection, which is made when needed.

    Args:
        host: Of the agent; its certificate must be for it.
        credentials: For TLS, or None.
        on_wait: Told the expected wait of a group, seconds, with every answer from it.
        max_message_bytes: Largest request and answer.

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
    ) -> None:
        self.port = 0
        self._host = host
        self._credentials = credentials
        self._on_wait = on_wait
        self._limit_bytes = max_message_bytes + _ENVELOPE_BYTES
        self._full_bytes = shared_bytes(max_message_bytes)
        self._numbers = itertools.count(1)
        self._pending: dict[int, _Sent] = {}
        self._transit = Delay()
        self._frames: _Frames | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    async def send(self, body: bytes, group: str, timeout_s: float) -> bytes:
        """Return the answer of ``group`` to a serialised request.

        The agent is told of less time: what requests lately spent on the way to it and back, twice, because the way
        from the client and back takes time too, as much as far as can be seen from here.

        Raises:
            CallFailed: It was refused, the connection broke, or ``timeout_s`` passed.
        """
        frames = self._frames or self._connect()
        number = next(self._numbers)
        answer: asyncio.Future[bytes] = self._loop.create_future()
        self._pending[number] = _Sent(answer, group, self._loop.time())
        left_s = timeout_s - min(2 * self._transit.expected_s, _MOST_OF_TIMEOUT * timeout_s)
        asked = pb.Request(number=number, group=group, timeout_s=left_s, body_bytes=len(body))
        asked.traceparent = current_traceparent()
        frames.put(asked, body)
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

    def _connect(self) -> _Frames:
        frames = _Frames(
            limit_bytes=self._limit_bytes,
            full_bytes=self._full_bytes,
            pack=lambda items: pb.Requests(requests=items).SerializeToString(),
            unpack=lambda message: pb.Answers.FromString(message).answers,
            on_item=self._answered,
            on_end=lambda reason: self._end(frames, reason),
        )
        self._frames = frames
        self._connecting = self._loop.create_task(self._open(frames))
        self._connecting.add_done_callback(log_failure)
        return frames

    async def _open(self, frames: _Frames) -> None:
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

    def _answered(self, answer: pb.Answer, body: memoryview) -> None:
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
            self._frames.put(pb.Request(number=number))

    def _end(self, frames: _Frames, reason: str) -> None:
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

    async def answer_to(self, request: pb.Request, body: memoryview) -> tuple[pb.Answer, bytes]:
        """Return the answer to one request and its body, whatever becomes of it."""
        join_trace(request.traceparent)
        answer = pb.Answer(number=request.number)
        found = b""
        try:
            found = await self._answer(body, request.group, request.timeout_s)
        except ForeplanError as error:
            answer.status, answer.details = status_of(error).value[0], details_of(error)
        except CallFailed as error:
            answer.status, answer.details = error.code.value[0], error.details
        except Exception:  # noqa: BLE001 - the edge of the process: one request must not end the connection of all
            _log.exception("event=bug request=%d", request.number)
            answer.status, answer.details = grpc.StatusCode.INTERNAL.value[0], "a bug in the agent; see its log"
        if len(found) > self._max_message_bytes:
            problem = f"the answer has {len(found)} bytes, above the limit of {self._max_message_bytes}"
            answer.status, answer.details = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], problem
            found = b""
        answer.body_bytes = len(found)
        answer.expected_wait_s = self._wait_s(request.group)
        return answer, found


class _Connection:
    """The requests of one gateway."""

    def __init__(self, server: ForwardServer) -> None:
        self._server = server
        self._running: dict[int, asyncio.Task[None]] = {}
        largest_bytes, full_bytes = server.limits_bytes
        self.frames = _Frames(
            limit_bytes=largest_bytes + _ENVELOPE_BYTES,
            full_bytes=full_bytes,
            pack=lambda items: pb.Answers(answers=items).SerializeToString(),
            unpack=lambda message: pb.Requests.FromString(message).requests,
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

    def _take(self, request: pb.Request, body: memoryview) -> None:
        number = request.number
        if not body:
            if task := self._running.get(number):
                task.cancel()
        elif self._server.is_closing:
            code = grpc.StatusCode.UNAVAILABLE.value[0]
            self.frames.put(pb.Answer(number=number, status=code, details="the agent is stopping"))
        elif number not in self._running:
            taken_s = asyncio.get_running_loop().time()
            self._running[number] = task = asyncio.create_task(self._one(request, body, taken_s))
            task.add_done_callback(lambda _: self._running.pop(number, None))

    async def _one(self, request: pb.Request, body: memoryview, taken_s: float) -> None:
        answer, found = await self._server.answer_to(request, body)
        answer.held_s = asyncio.get_running_loop().time() - taken_s
        self.frames.put(answer, found)

    def _ended(self, _: str) -> None:
        self._server.taking(self, False)
        for task in self._running.values():
            task.cancel()
