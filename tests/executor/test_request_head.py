from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.proto import open_inference_pb2 as pb
from executor.request_head import Fits, HeadReader, RequestHead
from executor.runtime.protocol import TensorSpec
from executor.tensors import TensorLimits, decode_inputs, decode_raw, encode_request
from executor.worker_wire import Loaded
from plans.errors import InvalidInput

LIMITS = TensorLimits(tensors=3)


def request(value: float, **changed):
    return encode_request("s", {"x": np.full((1, 4), value, np.float32)}, **changed).SerializeToString()


def test_requests_that_differ_in_contents_only_share_their_head():
    reader = HeadReader(LIMITS)
    first, raw = reader.read(request(1.0))
    second, other = reader.read(request(2.0))
    assert second is first
    assert decode_raw(first.described, raw)["x"].tolist() == [[1.0] * 4]
    assert decode_raw(first.described, other)["x"].tolist() == [[2.0] * 4]


@pytest.mark.parametrize(
    "changed", [{"request_id": "7"}, {"parameters": {"priority": 2}}, {"parameters": {"deadline_ms": 5}}]
)
def test_whatever_else_differs_makes_another_head(changed):
    reader = HeadReader(LIMITS)
    first, _ = reader.read(request(1.0))
    second, _ = reader.read(request(1.0, **changed))
    whole = RequestHead.of(pb.ModelInferRequest.FromString(request(1.0, **changed)), [b""], LIMITS)
    assert (second.message.id, second.priority, second.deadline_s) == (
        whole.message.id,
        whole.priority,
        whole.deadline_s,
    )
    assert second is not first
    assert (first.priority, first.deadline_s, first.message.id) == (5, None, "")


def test_typed_contents_are_part_of_the_message_and_not_remembered():
    reader = HeadReader(LIMITS)
    message = pb.ModelInferRequest(model_name="s")
    message.inputs.add(name="x", datatype="FP32", shape=[1, 1]).contents.fp32_contents.append(1.0)
    first, raw = reader.read(message.SerializeToString())
    assert not raw
    assert decode_inputs(first.message)["x"].tolist() == [[1.0]]
    message.inputs[0].contents.fp32_contents[0] = 2.0
    second, _ = reader.read(message.SerializeToString())
    assert decode_inputs(second.message)["x"].tolist() == [[2.0]]
    assert reader.read(message.SerializeToString())[0] is not second


def test_the_number_of_raw_contents_is_judged_for_each_request_by_itself():
    reader = HeadReader(LIMITS)
    reader.read(request(1.0))
    more = pb.ModelInferRequest.FromString(request(1.0))
    more.raw_input_contents.append(b"")
    with pytest.raises(InvalidInput, match="one raw content for each"):
        reader.read(more.SerializeToString())


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (pb.ModelInferRequest(outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="y")] * 4), "at most 3"),
        (encode_request("s", {}, parameters={"deadline_ms": -1}), "deadline_ms"),
        (encode_request("s", {}, parameters={"priority": 99}), "priority"),
        (encode_request("s", {name: np.zeros((1, 1), np.float32) for name in "abcd"}), "at most 3 tensors"),
    ],
)
def test_a_head_that_is_wrong_is_refused_each_time(message, says):
    reader = HeadReader(LIMITS)
    for _ in range(2):
        with pytest.raises(InvalidInput, match=says):
            reader.read(message.SerializeToString())


def test_a_content_of_another_size_than_its_tensor_is_refused_by_its_field():
    head, raw = HeadReader(LIMITS).read(request(1.0))
    with pytest.raises(InvalidInput) as caught:
        decode_raw(head.described, [raw[0][:-1]])
    assert [fault.field for fault in caught.value.faults] == ["inputs[0]"]
    assert "16 bytes for shape [1, 4] of FP32" in str(caught.value)


@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_refused_by_name(data):
    reader = HeadReader(LIMITS)
    for _ in range(2):
        try:
            head, raw = reader.read(data)
        except InvalidInput:
            continue
        assert len(raw) in (0, len(head.described))


def loaded(floats: int) -> Loaded:
    return Loaded(
        call=1,
        weight_bytes=1,
        load_s=0.0,
        first_inference_s=0.0,
        inputs=(TensorSpec("x", "FP32", (floats,)),),
        outputs=(TensorSpec("y", "FP32", (1,)),),
    )


def test_a_head_that_fitted_one_model_is_judged_anew_for_another_and_for_another_largest_batch():
    fits, reader = Fits(), HeadReader(LIMITS)
    inputs = {"x": np.zeros((2, 4), np.float32)}
    head, _ = reader.read(encode_request("s", inputs).SerializeToString())
    four, five = loaded(4), loaded(5)
    for _ in range(2):
        assert fits.items(head, four, 2) == 2
        with pytest.raises(InvalidInput, match="shape"):
            fits.items(head, five, 2)
        with pytest.raises(InvalidInput, match="a batch of 1 to 1"):
            fits.items(head, four, 1)


def test_outputs_that_a_model_has_not_are_refused_each_time():
    fits, reader = Fits(), HeadReader(LIMITS)
    for value in (1.0, 2.0):
        head, _ = reader.read(request(value, outputs=["z"]))
        with pytest.raises(InvalidInput, match="some of y"):
            fits.items(head, loaded(4), 1)


@pytest.mark.parametrize(
    ("of_input", "of_output", "says"),
    [
        ("shared_memory_region", "", r"inputs\[0\].parameters.shared_memory_region.*contents in the message"),
        ("", "shared_memory_region", r"outputs\[0\].parameters.shared_memory_region"),
        ("", "classification", r"outputs\[0\].parameters.classification.*outputs are sent whole"),
    ],
)
@pytest.mark.parametrize("has_contents", [True, False])
def test_what_stock_clients_may_ask_for_and_is_not_offered_is_named(of_input, of_output, says, has_contents):
    message = encode_request("m", {"x": np.ones((1, 2), np.float32)}, outputs=["y"])
    if of_input:
        message.inputs[0].parameters[of_input].string_param = "region"
    if of_output:
        message.outputs[0].parameters[of_output].int64_param = 3
    if not has_contents:
        message.ClearField("raw_input_contents")
    with pytest.raises(InvalidInput, match=says):
        RequestHead.of(message, message.raw_input_contents, TensorLimits())
