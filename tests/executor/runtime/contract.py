"""What every runtime must do. A test module of a runtime subclasses `RuntimeContract` and gives it two fixtures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from executor.runtime.protocol import InvalidTensor, LoadedModel, Runtime, UnknownVariant
from plans.errors import InvalidInput

MAX_BATCH = 4


class RuntimeContract:
    """Subclasses provide ``runtime`` and ``variant``, a model that it loads quickly, both of class scope or wider."""

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, runtime: Runtime, variant: str) -> LoadedModel:
        return runtime.load(variant, MAX_BATCH)

    def test_names_are_sorted_and_list_the_variant(self, runtime: Runtime, variant: str) -> None:
        assert list(runtime.names()) == sorted(set(runtime.names()))
        assert variant in runtime.names()

    @pytest.mark.parametrize("name", ["no-such-model", "", "../secret", "/etc", "a/b", ".", ".."])
    def test_an_unknown_variant_is_refused(self, runtime: Runtime, name: str) -> None:
        with pytest.raises(UnknownVariant) as caught:
            runtime.load(name, 1)
        assert caught.value.faults[0].found == repr(name)

    @pytest.mark.parametrize("max_batch", [0, -1])
    def test_a_batch_limit_below_one_is_refused(self, runtime: Runtime, variant: str, max_batch: int) -> None:
        with pytest.raises(InvalidInput, match="max_batch"):
            runtime.load(variant, max_batch)

    def test_a_loaded_model_says_what_it_cost(self, model: LoadedModel) -> None:
        assert model.weight_bytes > 0
        assert model.load_s > 0
        assert model.first_inference_s > 0

    @pytest.mark.parametrize("batch", [1, 3, MAX_BATCH])
    def test_outputs_have_the_shapes_and_types_that_were_announced(self, model: LoadedModel, batch: int) -> None:
        answer = model.run(model.example(batch))
        assert set(answer) == {spec.name for spec in model.outputs}
        for spec in model.outputs:
            assert answer[spec.name].shape == (batch, *spec.shape)
            assert answer[spec.name].dtype == spec.dtype
            assert np.isfinite(answer[spec.name]).all()

    def test_examples_fit_the_inputs_and_repeat_with_the_seed(self, model: LoadedModel) -> None:
        first, again, other = model.example(2, seed=5), model.example(2, seed=5), model.example(2, seed=6)
        assert set(first) == {spec.name for spec in model.inputs}
        for spec in model.inputs:
            assert first[spec.name].shape == (2, *spec.shape)
            assert first[spec.name].dtype == spec.dtype
            assert np.array_equal(first[spec.name], again[spec.name])
            assert not np.array_equal(first[spec.name], other[spec.name])

    def test_equal_inputs_give_equal_outputs(self, model: LoadedModel) -> None:
        inputs = model.example(2)
        first, again = model.run(inputs), model.run(inputs)
        assert all(np.array_equal(first[name], again[name]) for name in first)

    def test_an_item_gets_the_same_answer_alone_and_in_company(self, model: LoadedModel) -> None:
        inputs = model.example(3, seed=1)
        together = model.run(inputs)
        for item in range(3):
            alone = model.run({name: array[item : item + 1] for name, array in inputs.items()})
            for name in together:
                assert together[name][item] == pytest.approx(alone[name][0], rel=1e-3, abs=1e-4)

    def test_different_inputs_give_different_outputs(self, model: LoadedModel) -> None:
        one, other = model.run(model.example(1, seed=1)), model.run(model.example(1, seed=2))
        assert any(not np.array_equal(one[name], other[name]) for name in one)

    def test_inputs_over_received_bytes_are_accepted_and_left_alone(self, model: LoadedModel) -> None:
        inputs = model.example(2)
        received = {name: read_only(array) for name, array in inputs.items()}
        answer, expected = model.run(received), model.run(inputs)
        assert all(np.array_equal(answer[name], expected[name]) for name in expected)

    def test_answers_do_not_change_when_the_next_batch_runs(self, model: LoadedModel) -> None:
        answer = model.run(model.example(2, seed=1))
        kept = {name: array.copy() for name, array in answer.items()}
        model.run(model.example(2, seed=2))
        assert all(np.array_equal(answer[name], kept[name]) for name in kept)

    def test_a_missing_and_an_unknown_tensor_are_both_named(self, model: LoadedModel) -> None:
        name = model.inputs[0].name
        with pytest.raises(InvalidTensor) as caught:
            model.run({"stranger": model.example(1)[name]})
        assert {fault.field for fault in caught.value.faults} == {"stranger", *(spec.name for spec in model.inputs)}

    def test_a_wrong_type_is_named(self, model: LoadedModel) -> None:
        name = model.inputs[0].name
        with pytest.raises(InvalidTensor, match=f"{name}: found type float64"):
            model.run({**model.example(1), name: model.example(1)[name].astype(np.float64)})

    def test_a_wrong_shape_is_named(self, model: LoadedModel) -> None:
        name = model.inputs[0].name
        with pytest.raises(InvalidTensor, match=f"{name}: found shape"):
            model.run({**model.example(1), name: model.example(1)[name][..., :-1]})

    def test_an_item_without_a_batch_dimension_is_refused(self, model: LoadedModel) -> None:
        name = model.inputs[0].name
        with pytest.raises(InvalidTensor, match=f"{name}: found shape"):
            model.run({**model.example(1), name: model.example(1)[name][0]})

    @pytest.mark.parametrize("batch", [0, MAX_BATCH + 1])
    def test_a_batch_outside_the_limits_is_refused(self, model: LoadedModel, batch: int) -> None:
        inputs = {spec.name: np.zeros((batch, *spec.shape), dtype=spec.dtype) for spec in model.inputs}
        with pytest.raises(InvalidTensor, match=f"a batch of {batch}, expected a batch of 1 to {MAX_BATCH}"):
            model.run(inputs)

    def test_a_refused_batch_does_not_spoil_the_next(self, model: LoadedModel) -> None:
        with pytest.raises(InvalidTensor):
            model.run({})
        assert model.run(model.example(1))


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    return np.frombuffer(array.tobytes(), dtype=array.dtype).reshape(array.shape)
