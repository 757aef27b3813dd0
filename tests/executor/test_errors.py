from __future__ import annotations

import inspect

import grpc
import pytest

from executor import errors
from plans.errors import ForeplanError, InvalidInput


def test_every_error_of_the_executor_has_a_status_of_its_own():
    kinds = {
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, ForeplanError) and kind.__module__ == errors.__name__
    }
    assert kinds <= errors.STATUS.keys()
    assert kinds <= {getattr(errors, name) for name in errors.__all__ if name != "STATUS"}


def test_the_tree_in_the_docstring_names_every_error():
    for kind in errors.STATUS:
        if kind.__module__ == errors.__name__:
            assert kind.__name__ in errors.__doc__


def test_an_error_without_an_entry_has_the_status_of_its_nearest_ancestor():
    class Special(errors.QueueFull):
        pass

    assert errors.status_of(Special("full")) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert errors.status_of(InvalidInput.of("x")) is grpc.StatusCode.INVALID_ARGUMENT


def test_a_long_message_is_cut_to_what_a_trailer_can_carry():
    assert errors.details_of(ForeplanError("short")) == "short"
    assert len(errors.details_of(ForeplanError("x" * 100_000))) == 2000
    assert errors.shortened("x" * 2000) == "x" * 2000


@pytest.mark.parametrize("character", ["é", "漢", "😀"])  # each of their bytes takes three in a trailer
def test_characters_count_by_what_they_take_in_a_trailer_and_are_not_cut_in_two(character):
    cut = errors.shortened("ab" + 3000 * character)
    assert 1990 < len(cut.encode()) < 2010
    assert set(cut) == {"a", "b", character, " ", "…"}


def test_a_client_is_told_whether_its_inputs_the_model_or_the_worker_failed():
    bad = errors.request_error("n/0 s (m)", errors.WorkerRefused("shape [3]", invalid_input=True))
    assert isinstance(bad, InvalidInput)
    assert "n/0 s (m)" in str(bad)
    assert "shape [3]" in str(bad)
    assert isinstance(errors.request_error("r", errors.WorkerRefused("division by zero")), errors.ModelFailed)
    assert isinstance(errors.request_error("r", errors.WorkerGone("killed")), errors.ReplicaUnavailable)
