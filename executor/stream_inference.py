"""Streams of requests and answers: ``ModelStreamInfer``, Triton's extension of the Open Inference Protocol.

The requests of one stream are answered side by side. An answer tells its request by its id; a request may get several,
and the last has the parameter ``triton_final_response``. An error is an answer of its own, and the stream goes on.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable
from contextlib import AbstractContextManager, aclosing, nullcontext
from typing import TypeVar

import grpc

from executor.proto import open_inference_pb2 as pb

__all__ = ["FINAL", "INPUT", "OUTPUT", "STATUS_PARAMETER", "error_response", "interleaved"]

FINAL = "triton_final_response"
INPUT, OUTPUT = "input_ids", "output_ids"
"""Tensors of services that generate."""
STATUS_PARAMETER = "status"
"""Parameter of an error's answer: the name of the gRPC status that a call of its own would have ended with."""

_SIDE_BY_SIDE = 64
"""Requests of one stream that are answered at a time; further ones are not read before."""


class _Mark(enum.Enum):
    """What stands among the answers of a stream: one request has all of its own, or all requests have."""

    ANSWERED = enum.auto()
    END = enum.auto()


_Request = TypeVar("_Request")
_Answer = TypeVar("_Answer")


async def interleaved(
    requests: AsyncIterable[_Request],
    answers: Callable[[_Request], AsyncGenerator[_Answer, None]],
    around: Callable[[_Request], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> AsyncIterator[_Answer]:
    """Yield the answers to all requests, in the order in which they come.

    ``answers`` raises nothing; all that is done for one request is done in one task, inside of ``around``. When the
    caller stops, what is under way is cancelled. While it takes no answers, no more requests are read.
    """
    found: asyncio.Queue[_Answer | _Mark] = asyncio.Queue()  # bounded by what models generate for so many
    room = asyncio.Semaphore(_SIDE_BY_SIDE)

    async def one(request: _Request) -> None:
        try:
            with around(request):
                async with aclosing(answers(request)) as mine:
                    async for answer in mine:
                        found.put_nowait(answer)
        finally:
            found.put_nowait(_Mark.ANSWERED)

    async def read() -> None:
        async with asyncio.TaskGroup() as group:
            async for request in requests:
                await room.acquire()
                group.create_task(one(request))

    reader = asyncio.get_running_loop().create_task(read())
    reader.add_done_callback(lambda _: found.put_nowait(_Mark.END))
    try:
        while (answer := await found.get()) is not _Mark.END:
            if answer is _Mark.ANSWERED:
                room.release()  # only now: its answers are taken
            else:
                yield answer
        await reader
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


def error_response(request_id: str, service: str, code: grpc.StatusCode, details: str) -> pb.ModelStreamInferResponse:
    """Return the last answer to a request that failed."""
    answer = pb.ModelInferResponse(model_name=service, id=request_id)
    answer.parameters[STATUS_PARAMETER].string_param = code.name
    answer.parameters[FINAL].bool_param = True
    return pb.ModelStreamInferResponse(error_message=f"{code.name}: {details}", infer_response=answer)
