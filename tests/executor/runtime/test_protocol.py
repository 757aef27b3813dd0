from __future__ import annotations

import numpy as np
import pytest

from executor.runtime.protocol import InvalidTensor, TensorSpec, batch_of

PAIR = (TensorSpec("x", "FP32", (2,)), TensorSpec("n", "INT64", ()))


def test_a_datatype_outside_the_protocol_is_refused() -> None:
    with pytest.raises(ValueError, match="BF16"):
        TensorSpec("x", "BF16", (2,))


def test_a_negative_length_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        TensorSpec("x", "FP32", (-1, 2))


def test_item_bytes_count_every_element() -> None:
    assert TensorSpec("x", "FP32", (3, 4)).item_bytes == 48
    assert TensorSpec("n", "INT64", ()).item_bytes == 8


def test_the_batch_is_the_first_dimension() -> None:
    assert batch_of({"x": np.zeros((3, 2), np.float32), "n": np.zeros(3, np.int64)}, PAIR, max_batch=4) == 3


def test_tensors_of_different_batches_are_refused() -> None:
    with pytest.raises(InvalidTensor, match="x: 3, n: 2"):
        batch_of({"x": np.zeros((3, 2), np.float32), "n": np.zeros(2, np.int64)}, PAIR, max_batch=4)


def test_every_fault_is_named_at_once() -> None:
    inputs = {"x": np.zeros((9, 2), np.float64), "y": np.zeros(1)}
    with pytest.raises(InvalidTensor) as caught:
        batch_of(inputs, PAIR, max_batch=4, where="m")
    fields = [fault.field for fault in caught.value.faults]
    assert sorted(fields) == ["n", "x", "x", "y"]  # n is missing, x has a wrong type and batch, y is unknown
    assert {fault.where for fault in caught.value.faults} == {"m"}
