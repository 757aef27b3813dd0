from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.delay import Delay

delays = st.lists(st.floats(-1, 1), max_size=50)


def test_a_delay_that_stays_the_same_is_expected_as_it_is() -> None:
    delay = Delay()
    for _ in range(500):
        delay.note(0.003, most_s=1.0)
    assert delay.expected_s == pytest.approx(0.003, rel=1e-3)


def test_delays_that_vary_are_allowed_for_by_more_than_their_mean() -> None:
    delay = Delay()
    for number in range(500):
        delay.note(0.002 if number % 2 else 0.004, most_s=1.0)
    assert 0.004 < delay.expected_s < 0.008


def test_an_accident_counts_as_the_longest_delay_that_is_believed() -> None:
    accident, longest = Delay(), Delay()
    accident.note(60.0, most_s=0.01)
    longest.note(0.01, most_s=0.01)
    assert accident.expected_s == longest.expected_s


@given(delays, st.floats(0, 0.5))
def test_law_it_is_never_negative_and_at_most_five_times_what_is_believed(found: list[float], most_s: float) -> None:
    delay = Delay()
    for found_s in found:
        delay.note(found_s, most_s=most_s)
        assert 0 <= delay.expected_s <= 5 * most_s + 1e-12


def test_doubt_brings_it_to_nothing() -> None:
    delay = Delay()
    delay.note(1.0, most_s=1.0)
    before_s = delay.expected_s
    delay.doubt()
    assert delay.expected_s < before_s
    for _ in range(300):
        delay.doubt()
    assert delay.expected_s == pytest.approx(0, abs=1e-9)
