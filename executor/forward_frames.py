"""One end of the connection between a gateway and an agent: frames (`executor.forward_wire`) sent and taken apart."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from executor.forward_wire import LENGTHS, BadFrame

__all__ = ["Body", "Frames"]

_log = logging.getLogger("executor.forwarding")

_READ_BYTES = 1 << 16
_JOINED_BYTES = 1 << 14
"""Bodies up to here are joined: a call to send more costs more than a copy."""

_MOST_HEAD_BYTES = 1 << 12
"""An item takes no more of a frame beside its body: its numbers, and texts, which are `executor.errors.shortened`."""

Body = bytes | memoryview
"""A serialised message; what is not bytes is a part of a frame."""


@dataclass(frozen=True, slots=True)
class _Item:
    """A request or an answer in a frame, and its body."""

    message: Any
    body: Body


class Frames(asyncio.BufferedProtocol):
    """Frames over one connection: what is small and sent within one turn of the event loop leaves in one frame.

    Large bodies are neither joined when sent nor moved when received: they are read to where they stay. They leave at
    once, each in a frame of its own.

    Args:
        limit_bytes: Longest frame taken; a longer one ends the connection.
        full_bytes: When a frame to be sent is full.
        pack: Makes the message of a frame out of items.
        unpack: Returns the items of the message of a frame.
        on_item: Told every item that arrives, with its body, which stays valid; a `BadFrame` ends the connection.
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

    @property
    def unsent_bytes(self) -> int:
        """Bytes that the operating system has not taken yet, for the other end does not read."""
        return self.transport.get_write_buffer_size() if self.transport is not None else 0

    def put(self, message: Any, body: Body = b"") -> None:
        """Send ``message`` at the end of this turn of the event loop at the latest, or once the connection is there."""
        if not self._waiting and self.transport is not None:
            if len(body) > _JOINED_BYTES:
                self._send([_Item(message, body)])
                return
            self._loop.call_soon(self._flush)
        self._waiting.append(_Item(message, body))

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if len(waiting) == 1:
            self._send(waiting)
            return
        for items in _parts(waiting, self._full_bytes):
            self._send(items)

    def _send(self, items: list[_Item]) -> None:
        if self.transport.is_closing():
            return
        message = self._pack([item.message for item in items])
        bodies = [item.body for item in items]
        bodies_bytes = sum(map(len, bodies))
        head = LENGTHS.pack(len(message), bodies_bytes) + message
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
        except BadFrame as error:
            _log.warning("event=bad_frame problem=%r", str(error))
            self.transport.abort()

    def _take_small(self) -> None:
        start = 0
        while self._filled - start >= LENGTHS.size:
            size_bytes = LENGTHS.size + sum(LENGTHS.unpack_from(self._small, start))
            if size_bytes > self._limit_bytes:
                raise BadFrame(f"a frame of {size_bytes} bytes")
            end = start + size_bytes
            if end > self._filled:
                break
            self._take(memoryview(bytes(self._small[start:end])))
            start = end
        left_bytes = self._filled - start
        if left_bytes >= LENGTHS.size and size_bytes > _READ_BYTES // 2:
            self._large = memoryview(bytearray(size_bytes))
            self._large[:left_bytes] = self._small[start : self._filled]
        elif start:
            self._small[:left_bytes] = bytes(self._small[start : self._filled])
        self._filled = left_bytes

    def _take(self, frame: memoryview) -> None:
        message_bytes, _ = LENGTHS.unpack_from(frame)
        start = LENGTHS.size + message_bytes
        for item in self._unpack(bytes(frame[LENGTHS.size : start])):
            end = start + item.body_bytes
            if end > len(frame):
                raise BadFrame("a body that reaches beyond its frame")
            self._on_item(item, frame[start:end].toreadonly())
            start = end

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell why; called by the event loop."""
        self._on_end(str(exc) if exc else "the connection was closed")


def _parts(items: Iterable[_Item], full_bytes: int) -> Iterator[list[_Item]]:
    part: list[_Item] = []
    total = 0
    for item in items:
        size_bytes = len(item.body) + _MOST_HEAD_BYTES
        if part and total + size_bytes > full_bytes:
            yield part
            part, total = [], 0
        part.append(item)
        total += size_bytes
    if part:
        yield part
