"""Streams of requests and answers: ``ModelStreamInfer``, Triton's extension of the Open Inference Protocol.

The requests of one stream are answered side by side. An answer tells its request by its id; a request may get several,
and the last has the parameter ``triton_final_response``. An error is an answer of its own, and the stream goes on.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from contextlib import AbstractContextManager, aclosing, nullcontext
from typing import Generic, Literal, TypeVar

import grpc

from executor.errors import details_of, status_of
from executor.forwarding import CallFailed
from executor.proto import open_inference_pb2 as pb
from plans.errors import ForeplanError

__all__ = ["FINAL", "INPUT", "OUTPUT", "STATUS_PARAMETER", "error_response", "failure_response", "interleaved"]

_log = logging.getLogger("executor.stream")

FINAL = "triton_final_response"
INPUT, OUTPUT = "input_ids", "output_ids"
"""Tensors of services that generate."""
STATUS_PARAMETER = "status"
"""Parameter of an error's answer: the name of the gRPC status that a call of its own would have ended with."""

_SIDE_BY_SIDE = 64
"""Requests of one stream that are answered at a time; further ones are not read before."""
_WAITING_BYTES = 64 << 20
"""Answers of one stream that may wait for its client: fewer requests are answered at a time where theirs are large."""
_EXPECTED_BYTES = 8 << 20
"""What an answer is taken to have before the first one of its stream is there."""


class _Mark(enum.Enum):
    """What stands among the answers of a stream: one request has all of its own, or all requests have."""

    ANSWERED = enum.auto()
    END = enum.auto()


_Request = TypeVar("_Request")
_Answer = TypeVar("_Answer")


class _Waiting(Generic[_Answer]):
    """The answers of one stream that wait for its client, and with them how much more may be begun.

    A request is under way until all of its answers are taken. As many may be as answers of the largest size of late
    fit in the bytes that may wait. One with many answers goes on while those that wait fit.
    """

    def __init__(self, size_bytes: Callable[[_Answer], int]) -> None:
        self._size_bytes = size_bytes
        self._found: asyncio.Queue[_Answer | _Mark] = asyncio.Queue()  # bounded by `begin` and `put`
        self._under_way = 0
        self._bytes = 0
        self._large_bytes = 0
        self._may_begin, self._may_go_on = asyncio.Event(), asyncio.Event()
        self._weigh()

    async def begin(self) -> None:
        """Count a request as under way, once one more may be."""
        await self._may_begin.wait()
        self._under_way += 1
        self._weigh()

    async def put(self, answer: _Answer) -> None:
        """Add ``answer``, and return when there may be a further one."""
        size_bytes = self._size_bytes(answer)
        self._bytes += size_bytes
        self._large_bytes = max(self._large_bytes * 7 // 8, size_bytes)  # forgotten by and by
        self._found.put_nowait(answer)
        self._weigh()
        await self._may_go_on.wait()

    def mark(self, mark: _Mark) -> None:
        """Add ``mark`` behind the answers that are there."""
        self._found.put_nowait(mark)

    async def next(self) -> _Answer | Literal[_Mark.END]:
        """Return the next answer, which waits until it is `taken`, or that there are no more."""
        while (found := await self._found.get()) is _Mark.ANSWERED:
            self._under_way -= 1
            self._weigh()
        return found

    def taken(self, answer: _Answer) -> None:
        """Note that the client has ``answer``."""
        self._bytes -= self._size_bytes(answer)
        self._weigh()

    def clear(self) -> None:
        """Forget all answers: tracebacks of what was cancelled still refer to them, until a garbage collection."""
        while not self._found.empty():
            self._found.get_nowait()

    def _weigh(self) -> None:
        fit = max(_WAITING_BYTES // (self._large_bytes or _EXPECTED_BYTES), 1)
        _set(self._may_begin, self._under_way < min(fit, _SIDE_BY_SIDE))
        _set(self._may_go_on, self._bytes < _WAITING_BYTES)


def _set(event: asyncio.Event, holds: bool) -> None:
    (event.set if holds else event.clear)()


async def interleaved(
    requests: AsyncIterable[_Request],
    answers: Callable[[_Request], AsyncGenerator[_Answer, None]],
    *,
    failure: Callable[[_Request, Exception], _Answer],
    size_bytes: Callable[[_Answer], int],
    around: Callable[[_Request], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> AsyncGenerator[_Answer, None]:
    """Yield the answers to all requests, in the order in which they come.

    What ``answers`` raises becomes the request's last answer, by ``failure``; all that is done for one request is done
    in one task, inside of ``around``. When the caller stops, what is under way is cancelled. While it takes no answers,
    no more requests are read, and the bytes of those that wait, by ``size_bytes``, are bounded.
    """
    waiting = _Waiting(size_bytes)

    async def one(request: _Request) -> None:
        try:
            with around(request):
                try:
                    async with aclosing(answers(request)) as mine:
                        async for answer in mine:
                            await waiting.put(answer)
                except Exception as error:  # noqa: BLE001 - one request must not end the stream of all
                    await waiting.put(failure(request, error))
        finally:
            waiting.mark(_Mark.ANSWERED)

    async def read() -> None:
        async with asyncio.TaskGroup() as group:
            async for request in requests:
                await waiting.begin()
                group.create_task(one(request))

    reader = asyncio.get_running_loop().create_task(read())
    reader.add_done_callback(lambda _: waiting.mark(_Mark.END))
    try:
        while (answer := await waiting.next()) is not _Mark.END:
            yield answer
            waiting.taken(answer)
        await reader
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        waiting.clear()


def failure_response(request: pb.ModelInferRequest, error: Exception) -> pb.ModelStreamInferResponse:
    """Return the last answer to a request that ended with ``error``; it is logged where it is no refusal."""
    match error:
        case CallFailed():
            code, details = error.code, error.details
        case ForeplanError():
            code, details = status_of(error), details_of(error)
        case _:
            _log.error("event=bug service=%r", request.model_name, exc_info=error)
            code, details = grpc.StatusCode.INTERNAL, "a bug in Foreplan; see the server's log"
    return error_response(request.id, request.model_name, code, details)


def error_response(request_id: str, service: str, code: grpc.StatusCode, details: str) -> pb.ModelStreamInferResponse:
    """Return the last answer to a request that failed."""
    answer = pb.ModelInferResponse(model_name=service, id=request_id)
    answer.parameters[STATUS_PARAMETER].string_param = code.name
    answer.parameters[FINAL].bool_param = True
    return pb.ModelStreamInferResponse(error_message=f"{code.name}: {details}", infer_response=answer)
