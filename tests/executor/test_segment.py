from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from executor.segment import ALIGNMENT_BYTES, SharedSegment, place_all
from executor.worker_wire import TensorPlace


@pytest.fixture
def segment():
    made = SharedSegment.create()
    yield made
    made.close()


def test_parts_are_joined_along_the_first_dimension(segment):
    segment.grow(4096)
    places = place_all({"x": ("FP32", (3, 2))}, 64)
    segment.write({"x": [np.ones((1, 2), np.float32), np.zeros((2, 2), np.float32)]}, places)
    np.testing.assert_array_equal(segment.array(places[0]), [[1, 1], [0, 0], [0, 0]])


def test_the_other_side_reads_the_same_memory_also_after_it_grew(segment):
    other = SharedSegment(os.dup(segment.descriptor))
    segment.grow(64)
    early = place_all({"x": ("INT64", (8,))}, 0)
    segment.write({"x": [np.arange(8)]}, early)
    seen_early = other.array(early[0])
    segment.grow(1 << 20)
    late = place_all({"x": ("UINT8", (5,))}, 1 << 19)
    segment.write({"x": [np.arange(5, dtype=np.uint8)]}, late)
    np.testing.assert_array_equal(other.array(late[0]), np.arange(5))
    np.testing.assert_array_equal(seen_early, np.arange(8))
    other.close()


def test_tensors_lie_apart_and_aligned():
    places = place_all({"a": ("UINT8", (65,)), "b": ("FP64", (2, 2)), "c": ("BOOL", (1,))}, 128)
    assert [place.offset_bytes for place in places] == [128, 256, 320]
    assert all(place.offset_bytes % ALIGNMENT_BYTES == 0 for place in places)


def test_outputs_beyond_their_region_are_refused(segment):
    segment.grow(4096)
    with pytest.raises(ValueError, match="outputs of 80 bytes in a region of 64"):
        segment.write_outputs({"y": np.zeros(10)}, 0, 64)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (TensorPlace(name="x", datatype="FP32", shape=(4,), offset_bytes=4090, size_bytes=16), "byte 4106 of 4096"),
        (TensorPlace(name="x", datatype="FP32", shape=(4,), offset_bytes=0, size_bytes=15), "in 15 bytes"),
    ],
)
def test_a_place_outside_the_memory_is_refused(segment, place, says):
    segment.grow(4096)
    with pytest.raises(ValueError, match=says):
        segment.array(place)


def test_batches_that_return_to_a_place_find_the_memory_as_it_is_now(segment):
    segment.grow(4096)
    places = [segment.write_outputs({"y": np.full((2, 2), value, np.float32)}, 64, 64) for value in (1, 2)]
    assert places[0] == places[1]
    np.testing.assert_array_equal(segment.array(places[0][0]), [[2, 2], [2, 2]])


def test_outputs_of_another_type_or_shape_lie_as_they_need(segment):
    segment.grow(4096)
    for array in (np.ones((2, 2), np.float32), np.ones((2, 2)), np.ones((4, 1)), np.ones((1, 1), np.uint8)):
        (place,) = segment.write_outputs({"y": array}, 64, 64)
        np.testing.assert_array_equal(segment.array(place), array)
        assert segment.array(place).dtype == array.dtype
    with pytest.raises(ValueError, match="outputs of 32 bytes in a region of 31"):
        segment.write_outputs({"y": np.ones((2, 2))}, 64, 31)


def test_more_places_than_are_remembered_are_found(segment):
    segment.grow(1 << 20)
    for _ in range(2):
        for number in range(1500):
            place = TensorPlace("x", "UINT8", (1,), number * 64, 1)
            segment.array(place)[...] = number % 256
        assert segment.array(TensorPlace("x", "UINT8", (1,), 1499 * 64, 1)) == 1499 % 256


def test_the_memory_has_no_name_in_the_file_system(segment):
    segment.grow(4096)
    assert str(Path(f"/proc/self/fd/{segment.descriptor}").readlink()).endswith("(deleted)")


def test_closing_twice_is_harmless():
    made = SharedSegment.create()
    made.close()
    made.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        made.array(TensorPlace(name="x", datatype="FP32", shape=(1,), offset_bytes=0, size_bytes=4))
