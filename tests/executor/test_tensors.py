from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from executor.proto import open_inference_pb2 as pb
from executor.runtime.protocol import NUMPY_TYPES
from executor.tensors import (
    TensorLimits,
    datatype_of,
    decode_inputs,
    decode_outputs,
    described_inputs,
    encode_request,
    encode_response,
    parameter,
)
from plans.errors import InvalidInput

arrays = st.sampled_from(sorted(NUMPY_TYPES)).flatmap(
    lambda name: hnp.arrays(NUMPY_TYPES[name], hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=4))
)


def tensor(name="x", datatype="FP32", shape=(1, 2), **contents):
    message = pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape)
    if contents:
        message.contents.CopyFrom(pb.InferTensorContents(**contents))
    return message


def test_a_description_has_the_claimed_shape_and_takes_no_memory():
    claimed = pb.ModelInferRequest(inputs=[tensor(shape=(1000, 1000, 60))])
    described = described_inputs(claimed)["x"]
    assert (described.shape, described.dtype, described.base.nbytes) == ((1000, 1000, 60), np.float32, 4)
    with pytest.raises(InvalidInput, match="at most 268435456 bytes"):
        described_inputs(pb.ModelInferRequest(inputs=[tensor(shape=(2**40, 2**20))]))


def faults_of(request, limits=None):
    with pytest.raises(InvalidInput) as caught:
        decode_inputs(request, limits)
    return [str(fault) for fault in caught.value.faults]


@given(st.dictionaries(st.text(min_size=1, max_size=5), arrays, min_size=1, max_size=3))
def test_decoding_an_encoded_request_gives_the_same_arrays(inputs):
    request = pb.ModelInferRequest.FromString(encode_request("m", inputs).SerializeToString())
    decoded = decode_inputs(request)
    assert list(decoded) == list(inputs)
    for name, array in inputs.items():
        assert decoded[name].dtype == array.dtype
        np.testing.assert_array_equal(decoded[name], array)


@given(st.dictionaries(st.text(min_size=1, max_size=5), arrays, min_size=1, max_size=3))
def test_decoding_an_encoded_response_gives_the_same_arrays(outputs):
    response = pb.ModelInferResponse.FromString(encode_response("m", outputs, request_id="7").SerializeToString())
    assert response.id == "7"
    decoded = decode_outputs(response)
    for name, array in outputs.items():
        np.testing.assert_array_equal(decoded[name], array)


def test_transposed_and_big_endian_arrays_travel_by_value():
    array = np.arange(6, dtype=">f4").reshape(2, 3).T
    np.testing.assert_array_equal(decode_inputs(encode_request("m", {"x": array}))["x"], array)


@pytest.mark.parametrize(
    ("datatype", "contents", "values"),
    [
        ("BOOL", {"bool_contents": [True, False]}, [True, False]),
        ("UINT8", {"uint_contents": [0, 255]}, [0, 255]),
        ("INT8", {"int_contents": [-128, 127]}, [-128, 127]),
        ("INT32", {"int_contents": [-(2**31), 2**31 - 1]}, [-(2**31), 2**31 - 1]),
        ("INT64", {"int64_contents": [-(2**63), 2**63 - 1]}, [-(2**63), 2**63 - 1]),
        ("UINT64", {"uint64_contents": [1, 2**64 - 1]}, [1, 2**64 - 1]),
        ("FP32", {"fp32_contents": [0.5, -1.0]}, [0.5, -1.0]),
        ("FP64", {"fp64_contents": [0.1, 1e300]}, [0.1, 1e300]),
    ],
)
def test_typed_contents_decode_to_their_values(datatype, contents, values):
    decoded = decode_inputs(pb.ModelInferRequest(inputs=[tensor(datatype=datatype, **contents)]))["x"]
    assert decoded.dtype == NUMPY_TYPES[datatype]
    assert decoded.tolist() == [values]


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (pb.ModelInferRequest(inputs=[tensor(datatype="BYTES")], raw_input_contents=[b""]), "'BYTES'"),
        (pb.ModelInferRequest(inputs=[tensor(datatype="FP16", fp32_contents=[1, 2])]), "raw contents"),
        (pb.ModelInferRequest(inputs=[tensor(shape=(1, -2))], raw_input_contents=[b""]), "at least 1"),
        (pb.ModelInferRequest(inputs=[tensor(shape=(0, 2))], raw_input_contents=[b""]), "at least 1"),
        (pb.ModelInferRequest(inputs=[tensor(shape=())], raw_input_contents=[b"1234"]), "dimensions"),
        (pb.ModelInferRequest(inputs=[tensor(shape=[1] * 17)], raw_input_contents=[b"1234"]), "dimensions"),
        (pb.ModelInferRequest(inputs=[tensor()], raw_input_contents=[b"1234"]), "8 bytes for shape [1, 2]"),
        (pb.ModelInferRequest(inputs=[tensor()], raw_input_contents=[b"1", b"2"]), "one raw content for each"),
        (pb.ModelInferRequest(inputs=[tensor(fp32_contents=[1, 2])], raw_input_contents=[b"12345678"]), "not both"),
        (pb.ModelInferRequest(inputs=[tensor(fp32_contents=[1, 2, 3])]), "found 3 values, expected 2"),
        (pb.ModelInferRequest(inputs=[tensor()]), "found 0 values"),
        (pb.ModelInferRequest(inputs=[tensor(datatype="UINT8", uint_contents=[1, 256])]), "from 0 to 255"),
        (pb.ModelInferRequest(inputs=[tensor(), tensor()], raw_input_contents=[b"12345678"] * 2), "only once"),
        (pb.ModelInferRequest(inputs=[tensor(shape=(2**40, 2**40))], raw_input_contents=[b""]), "at most"),
    ],
)
def test_a_malformed_tensor_is_refused_with_the_reason(request_, says):
    assert says in "\n".join(faults_of(request_))


def test_every_fault_is_reported_at_once():
    request = pb.ModelInferRequest(
        inputs=[tensor(name="a", datatype="BF16"), tensor(name="b", shape=(0,))], raw_input_contents=[b"", b""]
    )
    assert len(faults_of(request)) == 2


def test_limits_hold_for_the_message_and_not_for_each_tensor():
    halves = {"a": np.zeros(60, np.uint8), "b": np.zeros(60, np.uint8)}
    limits = TensorLimits(total_bytes=100)
    assert "at most 100 bytes" in faults_of(encode_request("m", halves), limits)[0]
    assert "at most 1 tensors" in faults_of(encode_request("m", halves), TensorLimits(tensors=1))[0]


def test_a_raw_bool_byte_other_than_one_is_still_true():
    request = pb.ModelInferRequest(inputs=[tensor(datatype="BOOL")], raw_input_contents=[b"\x00\x07"])
    assert decode_inputs(request)["x"].view(np.uint8).tolist() == [[0, 1]]


def test_complex_arrays_have_no_datatype():
    with pytest.raises(InvalidInput, match="complex128"):
        datatype_of(np.zeros(1, complex))


@given(st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.text(max_size=9)))
def test_parameters_keep_value_and_type(value):
    request = encode_request("m", {"x": np.zeros(1)}, parameters={"p": value})
    found = parameter(request.parameters, "p")
    assert found == value
    assert type(found) is type(value)


def test_an_absent_parameter_is_none_and_is_not_created():
    request = pb.ModelInferRequest()
    assert parameter(request.parameters, "p") is None
    assert not request.parameters
