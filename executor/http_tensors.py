"""The HTTP/JSON form of the Open Inference Protocol to its protobuf form and back, with the binary tensor extension.

A body is a JSON object; with the header ``Inference-Header-Content-Length`` the object is that long, and the raw bytes
of tensors follow it in the order in which they are named there, each ``parameters.binary_data_size`` long. Everything
becomes raw contents, so that gateways and agents see one form only. What arrives is checked; `InvalidInput` names
every fault found in one step.
"""

from __future__ import annotations

import itertools
import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from executor.proto import open_inference_pb2 as pb
from executor.runtime.protocol import NUMPY_TYPES
from executor.tensors import TensorLimits, extension_faults, parameter, set_parameter
from plans.errors import InvalidInput

__all__ = ["HttpRequest", "answer_to_http", "parsed_json", "request_from_http"]

_BINARY_SIZE = "binary_data_size"
_IN_BINARY = "send tensors in binary, with parameters.binary_data_size and Inference-Header-Content-Length"
_PIECE = 1 << 14
"""Numbers that are written at once, a few milliseconds of work: between pieces other threads run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRequest:
    """A request that came by HTTP.

    Attributes:
        message: Its protobuf form.
        binary: For each output asked for by name, whether it is wanted as raw bytes.
        binary_default: Whether the others are.
    """

    message: pb.ModelInferRequest
    binary: Mapping[str, bool]
    binary_default: bool


def request_from_http(
    service: str, version: str, body: bytes, header_bytes: int | None, limits: TensorLimits | None = None
) -> HttpRequest:
    """Return the request in ``body``; ``header_bytes`` is the length of its JSON part, None for all of it.

    Raises:
        InvalidInput: It is not one.
    """
    if header_bytes is not None and not 0 <= header_bytes <= len(body):
        raise InvalidInput.of(
            f"a length of at most {len(body)}", where="Inference-Header-Content-Length", found=header_bytes
        )
    end = len(body) if header_bytes is None else header_bytes
    bounds = limits or TensorLimits()
    document = _object(parsed_json(memoryview(body)[:end], bounds), "request")
    message = pb.ModelInferRequest(model_name=service, model_version=version, id=_text(document.get("id", ""), "id"))
    parameters = dict(_object(document.get("parameters", {}), "parameters"))
    binary_default = parameters.pop("binary_data_output", False) is True
    _set_parameters(message.parameters, parameters, "parameters")
    rest = memoryview(body)[end:]
    for position, tensor in enumerate(_list(document.get("inputs", []), "inputs", bounds.tensors)):
        rest = _input(message, _object(tensor, f"inputs[{position}]"), f"inputs[{position}]", rest, bounds)
    if len(rest):
        raise InvalidInput.of("no bytes behind the last tensor", where="request", found=f"{len(rest)} bytes")
    binary: dict[str, bool] = {}
    for position, output in enumerate(_list(document.get("outputs", []), "outputs", bounds.tensors)):
        wanted = _object(output, f"outputs[{position}]")
        name = _text(wanted.get("name"), f"outputs[{position}].name")
        options = _object(wanted.get("parameters", {}), f"outputs[{position}].parameters")
        asked = message.outputs.add(name=name)
        if "binary_data" in options:
            binary[name] = options["binary_data"] is True
        others = {key: value for key, value in options.items() if key != "binary_data"}
        _set_parameters(asked.parameters, others, f"outputs[{position}].parameters")  # the agent judges them
    return HttpRequest(message=message, binary=binary, binary_default=binary_default)


def answer_to_http(answer: pb.ModelInferResponse, request: HttpRequest) -> tuple[bytes, int | None]:
    """Return the body for ``answer``, and the length of its JSON part when raw bytes follow it."""
    outputs: list[str] = []
    raw: list[bytes] = []
    for tensor, content in zip(answer.outputs, answer.raw_output_contents, strict=True):
        described: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.shape),
        }
        if request.binary.get(tensor.name, request.binary_default):
            described["parameters"] = {_BINARY_SIZE: len(content)}
            outputs.append(_written(described))
            raw.append(content)
        else:
            numbers = ",".join(_numbers(content, tensor.datatype))
            outputs.append(f'{_written(described)[:-1]},"data":[{numbers}]}}')
    document: dict[str, Any] = {"model_name": answer.model_name, "model_version": answer.model_version}
    if answer.id:
        document["id"] = answer.id
    if answer.parameters:
        document["parameters"] = {name: parameter(answer.parameters, name) for name in answer.parameters}
    header = f'{_written(document)[:-1]},"outputs":[{",".join(outputs)}]}}'.encode()
    return (b"".join((header, *raw)), len(header)) if raw else (header, None)


def _written(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _numbers(content: bytes, datatype: str) -> Iterator[str]:
    """Yield the values as JSON has them, in pieces; what is no number there (NaN, infinities) becomes null."""
    array = np.frombuffer(content, dtype=NUMPY_TYPES[datatype])
    for start in range(0, array.size, _PIECE):
        piece = array[start : start + _PIECE]
        values: list[Any] = piece.tolist()
        if piece.dtype.kind == "f" and not np.isfinite(piece).all():
            values = [value if math.isfinite(value) else None for value in values]
        yield _written(values)[1:-1]


def _input(
    message: pb.ModelInferRequest, tensor: Mapping[str, Any], where: str, rest: memoryview, limits: TensorLimits
) -> memoryview:
    """Add one tensor to ``message``; return what follows its raw bytes."""
    name = _text(tensor.get("name"), f"{where}.name")
    datatype = _text(tensor.get("datatype"), f"{where}.datatype")
    shape = _list(tensor.get("shape"), f"{where}.shape", limits.dimensions)
    if datatype not in NUMPY_TYPES:
        raise InvalidInput.of(
            f"one of {', '.join(NUMPY_TYPES)}", field=f"{where}.datatype", found=reprlib.repr(datatype)
        )
    if not shape or not all(type(size) is int and 1 <= size < 2**31 for size in shape):
        raise InvalidInput.of("dimensions of at least 1", field=f"{where}.shape", found=reprlib.repr(shape))
    if math.prod(shape) * NUMPY_TYPES[datatype].itemsize > limits.total_bytes:
        raise InvalidInput.of(f"at most {limits.total_bytes} bytes", field=f"{where}.shape", found=shape)
    parameters = dict(_object(tensor.get("parameters", {}), f"{where}.parameters"))
    if faults := tuple(extension_faults(parameters, where)):
        raise InvalidInput(faults)
    size_bytes = parameters.pop(_BINARY_SIZE, None)
    message.inputs.add(name=name, datatype=datatype, shape=shape)
    if size_bytes is None:
        if "data" not in tensor:
            expected = f"{math.prod(shape)} values of {datatype}"
            raise InvalidInput.of(expected, field=f"{where}.data", found="nothing", remedy=f"or {_IN_BINARY}")
        message.raw_input_contents.append(_content(tensor["data"], datatype, shape, f"{where}.data"))
        return rest
    if type(size_bytes) is not int or not 0 <= size_bytes <= len(rest):
        expected = f"at most the {len(rest)} bytes that follow"
        raise InvalidInput.of(expected, field=f"{where}.parameters.{_BINARY_SIZE}", found=reprlib.repr(size_bytes))
    message.raw_input_contents.append(bytes(rest[:size_bytes]))
    return rest[size_bytes:]


def _content(data: Any, datatype: str, shape: list[int], where: str) -> bytes:
    dtype = NUMPY_TYPES[datatype]
    values, kinds = _values(data, datatype, where)
    if len(values) != math.prod(shape):
        expected = f"{math.prod(shape)} values for shape {shape}"
        raise InvalidInput.of(expected, field=where, found=f"{len(values)} values")
    try:
        given = np.array(values, dtype=np.float64 if kinds == {float} else None)  # faster than to let numpy find out
        if datatype == "UINT64" and given.dtype.kind == "f" and kinds == {int}:
            given = np.array(values, dtype=np.uint64)  # numpy takes small and very large numbers together for fractions
        if given.dtype.kind not in "biuf" or (given.dtype.kind == "f" and dtype.kind != "f"):
            raise InvalidInput.of(f"numbers of {datatype}", field=where, found=f"a list of {given.dtype}")
        if (given.dtype.kind == "b") != (dtype.kind == "b"):
            raise InvalidInput.of(f"numbers of {datatype}", field=where, found=f"a list of {given.dtype}")
        if dtype.kind in "iu" and given.size:
            limit = np.iinfo(dtype)
            if given.min() < limit.min or given.max() > limit.max:
                found = f"{given.min()} to {given.max()}"
                raise InvalidInput.of(f"values from {limit.min} to {limit.max}", field=where, found=found)
        with np.errstate(over="ignore"):
            array = given.astype(dtype)
        if dtype.kind == "f" and np.isinf(array).any():
            most = np.finfo(dtype).max
            raise InvalidInput.of(f"values from {-most} to {most}", field=where, found="more", remedy=_IN_BINARY)
    except (ValueError, OverflowError) as error:
        raise InvalidInput.of(f"numbers of {datatype}", field=where, found=str(error)) from error
    return array.astype(dtype.newbyteorder("<")).tobytes()


def _values(data: Any, datatype: str, where: str) -> tuple[list[Any], set[type]]:
    """Return the numbers in ``data``, lists of equal lengths to any depth, and their types.

    numpy sees none but these: of texts, it makes an array in which each is as long as the longest.

    Raises:
        InvalidInput: They are none, or some lists are longer than others.
    """
    values = data if isinstance(data, list) else [data]
    while (kinds := set(map(type, values))) == {list}:
        if len(set(map(len, values))) > 1:
            raise InvalidInput.of("lists of equal lengths", field=where, found="longer and shorter ones")
        values = list(itertools.chain.from_iterable(values))
    if others := kinds - {bool, int, float}:
        found = " and ".join(sorted(kind.__name__ for kind in others))
        raise InvalidInput.of(f"numbers of {datatype}", field=where, found=f"a list with {found}")
    return values, kinds


def parsed_json(text: bytes | memoryview, limits: TensorLimits) -> Any:
    """Return the value in ``text``, which is short enough not to hold up the requests of others.

    Raises:
        InvalidInput: It is longer, or is no JSON; NaN and infinities are none.
    """
    if len(text) > limits.json_bytes:
        expected = f"at most {limits.json_bytes} bytes of JSON"
        raise InvalidInput.of(expected, where="request", found=f"{len(text)} bytes", remedy=_IN_BINARY)
    try:
        return json.loads(bytes(text), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise InvalidInput.of("a JSON object", where="request", found=str(error)) from error


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text}, which JSON does not have; {_IN_BINARY}")


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InvalidInput.of("a JSON object", field=where, found=type(value).__name__)
    return value


def _list(value: Any, where: str, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        found = f"{len(value)} entries" if isinstance(value, list) else type(value).__name__
        raise InvalidInput.of(f"a list of at most {most} entries", field=where, found=found)
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InvalidInput.of("a text", field=where, found=type(value).__name__)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON may hold one half of a surrogate pair without the other
        raise InvalidInput.of("whole characters", field=where, found=reprlib.repr(value)) from error
    return value


def _set_parameters(target: Any, parameters: Mapping[str, Any], where: str) -> None:
    for name, value in parameters.items():
        if not isinstance(value, bool | int | float | str) or (type(value) is int and abs(value) >= 2**63):
            expected = "a number, a text, true or false"
            raise InvalidInput.of(expected, field=f"{where}.{name}", found=reprlib.repr(value))
        if isinstance(value, str):
            _text(value, f"{where}.{name}")
        set_parameter(target[_text(name, where)], value)
