"""Many requests on one stream between a gateway and an agent (``foreplan.data.v1.Forward``).

A call of its own for every request costs a gateway as much as everything else that it does for it. On a stream,
requests that are due at the same moment share a message. `ForwardLink` is the gateway's end, `ForwardServicer` the
agent's. Requests above `shared_bytes` stay off the stream: they would hold up the small ones behind them.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from executor.errors import details_of, status_of
from executor.logs import log_failure
from executor.proto import forward_pb2 as pb
from plans.errors import ForeplanError

__all__ = ["ENVELOPE_BYTES", "FORWARD", "CallFailed", "ForwardLink", "ForwardServicer", "shared_bytes"]

_log = logging.getLogger("executor.forwarding")

FORWARD = "foreplan.data.v1.Forward"
_EXCHANGE = f"/{FORWARD}/Exchange"

ENVELOPE_BYTES = 1 << 16
"""What a message may have around the largest answer."""


def shared_bytes(max_message_bytes: int) -> int:
    """Return the largest request for the stream, which is also when a message is full."""
    return min(1 << 20, max_message_bytes // 2)


_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class CallFailed(Exception):
    """A call ended with a status other than OK."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details


class _Outbox:
    """Collects what is to be sent and sends it, as much at once as is there."""

    def __init__(
        self, write: Callable[[bytes], Awaitable[Any]], pack: Callable[[list[Any]], bytes], full_bytes: int
    ) -> None:
        self._write = write
        self._full_bytes = full_bytes
        self._pack = pack
        self._waiting: list[tuple[Any, int]] = []
        self._due = asyncio.Event()

    def put(self, item: Any, size_bytes: int) -> None:
        """Send ``item`` soon."""
        self._waiting.append((item, size_bytes))
        self._due.set()

    async def run(self) -> None:
        """Send until cancelled."""
        while True:
            await self._due.wait()
            self._due.clear()
            waiting, self._waiting = self._waiting, []
            for message in _parts(waiting, self._full_bytes):
                await self._write(self._pack(message))


def _parts(items: Iterable[tuple[Any, int]], full_bytes: int) -> Iterable[list[Any]]:
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
    """A gateway's end: `send` requests over one stream of ``channel``, which is opened when needed.

    Args:
        channel: To the agent.
        on_wait: Told the expected wait of a group, seconds, with every answer from it.
        max_message_bytes: Largest request.
    """

    def __init__(
        self, channel: grpc.aio.Channel, on_wait: Callable[[str, float], None], *, max_message_bytes: int
    ) -> None:
        self._full_bytes = shared_bytes(max_message_bytes)
        self._exchange: Any = channel.stream_stream(_EXCHANGE, None, None)
        self._on_wait = on_wait
        self._numbers = itertools.count(1)
        self._pending: dict[int, tuple[asyncio.Future[bytes], str]] = {}
        self._outbox: _Outbox | None = None
        self._tasks: tuple[asyncio.Task[None], ...] = ()

    async def send(self, body: bytes, group: str, timeout_s: float) -> bytes:
        """Return the answer of ``group`` to a serialised request.

        Raises:
            CallFailed: It was refused, the stream broke, or ``timeout_s`` passed.
        """
        loop = asyncio.get_running_loop()
        if self._outbox is None:
            self._open()
        outbox = self._outbox
        assert outbox is not None
        number = next(self._numbers)
        answer: asyncio.Future[bytes] = loop.create_future()
        self._pending[number] = (answer, group)
        outbox.put(pb.Request(number=number, group=group, timeout_s=timeout_s, body=body), len(body))
        timer = loop.call_later(timeout_s, self._late, number)
        try:
            return await answer
        except asyncio.CancelledError:  # the client gave up
            self._forget(number)
            raise
        finally:
            timer.cancel()

    async def close(self, grace_s: float) -> None:
        """End the stream once all is answered, or after ``grace_s`` seconds; what waits then fails."""
        waiting = [future for future, _ in self._pending.values()]
        if waiting and grace_s > 0:
            await asyncio.wait(waiting, timeout=grace_s)
        tasks = self._tasks
        self._end(grpc.StatusCode.UNAVAILABLE, "the connection was closed")
        await asyncio.gather(*tasks, return_exceptions=True)

    def _open(self) -> None:
        call = self._exchange()
        outbox = _Outbox(call.write, lambda items: pb.Requests(requests=items).SerializeToString(), self._full_bytes)
        self._outbox = outbox
        reading = asyncio.create_task(self._read(call, outbox), name="answers")
        sending = asyncio.create_task(outbox.run(), name="requests")
        sending.add_done_callback(lambda _: call.cancel())
        reading.add_done_callback(log_failure)
        sending.add_done_callback(_seen)
        self._tasks = (reading, sending)

    async def _read(self, call: Any, outbox: _Outbox) -> None:
        code, details = grpc.StatusCode.UNAVAILABLE, "the agent ended the stream"
        try:
            while (message := await call.read()) is not _EOF:
                for answer in pb.Answers.FromString(message).answers:
                    self._answered(answer)
            code, details = await call.code(), await call.details()
        except grpc.aio.AioRpcError as error:
            code, details = error.code(), error.details() or ""
        except DecodeError as error:
            details = f"its answer cannot be read ({error})"
        finally:
            if self._outbox is outbox:
                passing = (
                    code if code not in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED) else grpc.StatusCode.UNAVAILABLE
                )
                self._end(passing, details)

    def _answered(self, answer: pb.Answer) -> None:
        future, group = self._pending.pop(answer.number, (None, ""))
        if future is None:
            return
        self._on_wait(group, answer.expected_wait_s)
        if future.done():
            return
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
        if self._pending.pop(number, None) is not None and self._outbox is not None:
            self._outbox.put(pb.Request(number=number), 0)

    def _end(self, code: grpc.StatusCode, details: str) -> None:
        self._outbox = None
        tasks, self._tasks = self._tasks, ()
        for task in tasks:
            if task is not asyncio.current_task():
                task.cancel()
        pending, self._pending = self._pending, {}
        for future, _ in pending.values():
            if not future.done():
                future.set_exception(CallFailed(code, details))


class Answering(Protocol):
    """What an agent does with a forwarded request."""

    async def __call__(self, body: bytes, group: str, timeout_s: float) -> bytes:
        """Return the serialised answer; raise `ForeplanError` or `CallFailed` to refuse."""


class ForwardServicer:
    """An agent's end.

    Args:
        answer: Runs one request.
        wait_s: Returns the expected wait of a group, seconds.
        max_message_bytes: Largest answer.
    """

    def __init__(self, answer: Answering, wait_s: Callable[[str], float], *, max_message_bytes: int) -> None:
        self._limit_bytes = max_message_bytes
        self._full_bytes = shared_bytes(max_message_bytes)
        self._answer = answer
        self._wait_s = wait_s
        self._closing = False

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """Return the handler to register."""
        method: Any = grpc.stream_stream_rpc_method_handler(self.exchange)
        return grpc.method_handlers_generic_handler(FORWARD, {"Exchange": method})

    def close(self) -> None:
        """Refuse what arrives from now on; a gateway tries elsewhere."""
        self._closing = True

    async def exchange(self, _: Any, context: Any) -> None:
        """Answer the requests of one gateway until it ends the stream."""
        outbox = _Outbox(context.write, lambda items: pb.Answers(answers=items).SerializeToString(), self._full_bytes)
        running: dict[int, asyncio.Task[None]] = {}
        sending = asyncio.create_task(outbox.run(), name="answers")
        sending.add_done_callback(_seen)
        try:
            while (message := await context.read()) is not _EOF:
                for request in pb.Requests.FromString(message).requests:
                    self._take(request, running, outbox)
        except DecodeError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"expected Requests ({error})")
        finally:
            for task in (*running.values(), sending):
                task.cancel()

    def _take(self, request: pb.Request, running: dict[int, asyncio.Task[None]], outbox: _Outbox) -> None:
        number = request.number
        if not request.body:
            if task := running.get(number):
                task.cancel()
        elif self._closing:
            code = grpc.StatusCode.UNAVAILABLE.value[0]
            outbox.put(pb.Answer(number=number, status=code, details="the agent is stopping"), 0)
        elif number not in running:
            running[number] = task = asyncio.create_task(self._one(request, outbox))
            task.add_done_callback(lambda _: running.pop(number, None))

    async def _one(self, request: pb.Request, outbox: _Outbox) -> None:
        answer = pb.Answer(number=request.number)
        try:
            answer.body = await self._answer(request.body, request.group, request.timeout_s)
        except ForeplanError as error:
            answer.status, answer.details = status_of(error).value[0], details_of(error)
        except CallFailed as error:
            answer.status, answer.details = error.code.value[0], error.details
        except Exception:  # noqa: BLE001 - the edge of the process: one request must not end the stream of all
            _log.exception("event=bug request=%d", request.number)
            answer.status, answer.details = grpc.StatusCode.INTERNAL.value[0], "a bug in the agent; see its log"
        if len(answer.body) > self._limit_bytes:
            problem = f"the answer has {len(answer.body)} bytes, above the limit of {self._limit_bytes}"
            answer = pb.Answer(
                number=request.number, status=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], details=problem
            )
        answer.expected_wait_s = self._wait_s(request.group)
        outbox.put(answer, len(answer.body))


def _seen(task: asyncio.Task[None]) -> None:
    """Look at how ``task`` ended: a broken stream is told by the end that reads."""
    if not task.cancelled():
        task.exception()
