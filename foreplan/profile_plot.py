"""A page that draws profiles: latency, throughput and memory against the batch, with the fit and its band."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from plotly.io import to_html
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from foreplan.profile_series import UNITS, series
from foreplan.report.placement import PALETTE
from profiles.document import Phase, Profile, Row
from profiles.latency import LatencyModel
from profiles.library import ProfileLibrary

__all__ = ["profile_figure", "profile_page"]

_BEYOND = 1.25
"""The fit is drawn this far beyond the largest batch measured."""

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1d2733;background:#f4f6f8;margin:0}
main{max-width:1180px;margin:0 auto;padding:24px 20px 60px} h1{font-size:26px;margin:0 0 4px}
h2{font-size:19px;margin:30px 0 4px} p{margin:0 0 10px;color:#51606f}
.card{background:#fff;border:1px solid #dfe5ea;border-radius:8px;padding:12px 14px;margin:0 0 10px;overflow-x:auto}
.card>div{min-width:900px}
"""


def profile_page(profiles: Iterable[Profile], title: str = "Profiles") -> str:
    """Return one HTML page that needs no network, with a figure per model."""
    library = ProfileLibrary(profiles)
    models = sorted({profile.model for profile in library})
    sections = []
    for model in models:
        shown = [profile for profile in library if profile.model == model]
        sections.append(f"<h2>{escape(model)}</h2><p>{escape(_facts(shown))}</p>")
        for phase in UNITS:
            figure = profile_figure(shown, phase)
            html = to_html(figure, include_plotlyjs=False, full_html=False, config={"displayModeBar": False})
            sections.append(f'<div class="card">{html}</div>' if figure.data else "")
    lead = (
        "Dots are rows with the way up to their p99; the line is the latency model, and its band the error that it "
        "states. Where the line is dotted, nothing was measured."
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head><body><main><h1>{escape(title)}</h1>"
        f"<p>{lead}</p>{''.join(sections)}</main></body></html>\n"
    )


def profile_figure(profiles: Sequence[Profile], phase: Phase = "whole") -> Any:
    """Return latency, throughput and memory of ``phase`` against the batch: a colour for each series of each profile.

    It holds no data where no profile has rows of that phase.
    """
    what, unit = UNITS[phase]
    titles = (f"Latency of a {what} (ms)", f"Throughput ({unit}/s)", "Peak memory per GPU (MiB)")
    figure = make_subplots(rows=1, cols=3, subplot_titles=titles, horizontal_spacing=0.06)
    position = 0
    for profile in profiles:
        for name, rows in series(profile, phase):
            _draw(figure, profile, name, rows, PALETTE[position % len(PALETTE)])
            position += 1
    figure.update_xaxes(title_text="batch", rangemode="tozero")
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(
        template="plotly_white",
        height=400,
        margin={"l": 50, "r": 20, "t": 40, "b": 40},
        legend={"orientation": "h", "y": -0.2},
    )
    return figure


def _draw(figure: Any, profile: Profile, name: str, rows: Sequence[Row], color: str) -> None:
    first, last = rows[0], rows[-1]
    only = profile.model_copy(update={"rows": tuple(rows), "origins": ()})
    model = LatencyModel(only, first.tp, first.pp, first.input_tokens, first.output_tokens, first.phase)
    batches = list(range(first.batch, max(last.batch + 1, int(last.batch * _BEYOND)) + 1))
    shared: dict[str, Any] = {"legendgroup": name, "name": name, "row": 1}
    if len(rows) > 1:
        _draw_fit(figure, model, batches, last.batch, {"color": color}, shared)
    dots: dict[str, Any] = {"mode": "markers", "marker": {"color": color, "size": 8}, **shared}
    measured = [row.batch for row in rows]
    means = [row.latency_s.mean * 1000 for row in rows]
    tails = [max(0.0, (row.latency_s.p99 or row.latency_s.mean) - row.latency_s.mean) * 1000 for row in rows]
    error = {"type": "data", "array": tails, "arrayminus": [0.0] * len(rows), "thickness": 1}
    rates = [row.concurrency * row.batch / row.latency_s.mean for row in rows]
    memory = [max(row.peak_bytes) / 2**20 for row in rows]
    figure.add_scatter(x=measured, y=means, error_y=error, col=1, **dots)
    figure.add_scatter(x=measured, y=rates, showlegend=False, col=2, **dots)
    figure.add_scatter(x=measured, y=memory, showlegend=False, col=3, **dots)


def _draw_fit(
    figure: Any,
    model: LatencyModel,
    batches: Sequence[int],
    largest: int,
    line: Mapping[str, str],
    shared: Mapping[str, Any],
) -> None:
    """Draw the model's lines, dotted beyond ``largest``, and the bands of latency and throughput.

    A band is a factor to either side, as an error of 100 % is a factor of two.
    """
    estimates = [model.at(batch) for batch in batches]
    fitted = [estimate.mean_s * 1000 for estimate in estimates]
    high = [estimate.mean_s * 1000 * (1 + estimate.error_ratio) for estimate in estimates]
    low = [estimate.mean_s * 1000 / (1 + estimate.error_ratio) for estimate in estimates]

    def rates(latencies_ms: Sequence[float]) -> list[float]:
        return [1000 * batch / taken_ms for batch, taken_ms in zip(batches, latencies_ms, strict=True)]

    memory = [max(model.peak_bytes(batch)) / 2**20 for batch in batches]
    edge = batches.index(largest)
    for column, middle, upper, lower in ((1, fitted, high, low), (2, rates(fitted), rates(low), rates(high))):
        area = {"x": [*batches, *batches[::-1]], "y": [*upper, *lower[::-1]], "fill": "toself"}
        look = {"fillcolor": line["color"], "opacity": 0.15, "line": {"width": 0}, "mode": "lines"}
        figure.add_scatter(**area, **look, hoverinfo="skip", showlegend=False, col=column, **shared)
        _draw_line(figure, batches, middle, edge, line, column, shared)
    _draw_line(figure, batches, memory, edge, line, 3, shared)


def _draw_line(
    figure: Any,
    batches: Sequence[int],
    values: Sequence[float],
    edge: int,
    line: Mapping[str, str],
    column: int,
    shared: Mapping[str, Any],
) -> None:
    for part, dash in ((slice(0, edge + 1), "solid"), (slice(edge, None), "dot")):
        style = {**line, "dash": dash}
        x, y = batches[part], values[part]
        figure.add_scatter(x=x, y=y, mode="lines", line=style, showlegend=False, col=column, **shared)


def _facts(profiles: Sequence[Profile]) -> str:
    parts = []
    for profile in profiles:
        meta = profile.meta
        details = ", ".join(part for part in (meta.device_name, meta.dtype, meta.input, meta.measured_at) if part)
        parts.append(f"{profile.gpu_type}: {profile.source}" + (f" ({details})" if details else ""))
    return "; ".join(parts)
