from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans.units import format_bytes, format_seconds, parse_bandwidth, parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("150ms", 0.15), ("2.5 s", 2.5), ("5min", 300), ("50us", 5e-5), ("1h", 3600), (3, 3.0), ("1e2ms", 0.1)],
)
def test_durations(text, seconds):
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * 2**30), ("150KB", 150_000), ("1.5MiB", 1572864), ("8b", 1), (7, 7), ("0.1B", 1)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(("text", "rate"), [("25Gb/s", 3.125e9), ("12GB/s", 12e9), ("450GB/s", 4.5e11), (5, 5.0)])
def test_bandwidths_tell_bits_from_bytes(text, rate):
    assert parse_bandwidth(text) == rate


@pytest.mark.parametrize(
    "text", ["", "ms", "-5ms", "5 parsecs", "nan", "inf", float("nan"), float("inf"), True, "1,5s"]
)
def test_nonsense_is_no_duration(text):
    with pytest.raises(ValueError, match=r"duration|finite"):
        parse_seconds(text)


@pytest.mark.parametrize("text", ["80", "GiB", "80GiB/s", "80gib", "-1GiB", "1 PiB", None])
def test_nonsense_is_no_size(text):
    with pytest.raises(ValueError, match="size"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["25Gb", "25", "Gb/s"])
def test_a_bandwidth_needs_per_second(text):
    with pytest.raises(ValueError, match="bandwidth"):
        parse_bandwidth(text)


@given(st.floats(1e-6, 1e6))
def test_a_formatted_duration_reads_back_within_its_three_digits(seconds):
    assert parse_seconds(format_seconds(seconds).replace(" ", "")) == pytest.approx(seconds, rel=6e-3)


def test_a_formatted_size_names_the_binary_unit():
    assert format_bytes(80 * 2**30) == "80 GiB"
    assert format_bytes(3 * 2**40) == "3 TiB"
