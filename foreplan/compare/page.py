"""The comparison as one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any, get_args

import numpy as np
import plotly.graph_objects as go

from evaluator.paired import Interval, mean_interval, paired_difference
from executor.routing import Routing as GatewayRouting
from foreplan.compare.regret import Regret
from foreplan.compare.study import Outcome, Point
from foreplan.report.html import document, plot, table
from foreplan.report.placement import PALETTE
from plans.units import format_seconds

__all__ = ["render", "routings", "rows"]

COLUMNS = (
    "policy",
    "load",
    "SLO scale",
    "burstiness",
    "attainment",
    "against the first",
    "goodput (rps)",
    "GPU-hours",
    "GPUs",
    "decided in",
    "regret",
)


def rows(outcomes: Sequence[Outcome], regrets: Sequence[Regret]) -> list[list[str]]:
    """Return one row of text per outcome: mean attainment and its paired difference to the first policy, in points."""
    found = []
    lost = {(each.point, name): share for each in regrets for name, share in each.regret.items()}
    first = {outcome.point: outcome for outcome in reversed(outcomes)}
    for outcome in outcomes:
        reference = first[outcome.point]
        difference = paired_difference(outcome.attainments, reference.attainments)
        share = lost.get((outcome.point, outcome.policy))
        found.append(
            [
                outcome.policy,
                *_where(outcome.point),
                _percent(mean_interval(outcome.attainments)),
                "" if outcome is reference else _points(difference),
                f"{np.mean([sample.goodput_rps for sample in outcome.samples]):.4g}",
                f"{np.mean([sample.gpu_hours for sample in outcome.samples]):.4g}",
                str(outcome.gpus),
                format_seconds(outcome.decide_s),
                "" if share is None else f"{share:.1%}",
            ]
        )
    return found


def routings(outcomes: Sequence[Outcome]) -> str:
    """Return a sentence on how the requests of each policy were routed, and which option has a gateway do so."""
    policies: dict[str, dict[str, None]] = {}
    for outcome in outcomes:
        policies.setdefault(outcome.routing, {})[outcome.policy] = None
    found = []
    for routing, names in policies.items():
        offered = routing in get_args(GatewayRouting)
        where = f"`foreplan gateway --routing {routing}`" if offered else "simulated only"
        found.append(f"{', '.join(names)} by {routing} ({where})")
    return f"requests were routed as each policy says: {'; '.join(found)}"


def render(title: str, outcomes: Sequence[Outcome], regrets: Sequence[Regret], remarks: Sequence[str]) -> str:
    """Return the page: the table, attainment along each axis, latency distributions and timelines."""
    points = sorted({outcome.point for outcome in outcomes}, key=_order)
    base = points[0] if len(points) == 1 else _base(points)
    seeds = len(outcomes[0].samples)
    notes = "".join(f'<div class="remark">{escape(remark)}</div>' for remark in remarks)
    lead = (
        f"Every policy served the same arrivals with the same deadlines on the same cluster, {seeds} "
        f"{'seed' if seeds == 1 else 'seeds'}; intervals are 95 %, differences are paired by seed (n. s.: not "
        f"significant). Dropped and failed requests count as missed; {routings(outcomes)}."
    )
    parts = [f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>{notes}']
    parts.append(_card(table(COLUMNS, _unbroken(rows(outcomes, regrets)), text_columns=1)))
    axes: tuple[tuple[str, str, Callable[[Point], float | str]], ...] = (
        ("Attainment against load", "load, as a multiple of the recorded rate", lambda point: point.load),
        ("Attainment against deadlines", "deadlines, as a multiple of the SLO", lambda point: point.slo_scale),
        ("Attainment against burstiness", "coefficient of variation of the gaps", lambda point: _where(point)[2]),
    )
    for heading, label, place in axes:
        along = [point for point in points if _only_differs(point, base, place)]
        if len({place(point) for point in along}) > 1:
            parts.append(f"<h2>{heading}</h2>{plot(_along(outcomes, along, place, label))}")
    shown = [each for each in outcomes if each.point == base]
    load, slo_scale, burstiness = _where(base)
    lead = f'<p class="lead">Of seed 0 at load {load}, SLO scale {slo_scale}, burstiness {escape(burstiness)}.</p>'
    parts.append(f"<h2>Latency</h2>{lead}{plot(_latencies(shown))}")
    parts.append(f"<h2>Goodput over time</h2>{lead}{plot(_timelines(shown))}")
    if regrets:
        parts.append(_regret_section(regrets))
    return document(title, "\n".join(parts))


def _regret_section(regrets: Sequence[Regret]) -> str:
    lead = (
        "The best placement known for the recorded trace in hindsight, and the ILP's proven bound on what any "
        "placement could have served."
    )
    lines = [
        [
            *_where(each.point),
            each.best,
            f"{each.best_rps:.4g}",
            "" if each.bound_rps is None else f"{each.bound_rps:.4g}",
            ", ".join(f"{name} {share:.1%}" for name, share in each.regret.items()),
        ]
        for each in regrets
    ]
    columns = ("load", "SLO scale", "burstiness", "best in hindsight", "its goodput (rps)", "bound (rps)", "regret")
    return f'<h2>Regret</h2><p class="lead">{lead}</p>{_card(table(columns, lines, text_columns=0))}'


def _card(drawn: str) -> str:
    return f'<div class="card" style="overflow-x:auto">{drawn}</div>'


def _unbroken(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return ``lines`` with numbers that stay on one line."""
    return [[line[0], *(cell.replace(" ", "\u00a0") for cell in line[1:])] for line in lines]


def _along(
    outcomes: Sequence[Outcome], points: Sequence[Point], place: Callable[[Point], float | str], label: str
) -> Any:
    figure = go.Figure()
    for position, name in enumerate(_policies(outcomes)):
        mine = [outcome for outcome in outcomes if outcome.policy == name and outcome.point in points]
        mine.sort(key=lambda outcome: _order(outcome.point))
        found = [mean_interval(outcome.attainments) for outcome in mine]
        above = [0.0 if each.high is None else (min(each.high, 1.0) - each.mean) * 100 for each in found]
        below = [0.0 if each.low is None else (each.mean - max(each.low, 0.0)) * 100 for each in found]
        figure.add_scatter(
            x=[place(outcome.point) for outcome in mine],
            y=[each.mean * 100 for each in found],
            error_y={
                "type": "data",
                "array": above,
                "arrayminus": below,
                "symmetric": False,
                "thickness": 1,
                "visible": any(above) or any(below),
            },
            name=name,
            mode="lines+markers",
            line={"color": _color(position)},
        )
    named = any(isinstance(place(point), str) for point in points)
    figure.update_xaxes(title_text=label, type="category" if named else "linear")
    lowest = min(
        value - down for line in figure.data for value, down in zip(line.y, line.error_y.arrayminus, strict=True)
    )
    figure.update_yaxes(title_text="attainment (%)", range=[max(0.0, lowest - max(0.5, (100 - lowest) / 10)), 100.5])
    return _styled(figure)


def _latencies(outcomes: Sequence[Outcome]) -> Any:
    figure = go.Figure()
    for position, outcome in enumerate(outcomes):
        latency_s = outcome.samples[0].latency_s
        share = np.linspace(0, 100, len(latency_s))
        shown = [(value * 1000, part) for value, part in zip(latency_s, share, strict=True) if value is not None]
        figure.add_scatter(
            x=[value for value, _ in shown],
            y=[part for _, part in shown],
            name=outcome.policy,
            mode="lines",
            line={"color": _color(position)},
        )
    ticks = [digit * 10.0**power for power in range(-3, 8) for digit in (1, 2, 5)]
    figure.update_xaxes(
        title_text="latency (ms)", type="log", tickvals=ticks, ticktext=[f"{tick:.7g}" for tick in ticks]
    )
    figure.update_yaxes(title_text="requests offered that finished within (%)", range=[0, 103])
    return _styled(figure)


def _timelines(outcomes: Sequence[Outcome]) -> Any:
    figure = go.Figure()
    for position, outcome in enumerate(outcomes):
        bins = outcome.samples[0].timeline
        if bins is None:
            continue
        if position == 0:
            line: dict[str, Any] = {"color": "#9aa7b4", "dash": "dot", "shape": "hv"}
            figure.add_scatter(x=bins["start_s"], y=bins["offered_rps"], name="offered", mode="lines", line=line)
        line = {"color": _color(position), "shape": "hv"}
        figure.add_scatter(x=bins["start_s"], y=bins["good_rps"], name=outcome.policy, mode="lines", line=line)
    figure.update_xaxes(title_text="seconds")
    figure.update_yaxes(title_text="good requests per second", rangemode="tozero")
    return _styled(figure)


def _styled(figure: Any) -> Any:
    figure.update_layout(
        template="plotly_white", height=400, margin={"l": 60, "r": 20, "t": 20, "b": 50}, legend={"orientation": "v"}
    )
    return figure


def _color(position: int) -> str:
    return PALETTE[position % len(PALETTE)]


def _policies(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(outcome.policy for outcome in outcomes))


def _order(point: Point) -> tuple[float, float, float]:
    return point.load, point.slo_scale, point.burstiness_cv or 0.0


def _base(points: Sequence[Point]) -> Point:
    """Return the point that the axes cross in: the recorded trace if it is among them."""
    return next((point for point in points if point == Point()), points[0])


def _only_differs(point: Point, base: Point, place: Callable[[Point], float | str]) -> bool:
    """Whether ``point`` lies on the axis ``place`` through ``base``."""
    fields = [(point.load, base.load), (point.slo_scale, base.slo_scale), (point.burstiness_cv, base.burstiness_cv)]
    return sum(mine != other for mine, other in fields) == (place(point) != place(base))


def _where(point: Point) -> list[str]:
    cv = "as recorded" if point.burstiness_cv is None else f"cv {point.burstiness_cv:g}"
    return [f"{point.load:g}", f"{point.slo_scale:g}", cv]


def _percent(interval: Interval) -> str:
    if interval.high is None:
        return f"{interval.mean:.2%}"
    return f"{interval.mean:.2%} ± {(interval.high - interval.mean) * 100:.2f}"


def _points(interval: Interval) -> str:
    if interval.high is None:
        return f"{interval.mean * 100:+.2f}"
    mark = "" if interval.excludes_zero else " (n. s.)"
    return f"{interval.mean * 100:+.2f} ± {(interval.high - interval.mean) * 100:.2f}{mark}"
