"""The report's plots, as plotly figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from foreplan.report.content import Run, timeline
from foreplan.report.placement import PALETTE
from plans.demand import Demand, ServiceDemand
from plans.plan import Plan
from profiles.library import ProfileLibrary
from traces.rates import RateTrace

__all__ = ["SOURCES", "attainment_figure", "forecast_figure", "latency_figure", "profile_figure", "timeline_figure"]

SOURCES = {"predicted": "#9aa7b4", "simulated": "#2f6db3", "measured": "#d9822b"}
"""Colour of each origin of a figure, the same in every plot."""


def profile_figure(profiles: ProfileLibrary, models: Sequence[str]) -> Any:
    """Return latency and throughput against batch, with what was measured as dots and the model as a line."""
    figure = make_subplots(rows=1, cols=2, subplot_titles=("Latency of a batch (ms)", "Throughput (requests/s)"))
    shown = [profile for profile in profiles if profile.model in models]
    for position, profile in enumerate(shown):
        color = PALETTE[position % len(PALETTE)]
        name = f"{profile.model} on {profile.gpu_type}"
        rows = sorted((r for r in profile.rows if (r.tp, r.pp, r.concurrency) == (1, 1, 1)), key=lambda r: r.batch)
        model = profiles.latency(profile.model, profile.gpu_type, 1, 1)
        if not rows or model is None:
            continue
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
            figure.add_scatter(
                x=dots, y=points, mode="markers", marker=marker, showlegend=column == 1, **shared, **bars
            )
    figure.update_xaxes(title_text="batch")
    return _styled(figure, 380)


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
    """Add the mean and the widest stated quantiles, held over each window."""
    windows = len(service.rate_rps)
    x = (demand.start_s + np.arange(windows + 1) * demand.window_s) / 60
    mean = [rate.mean for rate in service.rate_rps]
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
        x=x, y=[*mean, mean[-1]], name="forecast mean", legendgroup="mean", mode="lines", line=line, **where
    )


def _steps(trace: RateTrace, service: str) -> tuple[Any, Any]:
    counts = trace.counts()[trace.services.index(service)]
    x = (trace.start_s + np.arange(len(counts) + 1) * trace.window_s) / 60
    rates = counts / trace.window_s
    return x, np.append(rates, rates[-1:])


def attainment_figure(plan: Plan, runs: Mapping[str, Run], targets: Mapping[str, float]) -> Any:
    """Return attainment per service, predicted and from each run, with the target as a line."""
    names = [prediction.service for prediction in plan.predicted]
    figure = go.Figure()
    predicted = [prediction.attainment * 100 for prediction in plan.predicted]
    figure.add_bar(x=names, y=predicted, name="predicted", marker_color=SOURCES["predicted"])
    for label, run in runs.items():
        attained = [run.summary.service(name).attainment for name in names]
        shown = [None if value is None else value * 100 for value in attained]
        figure.add_bar(x=names, y=shown, name=label, marker_color=SOURCES.get(label))
    wanted = [targets[name] * 100 if name in targets else None for name in names]
    if any(value is not None for value in wanted):
        marker = {"symbol": "line-ew", "size": 44, "line": {"width": 2, "color": "#333"}}
        figure.add_scatter(x=names, y=wanted, name="target", mode="markers", marker=marker)
    figure.update_yaxes(title_text="attainment (%)", range=[0, 105])
    figure.update_layout(barmode="group")
    return _styled(figure, 340)


def latency_figure(plan: Plan, runs: Mapping[str, Run], deadlines: Mapping[str, float]) -> Any:
    """Return p50 (solid) and p99 (pale) latency per service, predicted and from each run, with the deadline."""
    names = [prediction.service for prediction in plan.predicted]
    figure = go.Figure()
    sources: list[tuple[str, list[float | None], list[float | None]]] = [
        ("predicted", [p.latency_s.p50 for p in plan.predicted], [p.latency_s.p99 for p in plan.predicted])
    ]
    for label, run in runs.items():
        found = [run.summary.service(name).latency_s for name in names]
        sources.append((label, [latency.p50 for latency in found], [latency.p99 for latency in found]))
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
        margin={"l": 60, "r": 20, "t": 70, "b": 45},
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "yref": "container", "yanchor": "top", "y": 0.985, "xanchor": "right", "x": 1},
    )
    return figure
