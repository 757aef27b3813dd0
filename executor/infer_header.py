"""What the gateway must know of an inference request, read without touching its tensors.

Inputs are most of a request's bytes and the gateway only passes them on, so this walks over the top-level fields of the
message and hands the few small ones to the generated parser. Field numbers: executor/proto/open_inference.proto.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from executor.proto import open_inference_pb2 as messages
from plans.errors import InvalidInput

__all__ = ["InferHeader", "read_infer_header"]

_MODEL_NAME, _PARAMETERS = 1, 4
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class InferHeader:
    """Service asked for, and the deadline in its parameters (seconds from arrival; None when there is none)."""

    service: str
    deadline_s: float | None


def read_infer_header(request: bytes) -> InferHeader:
    """Read the header of a serialised ``ModelInferRequest``; cost does not grow with the size of the tensors.

    Raises:
        InvalidInput: The bytes are no such message, or ``deadline_ms`` is no number above 0.
    """
    try:
        header = messages.ModelInferRequest.FromString(_small_fields(request))
    except (DecodeError, IndexError, ValueError) as error:
        raise InvalidInput.of("a ModelInferRequest", where="request", found="other bytes") from error
    return InferHeader(service=header.model_name, deadline_s=_deadline_s(header))


def _deadline_s(header: messages.ModelInferRequest) -> float | None:
    if "deadline_ms" not in header.parameters:
        return None
    parameter = header.parameters["deadline_ms"]
    kind = parameter.WhichOneof("parameter_choice")
    value = getattr(parameter, kind) if kind else None
    try:
        deadline_ms = float(value) if not isinstance(value, bool | None) else math.nan
    except ValueError:
        deadline_ms = math.nan
    if not (math.isfinite(deadline_ms) and deadline_ms > 0):
        raise InvalidInput.of(
            "milliseconds above 0", where="request", field="parameters.deadline_ms", found=repr(value)
        )
    return deadline_ms / 1000


def _small_fields(request: bytes) -> bytes:
    """Return the model name and parameters of ``request`` as a message of their own."""
    kept = bytearray()
    position, end = 0, len(request)
    while position < end:
        start = position
        tag, position = _varint(request, position)
        wire_type = tag & 7
        if wire_type == _BYTES:
            size, position = _varint(request, position)
            position += size
        elif wire_type == _VARINT:
            _, position = _varint(request, position)
        elif wire_type in (_FIXED32, _FIXED64):
            position += 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError("groups are not part of this protocol")
        if position > end:
            raise ValueError("a field reaches beyond the message")
        if tag >> 3 in (_MODEL_NAME, _PARAMETERS):
            kept += request[start:position]
    return bytes(kept)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return the variable-length integer at ``position``, and the position behind it."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("an integer longer than 64 bits")
