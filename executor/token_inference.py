"""Generation in words of the Open Inference Protocol: requests for tokens, whole answers, and answers token by token.

A request has the tensor ``input_ids`` of INT64 (INT32 and UINT32 do as well), shape [tokens] or [1, tokens], and the
parameter ``max_tokens``. For load tests the parameter ``input_tokens``, a count, stands in for the tensor.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import numpy as np

from executor.errors import Hopeless
from executor.group_server import GroupServer
from executor.lane import Generated, Generating, TokenRequest
from executor.proto import open_inference_pb2 as pb
from executor.request_head import RequestHead
from executor.runtime.protocol import GenerationFacts
from executor.state import ReplicaKey
from executor.stream_inference import FINAL, INPUT, OUTPUT
from executor.tensors import Buffer, TensorLimits, decode_inputs, encode_response, parameter
from plans.errors import InvalidInput

__all__ = ["generated_answer", "streamed_tokens", "token_request"]

_DEFAULT_TOKENS = 128
"""Tokens generated where a request does not say how many; the evaluator takes the same."""


def token_request(
    head: RequestHead, raw: Sequence[Buffer], facts: GenerationFacts, limits: TensorLimits
) -> TokenRequest:
    """Return what a request asks of a model that generates.

    Raises:
        InvalidInput: It lacks a prompt, or a tensor or parameter is not as above.
    """
    parameters = head.message.parameters
    new_tokens = _count(parameter(parameters, "max_tokens"), "max_tokens", _DEFAULT_TOKENS)
    ignores = parameter(parameters, "ignore_eos")
    if not isinstance(ignores, bool | None):
        raise InvalidInput.of("true or false", field="parameters.ignore_eos", found=repr(ignores))
    stop_tokens = () if ignores else facts.stop_tokens
    if not head.described:
        count = parameter(parameters, "input_tokens")
        if count is None:
            raise InvalidInput.of(
                "a tensor of INT64 with the tokens of the prompt", field=INPUT, found="no such tensor"
            )
        most = min(_count(count, "input_tokens", 1), facts.max_context)  # a longer one is refused for its length
        prompt = tuple(7 * position % facts.vocabulary for position in range(most))
        return TokenRequest(prompt=prompt, new_tokens=new_tokens, stop_tokens=stop_tokens)
    array = head.described.get(INPUT)
    if array is None or len(head.described) > 1:
        raise InvalidInput.of(f"{INPUT} alone", field="inputs", found=", ".join(head.described))
    if array.dtype.kind not in "iu" or array.shape not in ((array.size,), (1, array.size)):
        found = f"{array.dtype} of shape {list(array.shape)}"
        raise InvalidInput.of("integers of shape [tokens] or [1, tokens]", field=INPUT, found=found)
    ids = decode_inputs(head.message, limits, raw or None)[INPUT]
    return TokenRequest(prompt=tuple(ids.ravel().tolist()), new_tokens=new_tokens, stop_tokens=stop_tokens)


def _count(value: object, name: str, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, str) and value.isdecimal() and len(value) <= _LONGEST_COUNT:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInput.of("a whole number above 0", field=f"parameters.{name}", found=repr(value))
    return value


_LONGEST_COUNT = 18
"""Digits of a number in a text: more tokens than that nobody has, and to read thousands of digits is an error."""


async def generated_answer(
    server: GroupServer, key: ReplicaKey, asked: TokenRequest, message: pb.ModelInferRequest, limit_s: float | None
) -> tuple[Generated, pb.ModelInferResponse]:
    """Generate a whole answer, within ``limit_s`` seconds if given.

    Raises:
        RequestRefused: It gets none.
        InvalidInput: The request is not what the model takes.
    """
    sequence = server.generate(key, asked)
    ends_s = None if limit_s is None else asyncio.get_running_loop().time() + limit_s
    async with _cancelled_with(server, sequence), _within(ends_s, key):
        answer = await sequence.answer
    return answer, _response(message, answer.tokens, _times(answer, asked))


async def streamed_tokens(
    server: GroupServer, key: ReplicaKey, asked: TokenRequest, message: pb.ModelInferRequest, limit_s: float | None
) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
    """Yield each token as soon as it is there; the last with what `generated_answer` says of the times.

    Raises:
        RequestRefused: It gets no more.
        InvalidInput: The request is not what the model takes.
    """
    tokens: asyncio.Queue[int | None] = asyncio.Queue()
    sequence = server.generate(key, asked, tokens.put_nowait)
    sequence.answer.add_done_callback(lambda _: tokens.put_nowait(None))
    ends_s = None if limit_s is None else asyncio.get_running_loop().time() + limit_s
    sent = 0
    async with _cancelled_with(server, sequence):
        while True:
            async with _within(ends_s, key):
                token = await tokens.get()
            if token is None:  # it failed: the last token ends an answer before
                await sequence.answer
                return
            sent += 1
            whole = _whole(sequence)
            is_last = whole is not None and sent == len(whole.tokens)
            told = _times(whole, asked) if whole is not None and is_last else {}
            yield pb.ModelStreamInferResponse(infer_response=_response(message, (token,), {**told, FINAL: is_last}))
            if is_last:
                return


def _whole(sequence: Generating) -> Generated | None:
    """Return the whole answer, once it is there."""
    answer = sequence.answer
    return answer.result() if answer.done() and not answer.cancelled() and answer.exception() is None else None


@contextlib.asynccontextmanager
async def _cancelled_with(server: GroupServer, sequence: Generating) -> AsyncIterator[None]:
    """Forget the sequence when the block is left before its end: the client gave up, or its time is over."""
    try:
        yield
    finally:
        # Who awaits the answer itself and is cancelled cancels it too.
        if not sequence.answer.done() or sequence.answer.cancelled():
            server.cancel_generation(sequence)


@contextlib.asynccontextmanager
async def _within(ends_s: float | None, key: ReplicaKey) -> AsyncIterator[None]:
    """Let the block take until ``ends_s``, on the clock of the event loop.

    Raises:
        Hopeless: It takes longer.
    """
    try:
        async with asyncio.timeout_at(ends_s):
            yield
    except TimeoutError as error:
        raise Hopeless(f"{key}: no whole answer within the deadline of the request") from error


def _times(answer: Generated, asked: TokenRequest) -> dict[str, Any]:
    return {
        "ttft_s": answer.ttft_s,
        "tpot_s": answer.tpot_s,
        "input_tokens": len(asked.prompt),
        "output_tokens": len(answer.tokens),
        "finish_reason": "stop" if answer.tokens[-1] in asked.stop_tokens else "length",
        "batch_size": answer.batch_items,
        "queue_s": answer.queue_s,
        "run_s": answer.run_s,
        "variant": answer.variant,
    }


def _response(
    message: pb.ModelInferRequest, tokens: Sequence[int], parameters: dict[str, Any]
) -> pb.ModelInferResponse:
    outputs = {OUTPUT: np.array([tokens], dtype=np.int64)}
    return encode_response(message.model_name, outputs, request_id=message.id, parameters=parameters)
