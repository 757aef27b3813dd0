from __future__ import annotations

import pytest

from foreplan.profile_plot import profile_figure, profile_page
from profiles.document import Phase
from tests.profiles.documents import curve, profile, row


def test_dots_are_what_was_measured_and_lines_go_through_them() -> None:
    figure = profile_figure([curve({1: 0.1, 2: 0.15, 4: 0.25})])
    latency = [trace for trace in figure.data if trace.xaxis == "x"]
    (dots,) = [trace for trace in latency if trace.mode == "markers"]
    assert list(dots.y) == pytest.approx([100, 150, 250])
    solid = next(trace for trace in latency if trace.line.dash == "solid")
    assert dict(zip(solid.x, solid.y, strict=True))[3] == pytest.approx(200)
    dotted = next(trace for trace in latency if trace.line.dash == "dot")
    assert dotted.x[0] == 4
    assert dotted.x[-1] > 4
    (band,) = [trace for trace in latency if trace.fill == "toself"]
    assert min(band.y) < 100 < 250 < max(band.y)


def test_throughput_counts_copies_and_memory_is_in_mebibytes() -> None:
    figure = profile_figure([profile(row(2, 0.1, concurrency=3, peak_bytes=(3 * 2**20,)))])
    dots = {trace.xaxis: list(trace.y) for trace in figure.data if trace.mode == "markers"}
    assert dots["x2"] == pytest.approx([60])
    assert dots["x3"] == [3.0]


def test_series_are_drawn_apart_and_named() -> None:
    rows = [row(batch, 0.1, phase="decode", input_tokens=tokens) for batch in (1, 2) for tokens in (64, 128)]
    shown = [profile(row(1, 0.1), *rows)]

    def names(phase: Phase) -> set[str]:
        return {trace.name for trace in profile_figure(shown, phase).data if trace.mode == "markers"}

    assert names("decode") == {"cpu (decode, 64 tokens)", "cpu (decode, 128 tokens)"}
    assert names("whole") == {"cpu"}
    assert names("prefill") == set()


def test_each_phase_has_axes_of_its_own() -> None:
    rows = [row(batch, 0.1, phase="decode", input_tokens=64) for batch in (1, 2)]
    page = profile_page([profile(row(1, 10.0), *rows)])
    assert page.count('<div class="card">') == 2
    assert "Latency of a decode step (ms)" in page
    assert "Throughput (tokens\\u002fs)" in page
    assert "Latency of a prefill" not in page


def test_the_page_needs_no_network_and_escapes_names() -> None:
    page = profile_page([curve({1: 0.1, 2: 0.2}, model="a"), curve({1: 0.1}, model="b")], "<b>")
    assert page.count("<h2>") == 2
    assert "&lt;b&gt;" in page
    assert 'src="http' not in page


def test_the_band_of_an_estimate_is_a_factor_of_two_to_either_side() -> None:
    rows = [row(batch, 0.1 * batch) for batch in (1, 2)]
    figure = profile_figure([profile(*rows).model_copy(update={"source": "modelled", "error_ratio": 1.0})])
    bands = {trace.xaxis: trace for trace in figure.data if trace.fill == "toself"}
    assert (bands["x"].y[0], bands["x"].y[-1]) == pytest.approx((200, 50))
    assert (bands["x2"].y[0], bands["x2"].y[-1]) == pytest.approx((20, 5))
