from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.forward_wire import (
    Answer,
    BadFrame,
    Request,
    decode_answers,
    decode_requests,
    encode_answers,
    encode_requests,
)

numbers = st.integers(0, 2**64 - 1)
sizes = st.integers(0, 2**32 - 1)
seconds = st.floats(0, 1e9)
texts = st.text(max_size=20)
requests = st.builds(Request, numbers, texts, seconds, sizes, texts)
answers = st.builds(Answer, numbers, sizes, st.integers(0, 16), texts, seconds, seconds)


@given(st.lists(requests, max_size=5))
def test_law_decoding_encoded_requests_is_the_identity(given_requests: list[Request]) -> None:
    assert decode_requests(encode_requests(given_requests)) == given_requests


@given(st.lists(answers, max_size=5))
def test_law_decoding_encoded_answers_is_the_identity(given_answers: list[Answer]) -> None:
    assert decode_answers(encode_answers(given_answers)) == given_answers


@given(st.lists(requests, min_size=1, max_size=3), st.data())
def test_law_a_message_cut_within_a_request_is_refused(given_requests: list[Request], data: st.DataObject) -> None:
    whole, rest = encode_requests(given_requests), encode_requests(given_requests[:-1])
    cut = data.draw(st.integers(len(rest) + 1, len(whole) - 1))
    with pytest.raises(BadFrame):
        decode_requests(whole[:cut])


@given(st.binary(max_size=100))
def test_law_any_bytes_are_a_message_or_are_refused(message: bytes) -> None:
    for decode in (decode_requests, decode_answers):
        try:
            assert isinstance(decode(message), list)
        except BadFrame:
            assert message


def test_overlong_details_are_cut() -> None:
    (answer,) = decode_answers(encode_answers([Answer(1, status=3, details="ä" * 70_000)]))
    assert 32_000 < len(answer.details) < 33_000
    assert answer.details.startswith("ää")
