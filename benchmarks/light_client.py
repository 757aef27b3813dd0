"""The least client for unary gRPC calls: a few frames of HTTP/2 on one connection. Not a benchmark itself.

It shows when a server answers, without what a gRPC library in Python takes for itself on the way: by the kernel's own
time stamps of what arrives (SO_TIMESTAMPNS, socket(7)), also without what it takes to wake this process. It knows one
kind of call and one kind of answer, and ends with an error at whatever else it meets. Linux only.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_FRAME_HEAD_BYTES = 9
_TABLE_SIZE, _INITIAL_WINDOW, _MAX_FRAME = 1, 4, 5
_WIDE = 1 << 30
"""The window for answers: more than a run takes."""
_SO_TIMESTAMPNS = 35
_STAMP = struct.Struct("@qq")
_READ_BYTES = 1 << 18


class Answer(NamedTuple):
    """A message, and when its last bytes arrived at the socket, seconds since 1970."""

    body: bytes
    arrived_s: float


class LightClient:
    """One connection to ``authority``, for calls of ``path``, made by `connect`. `call` sends at once."""

    @classmethod
    async def connect(cls, authority: str, path: str) -> LightClient:
        """Return a client of the server at ``authority`` (host:port), ready for calls."""
        host, _, port = authority.rpartition(":")
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.connect((host, int(port)))
        connection.setblocking(False)
        client = cls(connection, authority, path)
        await client._ready
        return client

    def __init__(self, connection: socket.socket, authority: str, path: str) -> None:
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._fields = b"\x83\x86" + b"".join(  # POST, http
            _field(name, value)
            for name, value in (
                (":path", path),
                (":authority", authority),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
            )
        )
        self._answers: dict[int, asyncio.Future[Answer]] = {}
        self._bodies: dict[int, bytes] = {}
        self._next = 1
        self._window_bytes = self._stream_window_bytes = (1 << 16) - 1
        self._frame_bytes = 1 << 14
        self._held = b""
        self._unsent = b""
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(connection, self._read)
        settings = struct.pack(">HIHI", _TABLE_SIZE, 0, _INITIAL_WINDOW, _WIDE)
        hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(_SETTINGS, 0, 0, settings)
        self._send([hello, _frame(_WINDOW, 0, 0, struct.pack(">I", _WIDE))])

    def _send(self, parts: Sequence[bytes | memoryview]) -> None:
        """Send at once what the socket takes, the rest when it takes more."""
        if self._unsent:
            self._unsent += b"".join(parts)
            return
        sent_bytes = self._socket.sendmsg(parts)
        if sent_bytes < sum(map(len, parts)):
            self._unsent = b"".join(parts)[sent_bytes:]
            self._loop.add_writer(self._socket, self._send_rest)

    def _send_rest(self) -> None:
        self._unsent = self._unsent[self._socket.send(self._unsent) :]
        if not self._unsent:
            self._loop.remove_writer(self._socket)

    def call(self, body: bytes, timeout_s: float) -> asyncio.Future[Answer]:
        """Send a request; the future holds the serialised answer, or an error where the status is not OK."""
        stream, self._next = self._next, self._next + 2
        self._window_bytes -= len(body) + 5
        assert min(self._window_bytes, self._stream_window_bytes - len(body) - 5) >= 0, "the server's window is full"
        answer = self._answers[stream] = self._loop.create_future()
        fields = self._fields + _field("grpc-timeout", f"{timeout_s * 1000:.0f}m")
        self._send([_frame(_HEADERS, _END_HEADERS, stream, fields), *self._data(stream, body)])
        return answer

    def _data(self, stream: int, body: bytes) -> Iterator[bytes | memoryview]:
        """Yield the frames of a message, without copying it."""
        whole, start, prefix = memoryview(body), 0, b"\0" + struct.pack(">I", len(body))
        while True:
            end = min(len(body), start + self._frame_bytes - len(prefix))
            flags = _END_STREAM if end == len(body) else 0
            yield _head(len(prefix) + end - start, _DATA, flags, stream) + prefix
            yield whole[start:end]
            if flags:
                return
            start, prefix = end, b""

    def _read(self) -> None:
        """Take frames apart; called by the event loop."""
        try:
            data, told, _, _ = self._socket.recvmsg(_READ_BYTES, socket.CMSG_SPACE(_STAMP.size))
        except BlockingIOError:
            return
        if not data:
            self.close(ConnectionError("the connection was closed"))
            return
        stamps = [_STAMP.unpack(stamp) for _, kind, stamp in told if kind == _SO_TIMESTAMPNS]
        arrived_s = time.time()  # the first packets are not stamped
        for seconds, nanoseconds in stamps:
            arrived_s = seconds + nanoseconds / 1e9
        held = self._held + data if self._held else data
        start = 0
        while len(held) - start >= _FRAME_HEAD_BYTES:
            body = start + _FRAME_HEAD_BYTES
            end = body + int.from_bytes(held[start : start + 3], "big")
            if end > len(held):
                break
            stream = int.from_bytes(held[start + 5 : body], "big")
            self._take(held[start + 3], held[start + 4], stream, held[body:end], arrived_s)
            start = end
        self._held = held[start:]

    def _take(self, kind: int, flags: int, stream: int, content: bytes, arrived_s: float) -> None:
        if kind == _DATA:
            self._bodies[stream] = self._bodies.get(stream, b"") + content
        elif kind == _SETTINGS and not flags & _ACK:
            self._settle(content)
        elif kind == _PING and not flags & _ACK:
            self._send([_frame(_PING, _ACK, 0, content)])
        elif kind == _WINDOW and stream == 0:
            self._window_bytes += int.from_bytes(content, "big")
        elif kind in (_RESET, _GOAWAY):
            raise ConnectionError(f"the server gave up: frame {kind}, {content!r}")
        if kind in (_DATA, _HEADERS) and flags & _END_STREAM:
            answer, body = self._answers.pop(stream), self._bodies.pop(stream, b"")
            if b"grpc-status\x010" in content:
                answer.set_result(Answer(body[5:], arrived_s))
            else:
                answer.set_exception(ConnectionError(f"not OK: {content!r}"))

    def _settle(self, content: bytes) -> None:
        for key, value in struct.iter_unpack(">HI", content):
            if key == _INITIAL_WINDOW:
                self._stream_window_bytes = value
            elif key == _MAX_FRAME:
                self._frame_bytes = value
        self._send([_frame(_SETTINGS, _ACK, 0)])
        if not self._ready.done():
            self._ready.set_result(None)

    def close(self, reason: Exception | None = None) -> None:
        """End the connection, and fail what waits."""
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(reason or ConnectionError("the connection was closed"))


def _field(name: str, value: str) -> bytes:
    """Return a header that no table remembers (RFC 7541, 6.2.2)."""
    assert max(len(name), len(value)) < 127
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def _head(size_bytes: int, kind: int, flags: int, stream: int) -> bytes:
    return size_bytes.to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")


def _frame(kind: int, flags: int, stream: int, content: bytes = b"") -> bytes:
    return _head(len(content), kind, flags, stream) + content
