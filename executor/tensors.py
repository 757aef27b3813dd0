"""Tensors of the Open Inference Protocol to NumPy arrays and back.

Inputs arrive raw (``raw_input_contents``, little endian, row major) or typed (``contents``); outputs always leave raw,
because stock clients read an empty array from typed numeric contents. The datatypes are those of fixed size; ``BYTES``
and ``BF16``, which no model here takes, are refused by name. Whatever arrives is untrusted: counts, shapes and sizes
are checked against `TensorLimits` before anything is allocated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from executor.proto import open_inference_pb2 as pb
from executor.runtime.protocol import NUMPY_TYPES
from plans.errors import Fault, InvalidInput

__all__ = [
    "Array",
    "Buffer",
    "TensorLimits",
    "datatype_of",
    "decode_inputs",
    "decode_outputs",
    "decode_raw",
    "described_inputs",
    "encode_request",
    "encode_response",
    "extension_faults",
    "parameter",
    "set_parameter",
]

Array = np.ndarray[Any, np.dtype[Any]]

Buffer = bytes | memoryview
"""Raw content of a tensor."""

_NAMES = {dtype: name for name, dtype in NUMPY_TYPES.items()}

_TYPED_DTYPES = {
    "bool_contents": np.dtype("?"),
    "int_contents": np.dtype("i4"),
    "int64_contents": np.dtype("i8"),
    "uint_contents": np.dtype("u4"),
    "uint64_contents": np.dtype("u8"),
    "fp32_contents": np.dtype("f4"),
    "fp64_contents": np.dtype("f8"),
}

_TYPED_FIELDS = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}


_NOT_OFFERED = {
    "shared_memory_region": "contents in the message, for memory is not shared with clients",
    "classification": "nothing of the kind, for outputs are sent whole: choose among the values yourself",
}
"""Parameters of tensors that stock clients send for extensions of the protocol, and what to do instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLimits:
    """What one message may hold: number of tensors, dimensions of each, bytes of all together, and bytes of JSON."""

    tensors: int = 64
    dimensions: int = 16
    total_bytes: int = 256 * 2**20
    json_bytes: int = 4 * 2**20


def datatype_of(array: Array) -> str:
    """Return the protocol's name for the array's element type.

    Raises:
        InvalidInput: The protocol has none, or this project does not carry it.
    """
    name = _NAMES.get(array.dtype.newbyteorder("<"))
    if name is None:
        raise InvalidInput.of(f"one of {', '.join(NUMPY_TYPES)}", field="datatype", found=array.dtype)
    return name


def decode_inputs(
    request: pb.ModelInferRequest, limits: TensorLimits | None = None, raw: Sequence[Buffer] | None = None
) -> dict[str, Array]:
    """Return the request's input tensors by name; raw ones are read-only views of the message.

    ``raw`` are the raw contents, where they are not in ``request``.

    Raises:
        InvalidInput: A tensor is malformed or beyond ``limits``; with every fault.
    """
    contents = request.raw_input_contents if raw is None else raw
    return _decode(request.inputs, contents, "inputs", limits or TensorLimits())


def decode_raw(described: Mapping[str, Array], raw: Sequence[Buffer]) -> dict[str, Array]:
    """Return input tensors by name, read-only views of their raw contents: ``raw`` in the order of ``described``.

    ``described`` is what `described_inputs` returned for as many contents.

    Raises:
        InvalidInput: A content has not the size of its tensor; with every fault.
    """
    faults: list[Fault] = []
    arrays: dict[str, Array] = {}
    for position, (name, like) in enumerate(described.items()):
        array = _raw_array(like.dtype, like.shape, raw[position], f"inputs[{position}]")
        if isinstance(array, Fault):
            faults.append(array)
        else:
            arrays[name] = array
    if faults:
        raise InvalidInput(faults)
    return arrays


def described_inputs(
    request: pb.ModelInferRequest, limits: TensorLimits | None = None, raw: Sequence[Buffer] | None = None
) -> dict[str, Array]:
    """Return arrays of the types and shapes that the request's headers claim, without looking at any content.

    They take no memory (every element is the same zero), so a request can be judged before it costs anything.

    Raises:
        InvalidInput: A header is malformed or beyond ``limits``; with every fault.
    """
    contents = request.raw_input_contents if raw is None else raw
    _check_headers(request.inputs, contents, "inputs", limits or TensorLimits())
    return {
        tensor.name: np.broadcast_to(np.zeros((), NUMPY_TYPES[tensor.datatype]), tuple(tensor.shape))
        for tensor in request.inputs
    }


def decode_outputs(response: pb.ModelInferResponse, limits: TensorLimits | None = None) -> dict[str, Array]:
    """Return the response's output tensors by name; raw ones are read-only views of the message.

    Raises:
        InvalidInput: A tensor is malformed or beyond ``limits``; with every fault.
    """
    return _decode(response.outputs, response.raw_output_contents, "outputs", limits or TensorLimits())


_Tensor = pb.ModelInferRequest.InferInputTensor | pb.ModelInferResponse.InferOutputTensor


def _decode(tensors: Sequence[_Tensor], raw: Sequence[Buffer], field: str, limits: TensorLimits) -> dict[str, Array]:
    _check_headers(tensors, raw, field, limits)
    faults: list[Fault] = []
    arrays: dict[str, Array] = {}
    for position, tensor in enumerate(tensors):
        here = f"{field}[{position}]"
        array = (
            _raw_array(NUMPY_TYPES[tensor.datatype], tuple(tensor.shape), raw[position], here)
            if raw
            else _typed_array(tensor, here)
        )
        if isinstance(array, Fault):
            faults.append(array)
        else:
            arrays[tensor.name] = array
    if faults:
        raise InvalidInput(faults)
    return arrays


def _check_headers(tensors: Sequence[_Tensor], raw: Sequence[Buffer], field: str, limits: TensorLimits) -> None:
    faults = list(_count_faults(tensors, raw, field, limits))
    if len(tensors) <= limits.tensors:
        asked = (extension_faults(tensor.parameters, f"{field}[{i}]") for i, tensor in enumerate(tensors))
        faults = list(itertools.chain.from_iterable(asked)) or faults  # contents may be missing for that
    total_bytes = 0
    for position, tensor in enumerate(tensors if not faults else ()):
        here = f"{field}[{position}]"
        found = list(_header_faults(tensor, here, limits))
        if not found:
            total_bytes += math.prod(tensor.shape) * NUMPY_TYPES[tensor.datatype].itemsize
            if total_bytes > limits.total_bytes:
                expected = f"at most {limits.total_bytes} bytes of tensors in one message"
                found = [Fault(field=f"{here}.shape", found=str(list(tensor.shape)), expected=expected)]
        faults += found
    if faults:
        raise InvalidInput(faults)


def extension_faults(parameters: Container[str], field: str) -> Iterator[Fault]:
    """Yield what the parameters of a tensor ask for that is not offered: not to answer something else instead."""
    for name, expected in _NOT_OFFERED.items():
        if name in parameters:
            yield Fault(field=f"{field}.parameters.{name}", found="a wish for it", expected=expected)


def _count_faults(
    tensors: Sequence[_Tensor], raw: Sequence[Buffer], field: str, limits: TensorLimits
) -> Iterator[Fault]:
    if len(tensors) > limits.tensors:
        yield Fault(field=field, found=str(len(tensors)), expected=f"at most {limits.tensors} tensors")
        return  # not to look at them one by one
    names = [tensor.name for tensor in tensors]
    if len(set(names)) < len(names):
        yield Fault(field=field, found=str(names), expected="every tensor name only once")
    if raw and len(raw) != len(tensors):
        expected = f"one raw content for each of the {len(tensors)} tensors"
        yield Fault(field=f"raw_{field[:-1]}_contents", found=str(len(raw)), expected=expected)
    if raw and any(tensor.HasField("contents") for tensor in tensors):
        expected = f"contents in the tensors, or raw_{field[:-1]}_contents, not both"
        yield Fault(field=field, found="both", expected=expected)


def _header_faults(tensor: _Tensor, field: str, limits: TensorLimits) -> Iterator[Fault]:
    if tensor.datatype not in NUMPY_TYPES:
        yield Fault(field=f"{field}.datatype", found=repr(tensor.datatype), expected=f"one of {', '.join(NUMPY_TYPES)}")
    if not 1 <= len(tensor.shape) <= limits.dimensions:
        expected = f"1 to {limits.dimensions} dimensions"
        yield Fault(field=f"{field}.shape", found=str(list(tensor.shape[: limits.dimensions])), expected=expected)
    elif min(tensor.shape) < 1:
        yield Fault(field=f"{field}.shape", found=str(list(tensor.shape)), expected="every dimension at least 1")


def _raw_array(dtype: np.dtype[Any], shape: tuple[int, ...], content: Buffer, field: str) -> Array | Fault:
    size_bytes = math.prod(shape) * dtype.itemsize
    if len(content) != size_bytes:
        expected = f"{size_bytes} bytes for shape {list(shape)} of {_NAMES[dtype]}"
        return Fault(field=field, found=f"{len(content)} bytes", expected=expected)
    if dtype == np.bool_:  # any other byte than 0 and 1 would make an invalid bool
        flags: Array = np.frombuffer(content, dtype=np.uint8) != 0
        return flags.reshape(shape)
    return np.frombuffer(content, dtype=dtype).reshape(shape)


def _typed_array(tensor: _Tensor, field: str) -> Array | Fault:
    name = _TYPED_FIELDS.get(tensor.datatype)
    if name is None:
        return Fault(
            field=field, found=f"typed contents of {tensor.datatype}", expected="raw contents for this datatype"
        )
    values = getattr(tensor.contents, name)
    count = math.prod(tensor.shape)
    if len(values) != count:
        expected = f"{count} values in {name} for shape {list(tensor.shape)}"
        return Fault(field=field, found=f"{len(values)} values", expected=expected)
    dtype = NUMPY_TYPES[tensor.datatype]
    wide: Array = np.array(values, dtype=_TYPED_DTYPES[name])
    if dtype.kind in "iu":
        limit = np.iinfo(dtype)
        if wide.min() < limit.min or wide.max() > limit.max:
            expected = f"values from {limit.min} to {limit.max} for {tensor.datatype}"
            return Fault(field=field, found=f"{wide.min()} to {wide.max()}", expected=expected)
    return wide.astype(dtype).reshape(tuple(tensor.shape))


def encode_request(
    model: str,
    inputs: Mapping[str, Array],
    *,
    request_id: str = "",
    parameters: Mapping[str, bool | int | float | str] | None = None,
    outputs: Iterable[str] = (),
) -> pb.ModelInferRequest:
    """Return a request with raw contents.

    Raises:
        InvalidInput: An array's element type has no name in the protocol.
    """
    request = pb.ModelInferRequest(
        model_name=model,
        id=request_id,
        inputs=[
            pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype_of(array), shape=array.shape)
            for name, array in inputs.items()
        ],
        outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs],
        raw_input_contents=[_raw(array) for array in inputs.values()],
    )
    for name, value in (parameters or {}).items():
        set_parameter(request.parameters[name], value)
    return request


def encode_response(
    model: str,
    outputs: Mapping[str, Array],
    *,
    request_id: str = "",
    parameters: Mapping[str, bool | int | float | str] | None = None,
    version: str = "1",
) -> pb.ModelInferResponse:
    """Return a response with raw contents.

    Raises:
        InvalidInput: An array's element type has no name in the protocol.
    """
    response = pb.ModelInferResponse(
        model_name=model,
        model_version=version,
        id=request_id,
        outputs=[
            pb.ModelInferResponse.InferOutputTensor(name=name, datatype=datatype_of(array), shape=array.shape)
            for name, array in outputs.items()
        ],
        raw_output_contents=[_raw(array) for array in outputs.values()],
    )
    for name, value in (parameters or {}).items():
        set_parameter(response.parameters[name], value)
    return response


def _raw(array: Array) -> bytes:
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()


def set_parameter(message: pb.InferParameter, value: bool | int | float | str) -> None:
    """Store ``value`` in ``message`` under the field of its type."""
    if isinstance(value, bool):
        message.bool_param = value
    elif isinstance(value, int):
        message.int64_param = value
    elif isinstance(value, float):
        message.double_param = value
    else:
        message.string_param = value


def parameter(parameters: Mapping[str, pb.InferParameter], name: str) -> bool | int | float | str | None:
    """Return the value of the parameter ``name``, or None when it is absent or empty."""
    if name not in parameters:  # reading a protobuf map would insert the key
        return None
    message = parameters[name]
    choice = message.WhichOneof("parameter_choice")
    if choice is None:
        return None
    value: bool | int | float | str = getattr(message, choice)
    return value
