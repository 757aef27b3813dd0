from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.document import Neighbour
from profiles.interference import InterferenceModel, Observation
from tests.profiles.documents import profile, row

NAMES = ("a", "b", "c", "d")


def synthetic(sensitivity: dict[str, float], pressure: dict[str, float]) -> list[Observation]:
    """What would be measured for copies and pairs if the model were exact."""
    return [
        Observation(model=one, neighbours=(other,), factor=1 + sensitivity[one] * pressure[other])
        for one in sensitivity
        for other in sensitivity
    ]


def test_a_model_that_holds_is_found_again_even_for_a_pair_left_out() -> None:
    sensitivity = dict(zip(NAMES, (0.5, 1.0, 1.5, 0.8), strict=True))
    pressure = dict(zip(NAMES, (0.9, 0.3, 0.6, 1.2), strict=True))
    every = synthetic(sensitivity, pressure)
    fitted = InterferenceModel.fit([each for each in every if (each.model, each.neighbours) != ("a", ("d",))])
    assert fitted.factor("a", ["d"]) == pytest.approx(1 + 0.5 * 1.2, rel=0.05)
    assert fitted.factor("b", ["a", "c"]) == pytest.approx(1 + 1.0 * 1.5, rel=0.05)
    assert fitted.error_ratio is not None
    assert fitted.error_ratio < 0.02


def test_what_was_measured_goes_before_the_fit() -> None:
    fitted = InterferenceModel.fit(
        [
            Observation(model="a", neighbours=("a",), factor=1.5),
            Observation(model="a", neighbours=("b",), factor=3.0),
            Observation(model="b", neighbours=("a",), factor=1.1),
        ]
    )
    assert fitted.factor("a", ["b"]) == 3.0
    assert fitted.factor("a", ["b", "b"]) > 3.0


def test_profiles_bring_their_copies_and_neighbours() -> None:
    near = Neighbour(model="b", batch=1, neighbour_batch=1, factor=1.4)
    one = profile(row(1, 0.1), model="a").model_copy(update={"interference": {2: 1.5, 3: 2.2}, "neighbours": (near,)})
    fitted = InterferenceModel.of([one])
    assert fitted.factor("a", ["b"]) == 1.4
    assert fitted.factor("a", ["a", "a"]) == 2.2
    assert fitted.factor("nobody", ["a"]) > 1


def test_without_any_measurement_everything_waits_for_everything() -> None:
    assert InterferenceModel.fit([]).factor("a", ["b", "c"]) == 3.0


@given(
    st.lists(
        st.builds(
            Observation,
            model=st.sampled_from(NAMES),
            neighbours=st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map(tuple),
            factor=st.floats(1.0, 5.0),
        ),
        max_size=12,
    ),
    st.sampled_from(NAMES),
    st.lists(st.sampled_from(NAMES), max_size=3),
)
def test_no_neighbour_ever_makes_faster(observed: list[Observation], model: str, beside: list[str]) -> None:
    fitted = InterferenceModel.fit(observed)
    assert fitted.factor(model, beside) >= 1.0
    assert (fitted.error_ratio is None) == (not observed)
