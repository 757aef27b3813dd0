"""Naming what conflicts when no placement satisfies the hard constraints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from planner.backend import Budget, InfeasibleModel, Solution, solver
from planner.formulation import Formulation
from planner.space import PlanningSpace
from planner.unserved import binding

__all__ = ["Conflict", "find_conflicts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """One constraint of a conflicting set: the service, the field that states it, and what it meets."""

    service: str
    field: str
    detail: str

    def __str__(self) -> str:
        return f"{self.service}.{self.field}: {self.detail}"


def find_conflicts(space: PlanningSpace, clock: Callable[[], float], ends_at_s: float) -> tuple[Conflict, ...]:
    """Return a set of constraints that cannot hold together.

    Only minimum replicas force anything, so the set holds services with ``min_replicas``: one alone if one cannot be
    satisfied alone, else one from which none can be left out (deletion filter: drop each in turn, keep it only when
    the rest becomes feasible). When the time runs out the set may be larger than it has to be.
    """
    forced = [int(service) for service in np.flatnonzero(space.min_replicas > 0)]
    for service in forced:
        if not _feasible(space, [service], clock, ends_at_s, unknown=True):
            return (_conflict(space, service, _most_replicas(space, service, clock, ends_at_s)),)
    needed = list(forced)
    for service in forced:
        rest = [other for other in needed if other != service]
        if not _feasible(space, rest, clock, ends_at_s, unknown=True):
            needed = rest
    return tuple(_conflict(space, service, None) for service in needed)


def _feasible(
    space: PlanningSpace, services: list[int], clock: Callable[[], float], ends_at_s: float, *, unknown: bool
) -> bool:
    """Say whether the minimum replicas of ``services`` fit together; ``unknown`` when the time runs out."""
    if clock() >= ends_at_s:
        return unknown
    relaxed = _with_minimum(space, services)
    for classes in (space.classes, space.singles):
        answer = _solve(Formulation(relaxed, classes), space, ends_at_s - clock())
        if isinstance(answer, InfeasibleModel):
            return False
    return isinstance(answer, Solution) or unknown


def _most_replicas(
    space: PlanningSpace, service: int, clock: Callable[[], float], ends_at_s: float
) -> tuple[int, str] | None:
    """Return how many replicas of ``service`` fit when it has the cluster to itself, and what stops the next."""
    formulation = Formulation(_with_minimum(space, []), space.singles)
    mine = np.flatnonzero(space.service_of[formulation.pair_option] == service)
    objective = np.zeros(len(formulation.model.variables))
    objective[formulation.run[mine]] = 1.0
    model = formulation.model.with_objective(objective, maximise=True)
    answer = solver(space.problem.settings.backend).solve(model, Budget(time_limit_s=max(0.5, ends_at_s - clock())))
    if not isinstance(answer, Solution):
        return None
    return round(answer.objective), binding(space, formulation.decode(answer.values), service).detail


def _with_minimum(space: PlanningSpace, services: list[int]) -> PlanningSpace:
    least = np.zeros_like(space.min_replicas)
    least[services] = space.min_replicas[services]
    return replace(space, min_replicas=least)


def _solve(formulation: Formulation, space: PlanningSpace, time_limit_s: float) -> object:
    """Look for any feasible point: no objective."""
    settings = space.problem.settings
    budget = Budget(time_limit_s=max(0.05, time_limit_s), seed=settings.seed)
    return solver(settings.backend).solve(formulation.model, budget)


def _conflict(space: PlanningSpace, service: int, most: tuple[int, str] | None) -> Conflict:
    name = space.names[service]
    wanted = int(space.min_replicas[service])
    document = space.problem.services.service(name)
    others = [
        text
        for text, stated in (
            (f"max_gpus {document.max_gpus}", document.max_gpus is not None),
            (f"pin {', '.join(document.pin)}", document.pin),
            (f"forbid {', '.join(document.forbid)}", document.forbid),
        )
        if stated
    ]
    against = f" under {'; '.join(others)}" if others else ""
    if most is None:
        detail = f"needs {wanted} replicas{against}, together with the other services named"
    else:
        detail = f"needs {wanted} replicas{against}; at most {most[0]} fit, because: {most[1]}"
    return Conflict(service=name, field="min_replicas", detail=detail)
