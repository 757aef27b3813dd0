"""The rules of workflows that simulator and executor share."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from evaluator import rules
from plans.workflows import DRAW_EDGES, DRAW_SWITCHES, drawn_calls, drawn_share
from tests.evaluator.naive_parts import uniform


@given(seed=st.integers(0, 2**31), index=st.integers(0, 2**56))
def test_law_executor_and_simulator_draw_the_same(seed: int, index: int) -> None:
    assert (DRAW_SWITCHES, DRAW_EDGES) == (rules.DRAW_SWITCHES, rules.DRAW_EDGES)
    for purpose in (DRAW_SWITCHES, DRAW_EDGES):
        assert drawn_share(seed, purpose, index) == uniform(seed, purpose, index)


def test_calls_are_whole_fan_outs_and_the_rest_by_chance() -> None:
    assert [drawn_calls(1.6, 2, share) for share in (0.0, 0.79, 0.81)] == [3, 3, 4]
    assert drawn_calls(0.1, 10, 0.0) == 1
    assert drawn_calls(0.3, 1, 0.69) == 0
