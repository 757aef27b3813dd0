"""How tensors are named, dealt to calls and gathered from them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.workflow import Release
from executor.workflow_tensors import by_stage, dealt, gathered, inputs_of, qualified
from plans.errors import InvalidInput
from tests.executor.test_workflow import edge, structure


@given(rows=st.integers(1, 12), calls=st.integers(1, 12))
def test_law_dealing_rows_and_gathering_them_gives_all_of_them_in_order(rows: int, calls: int) -> None:
    array = np.arange(2 * rows).reshape(rows, 2)
    parts = dealt({"x": array}, calls)
    sizes = [len(part["x"]) for part in parts]
    assert len(parts) == calls
    assert max(sizes) - min(sizes) <= 1
    whole = gathered("s", parts)["x"]
    assert np.array_equal(whole[:rows], array)
    assert len(whole) == max(rows, calls)


def test_names_say_whose_a_tensor_is_also_where_services_have_dots() -> None:
    array = np.zeros((1, 2))
    found = by_stage({"a.x": array, "a.b.x": array, "y": array}, ("a", "a.b"), plain="a")
    assert {stage: sorted(arrays) for stage, arrays in found.items()} == {"a": ["x", "y"], "a.b": ["x"]}
    assert sorted(qualified("a", found["a"])) == ["a.x", "a.y"]


def test_names_of_nobody_are_refused_all_at_once() -> None:
    array = np.zeros((1, 2))
    with pytest.raises(InvalidInput) as caught:
        by_stage({"x": array, "c.x": array, "a.x": array}, ("a", "b"))
    assert [fault.found for fault in caught.value.faults] == ["'x'", "'c.x'"]


def test_what_an_edge_hands_over_goes_before_what_the_client_sent_and_the_rest_rides_along() -> None:
    flow = structure(edge("a", "b", inputs={"x": "y"}), edge("c", "b", inputs={"x": "y", "z": "y"}))
    release = Release(stage="b", calls=1, edges=(0, 1))
    outputs = {name: [{"y": np.full((1, 1), float(number))}] for number, name in enumerate("abc")}
    client = {"x": np.full((1, 1), 7.0), "w": np.full((1, 1), 8.0)}
    (found,) = inputs_of(flow, release, client, outputs)
    assert {name: array.item() for name, array in found.items()} == {"x": 0.0, "z": 2.0, "w": 8.0}


def test_of_a_join_any_the_first_call_alone_hands_over() -> None:
    flow = structure(edge("a", "b", inputs={"x": "y"}), joins={"b": "any"})
    outputs = {"a": [None, {"y": np.full((1, 1), 5.0)}]}
    release = Release(stage="b", calls=2, edges=(0,), first_call=1)
    assert [part["x"].item() for part in inputs_of(flow, release, {}, outputs)] == [5.0, 5.0]


def test_an_output_that_is_not_there_is_named_with_those_that_are() -> None:
    flow = structure(edge("a", "b", inputs={"x": "boxes"}))
    with pytest.raises(InvalidInput, match=r"edges\[0\].inputs.*'boxes'.*scores"):
        inputs_of(flow, Release(stage="b", calls=1, edges=(0,)), {}, {"a": [{"scores": np.zeros((1, 1))}]})


def test_calls_whose_outputs_differ_in_shape_cannot_be_gathered() -> None:
    with pytest.raises(InvalidInput, match="the same outputs from every call"):
        gathered("a", [{"y": np.zeros((1, 2))}, {"y": np.zeros((1, 3))}])
