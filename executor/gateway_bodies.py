"""The bodies of a gateway's HTTP requests and answers: read, inflated and sent within limits of bytes and of time."""

from __future__ import annotations

import asyncio
import contextlib
import reprlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from aiohttp import web

from executor.errors import TOO_MUCH
from executor.forwarding import CallFailed
from plans.errors import InvalidInput

__all__ = ["Bodies"]

_HELD_BYTES = 512 * 2**20
"""Most bytes of all bodies that are being read, and of all answers that are being sent."""

_BODY_S, _ANSWER_S = 60.0, 60.0
"""How long the body of a request may take to come, and an answer to be taken."""

_BUFFER_BYTES = 1 << 16
"""Fits in the buffer of a connection: so short an answer is waited for by nobody, so short a body not counted."""

_PIECE_BYTES = 1 << 20
"""Bytes that are inflated at once, a few milliseconds of work."""

_Take = Callable[[bytes], None]


class Bodies:
    """The bodies and answers that a process holds."""

    def __init__(self, largest_bytes: int) -> None:
        self._largest_bytes = largest_bytes
        self._held_bytes = 0

    async def read(self, request: web.Request) -> bytes:
        """Return the body of a request, inflated.

        Raises:
            InvalidInput: It is in an encoding that is not taken.
            CallFailed: Too many bytes are held already.
            web.RequestPayloadError: It is not encoded as it says.
            web.HTTPException: It is too large, or does not come.
        """
        inflater = _inflater(request)
        body = bytearray()
        with self._holding() as hold:

            def take(piece: bytes) -> None:
                body.extend(piece)
                hold(max(0, min(len(piece), len(body) - _BUFFER_BYTES)))  # short ones are nobody's trouble
                if len(body) > self._largest_bytes:
                    raise web.HTTPRequestEntityTooLarge(self._largest_bytes, len(body))

            try:
                async with asyncio.timeout(_BODY_S):
                    async for piece in request.content.iter_any():
                        if inflater is None:
                            take(piece)
                        else:
                            await _inflate(inflater, piece, take)
            except TimeoutError as error:
                raise web.HTTPRequestTimeout(text=f"the body did not come whole within {_BODY_S:g} s") from error
            if inflater is not None and not inflater.eof:
                raise web.RequestPayloadError("it ends too early")
            return bytes(body)

    async def send(self, request: web.Request, answer: web.StreamResponse) -> None:
        """Send a long answer; a client that does not take it in time loses its connection.

        A short one is left to the server.

        Raises:
            CallFailed: Too many bytes are held already; nothing is sent.
        """
        size_bytes = answer.content_length or 0
        if size_bytes <= _BUFFER_BYTES:
            return
        with self._holding() as hold:
            hold(size_bytes)
            try:
                async with asyncio.timeout(_ANSWER_S):
                    await answer.prepare(request)
                    await answer.write_eof()
            except ConnectionError:
                pass  # the client is gone, as the server finds too
            except TimeoutError:
                if request.transport is not None:
                    request.transport.abort()

    @contextlib.contextmanager
    def _holding(self) -> Iterator[Callable[[int], None]]:
        """Yield what counts bytes as held until the end of the block, and refuses them beyond the limit.

        What is held alone is never refused, for to come again would not help it.
        """
        mine_bytes = 0

        def hold(more_bytes: int) -> None:
            nonlocal mine_bytes
            if self._held_bytes > mine_bytes and self._held_bytes + more_bytes > _HELD_BYTES:
                problem = f"{self._held_bytes} bytes of bodies and answers are held by this gateway"
                problem = f"{problem}, and {more_bytes} more exceed its limit of {_HELD_BYTES}; {TOO_MUCH}"
                raise CallFailed(grpc.StatusCode.RESOURCE_EXHAUSTED, problem)
            mine_bytes += more_bytes
            self._held_bytes += more_bytes

        try:
            yield hold
        finally:
            self._held_bytes -= mine_bytes


def _inflater(request: web.Request) -> Any:
    """Return what inflates the body of a request, of zlib's own type; None for one that is as it is."""
    match encoding := request.headers.get("Content-Encoding", "identity").lower():
        case "identity" | "":
            return None
        case "gzip" | "deflate":
            return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # of either form, as its first bytes say
    raise InvalidInput.of("gzip, deflate or identity", where="Content-Encoding", found=reprlib.repr(encoding))


async def _inflate(inflater: Any, piece: bytes, take: _Take) -> None:
    """Let ``take`` have what ``piece`` of a body holds: inflated in another thread, beside the requests of others."""
    is_more = True
    while is_more:
        try:
            inflated = await asyncio.to_thread(inflater.decompress, piece, _PIECE_BYTES)
        except zlib.error as error:
            raise web.RequestPayloadError(str(error)) from error
        take(inflated)
        piece = inflater.unconsumed_tail
        is_more = bool(piece) or len(inflated) == _PIECE_BYTES
    if inflater.unused_data:
        raise web.RequestPayloadError("more follows its end")
