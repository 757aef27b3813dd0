"""The connection over which a gateway hands requests to an agent (``executor/proto/forward.proto``).

A gRPC call of its own for every request costs a gateway more than all else that it does for it. Here requests are
frames on one connection, and those that are due at one moment share a frame. `ForwardLink` is the gateway's end,
`ForwardServer` the agent's. With TLS the agent asks for the role of a gateway once, when a connection is made.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import grpc
from google.protobuf.message import DecodeError

from executor.errors import details_of, status_of
from executor.logs import log_failure
from executor.proto import forward_pb2 as pb
from executor.roles import Role
from executor.tls import Credentials, peer_identity
from plans.errors import ForeplanError, InvalidInput

__all__ = ["CallFailed", "ForwardLink", "ForwardServer", "shared_bytes"]

_log = logging.getLogger("executor.forwarding")

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_LENGTH = struct.Struct("<I")
_ENVELOPE_BYTES = 1 << 16
_CONNECT_S = 2.0


def shared_bytes(max_message_bytes: int) -> int:
    """Return the largest request for the connection: a larger one would hold up the small ones behind it."""
    return min(1 << 20, max_message_bytes)


class CallFailed(Exception):
    """A request ended with a status other than OK."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details


class _Frames(asyncio.Protocol):
    """Frames over one connection: what is sent within one turn of the event loop leaves in one frame, up to a size.

    Args:
        limit_bytes: Longest frame taken; a longer one ends the connection.
        full_bytes: When a frame to be sent is full.
        pack: Makes the message of a frame out of items.
        on_frame: Told every message that arrives; a `DecodeError` ends the connection.
        on_end: Told why when the connection is gone.
    """

    def __init__(
        self,
        *,
        limit_bytes: int,
        full_bytes: int,
        pack: Callable[[list[Any]], bytes],
        on_frame: Callable[[bytes], None],
        on_end: Callable[[str], None],
    ) -> None:
        self.transport: Any = None
        self._limit_bytes = limit_bytes
        self._full_bytes = full_bytes
        self._pack = pack
        self._on_frame = on_frame
        self._on_end = on_end
        self._waiting: list[tuple[Any, int]] = []
        self._read = bytearray()
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send what waited for the connection; called by the event loop."""
        self.transport = transport
        self._flush()

    def put(self, item: Any, size_bytes: int) -> None:
        """Send ``item`` within this turn of the event loop, or once the connection is there."""
        if not self._waiting and self.transport is not None:
            self._loop.call_soon(self._flush)
        self._waiting.append((item, size_bytes))

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if self.transport.is_closing():
            return
        for items in _parts(waiting, self._full_bytes):
            body = self._pack(items)
            self.transport.write(_LENGTH.pack(len(body)) + body)

    def data_received(self, data: bytes) -> None:
        """Take frames apart; called by the event loop."""
        self._read += data
        start = 0
        try:
            while len(self._read) - start >= _LENGTH.size:
                (size_bytes,) = _LENGTH.unpack_from(self._read, start)
                if size_bytes > self._limit_bytes:
                    raise DecodeError(f"a frame of {size_bytes} bytes")
                end = start + _LENGTH.size + size_bytes
                if len(self._read) < end:
                    break
                self._on_frame(bytes(memoryview(self._read)[start + _LENGTH.size : end]))
                start = end
        except DecodeError as error:
            _log.warning("event=bad_frame problem=%r", str(error))
            self.transport.abort()
            return
        del self._read[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell why; called by the event loop."""
        self._on_end(str(exc) if exc else "the connection was closed")


def _parts(items: Iterable[tuple[Any, int]], full_bytes: int) -> Iterator[list[Any]]:
    part: list[Any] = []
    total = 0
    for item, size_bytes in items:
        if part and total + size_bytes > full_bytes:
            yield part
            part, total = [], 0
        part.append(item)
        total += size_bytes
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
        self._pending: dict[int, tuple[asyncio.Future[bytes], str]] = {}
        self._frames: _Frames | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    async def send(self, body: bytes, group: str, timeout_s: float) -> bytes:
        """Return the answer of ``group`` to a serialised request.

        Raises:
            CallFailed: It was refused, the connection broke, or ``timeout_s`` passed.
        """
        frames = self._frames or self._connect()
        number = next(self._numbers)
        answer: asyncio.Future[bytes] = self._loop.create_future()
        self._pending[number] = (answer, group)
        frames.put(pb.Request(number=number, group=group, timeout_s=timeout_s, body=body), len(body))
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
        waiting = [future for future, _ in self._pending.values()]
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
            on_frame=self._answered,
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

    def _answered(self, message: bytes) -> None:
        for answer in pb.Answers.FromString(message).answers:
            future, group = self._pending.pop(answer.number, (None, ""))
            if future is None:
                continue
            self._on_wait(group, answer.expected_wait_s)
            if future.done():
                continue
            if answer.status:
                code = _CODES.get(answer.status, grpc.StatusCode.UNKNOWN)
                future.set_exception(CallFailed(code, answer.details))
            else:
                future.set_result(answer.body)

    def _late(self, number: int) -> None:
        future, _ = self._pending.get(number, (None, ""))
        self._forget(number)
        if future is not None and not future.done():
            future.set_exception(CallFailed(grpc.StatusCode.DEADLINE_EXCEEDED, "no answer within the deadline"))

    def _forget(self, number: int) -> None:
        if self._pending.pop(number, None) is not None and self._frames is not None:
            self._frames.put(pb.Request(number=number), 0)

    def _end(self, frames: _Frames, reason: str) -> None:
        if self._frames is not frames:
            return
        self._frames = None
        pending, self._pending = self._pending, {}
        for future, _ in pending.values():
            if not future.done():
                future.set_exception(CallFailed(grpc.StatusCode.UNAVAILABLE, reason))


class Answering(Protocol):
    """What an agent does with a forwarded request."""

    async def __call__(self, body: bytes, group: str, timeout_s: float) -> bytes:
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
        if roles & {Role.GATEWAY, Role.OPERATOR}:
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

    async def answer_to(self, request: pb.Request) -> pb.Answer:
        """Return the answer to one request, whatever becomes of it."""
        answer = pb.Answer(number=request.number)
        try:
            answer.body = await self._answer(request.body, request.group, request.timeout_s)
        except ForeplanError as error:
            answer.status, answer.details = status_of(error).value[0], details_of(error)
        except CallFailed as error:
            answer.status, answer.details = error.code.value[0], error.details
        except Exception:  # noqa: BLE001 - the edge of the process: one request must not end the connection of all
            _log.exception("event=bug request=%d", request.number)
            answer.status, answer.details = grpc.StatusCode.INTERNAL.value[0], "a bug in the agent; see its log"
        if len(answer.body) > self._max_message_bytes:
            problem = f"the answer has {len(answer.body)} bytes, above the limit of {self._max_message_bytes}"
            code = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
            answer = pb.Answer(number=request.number, status=code, details=problem)
        answer.expected_wait_s = self._wait_s(request.group)
        return answer


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
            on_frame=self._asked,
            on_end=self._ended,
        )
        self._admitted = False

    def abort(self) -> None:
        """End the connection now."""
        if self.frames.transport is not None:
            self.frames.transport.abort()

    def _asked(self, message: bytes) -> None:
        if not self._admitted:
            self._admitted = self._server.admits(self.frames.transport)
            if not self._admitted:
                self.abort()
                return
            self._server.taking(self, True)
        for request in pb.Requests.FromString(message).requests:
            self._take(request)

    def _take(self, request: pb.Request) -> None:
        number = request.number
        if not request.body:
            if task := self._running.get(number):
                task.cancel()
        elif self._server.is_closing:
            code = grpc.StatusCode.UNAVAILABLE.value[0]
            self.frames.put(pb.Answer(number=number, status=code, details="the agent is stopping"), 0)
        elif number not in self._running:
            self._running[number] = task = asyncio.create_task(self._one(request))
            task.add_done_callback(lambda _: self._running.pop(number, None))

    async def _one(self, request: pb.Request) -> None:
        answer = await self._server.answer_to(request)
        self.frames.put(answer, len(answer.body))

    def _ended(self, _: str) -> None:
        self._server.taking(self, False)
        for task in self._running.values():
            task.cancel()
