from __future__ import annotations

import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from executor.answer_bytes import AnswerWriter, answer_message
from executor.proto import open_inference_pb2 as pb
from executor.request_head import HeadReader, RequestHead
from executor.runtime.protocol import NUMPY_TYPES
from executor.tensors import TensorLimits, encode_request
from executor.whole_requests import Answer

seconds = st.floats(0, 1e6)
arrays = st.sampled_from(sorted(NUMPY_TYPES.values(), key=str)).flatmap(
    lambda dtype: arrays_of.arrays(dtype, arrays_of.array_shapes(min_dims=1, max_dims=3, max_side=3))
)
answers = st.builds(
    Answer,
    outputs=st.dictionaries(st.sampled_from("abc"), arrays, max_size=3),
    variant=st.sampled_from(["small", "large"]),
    batch_items=st.integers(1, 3),
    queue_s=seconds,
    run_s=seconds,
)


def head_of(request: pb.ModelInferRequest) -> RequestHead:
    return HeadReader(TensorLimits()).read(request.SerializeToString())[0]


heads = st.builds(
    lambda request_id, wanted: head_of(
        encode_request("m", {"x": np.zeros((1, 1), np.float32)}, request_id=request_id, outputs=wanted)
    ),
    st.sampled_from(["", "one", "two"]),
    st.sets(st.sampled_from("abc")),
)


@given(st.lists(st.tuples(heads, answers), min_size=1, max_size=6))
def test_law_written_answers_say_what_their_messages_say_whatever_was_written_before(
    pairs: list[tuple[RequestHead, Answer]],
) -> None:
    writer = AnswerWriter()
    for head, answer in [*pairs, *reversed(pairs)]:
        assert pb.ModelInferResponse.FromString(writer.write(head, answer)) == answer_message(head, answer)


def test_more_answers_than_are_remembered_are_written() -> None:
    writer, head = AnswerWriter(), head_of(encode_request("m", {"x": np.zeros((1, 1), np.float32)}))
    for items in (*range(1, 1100), 1):
        answer = Answer(outputs={"y": np.ones((1, 1))}, variant="v", batch_items=items, queue_s=0.5, run_s=0.25)
        assert pb.ModelInferResponse.FromString(writer.write(head, answer)) == answer_message(head, answer)


def test_long_ids_of_requests_are_not_kept() -> None:
    writer = AnswerWriter()
    answer = Answer(outputs={"y": np.ones((1, 1))}, variant="v", batch_items=1, queue_s=0.5, run_s=0.25)
    tracemalloc.start()
    try:
        for number in range(100):
            request_id = f"{number}" + "i" * 100_000
            head = head_of(encode_request("m", {"x": np.zeros((1, 1), np.float32)}, request_id=request_id))
            assert pb.ModelInferResponse.FromString(writer.write(head, answer)).id == request_id
        assert tracemalloc.get_traced_memory()[0] < 2_000_000
    finally:
        tracemalloc.stop()
