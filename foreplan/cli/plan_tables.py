"""A plan as people and programs read it on stdout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreplan.cli.output import Output

if TYPE_CHECKING:
    from plans.plan import Plan, Prediction, Unserved

__all__ = ["plan_json", "print_plan"]


def plan_json(plan: Plan, path: Path) -> dict[str, Any]:
    """Return what ``plan --json`` prints."""
    data = plan.model_dump(mode="json", by_alias=True)
    kept = {key: data[key] for key in ("solver", "predicted", "unserved", "shadow_prices", "warnings")}
    if plan.polish is not None:
        kept["polish"] = data["polish"]
    return kept | {"plan": str(path), "gpus_used": plan.gpus_used}


def _attainment(prediction: Prediction) -> str:
    if prediction.attainment_interval is None:
        return f"{prediction.attainment:.2%}"
    low, high = prediction.attainment_interval
    return f"{prediction.attainment:.2%} ({low:.2%} to {high:.2%})"


def _left_out(left: Unserved, predicted: Prediction | None) -> str:
    """Say what of a service is not planned for; queueing and simulation may well predict that some of it is served."""
    text = f"{left.service} {left.rate_rps:.4g} rps ({left.reason}): {left.detail}"
    planned_rps = 0.0 if predicted is None else predicted.offered_rps - left.rate_rps
    if predicted is None or planned_rps <= 1e-6 * predicted.offered_rps:
        return f"unserved: {text}"
    more = predicted.goodput_rps > planned_rps * (1 + 1e-3)
    beside = f"; predicted in time all the same: {predicted.goodput_rps:.4g} rps in all" if more else ""
    return f"beyond the planned utilisation: {text}{beside}"


def print_plan(out: Output, plan: Plan) -> None:
    """Print certificate, placement, predictions, contingencies, transition and warnings."""
    _print_certificate(out, plan)
    _print_placement(out, plan)
    _print_predicted(out, plan)
    _print_contingencies(out, plan)
    _print_transition(out, plan)
    for warning in plan.warnings:
        out.warn(warning)


def _print_certificate(out: Output, plan: Plan) -> None:
    from plans.units import format_seconds

    solver = plan.solver
    first = solver.tiers[0].name if solver.tiers else "goodput"
    unit = " rps (weighted)" if first == "goodput" else ""
    proven = "at least" if solver.bound < solver.objective else "at most"
    out.say(
        f"{solver.status}: {first} {solver.objective:.6g}{unit}, proven {proven} {solver.bound:.6g}, gap "
        f"{solver.gap:.3%}; {plan.gpus_used} GPUs; {solver.name}, {format_seconds(solver.wall_s)}"
    )
    if plan.polish is not None:
        polish = plan.polish
        out.say(
            f"polished by {polish.scorer}: attainment {polish.start_attainment:.2%} -> {polish.attainment:.2%} on the "
            f"traces that it was chosen by; predicted below on {polish.traces} others ({polish.arrivals}); "
            f"{polish.candidates} candidates, {format_seconds(polish.wall_s)}"
        )


def _print_placement(out: Output, plan: Plan) -> None:
    from plans.units import format_bytes

    out.table(
        ["group", "tp", "pp", "service", "variant", "batch", "rate (rps)", "memory per GPU"],
        [
            [
                group.id,
                group.tp,
                group.pp,
                entry.service,
                entry.variant,
                entry.max_batch,
                entry.rate_rps,
                format_bytes(max(entry.memory_bytes)),
            ]
            for group in plan.groups
            for entry in group.loadout
        ],
        title="Placement",
    )


def _print_predicted(out: Output, plan: Plan) -> None:
    out.table(
        ["service", "offered (rps)", "goodput (rps)", "attainment", "p50 (ms)", "p99 (ms)", "accuracy", "confidence"],
        [
            [
                prediction.service,
                prediction.offered_rps,
                prediction.goodput_rps,
                _attainment(prediction),
                None if prediction.latency_s.p50 is None else prediction.latency_s.p50 * 1000,
                None if prediction.latency_s.p99 is None else prediction.latency_s.p99 * 1000,
                prediction.accuracy,
                prediction.confidence,
            ]
            for prediction in plan.predicted
        ],
        title="Predicted",
    )
    predicted = {each.service: each for each in plan.predicted}
    for left in plan.unserved:
        out.say(_left_out(left, predicted.get(left.service)))
    for gpu_type, price in plan.shadow_prices.items():
        out.say(f"one more {gpu_type} adds {price:.4g} weighted rps to the relaxation's goodput")


def _print_contingencies(out: Output, plan: Plan) -> None:
    if plan.contingencies:
        worst = min(plan.contingencies, key=lambda each: each.goodput_rps / max(each.offered_rps, 1e-12))
        mean = sum(each.goodput_rps for each in plan.contingencies) / len(plan.contingencies)
        out.say(
            f"{len(plan.contingencies)} contingencies: {mean:.4g} rps (weighted) on average; the worst, {worst.kind} "
            f"{worst.name}, serves {worst.goodput_rps:.4g} of {worst.offered_rps:.4g}"
        )


def _print_transition(out: Output, plan: Plan) -> None:
    from plans.units import format_bytes, format_seconds

    if plan.transition:
        out.table(
            ["step", "action", "group", "service", "moves", "about"],
            [
                [s.step, s.action, s.group, s.service, format_bytes(s.moved_bytes), format_seconds(s.est_s)]
                for s in plan.transition
            ],
            title="Transition",
        )
