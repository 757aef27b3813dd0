"""The page: sections put together, with everything that it needs inside the one file."""

from __future__ import annotations

from html import escape

from foreplan.profile_series import UNITS
from foreplan.report import figures
from foreplan.report.content import Content
from foreplan.report.html import document, plot, table
from foreplan.report.placement import placement_map
from plans.units import format_seconds

__all__ = ["render"]


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
    return document(content.title, "\n".join(section for section in sections if section))


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
    names = content.names()
    if not names:
        return ""
    known = (*content.services.services, *content.services.workflows) if content.services else ()
    targets = {service.name: service.slo.attainment for service in known}
    deadlines = {entry.service: entry.deadline_s for group in content.plan.groups for entry in group.loadout}
    workflows = content.services.workflows if content.services else ()
    deadlines |= {workflow.name: workflow.slo.deadline_s for workflow in workflows}
    plots = plot(figures.attainment_figure(content.plan, content.runs, names, targets))
    plots += plot(figures.latency_figure(content.plan, content.runs, names, deadlines))
    lead = f'<p class="lead">{escape(_results_lead(content))}</p>'
    return f"<h2>Attainment and latency</h2>{lead}{_result_table(content)}{plots}"


def _results_lead(content: Content) -> str:
    """Return what the figures compare; runs that were offered different requests are not told as one comparison."""
    if not content.runs:
        return "The planner's prediction."
    offered = [{each.service: each.offered for each in run.summary.services} for run in content.runs.values()]
    if any(each != offered[0] for each in offered):
        made = f"what became of other arrivals in each of: {', '.join(content.runs)}; compare with care"
    else:
        made = "what the simulator and the live system made of the same arrivals"
    lead = f"The planner's prediction beside {made}."
    if any(
        each.good + each.late and each.latency_s.p99 is None
        for run in content.runs.values()
        for each in run.summary.services
    ):
        lead += " A p99 needs 100 requests that finished, and is left out where there are fewer."
    return lead


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
    predictions = {prediction.service: prediction for prediction in content.plan.predicted}
    for name in content.names():
        first = name
        if prediction := predictions.get(name):
            latency = prediction.latency_s
            rate = f"{prediction.offered_rps:.3g}\u00a0rps"
            cells = [name, "predicted", rate, "", "", "", "", f"{prediction.attainment:.1%}"]
            rows.append([*cells, _ms(latency.p50), _ms(latency.p99), ""])
            first = ""
        for label, run in content.runs.items():
            found = run.find(name)
            if found is None:
                continue
            counts = [str(count) for count in (found.offered, found.good, found.late, found.dropped, found.failed)]
            attained = "" if found.attainment is None else f"{found.attainment:.1%}"
            mean_batch = "" if found.mean_batch is None else f"{found.mean_batch:.2f}"
            latencies = [_ms(found.latency_s.p50), _ms(found.latency_s.p99)]
            rows.append([first, label, *counts, attained, *latencies, mean_batch])
            first = ""
    return f'<div class="card">{table([*columns, "mean batch"], rows, text_columns=2)}</div>'


def _timelines(content: Content) -> str:
    if not content.runs:
        return ""
    offered = {each.service for run in content.runs.values() for each in run.summary.services if each.offered}
    services = [name for name in content.names() if name in offered]
    lead = "Requests per second by the time they were due, and how many of those ended well."
    drawn = plot(figures.timeline_figure(content.runs, services))
    return f'<h2>Rate and goodput</h2><p class="lead">{lead}</p>{drawn}'


def _forecast(content: Content) -> str:
    if content.demand is None or not content.demand.services:
        return ""
    drawn = plot(figures.forecast_figure(content.demand, content.history, content.actual))
    method = escape(content.demand.method or "the demand that the plan was made from")
    heading = "Forecast" if content.actual is None else "Forecast against actual"
    return f'<h2>{heading}</h2><p class="lead">{method}</p>{drawn}'


def _profiles(content: Content) -> str:
    if content.profiles is None:
        return ""
    models = (
        sorted({variant.model for service in content.services.services for variant in service.variants})
        if (content.services)
        else [profile.model for profile in content.profiles]
    )
    drawn = "".join(
        plot(figure, least_px=720)
        for phase in UNITS
        if (figure := figures.profile_figure(content.profiles, models, phase)).data
    )
    lead = "Dots are measured means, with the way up to p99; lines are the latency model that the planner uses."
    return f'<h2>Profiles</h2><p class="lead">{lead}</p>{drawn}'


def _certificate(content: Content) -> str:
    solver = content.plan.solver
    rows = [[tier.name, f"{tier.objective:.6g}", f"{tier.bound:.6g}", f"{tier.gap:.3%}"] for tier in solver.tiers] or [
        ["goodput", f"{solver.objective:.6g}", f"{solver.bound:.6g}", f"{solver.gap:.3%}"]
    ]
    text = (
        f"{solver.status}, proven by {solver.name} in {format_seconds(solver.wall_s)}. The bound is what no placement "
        "of this model of the problem can exceed; the gap is how far this plan may be from it."
    )
    warnings = "".join(f'<div class="remark">{escape(warning)}</div>' for warning in content.plan.warnings)
    drawn = table(["objective", "value", "bound", "gap"], rows, text_columns=1)
    head = f'<h2>How good the plan provably is</h2><p class="lead">{escape(text)}</p>'
    return f'{head}<div class="card">{drawn}</div>{warnings}'


def _ms(latency_s: float | None) -> str:
    return "" if latency_s is None else f"{latency_s * 1000:.1f}"
