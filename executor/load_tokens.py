"""Requests for tokens in a replay: what each asks for, and when its tokens came back.

They go as streams of one request, so that the first token's time is the client's own.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from executor.infer_header import AnswerHeader, answer_header
from executor.proto import open_inference_pb2 as messages
from executor.stream_inference import STATUS_PARAMETER
from executor.tensors import encode_request

__all__ = ["StreamedAnswer", "TokenLoad", "stream_answer", "token_fields"]

_HIGHEST_TOKEN = 90
"""Prompts are of the first tokens of the vocabulary, which every model has."""

_PATIENCE, _LEAST_S = 10.0, 60.0
"""Answers are awaited for so many times their deadline, and at least for so many seconds: late ones count as late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoad:
    """What requests ask of services that generate, all of shape (request,).

    Attributes:
        input_tokens: Tokens of the prompt.
        output_tokens: Tokens of the answer; 0 for a request that is no such.
        ttft_s: Time that the first token has; NaN for a request that is no such.
        tpot_s: Likewise the time of each further one.
    """

    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    ttft_s: NDArray[np.float64]
    tpot_s: NDArray[np.float64]

    def part(self, rows: NDArray[np.int64]) -> TokenLoad:
        """Return the requests ``rows`` alone."""
        return TokenLoad(
            input_tokens=self.input_tokens[rows],
            output_tokens=self.output_tokens[rows],
            ttft_s=self.ttft_s[rows],
            tpot_s=self.tpot_s[rows],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedAnswer:
    """What became of one request; times on the clock of ``time.monotonic``, NaN where there was no such token."""

    status: str
    header: AnswerHeader | None = None
    first_s: float = math.nan
    last_s: float = math.nan
    tokens: int = 0

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first; 0 for a single one."""
        return (self.last_s - self.first_s) / (self.tokens - 1) if self.tokens > 1 else 0.0


def token_fields(input_tokens: int, output_tokens: int, seed: int) -> bytes:
    """Return what, behind a serialised ``ModelInferRequest`` with a name only, asks for tokens."""
    prompt = np.random.default_rng(seed).integers(0, _HIGHEST_TOKEN, (1, input_tokens), dtype=np.int64)
    parameters = {"max_tokens": output_tokens, "ignore_eos": True}
    return encode_request("", {"input_ids": prompt}, parameters=parameters).SerializeToString()


async def stream_answer(send: Any, request: bytes, deadline_s: float) -> StreamedAnswer:
    """Send ``request`` as a stream of its own, and note when its tokens come.

    Args:
        send: The method ``ModelStreamInfer`` of a channel, of bytes, for a single request.
        request: A serialised ``ModelInferRequest``.
        deadline_s: Seconds that the whole answer has; it is awaited for longer.
    """
    call = send(request, timeout=max(_LEAST_S, _PATIENCE * deadline_s))
    first_s = last_s = math.nan
    tokens = 0
    header = None
    try:
        async for serialised in call:
            last_s = time.monotonic()
            answer = messages.ModelStreamInferResponse.FromString(serialised)
            if answer.error_message:
                status = answer.infer_response.parameters[STATUS_PARAMETER].string_param
                return StreamedAnswer(status=status or grpc.StatusCode.UNKNOWN.name)
            first_s = last_s if not tokens else first_s
            tokens += 1
            header = answer_header(answer.infer_response)
    except grpc.aio.AioRpcError as error:
        return StreamedAnswer(status=error.code().name)
    except DecodeError:
        return StreamedAnswer(status=grpc.StatusCode.INTERNAL.name)  # what a client makes of a broken answer
    finally:
        call.cancel()
    code = grpc.StatusCode.OK if tokens else grpc.StatusCode.INTERNAL
    return StreamedAnswer(status=code.name, header=header, first_s=first_s, last_s=last_s, tokens=tokens)
