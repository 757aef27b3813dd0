"""An independent check of what a plan says about itself: objective, bound, gap, and what is left unserved.

Shares no code with the planner. Whether the bound is a bound is the solver's word; that it lies on the right side of an
objective that the placement really has, and that the gap is theirs, can be told from the plan.
"""

from __future__ import annotations

from collections.abc import Iterator

from plans.cluster import Cluster
from plans.errors import Fault
from plans.plan import Plan
from plans.service import Services

__all__ = ["check_certificate"]

_RELATIVE = 1e-5
"""Relative difference that rounding explains."""

_MINIMISED = ("gpus", "gpu-cost", "bytes-moved", "bytes-crossing")
"""Objectives whose bound lies below them; that of every other lies above."""

_LEAST_GAP_BASE = 1e-9
"""The gap is relative to the objective, or to this where that is smaller (``SolverReport``)."""


def check_certificate(plan: Plan, cluster: Cluster, services: Services) -> Iterator[Fault]:
    """Yield what the certificate states wrongly, for a plan whose names are those of its documents.

    The first objective is computed again where the placement tells it: goodput, GPUs and GPU cost. A polished plan
    keeps the certificate of the placement it started from, so its objective is not compared.
    """
    solver = plan.solver
    yield from _check_gap("solver", solver.objective, solver.bound, solver.gap)
    for tier in solver.tiers:
        where = f"solver.tiers.{tier.name}"
        yield from _check_gap(where, tier.objective, tier.bound, tier.gap)
        if tier.name in _MINIMISED and _above(tier.bound, tier.objective):
            yield _fault(
                f"{where}.bound", tier.bound, f"at most the objective {tier.objective:.9g}, which is minimised"
            )
        if tier.name not in _MINIMISED and _above(tier.objective, tier.bound):
            yield _fault(f"{where}.bound", tier.bound, f"at least the objective {tier.objective:.9g}")
    if solver.tiers and plan.polish is None:
        first = solver.tiers[0]
        if not _same(first.objective, solver.objective):
            yield _fault("solver.objective", solver.objective, f"{first.objective:.9g}, that of {first.name}")
        reached = _recomputed(first.name, plan, cluster, services)
        if reached is not None and not _same(reached, solver.objective):
            yield _fault("solver.objective", solver.objective, f"{reached:.9g}, the {first.name} of the placement")
    yield from _check_unserved(plan)


def _check_gap(where: str, objective: float, bound: float, gap: float) -> Iterator[Fault]:
    expected = abs(bound - objective) / max(abs(objective), _LEAST_GAP_BASE)
    if abs(gap - expected) > _RELATIVE * max(1.0, expected):
        yield _fault(f"{where}.gap", gap, f"{expected:.6g}, from objective {objective:.9g} and bound {bound:.9g}")


def _recomputed(name: str, plan: Plan, cluster: Cluster, services: Services) -> float | None:
    """Return the value of an objective from the placement; None where it takes more than the placement to tell."""
    if name == "goodput":
        weights = {service.name: service.weight for service in services.services}
        return sum(weights[entry.service] * entry.rate_rps for group in plan.groups for entry in group.loadout)
    if name == "gpus":
        return float(sum(len(group.gpus) for group in plan.groups))
    if name == "gpu-cost":
        return sum(len(group.gpus) * cluster.gpu_type_of(group.node).cost_per_hour for group in plan.groups)
    return None


def _check_unserved(plan: Plan) -> Iterator[Fault]:
    """What is planned and what is said to be unserved make up what is offered."""
    left = {each.service: each.rate_rps for each in plan.unserved}
    for prediction in plan.predicted:
        name, offered = prediction.service, prediction.offered_rps
        planned = sum(entry.rate_rps for group in plan.groups if (entry := group.entry(name)) is not None)
        missing = offered - planned
        if abs(missing - left.get(name, 0.0)) > _RELATIVE * max(1.0, offered):
            expected = f"{max(0.0, missing):.6g} rps: {offered:.6g} are offered and {planned:.6g} planned"
            yield _fault(f"unserved.{name}", f"{left.get(name, 0.0):.6g} rps", expected)


def _above(value: float, limit: float) -> bool:
    return value > limit + _RELATIVE * max(1.0, abs(limit))


def _same(value: float, other: float) -> bool:
    return not _above(value, other) and not _above(other, value)


def _fault(field: str, found: object, expected: str) -> Fault:
    return Fault(where="plan", field=field, found=str(found), expected=expected, remedy="plan again")
