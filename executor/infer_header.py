"""What the gateway must know of a request, and the load client of an answer, read without touching their tensors.

Tensors are most of the bytes and are only passed on, so this walks over the top-level fields of the message and hands
the few small ones to the generated parser. Field numbers: executor/proto/open_inference.proto, alike for both.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from executor.dispatcher import DEFAULT_PRIORITY, LAST_PRIORITY
from executor.proto import open_inference_pb2 as messages
from executor.tensors import parameter
from plans.errors import InvalidInput

__all__ = [
    "GROUP_METADATA",
    "LONGEST_DEADLINE_S",
    "STREAM_PARAMETER",
    "AnswerHeader",
    "InferHeader",
    "answer_header",
    "deadline_in_s",
    "deadline_of",
    "group_mark",
    "group_message",
    "parsed_request",
    "priority_of",
    "read_answer_header",
    "read_infer_header",
    "small_fields",
    "split_fields",
    "stream_of",
]

GROUP_METADATA = "foreplan-group"
"""Metadata key by which a gateway names the GPU group that shall run a request."""

LONGEST_DEADLINE_S = 86_400.0
"""A later deadline is this one: gRPC cannot carry just any number, and nobody waits longer."""

STREAM_PARAMETER = "sequence_id"
"""Parameter that marks requests as frames of one stream, as with Triton."""

_MOST_FIELDS = 1000
"""Top-level fields of a message: tensors and parameters. They are looked at one by one."""

_LONGEST_STREAM = 128
"""Characters of the name of a stream: gateways remember many."""

_MODEL_NAME, _PARAMETERS, _RAW_CONTENTS = 1, 4, 7
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MORE = 0x80
"""A byte from here on is not the last of its integer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InferHeader:
    """Service asked for, and the deadline in its parameters (`deadline_of`).

    ``stream`` is the parameter ``sequence_id``, which marks the frames of one stream; empty without it.
    """

    service: str
    deadline_s: float | None
    stream: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerHeader:
    """What an answer's parameters say about how it was served; None where they do not."""

    batch_size: int | None
    run_s: float | None
    variant: str | None
    group: str | None


def read_infer_header(request: bytes) -> InferHeader:
    """Read the header of a serialised ``ModelInferRequest``; cost does not grow with the size of the tensors.

    Raises:
        InvalidInput: The bytes are no such message, or a parameter that sets a deadline or names a stream is none.
    """
    try:
        header = messages.ModelInferRequest.FromString(_small_fields(request))
    except (DecodeError, IndexError, ValueError) as error:
        raise InvalidInput.of("a ModelInferRequest", where="request", found=f"other bytes ({error})") from error
    return InferHeader(service=header.model_name, deadline_s=deadline_of(header), stream=stream_of(header))


def read_answer_header(answer: bytes) -> AnswerHeader:
    """Read the header of a serialised ``ModelInferResponse``.

    Raises:
        InvalidInput: The bytes are no such message.
    """
    try:
        header = messages.ModelInferResponse.FromString(_small_fields(answer))
    except (DecodeError, IndexError, ValueError) as error:
        raise InvalidInput.of("a ModelInferResponse", where="answer", found=f"other bytes ({error})") from error
    return answer_header(header)


def answer_header(header: messages.ModelInferResponse) -> AnswerHeader:
    """Return what the parameters of an answer say."""
    batch_size = parameter(header.parameters, "batch_size")
    run_s = parameter(header.parameters, "run_s")
    variant = parameter(header.parameters, "variant")
    group = parameter(header.parameters, "group")
    return AnswerHeader(
        batch_size=int(batch_size) if isinstance(batch_size, int | float) and 1 <= batch_size < math.inf else None,
        run_s=float(run_s) if isinstance(run_s, int | float) else None,
        variant=variant if isinstance(variant, str) else None,
        group=group if isinstance(group, str) else None,
    )


def group_mark(group: str) -> bytes:
    """Return bytes which, behind a serialised ``ModelInferResponse``, give it the parameter ``group``.

    A protobuf message may be continued by appending fields, so nothing of the answer has to be parsed.
    """
    return group_message(group).SerializeToString()


def group_message(group: str) -> messages.ModelInferResponse:
    """Return an answer of which nothing but the parameter ``group`` is known."""
    mark = messages.ModelInferResponse()
    mark.parameters["group"].string_param = group
    return mark


def deadline_of(request: messages.ModelInferRequest) -> float | None:
    """Return the seconds that a request has from its arrival, by its parameters, numbers or their texts.

    That is the least of ``deadline_ms``, in milliseconds, and of ``timeout``, which stock Triton clients send, in
    microseconds; a ``timeout`` of 0 sets none, as with Triton. None without them; never above `LONGEST_DEADLINE_S`.

    Raises:
        InvalidInput: One is no such number.
    """
    limits_s = []
    if (deadline_ms := _number(request, "deadline_ms")) is not None:
        if deadline_ms == 0:
            raise _wrong_number("deadline_ms", "0")
        limits_s.append(deadline_ms / 1000)
    if timeout_us := _number(request, "timeout"):
        limits_s.append(timeout_us / 1e6)
    return min((*limits_s, LONGEST_DEADLINE_S)) if limits_s else None


_LIMITS = {"deadline_ms": "milliseconds above 0", "timeout": "microseconds above 0, or 0 for no limit"}


def _number(request: messages.ModelInferRequest, name: str) -> float | None:
    value = parameter(request.parameters, name)
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise _wrong_number(name, repr(value))
    return number


def _wrong_number(name: str, found: str) -> InvalidInput:
    return InvalidInput.of(_LIMITS[name], where="request", field=f"parameters.{name}", found=found)


def deadline_in_s(asked_s: float | None, time_remaining_s: float | None, default_s: float) -> float:
    """Return the seconds that a request may take from its arrival.

    The sooner of the gRPC timeout and what its parameter asks for, or ``default_s`` when it carries neither; at most
    `LONGEST_DEADLINE_S`.
    """
    if time_remaining_s is None:
        return min(LONGEST_DEADLINE_S, default_s if asked_s is None else asked_s)
    return min(LONGEST_DEADLINE_S, time_remaining_s if asked_s is None else min(asked_s, time_remaining_s))


def small_fields(message: bytes) -> bytes:
    """Return the model name and parameters of a serialised request or answer as a message of their own.

    Raises:
        InvalidInput: The bytes are no protobuf message, or one of too many fields.
    """
    try:
        return _small_fields(message)
    except (IndexError, ValueError) as error:
        raise InvalidInput.of("an inference message", where="message", found=f"other bytes ({error})") from error


def stream_of(request: messages.ModelInferRequest) -> str:
    """Return the stream of which ``request`` is a frame: its parameter ``sequence_id``, a whole number but 0 or a text.

    Raises:
        InvalidInput: It is neither, or the text is too long to be kept, as with Triton.
    """
    value = parameter(request.parameters, STREAM_PARAMETER)
    if isinstance(value, bool | float) or (isinstance(value, str) and len(value) > _LONGEST_STREAM):
        expected = f"a whole number, or a text of at most {_LONGEST_STREAM} characters"
        found = reprlib.repr(value)
        raise InvalidInput.of(expected, where="request", field=f"parameters.{STREAM_PARAMETER}", found=found)
    return str(value) if value else ""


def priority_of(request: messages.ModelInferRequest) -> int:
    """Return the priority of ``request``: its parameter ``priority``, from 1, which goes first, to `LAST_PRIORITY`.

    0, and no parameter, mean `DEFAULT_PRIORITY`, as with Triton.

    Raises:
        InvalidInput: It is no such number.
    """
    value = parameter(request.parameters, "priority") or DEFAULT_PRIORITY
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LAST_PRIORITY:
        expected = f"a whole number from 0 (the default) to {LAST_PRIORITY}"
        raise InvalidInput.of(expected, where="request", field="parameters.priority", found=repr(value))
    return value


def _small_fields(request: bytes) -> bytes:
    """Return the model name and parameters of a request or an answer as a message of their own."""
    wanted = (_MODEL_NAME, _PARAMETERS)
    return b"".join([request[start:end] for tag, start, _, end in _fields(request) if tag >> 3 in wanted])


def split_fields(request: bytes | memoryview) -> tuple[bytes, list[memoryview]]:
    """Return a serialised request without its raw contents, serialised, and these as parts of it, not copied.

    Raises:
        InvalidInput: The bytes are no protobuf message, or one of too many fields.
    """
    whole = memoryview(request)
    raw: list[memoryview] = []
    rest: list[memoryview] = []
    try:
        for tag, start, content, end in _fields(whole):
            if tag == _RAW_CONTENTS << 3 | _BYTES:  # of another type it is a field that nobody knows
                raw.append(whole[content:end])
            else:
                rest.append(whole[start:end])
    except (IndexError, ValueError) as error:
        raise InvalidInput.of("a ModelInferRequest", where="request", found=f"other bytes ({error})") from error
    return b"".join(rest), raw


def parsed_request(request: bytes) -> messages.ModelInferRequest:
    """Parse a serialised request.

    Raises:
        InvalidInput: The bytes are no such message.
    """
    try:
        return messages.ModelInferRequest.FromString(request)
    except DecodeError as error:
        raise InvalidInput.of("a ModelInferRequest", where="request", found=f"other bytes ({error})") from error


def _fields(message: bytes | memoryview) -> Iterator[tuple[int, int, int, int]]:
    """Yield tag, start, start of the content and end of each top-level field.

    Raises:
        ValueError: The bytes are no protobuf message, or one of too many fields.
        IndexError: They end within a field.
    """
    position, end = 0, len(message)
    fields = 0
    while position < end:
        start = position
        fields += 1
        if fields > _MOST_FIELDS:
            raise ValueError(f"more than {_MOST_FIELDS} fields")
        tag, position = message[position], position + 1
        if tag >= _MORE:
            tag, position = _varint(message, start)
        content = position
        wire_type = tag & 7
        if wire_type == _BYTES:
            size, content = message[position], position + 1
            if size >= _MORE:
                size, content = _varint(message, position)
            position = content + size
        elif wire_type == _VARINT:
            _, position = _varint(message, position)
        elif wire_type in (_FIXED32, _FIXED64):
            position += 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError("groups are not part of this protocol")
        if position > end:
            raise ValueError("a field reaches beyond the message")
        yield tag, start, content, position


def _varint(data: bytes | memoryview, position: int) -> tuple[int, int]:
    """Return the variable-length integer at ``position``, and the position behind it."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < _MORE:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("an integer longer than 64 bits")
