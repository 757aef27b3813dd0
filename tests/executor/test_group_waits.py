from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.group_waits import GroupWaits


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_nothing_is_expected_of_a_group_that_has_said_nothing() -> None:
    assert GroupWaits(Clock()).wait_s("a/0") == 0


def test_a_report_ages_with_the_clock_and_never_below_nothing() -> None:
    clock = Clock()
    waits = GroupWaits(clock)
    waits.note("a/0", 0.5)
    clock.now_s += 0.2
    assert waits.wait_s("a/0") == pytest.approx(0.3)
    clock.now_s += 5
    assert waits.wait_s("a/0") == 0


def test_what_was_sent_since_counts_until_the_next_report() -> None:
    clock = Clock()
    waits = GroupWaits(clock)
    waits.note("a/0", 0.1)
    waits.sent("a/0", 0.2)
    waits.sent("a/0", 0.2)
    assert waits.wait_s("a/0") == pytest.approx(0.5)
    waits.note("a/0", 0.3)
    assert waits.wait_s("a/0") == pytest.approx(0.3)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=20))
def test_law_without_reports_it_is_a_server_that_does_one_share_after_the_other(
    steps: list[tuple[float, float]],
) -> None:
    clock = Clock()
    waits = GroupWaits(clock)
    backlog_s = 0.0
    for pause_s, share_s in steps:
        clock.now_s += pause_s
        backlog_s = max(0.0, backlog_s - pause_s) + share_s
        waits.sent("a/0", share_s)
        assert waits.wait_s("a/0") == pytest.approx(backlog_s, abs=1e-9)
    assert waits.wait_s("b/0") == 0


def test_a_group_that_left_is_forgotten() -> None:
    waits = GroupWaits(Clock())
    waits.note("a/0", 0.5)
    waits.note("b/0", 0.5)
    waits.keep({"b/0"})
    assert (waits.wait_s("a/0"), waits.wait_s("b/0") > 0) == (0, True)
