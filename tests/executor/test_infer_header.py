from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.infer_header import deadline_in_s, deadline_of, parsed_request, read_infer_header, split_fields
from executor.proto import open_inference_pb2 as messages
from executor.tensors import encode_request
from plans.errors import InvalidInput


def request(service: str = "detect", tensor: bytes = b"", **parameters: float | int | str | bool) -> bytes:
    message = messages.ModelInferRequest(model_name=service, id="7", model_version="1", raw_input_contents=[tensor])
    message.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    message.outputs.add(name="y")
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    for name, value in parameters.items():
        setattr(message.parameters[name], kinds[type(value)], value)
    return message.SerializeToString()


@given(st.text(), st.binary(max_size=300), st.none() | st.integers(1, 2**40) | st.floats(1e-3, 1e9))
def test_service_and_deadline_are_what_a_full_parse_finds(
    service: str, tensor: bytes, deadline_ms: float | None
) -> None:
    parameters = {} if deadline_ms is None else {"deadline_ms": deadline_ms}
    header = read_infer_header(request(service, tensor, other="z", **parameters))
    assert header.service == service
    expected_s = None if deadline_ms is None else pytest.approx(min(deadline_ms / 1000, 86_400.0))
    assert header.deadline_s == expected_s


@given(st.lists(st.binary(max_size=300), max_size=4), st.text())
def test_law_a_split_request_is_the_whole_one_and_its_contents_are_parts_of_it(
    tensors: list[bytes], service: str
) -> None:
    whole = messages.ModelInferRequest.FromString(request(service, mode="z"))
    del whole.raw_input_contents[:]
    whole.raw_input_contents.extend(tensors)
    data = whole.SerializeToString()
    rest, raw = split_fields(data)
    assert [bytes(one) for one in raw] == tensors
    assert all(one.obj is data for one in raw)
    del whole.raw_input_contents[:]
    assert parsed_request(rest) == whole


@given(st.binary(max_size=60))
def test_any_bytes_are_split_as_a_full_parse_does_or_refused_by_name(data: bytes) -> None:
    try:
        serialised, raw = split_fields(data)
        rest = parsed_request(serialised)
    except InvalidInput:
        return
    rest.raw_input_contents.extend(map(bytes, raw))
    assert rest.SerializeToString(deterministic=True) == messages.ModelInferRequest.FromString(data).SerializeToString(
        deterministic=True
    )


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused_by_name(data: bytes) -> None:
    with contextlib.suppress(InvalidInput):
        assert isinstance(read_infer_header(data).service, str)


@given(st.data())
def test_a_request_cut_short_is_never_read_as_another_service(data: st.DataObject) -> None:
    whole = request("detect", b"tensor" * 9)
    cut = data.draw(st.integers(0, len(whole) - 1))
    try:
        found = read_infer_header(whole[:cut]).service
    except InvalidInput:
        return
    assert found in ("", "detect")


@pytest.mark.parametrize("deadline_ms", [10**15, 1e308, "1e300"])
def test_a_deadline_that_is_far_away_is_a_day(deadline_ms: float | str) -> None:
    assert read_infer_header(request(deadline_ms=deadline_ms)).deadline_s == 86_400.0


def test_a_message_of_very_many_fields_is_refused_without_looking_at_them_all() -> None:
    tiny = b"\xa8\x06\x01"  # an unknown number, which a parser skips
    assert read_infer_header(request() + 900 * tiny).service == "detect"
    with pytest.raises(InvalidInput, match="more than 1000 fields"):
        read_infer_header(request() + 10_000 * tiny + b"\xff")


def test_a_deadline_as_text_counts() -> None:
    assert read_infer_header(request(deadline_ms="250")).deadline_s == pytest.approx(0.25)


@pytest.mark.parametrize("value", [0, -5, float("nan"), float("inf"), "soon", True])
def test_a_deadline_that_is_no_time_is_refused(value: float | str | bool) -> None:
    with pytest.raises(InvalidInput, match="deadline_ms"):
        read_infer_header(request(deadline_ms=value))


def test_the_name_of_a_stream_is_a_number_or_a_short_text() -> None:
    assert read_infer_header(request(sequence_id="s" * 128)).stream == "s" * 128
    assert read_infer_header(request(sequence_id=2**62)).stream == str(2**62)
    for nobody in (0, ""):
        assert read_infer_header(request(sequence_id=nobody)).stream == ""
    for wrong in ("s" * 129, 1.5, True, False):
        with pytest.raises(InvalidInput, match=r"sequence_id: .* at most 128 characters"):
            read_infer_header(request(sequence_id=wrong))


@given(st.none() | st.floats(0.001, 1e3), st.none() | st.integers(1, 10**6) | st.floats(0.001, 1e6))
def test_the_sooner_deadline_holds_and_the_default_only_without_any(timeout_s, deadline_ms):
    request = encode_request("s", {}, parameters={} if deadline_ms is None else {"deadline_ms": deadline_ms})
    given_s = [one for one in (timeout_s, None if deadline_ms is None else deadline_ms / 1000) if one is not None]
    assert deadline_in_s(deadline_of(request), timeout_s, 7.0) == (min(given_s) if given_s else 7.0)


def test_a_deadline_as_text_counts_as_in_the_gateway():
    assert deadline_in_s(deadline_of(encode_request("s", {}, parameters={"deadline_ms": "100"})), None, 7.0) == 0.1


@pytest.mark.parametrize(("timeout_s", "default_s"), [(None, 1e15), (1e15, 7.0)])
def test_no_deadline_is_farther_than_a_day(timeout_s, default_s):
    request = encode_request("s", {}, parameters={"deadline_ms": 10**15})
    assert deadline_in_s(deadline_of(request), timeout_s, default_s) == 86_400.0
    assert deadline_in_s(deadline_of(encode_request("s", {})), timeout_s, default_s) == 86_400.0


@pytest.mark.parametrize("bad", [0, -1, 0.0, float("nan"), float("inf"), "soon", True])
def test_a_deadline_that_is_no_number_above_0_is_refused(bad):
    with pytest.raises(InvalidInput, match="deadline_ms"):
        deadline_in_s(deadline_of(encode_request("s", {}, parameters={"deadline_ms": bad})), None, 1.0)


@given(st.none() | st.integers(1, 10**6), st.none() | st.integers(0, 10**12))
def test_the_timeout_that_triton_clients_send_counts_as_well_and_0_is_none(deadline_ms, timeout_us):
    sent = {"deadline_ms": deadline_ms, "timeout": timeout_us}
    request = encode_request("s", {}, parameters={name: value for name, value in sent.items() if value is not None})
    limits_s = [deadline_ms / 1000] if deadline_ms else []
    limits_s += [timeout_us / 1e6] if timeout_us else []
    assert deadline_of(request) == (min([*limits_s, 86_400.0]) if limits_s else None)


@pytest.mark.parametrize("bad", [-1, float("nan"), float("inf"), "soon", True])
def test_a_timeout_that_is_no_time_is_refused(bad):
    with pytest.raises(InvalidInput, match=r"parameters.timeout: .*microseconds"):
        deadline_of(encode_request("s", {}, parameters={"timeout": bad}))
