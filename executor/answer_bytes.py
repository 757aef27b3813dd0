"""Serialised answers, put together from what is remembered of equal ones.

A protobuf message may be continued by appending fields. So what the answers to equal requests have in common is
serialised once; their times and their tensors are appended to it.
"""

from __future__ import annotations

import struct

import numpy as np

from executor.proto import open_inference_pb2 as pb
from executor.request_head import RequestHead
from executor.tensors import encode_response, set_parameter
from executor.whole_requests import Answer

__all__ = ["EXTENSIONS", "MODEL_VERSION", "AnswerWriter", "answer_message"]

EXTENSIONS = ("model_configuration", "model_repository", "parameters", "schedule_policy", "statistics", "stream_infer")
"""Extensions of the protocol that agents and gateways speak, by Triton's names where it has them."""

MODEL_VERSION = "1"
"""The one version of every service."""

_DOUBLE = struct.Struct("<d")
_KNOWN = 1024
_Key = tuple[str, str, str, int, tuple[tuple[str, np.dtype[np.generic], tuple[int, ...]], ...]]


def answer_message(head: RequestHead, answer: Answer) -> pb.ModelInferResponse:
    """Return the answer to the request with ``head``, with the outputs that it asks for."""
    return encode_response(
        head.message.model_name,
        {name: array for name, array in answer.outputs.items() if not head.wanted or name in head.wanted},
        request_id=head.message.id,
        version=MODEL_VERSION,
        parameters={
            "batch_size": answer.batch_items,
            "queue_s": answer.queue_s,
            "run_s": answer.run_s,
            "variant": answer.variant,
        },
    )


class AnswerWriter:
    """Writes answers, as `answer_message` serialised, and remembers what many have in common."""

    def __init__(self) -> None:
        self._known: dict[_Key, tuple[bytes, tuple[bytes, ...]]] = {}

    def write(self, head: RequestHead, answer: Answer) -> bytes:
        """Return the serialised answer to the request with ``head``."""
        message, wanted = head.message, head.wanted
        outputs = [(name, array) for name, array in answer.outputs.items() if not wanted or name in wanted]
        shapes = tuple((name, array.dtype, array.shape) for name, array in outputs)
        key = (message.model_name, message.id, answer.variant, answer.batch_items, shapes)
        known = self._known.get(key)
        if known is None:
            known = _in_common(answer_message(head, answer))
            if head.recurs:  # otherwise it holds what the client likes, such as an id of a megabyte
                if len(self._known) >= _KNOWN:
                    self._known.clear()
                self._known[key] = known
        start, tags = known
        parts = [start, _QUEUE_S, _DOUBLE.pack(answer.queue_s), _RUN_S, _DOUBLE.pack(answer.run_s)]
        for tag, (_, array) in zip(tags, outputs, strict=True):
            parts += (tag, array.tobytes())
        return b"".join(parts)


def _in_common(response: pb.ModelInferResponse) -> tuple[bytes, tuple[bytes, ...]]:
    """Return ``response``, serialised, without its times and raw contents, and what goes before each of these."""
    tags = tuple(_before_raw(len(content)) for content in response.raw_output_contents)
    del response.raw_output_contents[:]
    for name in ("queue_s", "run_s"):
        del response.parameters[name]
    return response.SerializeToString(), tags


def _before_raw(size_bytes: int) -> bytes:
    whole = pb.ModelInferResponse(raw_output_contents=[bytes(size_bytes)]).SerializeToString()
    return whole[: len(whole) - size_bytes]


def _before_seconds(name: str) -> bytes:
    """Return the bytes of the parameter ``name`` before its value, a double, which ends it."""
    response = pb.ModelInferResponse()
    set_parameter(response.parameters[name], 0.5)
    return response.SerializeToString()[: -_DOUBLE.size]


_QUEUE_S, _RUN_S = _before_seconds("queue_s"), _before_seconds("run_s")
