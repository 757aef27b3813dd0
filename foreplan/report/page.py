"""The page: sections put together, with everything that it needs inside the one file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from plotly.io import to_html
from plotly.offline import get_plotlyjs

from foreplan.report import figures
from foreplan.report.content import Content
from foreplan.report.placement import placement_map
from plans.units import format_seconds

__all__ = ["render"]

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1d2733;background:#f4f6f8;margin:0}
main{max-width:1120px;margin:0 auto;padding:24px 20px 60px}
h1{font-size:26px;margin:0 0 4px} h2{font-size:19px;margin:34px 0 6px}
p.lead{margin:0 0 12px;color:#51606f} .muted{color:#6b7987;font-size:13px}
.facts{display:flex;flex-wrap:wrap;gap:6px 22px;margin:10px 0 0;padding:0;list-style:none;font-size:14px}
.facts b{font-weight:600} .card{background:#fff;border:1px solid #dfe5ea;border-radius:8px;padding:14px 16px}
.remark{background:#fff6e5;border:1px solid #f0d9a8;border-radius:6px;padding:8px 12px;margin:8px 0;font-size:14px}
table{border-collapse:collapse;width:100%;font-size:14px} th,td{padding:5px 10px;border-bottom:1px solid #e6ebef}
th{text-align:left;font-weight:600;color:#3d4b59} td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.nodes{display:flex;flex-wrap:wrap;gap:14px} .node{background:#fff;border:1px solid #dfe5ea;border-radius:8px;
padding:12px 14px;flex:1 1 320px} .node header{margin-bottom:8px} .devices{display:flex;flex-wrap:wrap;gap:10px;
align-items:flex-start}
.device{flex:1 1 230px;border:1px solid #cfd8df;border-radius:6px;padding:8px 10px;background:#fafbfc}
.device.idle{background:#f0f2f4;border-style:dashed} .device-name{font-weight:600;font-size:13px}
.chip{border-left:5px solid;background:#fff;border-radius:3px;padding:3px 8px;margin:6px 0;display:flex;
flex-direction:column} .bar-row{display:flex;justify-content:space-between;font-size:12px;color:#51606f;margin-top:6px}
.bar{height:9px;background:#e3e8ec;border-radius:3px;overflow:hidden;display:flex} .bar i{display:block;height:100%}
"""


def render(content: Content) -> str:
    """Return the report as one HTML page that needs no network."""
    sections = [
        _heading(content),
        _placement(content),
        _results(content),
        _timelines(content),
        _forecast(content),
        _profiles(content),
        _certificate(content),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(content.title)}</title><style>{_STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body><main>{body}</main></body></html>\n"
    )


def _heading(content: Content) -> str:
    facts = "".join(f"<li><b>{escape(name)}</b> {escape(value)}</li>" for name, value in content.facts.items())
    remarks = "".join(f'<div class="remark">{escape(remark)}</div>' for remark in content.remarks)
    return f'<h1>{escape(content.title)}</h1><ul class="facts">{facts}</ul>{remarks}'


def _placement(content: Content) -> str:
    utilisation = {
        label: {group.group: group.utilisation for group in run.summary.groups}
        for label, run in content.runs.items()
        if any(group.utilisation is not None for group in run.summary.groups)
    }
    drawn = placement_map(content.plan, content.cluster, utilisation)
    lead = "Every node and device, what it runs, and how full it is."
    return f'<h2>Placement</h2><p class="lead">{lead}</p>{drawn}'


def _results(content: Content) -> str:
    if not content.plan.predicted:
        return ""
    known = content.services.services if content.services else ()
    targets = {service.name: service.slo.attainment for service in known}
    deadlines = {entry.service: entry.deadline_s for group in content.plan.groups for entry in group.loadout}
    plots = _plot(figures.attainment_figure(content.plan, content.runs, targets))
    plots += _plot(figures.latency_figure(content.plan, content.runs, deadlines))
    lead = "The planner's prediction beside what the simulator and the live system made of the same arrivals."
    return f'<h2>Attainment and latency</h2><p class="lead">{lead}</p>{_result_table(content)}{plots}'


def _result_table(content: Content) -> str:
    columns = [
        "service",
        "source",
        "offered",
        "good",
        "late",
        "dropped",
        "failed",
        "attainment",
        "p50 (ms)",
        "p99 (ms)",
    ]
    rows: list[list[str]] = []
    for prediction in content.plan.predicted:
        latency = prediction.latency_s
        rate = f"{prediction.offered_rps:.3g} rps"
        cells = [prediction.service, "predicted", rate, "", "", "", "", f"{prediction.attainment:.1%}"]
        rows.append([*cells, _ms(latency.p50), _ms(latency.p99), ""])
        for label, run in content.runs.items():
            found = run.summary.service(prediction.service)
            counts = [str(count) for count in (found.offered, found.good, found.late, found.dropped, found.failed)]
            attained = "" if found.attainment is None else f"{found.attainment:.1%}"
            mean_batch = "" if found.mean_batch is None else f"{found.mean_batch:.2f}"
            latencies = [_ms(found.latency_s.p50), _ms(found.latency_s.p99)]
            rows.append(["", label, *counts, attained, *latencies, mean_batch])
    return f'<div class="card">{_table([*columns, "mean batch"], rows, text_columns=2)}</div>'


def _timelines(content: Content) -> str:
    if not content.runs:
        return ""
    services = [prediction.service for prediction in content.plan.predicted]
    lead = "Requests per second by the time they were due, and how many of those ended well."
    plot = _plot(figures.timeline_figure(content.runs, services))
    return f'<h2>Rate and goodput</h2><p class="lead">{lead}</p>{plot}'


def _forecast(content: Content) -> str:
    if content.demand is None or not content.demand.services:
        return ""
    plot = _plot(figures.forecast_figure(content.demand, content.history, content.actual))
    method = escape(content.demand.method or "the demand that the plan was made from")
    return f'<h2>Forecast against actual</h2><p class="lead">{method}</p>{plot}'


def _profiles(content: Content) -> str:
    if content.profiles is None:
        return ""
    models = (
        sorted({variant.model for service in content.services.services for variant in service.variants})
        if (content.services)
        else [profile.model for profile in content.profiles]
    )
    plot = _plot(figures.profile_figure(content.profiles, models))
    lead = "Dots are measured means, with the way up to p99; lines are the latency model that the planner uses."
    return f'<h2>Profiles</h2><p class="lead">{lead}</p>{plot}'


def _certificate(content: Content) -> str:
    solver = content.plan.solver
    rows = [[tier.name, f"{tier.objective:.6g}", f"{tier.bound:.6g}", f"{tier.gap:.3%}"] for tier in solver.tiers] or [
        ["goodput", f"{solver.objective:.6g}", f"{solver.bound:.6g}", f"{solver.gap:.3%}"]
    ]
    text = (
        f"{solver.status}, proven by {solver.name} in {format_seconds(solver.wall_s)}. The bound is what no placement "
        "of this model of the problem can exceed; the gap is how far this plan may be from it."
    )
    left = "".join(
        f'<div class="remark">unserved: {escape(u.service)} {u.rate_rps:.3g} rps ({u.reason}): {escape(u.detail)}</div>'
        for u in content.plan.unserved
    )
    warnings = "".join(f'<div class="remark">{escape(warning)}</div>' for warning in content.plan.warnings)
    table = _table(["objective", "value", "bound", "gap"], rows, text_columns=1)
    head = f'<h2>How good the plan provably is</h2><p class="lead">{escape(text)}</p>'
    return f'{head}<div class="card">{table}</div>{left}{warnings}'


def _plot(figure: Any) -> str:
    html: str = to_html(figure, include_plotlyjs=False, full_html=False, config={"displayModeBar": False})
    return f'<div class="card" style="margin-top:12px">{html}</div>'


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' if position >= text_columns else ''}>{escape(value)}</{tag}>"
            for position, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', columns)}</tr></thead><tbody>{body}</tbody></table>"


def _ms(latency_s: float | None) -> str:
    return "" if latency_s is None else f"{latency_s * 1000:.1f}"
