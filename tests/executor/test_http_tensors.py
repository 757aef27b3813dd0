from __future__ import annotations

import contextlib
import json
import tracemalloc
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


@pytest.mark.parametrize("values", [[1, 2**63], [2**64 - 1, 0], [[7, 2**63 + 1]]])
def test_small_and_very_large_numbers_without_a_sign_go_together(values: list[Any]) -> None:
    count = int(np.size(values))
    tensor = {"name": "x", "datatype": "UINT64", "shape": [count], "data": values}
    message = request_from_http("s", "", json.dumps({"inputs": [tensor]}).encode(), None).message
    flat = values[0] if isinstance(values[0], list) else values
    assert np.frombuffer(message.raw_input_contents[0], "<u8").tolist() == flat


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
        (body(data=[[1], [2, 3]]), "lists of equal lengths"),
        (body(data=[1, [2]]), r"data: found a list with list, expected numbers of FP32"),
        (body(data=[None, {}]), "a list with NoneType and dict"),
        (body(data={"0": 1, "1": 2}), "a list with dict"),
        (body(data=[[], []]), "found 0 values, expected 2 values"),
        (body(datatype="INT8", data=[1, 300]), "data"),
        (body(datatype="INT8", data=[1.5, 2]), "data"),
        (body(datatype="BOOL", data=[1, 0]), "data"),
        (body(datatype="UINT8", data=[-1, 0]), "data"),
        (body(parameters={"binary_data_size": 8}), "binary_data_size"),
        (body(parameters={"binary_data_size": -1}), "binary_data_size"),
        (json.dumps({"parameters": {"x": [1]}}).encode(), "parameters"),
        (json.dumps({"outputs": [{}]}).encode(), "name"),
        (b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [2]}]}', r"data: found nothing, expected 2 values"),
        (body(parameters={"shared_memory_region": "r", "shared_memory_byte_size": 8}), "contents in the message"),
        (json.dumps({"outputs": [{"name": "y", "parameters": {"x": []}}]}).encode(), r"outputs\[0\].parameters.x"),
        (body(datatype="FP16", data=[1e6, 0]), "values from -6.*send tensors in binary"),
        (body(data=[1e300, 0]), "values from -3.4.*send tensors in binary"),
        (body(data=["NaN", 0]).replace(b'"NaN"', b"NaN"), "NaN, which JSON does not have"),
        (body(datatype="FP64", data=["X", 0]).replace(b'"X"', b"1e999"), "values from"),
        (body(name="\ud800"), r"inputs\[0\].name: found .*whole characters"),
        (json.dumps({"id": "\udfff"}).encode(), "id: found .*whole characters"),
        (json.dumps({"parameters": {"\ud800": 1}}).encode(), "parameters: found .*whole characters"),
        (json.dumps({"parameters": {"x": "\ud800"}}).encode(), "parameters.x: found .*whole characters"),
        (json.dumps({"outputs": [{"name": "\ud800"}]}).encode(), r"outputs\[0\].name: found .*whole characters"),
    ],
)
def test_what_is_no_request_is_refused_by_name(found: bytes, named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        request_from_http("m", "", found, None, TensorLimits(total_bytes=1 << 20))


@pytest.mark.parametrize("data", [["a" * 3000, *[""] * 20_000], [["a" * 3000], *[[""]] * 20_000]])
def test_texts_of_any_length_take_no_more_memory_than_they_are_long(data: list[Any]) -> None:
    sent = body(data=data)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput, match=r"inputs\[0\].data: found a list with str, expected numbers of FP32"):
            request_from_http("m", "", sent, None)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 100 * len(sent)


def test_what_is_asked_of_an_output_goes_to_who_knows_of_it() -> None:
    asked = {"outputs": [{"name": "y", "parameters": {"binary_data": True, "classification": 3}}]}
    (output,) = request_from_http("m", "", json.dumps(asked).encode(), None).message.outputs
    assert {name: value.int64_param for name, value in output.parameters.items()} == {"classification": 3}


def test_bytes_that_belong_to_no_tensor_are_refused() -> None:
    whole = body()
    with pytest.raises(InvalidInput, match="1 bytes"):
        request_from_http("m", "", whole + b"x", len(whole))
    with pytest.raises(InvalidInput, match="Inference-Header-Content-Length"):
        request_from_http("m", "", whole, len(whole) + 1)


def test_a_json_part_that_would_hold_up_others_is_refused_and_the_same_in_binary_is_not() -> None:
    limits = TensorLimits(total_bytes=1 << 20, json_bytes=1 << 10)
    values = np.ones(400, np.float32)
    with pytest.raises(
        InvalidInput, match=r"found \d{4} bytes, expected at most 1024 bytes of JSON; send tensors in b"
    ):
        request_from_http("m", "", body(shape=[400], data=values.tolist()), None, limits)
    described = {"name": "x", "datatype": "FP32", "shape": [400], "parameters": {"binary_data_size": 1600}}
    header = json.dumps({"inputs": [described]}).encode()
    request = request_from_http("m", "", header + values.tobytes(), len(header), limits)
    np.testing.assert_array_equal(decode_inputs(request.message)["x"], values)


def test_long_answers_are_the_same_json_as_short_ones() -> None:
    request = request_from_http("m", "", b'{"id": "4", "inputs": []}', None)
    values = np.arange(100_000, dtype=np.float32)
    values[[3, 99_999]] = np.nan
    answer = encode_response("m", {"y": values, "none": np.zeros((0, 3), np.int8)}, request_id="4")
    found, _ = answer_to_http(answer, request)
    first, second = json.loads(found)["outputs"]
    assert first["data"] == [None if position in (3, 99_999) else position for position in range(100_000)]
    assert second == {"name": "none", "datatype": "INT8", "shape": [0, 3], "data": []}


_TEXT = st.text(st.characters() | st.characters(categories=["Cs"]), max_size=5)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4),
    max_leaves=12,
)
_NUMBERS = st.lists(st.integers(-(2**70), 2**70) | st.floats() | st.booleans(), max_size=4)
_TENSOR = st.fixed_dictionaries(
    {"name": _TEXT | _JSON, "datatype": st.sampled_from(sorted(NUMPY_TYPES))},
    optional={
        "shape": st.lists(st.integers(0, 4), max_size=3) | _JSON,
        "data": _NUMBERS | st.lists(_NUMBERS, max_size=3) | _JSON,
        "parameters": st.dictionaries(st.just("binary_data_size") | _TEXT, st.integers(-1, 20) | _JSON, max_size=2),
    },
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "inputs": st.lists(_TENSOR, max_size=3) | _JSON,
            "outputs": st.lists(st.fixed_dictionaries({"name": _TEXT}), max_size=2) | _JSON,
            "parameters": st.dictionaries(_TEXT, _JSON, max_size=3) | _JSON,
            "id": _TEXT | _JSON,
        },
    ),
    st.binary(max_size=20),
    st.booleans() | st.integers(-5, 300),
)
def test_law_anything_is_a_request_that_can_be_sent_or_refused_by_name(document: Any, rest: bytes, length: int) -> None:
    """A length that is true is that of the JSON part, and false stands for none."""
    header = json.dumps(document).encode()
    said = (len(header) if length else None) if isinstance(length, bool) else length
    with contextlib.suppress(InvalidInput):
        request_from_http("m", "", header + rest, said).message.SerializeToString()


@given(
    st.sampled_from(sorted(NUMPY_TYPES)), st.lists(st.integers(-(2**65), 2**65) | st.floats(), min_size=1, max_size=4)
)
def test_law_numbers_arrive_as_they_are_or_are_refused(datatype: str, values: list[float]) -> None:
    with contextlib.suppress(InvalidInput):
        request = request_from_http("m", "", body(datatype=datatype, shape=[len(values)], data=values), None)
        (decoded,) = decode_inputs(request.message).values()
        assert np.isfinite(decoded).all()
        np.testing.assert_allclose(decoded.astype(np.float64), values, rtol=1e-3, atol=1e-7)
