from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans.errors import InvalidInput
from profiles.holdout import hold_out, predict, summarise_errors
from tests.profiles.documents import curve, profile, row


@given(st.floats(1e-4, 1.0), st.floats(1e-5, 1.0))
def test_a_straight_line_is_predicted_without_error(alpha: float, beta: float) -> None:
    held = hold_out(curve({batch: alpha + beta * batch for batch in (1, 2, 4, 8, 16)}))
    assert [each.row.batch for each in held] == [2, 8]
    assert all(each.error_ratio < 1e-9 and each.inside for each in held)


def test_a_point_off_the_line_is_as_wrong_as_it_is_far() -> None:
    (held,) = hold_out(curve({1: 0.1, 2: 0.4, 3: 0.3}))
    assert held.error_ratio == pytest.approx(0.5)
    assert (held.model, held.row.batch) == ("resnet-18", 2)


def test_a_last_point_held_out_lies_beyond_the_grid() -> None:
    held = hold_out(curve({1: 0.1, 2: 0.2, 4: 0.4, 8: 0.8}))
    assert [(each.row.batch, each.inside) for each in held] == [(2, True), (8, False)]
    each_in_turn = hold_out(curve({1: 0.1, 2: 0.2, 4: 0.4, 8: 0.8}), "each")
    assert [(each.row.batch, each.inside) for each in each_in_turn] == [(2, True), (4, True)]


def test_series_of_other_tokens_and_parallelism_are_held_out_apart() -> None:
    rows = [row(batch, 0.1 * batch * tp, tp=tp) for tp in (1, 2) for batch in (1, 2, 4)]
    assert [(each.row.tp, each.row.batch) for each in hold_out(profile(*rows))] == [(1, 2), (2, 2)]


def test_chosen_rows_predict_the_others_in_any_order() -> None:
    known = curve({1: 0.1, 2: 0.2, 4: 0.4, 8: 0.9})
    first, second, third, fourth = known.rows
    held = predict(known, (third, first), (fourth, second))
    assert [(each.row.batch, each.inside) for each in held] == [(8, False), (2, True)]
    assert held[1].predicted_s == pytest.approx(0.2)


def test_two_batches_leave_nothing_to_hold_out() -> None:
    assert hold_out(curve({1: 0.1, 2: 0.2})) == ()
    with pytest.raises(InvalidInput, match="three batches"):
        summarise_errors(())


def test_a_summary_names_the_worst_and_counts_what_the_prediction_covered() -> None:
    held = [point for two in (0.15, 0.18, 0.4) for point in hold_out(curve({1: 0.1, 2: two, 3: 0.2}))]
    summary = summarise_errors(held)
    assert summary.points == 3
    assert summary.median == pytest.approx(0.03 / 0.18)
    assert summary.worst.row.latency_s.mean == 0.4
    assert summary.p95 == summary.worst.error_ratio
    assert 0 < summary.covered_ratio < 1
