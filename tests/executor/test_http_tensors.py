from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.http_tensors import answer_to_http, request_from_http
from executor.runtime.protocol import NUMPY_TYPES
from executor.tensors import TensorLimits, decode_inputs, encode_response
from plans.errors import InvalidInput


def body(**changed: Any) -> bytes:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.5, -2]}
    return json.dumps({"inputs": [tensor | changed]}).encode()


@pytest.mark.parametrize("datatype", sorted(NUMPY_TYPES))
def test_numbers_become_the_same_raw_tensor_nested_or_flat(datatype: str) -> None:
    values = [[1, 0], [0, 1]] if datatype != "BOOL" else [[True, False], [False, True]]
    for data in (values, [one for row in values for one in row]):
        request = request_from_http("m", "", body(datatype=datatype, shape=[2, 2], data=data), None)
        decoded = decode_inputs(request.message)["x"]
        assert decoded.dtype == NUMPY_TYPES[datatype]
        assert decoded.tolist() == values


def test_binary_tensors_lie_behind_the_object_in_their_order() -> None:
    header = json.dumps(
        {
            "id": "7",
            "parameters": {"deadline_ms": 20, "binary_data_output": True},
            "inputs": [
                {"name": "a", "datatype": "INT8", "shape": [2], "parameters": {"binary_data_size": 2}},
                {"name": "b", "datatype": "INT8", "shape": [1], "data": [9]},
                {"name": "c", "datatype": "INT8", "shape": [1], "parameters": {"binary_data_size": 1}},
            ],
            "outputs": [{"name": "y"}, {"name": "z", "parameters": {"binary_data": False}}],
        }
    ).encode()
    request = request_from_http("m", "1", header + b"\1\2\3", len(header))
    assert [one.tolist() for one in decode_inputs(request.message).values()] == [[1, 2], [9], [3]]
    assert request.message.parameters["deadline_ms"].int64_param == 20
    assert "binary_data_output" not in request.message.parameters
    answer = encode_response("m", {"y": np.array([1, 2], np.int16), "z": np.array([0.5], np.float32)}, request_id="7")
    found, length = answer_to_http(answer, request)
    assert length is not None
    document = json.loads(found[:length])
    assert document["id"] == "7"
    assert document["outputs"] == [
        {"name": "y", "datatype": "INT16", "shape": [2], "parameters": {"binary_data_size": 4}},
        {"name": "z", "datatype": "FP32", "shape": [1], "data": [0.5]},
    ]
    assert found[length:] == b"\1\0\2\0"


def test_what_json_cannot_say_becomes_null() -> None:
    request = request_from_http("m", "", b'{"inputs": []}', None)
    answer = encode_response("m", {"y": np.array([np.nan, np.inf, 1], np.float32)})
    found, length = answer_to_http(answer, request)
    assert length is None
    assert json.loads(found)["outputs"][0]["data"] == [None, None, 1.0]


@pytest.mark.parametrize(
    ("found", "named"),
    [
        (b"no json", "JSON object"),
        (b"[" * 100_000, "JSON object"),
        (b"[]", "request"),
        (b'{"inputs": 5}', "inputs"),
        (b'{"inputs": [5]}', r"inputs\[0\]"),
        (body(datatype="FP8"), "datatype"),
        (body(shape=[]), "shape"),
        (body(shape=[-1, 2]), "shape"),
        (body(shape=[True, 2]), "shape"),
        (body(shape=[2**30, 2**30]), "shape"),
        (body(shape=[3]), "3 values"),
        (body(data=["a", "b"]), "data"),
        (body(data=[[1], [2, 3]]), "data"),
        (body(datatype="INT8", data=[1, 300]), "data"),
        (body(datatype="INT8", data=[1.5, 2]), "data"),
        (body(datatype="BOOL", data=[1, 0]), "data"),
        (body(datatype="UINT8", data=[-1, 0]), "data"),
        (body(parameters={"binary_data_size": 8}), "binary_data_size"),
        (body(parameters={"binary_data_size": -1}), "binary_data_size"),
        (json.dumps({"parameters": {"x": [1]}}).encode(), "parameters"),
        (json.dumps({"outputs": [{}]}).encode(), "name"),
    ],
)
def test_what_is_no_request_is_refused_by_name(found: bytes, named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        request_from_http("m", "", found, None, TensorLimits(total_bytes=1 << 20))


def test_bytes_that_belong_to_no_tensor_are_refused() -> None:
    whole = body()
    with pytest.raises(InvalidInput, match="1 bytes"):
        request_from_http("m", "", whole + b"x", len(whole))
    with pytest.raises(InvalidInput, match="Inference-Header-Content-Length"):
        request_from_http("m", "", whole, len(whole) + 1)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)
_NAMES = st.sampled_from(["name", "datatype", "shape", "data", "parameters", "binary_data_size"])


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "inputs": _JSON | st.lists(st.dictionaries(_NAMES, _JSON), max_size=3),
            "outputs": _JSON,
            "parameters": _JSON,
            "id": _JSON,
        },
    ),
    st.binary(max_size=20),
    st.none() | st.integers(-5, 300),
)
def test_law_anything_is_a_request_or_refused_by_name(document: Any, rest: bytes, length: int | None) -> None:
    with contextlib.suppress(InvalidInput):
        request_from_http("m", "", json.dumps(document).encode() + rest, length)
