from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor import worker_wire as wire
from executor.proto import worker_pb2
from executor.runtime.protocol import NUMPY_TYPES, GenerationFacts, TensorSpec

names = st.text(max_size=8)
counts = st.integers(0, 2**62)
shapes = st.lists(st.integers(0, 2**40), max_size=4).map(tuple)
datatypes = st.sampled_from(sorted(NUMPY_TYPES))
places = st.lists(
    st.builds(wire.TensorPlace, name=names, datatype=datatypes, shape=shapes, offset_bytes=counts, size_bytes=counts),
    max_size=3,
).map(tuple)
specs = st.lists(st.builds(TensorSpec, names, datatypes, shapes), max_size=3).map(tuple)
seconds = st.floats(0, 1e6)
numbers = st.lists(counts, max_size=3).map(tuple)
tokens = st.lists(st.integers(0, 2**32 - 1), max_size=3).map(tuple)
facts = st.builds(
    GenerationFacts,
    vocabulary=st.integers(1, 2**32 - 1),
    max_context=st.integers(1, 2**32 - 1),
    kv_bytes_per_token=counts,
    stop_tokens=tokens,
)

to_worker = st.one_of(
    st.builds(wire.Load, call=counts, variant=names, max_batch=st.integers(1, 4096), kv_bytes=counts),
    st.builds(
        wire.Iterate,
        call=counts,
        variant=names,
        kv_tokens=counts,
        freed=numbers,
        prefill=st.lists(st.tuples(counts, tokens), max_size=2).map(tuple),
        decode=numbers,
    ),
    st.builds(wire.Unload, call=counts, variant=names),
    st.builds(
        wire.Run,
        call=counts,
        variant=names,
        inputs=places,
        output_offset_bytes=counts,
        output_capacity_bytes=counts,
    ),
    st.just(wire.Stop()),
)
from_worker = st.one_of(
    st.builds(wire.Ready, process=st.integers(1, 2**22), variants=st.lists(names, max_size=3).map(tuple)),
    st.builds(
        wire.Loaded,
        call=counts,
        weight_bytes=counts,
        load_s=seconds,
        first_inference_s=seconds,
        inputs=specs,
        outputs=specs,
        generates=st.none() | facts,
    ),
    st.builds(wire.Iterated, call=counts, tokens=tokens, run_s=seconds),
    st.builds(wire.Done, call=counts, outputs=places, run_s=seconds, swap_s=seconds),
    st.builds(wire.Unloaded, call=counts),
    st.builds(wire.Failed, call=counts, problem=names, invalid_input=st.booleans()),
)


def cut(data, sizes):
    """Cut ``data`` into pieces of these sizes, and the rest."""
    pieces = []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    return [*pieces, data]


@given(st.lists(to_worker, max_size=4), st.lists(st.integers(0, 20), max_size=8))
def test_messages_to_a_worker_survive_any_cutting_of_the_stream(messages, sizes):
    splitter = wire.FrameSplitter()
    stream = b"".join(wire.encode_to_worker(message) for message in messages)
    bodies = [body for piece in cut(stream, sizes) for body in splitter.feed(piece)]
    assert [wire.decode_to_worker(body) for body in bodies] == messages


@given(st.lists(from_worker, max_size=4), st.lists(st.integers(0, 20), max_size=8))
def test_messages_from_a_worker_survive_any_cutting_of_the_stream(messages, sizes):
    splitter = wire.FrameSplitter()
    stream = b"".join(wire.encode_from_worker(message) for message in messages)
    bodies = [body for piece in cut(stream, sizes) for body in splitter.feed(piece)]
    assert [wire.decode_from_worker(body) for body in bodies] == messages


@pytest.mark.parametrize("decode", [wire.decode_to_worker, wire.decode_from_worker])
@pytest.mark.parametrize("kind", [b"\0", b"\1"])
@pytest.mark.parametrize("message", [b"\xff\xff\xff", b"\x07"])
def test_a_body_that_is_no_message_is_refused(decode, kind, message):
    with pytest.raises(wire.FrameError):
        decode(kind + bytes(24) + message)


@pytest.mark.parametrize("decode", [wire.decode_to_worker, wire.decode_from_worker])
@pytest.mark.parametrize("body", [b"", bytes(24), bytes(25) + worker_pb2.ToWorker().SerializeToString()])
def test_a_body_without_a_whole_head_or_without_content_is_refused(decode, body):
    with pytest.raises(wire.FrameError):
        decode(body)


@given(places, counts, counts)
def test_batches_in_one_place_differ_in_the_head_of_their_frames_only(found, one, other):
    frames = [
        wire.encode_from_worker(wire.Done(call=call, outputs=found, run_s=run_s, swap_s=run_s / 2))
        for call, run_s in ((one, 0.25), (other, 0.5))
    ]
    assert len({frame[29:] for frame in frames}) == 1
    decoded = [wire.decode_from_worker(frame[4:]) for frame in frames]
    assert [(done.call, done.run_s, done.swap_s) for done in decoded] == [(one, 0.25, 0.125), (other, 0.5, 0.25)]
    assert decoded[0].outputs == decoded[1].outputs == found


def test_a_frame_of_absurd_length_is_refused_before_it_is_read():
    with pytest.raises(wire.FrameError, match="4294967295 bytes"):
        wire.FrameSplitter().feed(b"\xff\xff\xff\xff")


def test_a_problem_of_any_length_fits_into_a_frame() -> None:
    frame = wire.encode_from_worker(wire.Failed(call=7, problem="\N{SNOWMAN}" * wire.MAX_FRAME_BYTES))
    splitter = wire.FrameSplitter()
    assert splitter.feed(frame[:9]) == []  # a read brings a part of it
    (body,) = splitter.feed(frame[9:])
    told = wire.decode_from_worker(body)
    assert isinstance(told, wire.Failed)
    assert told.call == 7
    assert set(told.problem) == {"\N{SNOWMAN}"}


def test_a_problem_may_hold_what_is_no_character() -> None:
    (body,) = wire.FrameSplitter().feed(wire.encode_from_worker(wire.Failed(call=7, problem="no file \udc80")))
    assert wire.decode_from_worker(body) == wire.Failed(call=7, problem="no file ?")
