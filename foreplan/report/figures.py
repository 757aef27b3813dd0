"""The report's plots, as plotly figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from foreplan.profile_series import UNITS, series
from foreplan.report.content import Run, timeline
from foreplan.report.placement import PALETTE
from plans.demand import Demand, ServiceDemand
from plans.plan import Plan
from profiles.document import Phase, Profile, Row
from profiles.latency import LatencyModel
from profiles.library import ProfileLibrary
from traces.rates import RateTrace

__all__ = ["SOURCES", "attainment_figure", "forecast_figure", "latency_figure", "profile_figure", "timeline_figure"]

SOURCES = {"predicted": "#9aa7b4", "simulated": "#2f6db3", "measured": "#d9822b"}
"""Colour of each origin of a figure, the same in every plot."""


def profile_figure(profiles: ProfileLibrary, models: Sequence[str], phase: Phase = "whole") -> Any:
    """Return latency and throughput of ``phase`` on one device against batch: measured dots, and the model as a line.

    It holds no data where no model has rows of that phase.
    """
    what, unit = UNITS[phase]
    figure = make_subplots(rows=1, cols=2, subplot_titles=(f"Latency of a {what} (ms)", f"Throughput ({unit}/s)"))
    curves = [
        (profile, name, rows)
        for profile in profiles
        if profile.model in models
        for name, rows in series(profile, phase)
        if (rows[0].tp, rows[0].pp, rows[0].concurrency) == (1, 1, 1)
    ]
    for position, (profile, name, rows) in enumerate(curves):
        _draw_profile(figure, profile, f"{profile.model} on {name}", rows, PALETTE[position % len(PALETTE)])
    figure.update_xaxes(title_text="batch")
    return _styled(figure, 380)


def _draw_profile(figure: Any, profile: Profile, name: str, rows: Sequence[Row], color: str) -> None:
    first = rows[0]
    only = profile.model_copy(update={"rows": tuple(rows), "origins": ()})
    model = LatencyModel(only, first.tp, first.pp, first.input_tokens, first.output_tokens, first.phase)
    batches = np.arange(1, rows[-1].batch + 1)
    line_s = np.array([model.at(int(batch)).mean_s for batch in batches])
    dots = np.array([row.batch for row in rows])
    dots_s = np.array([row.latency_s.mean for row in rows])
    tail_ms = [(row.latency_s.p99 or row.latency_s.mean) * 1000 - row.latency_s.mean * 1000 for row in rows]
    marker = {"color": color, "size": 8}
    error = {"type": "data", "array": tail_ms, "arrayminus": [0] * len(rows), "thickness": 1}
    for column, line, points in ((1, line_s * 1000, dots_s * 1000), (2, batches / line_s, dots / dots_s)):
        shared: dict[str, Any] = {"legendgroup": name, "name": name, "row": 1, "col": column}
        figure.add_scatter(x=batches, y=line, mode="lines", line={"color": color}, showlegend=False, **shared)
        bars = {"error_y": error} if column == 1 else {}
        figure.add_scatter(x=dots, y=points, mode="markers", marker=marker, showlegend=column == 1, **shared, **bars)


def forecast_figure(demand: Demand, history: RateTrace | None, actual: RateTrace | None) -> Any:
    """Return, per service, the history, the forecast with its quantile band, and what then came."""
    services = demand.services
    figure = make_subplots(rows=len(services), cols=1, shared_xaxes=True, subplot_titles=[s.service for s in services])
    for row, service in enumerate(services, start=1):
        where: dict[str, Any] = {"row": row, "col": 1, "showlegend": row == 1}
        for trace, name, color in ((history, "history", "#9aa7b4"), (actual, "actual", SOURCES["measured"])):
            if trace is not None and service.service in trace.services:
                x, y = _steps(trace, service.service)
                line = {"color": color, "shape": "hv"}
                figure.add_scatter(x=x, y=y, name=name, legendgroup=name, mode="lines", line=line, **where)
        _add_band(figure, demand, service, where)
    figure.update_yaxes(title_text="requests/s", rangemode="tozero")
    figure.update_xaxes(title_text="minutes", row=len(services), col=1)
    return _styled(figure, 190 * len(services) + 90)


def _add_band(figure: Any, demand: Demand, service: ServiceDemand, where: Mapping[str, Any]) -> None:
    """Add the median and the widest stated quantiles, held over each window; the mean where no median is stated.

    A method without parameters repeats the past as its mean, which need not lie within what its errors say.
    """
    windows = len(service.rate_rps)
    x = (demand.start_s + np.arange(windows + 1) * demand.window_s) / 60
    middle = "mean" if any("0.5" not in rate.quantiles for rate in service.rate_rps) else "median"
    line_rps = [rate.mean if middle == "mean" else rate.quantiles["0.5"] for rate in service.rate_rps]
    levels = sorted(service.rate_rps[0].quantiles, key=float)
    if len(levels) >= 2:
        low, high = ([rate.quantiles[level] for rate in service.rate_rps] for level in (levels[0], levels[-1]))
        name = f"forecast {float(levels[0]):.0%} to {float(levels[-1]):.0%}"
        line: dict[str, Any] = {"width": 0, "shape": "hv"}
        band: dict[str, Any] = {"mode": "lines", "line": line}
        figure.add_scatter(x=x, y=[*low, low[-1]], hoverinfo="skip", **band, **{**where, "showlegend": False})
        fill = {"fill": "tonexty", "fillcolor": "rgba(47,109,179,0.18)"}
        figure.add_scatter(x=x, y=[*high, high[-1]], name=name, legendgroup=name, **band, **fill, **where)
    line = {"color": SOURCES["simulated"], "shape": "hv"}
    figure.add_scatter(
        x=x,
        y=[*line_rps, line_rps[-1]],
        name=f"forecast {middle}",
        legendgroup="middle",
        mode="lines",
        line=line,
        **where,
    )


def _steps(trace: RateTrace, service: str) -> tuple[Any, Any]:
    counts = trace.counts()[trace.services.index(service)]
    x = (trace.start_s + np.arange(len(counts) + 1) * trace.window_s) / 60
    rates = counts / trace.window_s
    return x, np.append(rates, rates[-1:])


def attainment_figure(plan: Plan, runs: Mapping[str, Run], names: Sequence[str], targets: Mapping[str, float]) -> Any:
    """Return attainment of services and workflows, predicted and from each run, with the target as a line."""
    figure = go.Figure()
    known = {prediction.service: prediction.attainment * 100 for prediction in plan.predicted}
    predicted = [known.get(name) for name in names]
    figure.add_bar(x=names, y=predicted, name="predicted", marker_color=SOURCES["predicted"])
    for label, run in runs.items():
        found = [run.find(name) for name in names]
        attained = [None if one is None else one.attainment for one in found]
        shown = [None if value is None else value * 100 for value in attained]
        figure.add_bar(x=names, y=shown, name=label, marker_color=SOURCES.get(label))
    wanted = [targets[name] * 100 if name in targets else None for name in names]
    if any(value is not None for value in wanted):
        marker = {"symbol": "line-ew", "size": 44, "line": {"width": 2, "color": "#333"}}
        figure.add_scatter(x=names, y=wanted, name="target", mode="markers", marker=marker)
    figure.update_yaxes(title_text="attainment (%)", range=[0, 105])
    figure.update_layout(barmode="group")
    return _styled(figure, 340)


def latency_figure(plan: Plan, runs: Mapping[str, Run], names: Sequence[str], deadlines: Mapping[str, float]) -> Any:
    """Return p50 (solid) and p99 (pale) of services and workflows, predicted and of each run, with the deadline."""
    figure = go.Figure()
    known = {prediction.service: (prediction.latency_s.p50, prediction.latency_s.p99) for prediction in plan.predicted}
    pairs = [known.get(name, (None, None)) for name in names]
    sources = [("predicted", [p50 for p50, _ in pairs], [p99 for _, p99 in pairs])]
    for label, run in runs.items():
        found = [run.find(name) for name in names]
        p50s = [None if one is None else one.latency_s.p50 for one in found]
        p99s = [None if one is None else one.latency_s.p99 for one in found]
        sources.append((label, p50s, p99s))
    for label, p50, p99 in sources:
        for name, values, opacity in (("p50", p50, 1.0), ("p99", p99, 0.45)):
            shown = [None if value is None else value * 1000 for value in values]
            color = SOURCES.get(label)
            figure.add_bar(x=names, y=shown, name=f"{label} {name}", marker_color=color, opacity=opacity)
    wanted = [deadlines[name] * 1000 if name in deadlines else None for name in names]
    marker = {"symbol": "line-ew", "size": 60, "line": {"width": 2, "color": "#333"}}
    figure.add_scatter(x=names, y=wanted, name="deadline", mode="markers", marker=marker)
    figure.update_yaxes(title_text="latency (ms)", rangemode="tozero")
    figure.update_layout(barmode="group")
    return _styled(figure, 340)


def timeline_figure(runs: Mapping[str, Run], services: Sequence[str]) -> Any:
    """Return, per service, offered rate and goodput over the run."""
    end_s = max(float(run.requests["scheduled_s"].max()) for run in runs.values())
    bin_s = max(1.0, round(end_s / 60))
    figure = make_subplots(rows=len(services), cols=1, shared_xaxes=True, subplot_titles=list(services))
    for row, service in enumerate(services, start=1):
        for position, (label, run) in enumerate(runs.items()):
            requests = run.requests[run.requests["service"] == service]
            counts = timeline(requests, bin_s=bin_s, end_s=end_s)
            where: dict[str, Any] = {"row": row, "col": 1, "showlegend": row == 1}
            if position == 0:
                line = {"color": "#9aa7b4", "dash": "dot"}
                figure.add_scatter(
                    x=counts.start_s, y=counts.offered_rps, name="offered", legendgroup="offered", line=line, **where
                )
            figure.add_scatter(
                x=counts.start_s,
                y=counts.good_rps,
                name=f"goodput {label}",
                legendgroup=label,
                line={"color": SOURCES.get(label)},
                **where,
            )
    figure.update_yaxes(title_text="requests/s", rangemode="tozero")
    figure.update_xaxes(title_text=f"seconds (bins of {bin_s:g} s)", row=len(services), col=1)
    return _styled(figure, 190 * len(services) + 90)


def _styled(figure: Any, height: int) -> Any:
    figure.update_layout(
        height=height,
        template="plotly_white",
        margin={"l": 60, "r": 20, "t": 90, "b": 45},
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "yref": "container", "yanchor": "top", "y": 0.985, "xanchor": "right", "x": 1},
    )
    return figure
