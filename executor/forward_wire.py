"""What a gateway and an agent say to each other about forwarded requests: values to bytes and back.

Frames go over one TCP (or TLS) connection: two lengths (four bytes each, little endian), a message of the first length,
and bodies of the second length together. A message is the requests, or the answers, of one moment, one after the other,
each a head of fixed size and its texts; answers come in any order. The bodies, in the order of the message, are
serialised messages of the Open Inference Protocol; they are outside the message so that nobody has to copy them.

The heads are plain structures: a library that has left the processor's caches since the last request takes longer to
read such a message than all that the message is about.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

__all__ = [
    "Answer",
    "BadFrame",
    "LENGTHS",
    "Request",
    "decode_answers",
    "decode_requests",
    "encode_answers",
    "encode_requests",
]

LENGTHS = struct.Struct("<II")
"""Of the message, and of all bodies."""

_REQUEST = struct.Struct("<QdIHH")
_ANSWER = struct.Struct("<QddIHH")
_LONGEST_TEXT_BYTES = 0xFFFF


class BadFrame(Exception):
    """The other side sent bytes that are no frame of this protocol."""


class Request(NamedTuple):
    """A request.

    Attributes:
        number: The caller's; unique among what is not answered yet.
        group: The GPU group that shall run it.
        timeout_s: What is left of its time.
        body_bytes: Of its ``inference.ModelInferRequest``; 0: the request of this number is no longer wanted.
        traceparent: The caller's span (W3C Trace Context), where it records any.
    """

    number: int
    group: str = ""
    timeout_s: float = 0.0
    body_bytes: int = 0
    traceparent: str = ""


class Answer(NamedTuple):
    """An answer.

    Attributes:
        number: That of its request.
        body_bytes: Of its ``inference.ModelInferResponse``, when ``status`` is 0.
        status: A gRPC status code.
        details: What is wrong, where something is.
        expected_wait_s: Of the group: until a request that arrives now would start.
        held_s: From the arrival of the request to this answer; 0: not known.
    """

    number: int
    body_bytes: int = 0
    status: int = 0
    details: str = ""
    expected_wait_s: float = 0.0
    held_s: float = 0.0


def encode_requests(requests: Iterable[Request]) -> bytes:
    """Return the message that holds ``requests``."""
    parts: list[bytes] = []
    for number, group, timeout_s, body_bytes, traceparent in requests:
        group_text, trace_text = group.encode(), traceparent.encode()
        parts.append(_REQUEST.pack(number, timeout_s, body_bytes, len(group_text), len(trace_text)))
        parts += (group_text, trace_text)
    return b"".join(parts)


def decode_requests(message: bytes) -> list[Request]:
    """Return the requests in a message.

    Raises:
        BadFrame: It is none.
    """
    requests, start = [], 0
    try:
        while start < len(message):
            number, timeout_s, body_bytes, group_bytes, trace_bytes = _REQUEST.unpack_from(message, start)
            group, start = _text(message, start + _REQUEST.size, group_bytes)
            traceparent, start = _text(message, start, trace_bytes) if trace_bytes else ("", start)
            requests.append(Request(number, group, timeout_s, body_bytes, traceparent))
    except struct.error as error:
        raise BadFrame(str(error)) from error
    return requests


def encode_answers(answers: Iterable[Answer]) -> bytes:
    """Return the message that holds ``answers``; overlong details are cut."""
    parts: list[bytes] = []
    for number, body_bytes, status, details, expected_wait_s, held_s in answers:
        text = details.encode()[:_LONGEST_TEXT_BYTES]
        parts += (_ANSWER.pack(number, expected_wait_s, held_s, body_bytes, status, len(text)), text)
    return b"".join(parts)


def decode_answers(message: bytes) -> list[Answer]:
    """Return the answers in a message.

    Raises:
        BadFrame: It is none.
    """
    answers, start = [], 0
    try:
        while start < len(message):
            number, expected_wait_s, held_s, body_bytes, status, length = _ANSWER.unpack_from(message, start)
            start += _ANSWER.size
            details, start = _text(message, start, length) if length else ("", start)
            answers.append(Answer(number, body_bytes, status, details, expected_wait_s, held_s))
    except struct.error as error:
        raise BadFrame(str(error)) from error
    return answers


def _text(message: bytes, start: int, length: int) -> tuple[str, int]:
    """Return the text of ``length`` bytes at ``start``, and where it ends."""
    end = start + length
    if end > len(message):
        raise BadFrame("a text that reaches beyond its message")
    return message[start:end].decode(errors="replace"), end
