"""Why no placement satisfies the hard limits: a smallest conflicting set, and the least relaxation.

A limit is something that a user stated: a minimum of replicas, a budget, a pin, a required attainment. GPUs, memory and
deadlines are not: they are what the limits conflict over. The set is irreducible: it cannot be satisfied, and without
any one of its members it can (U. Junker, "QuickXplain: preferred explanations and relaxations for over-constrained
problems", AAAI 2004).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.backend import Budget, InfeasibleModel, Solution, solver_for
from planner.formulation import Formulation
from planner.linear import Floats, Integers, LinearModel
from planner.problem import Problem
from planner.space import PlanningSpace, build_space
from planner.unserved import binding
from plans.service import Service

__all__ = ["Conflict", "Relaxation", "explain_infeasible", "find_conflicts", "least_relaxation", "limits", "only"]

Limit = tuple[str, str]
"""(service or workflow, field); the name is empty for a setting that holds for all."""

_FIELDS: dict[str, object] = {
    "min_replicas": 0,
    "max_gpus": None,
    "pin": (),
    "forbid": (),
    "min_accuracy": 0.0,
    "spread": None,
}
"""Fields of a service that limit it, and what they are when they do not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """One limit of a conflicting set: the service (or workflow), the field that states it, and what it meets."""

    service: str
    field: str
    detail: str

    def __str__(self) -> str:
        return f"{self.service}.{self.field}: {self.detail}" if self.service else f"{self.field}: {self.detail}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxation:
    """One step of the least relaxation: ``field`` of ``service`` from what is asked to what can be had."""

    service: str
    field: str
    stated: float
    possible: float

    def __str__(self) -> str:
        return f"{self.service}.{self.field}: {self.stated:.4g} -> {self.possible:.4g}"


def limits(problem: Problem) -> tuple[Limit, ...]:
    """Return every limit that ``problem`` states, those that force something first."""
    services = problem.services.services
    forcing = [(service.name, "min_replicas") for service in services if service.min_replicas]
    if problem.settings.attainment is not None:
        forcing += [(service.name, "attainment") for service in services]
    if problem.settings.keep_after_loss > 0:
        forcing.append(("", "keep_after_loss"))
    others = [
        (service.name, field)
        for service in services
        for field, free in _FIELDS.items()
        if field != "min_replicas" and getattr(service, field) != free
    ]
    others += [(each.name, "affinity") for each in problem.services.workflows if each.affinity == "require"]
    return (*forcing, *others)


def only(problem: Problem, kept: Iterable[Limit]) -> PlanningSpace:
    """Return the space of ``problem`` with the limits ``kept`` alone."""
    keep = set(kept)
    services = tuple(_freed(service, keep) for service in problem.services.services)
    workflows = tuple(
        each
        if (each.name, "affinity") in keep or each.affinity != "require"
        else each.model_copy(update={"affinity": "none"})
        for each in problem.services.workflows
    )
    loss = problem.settings.keep_after_loss if ("", "keep_after_loss") in keep else 0.0
    space = build_space(
        replace(
            problem,
            services=problem.services.model_copy(update={"services": services, "workflows": workflows}),
            settings=replace(problem.settings, keep_after_loss=loss),
        )
    )
    asked = np.array([(name, "attainment") in keep for name in space.names])
    least = np.where(asked, space.requirements.least_rps, 0.0)
    return replace(space, requirements=replace(space.requirements, least_rps=least))


def find_conflicts(space: PlanningSpace, clock: Callable[[], float], ends_at_s: float) -> tuple[Conflict, ...]:
    """Return an irreducible set of limits that cannot hold together.

    When the time runs out the set may be larger than it has to be: what is not proven to conflict is taken to fit.
    """
    problem = space.problem

    def conflicting(kept: Sequence[Limit]) -> bool:
        return clock() < ends_at_s and _proven_infeasible(only(problem, kept), ends_at_s - clock())

    found = _quick_explain((), False, limits(problem), conflicting)
    return tuple(_described(problem, limit, found, clock, ends_at_s) for limit in found)


def explain_infeasible(
    problem: Problem, *, clock: Callable[[], float], time_limit_s: float
) -> tuple[tuple[Conflict, ...], tuple[Relaxation, ...]]:
    """Return an irreducible conflict of ``problem`` and its least relaxation; both empty when it is feasible."""
    space = build_space(problem)
    ends_at_s = clock() + time_limit_s
    if not _proven_infeasible(space, time_limit_s):
        return (), ()
    return find_conflicts(space, clock, ends_at_s), least_relaxation(space, max(1.0, ends_at_s - clock()))


def least_relaxation(space: PlanningSpace, time_limit_s: float) -> tuple[Relaxation, ...]:
    """Return which numbers to relax, by how much: the least sum of changes, each as a share of what is asked.

    Minimum replicas and domains and required rates may fall, budgets may grow. Empty when nothing of that helps, or no
    answer was found in time.
    """
    formulation = Formulation(space, space.singles)
    model = formulation.model
    rows = {name: row for row, name in enumerate(model.rows)}
    elastic: list[tuple[int, float, float, str, str]] = []
    for index, service in enumerate(space.problem.services.services):
        asked = float(space.requirements.least_rps[index])
        for name, field, sign, size in (
            (f"replicas.{service.name}", "min_replicas", 1.0, float(service.min_replicas)),
            (f"domains.{service.name}", "spread.min_domains", 1.0, float(getattr(service.spread, "min_domains", 0))),
            (f"budget.{service.name}", "max_gpus", -1.0, float(service.max_gpus or 1)),
            (f"attain.{service.name}", "attainment", 1.0, asked),
        ):
            if name in rows:
                elastic.append((rows[name], sign, max(size, 1e-9), service.name, field))
    loosened, slack = _with_slack(model, elastic)
    settings = space.problem.settings
    budget = Budget(time_limit_s=max(0.05, time_limit_s), seed=settings.seed)
    answer = solver_for(settings).solve(loosened, budget)
    if not isinstance(answer, Solution):
        return ()
    offered = dict(zip(space.names, space.offered_rps.tolist(), strict=True))
    found = []
    for column, (row, sign, _, named, field) in zip(slack, elastic, strict=True):
        amount = float(answer.values[column])
        if amount > 1e-6:
            stated = float(model.row_lower[row] if sign > 0 else model.row_upper[row])
            scale = 1.0 / offered[named] if field == "attainment" else 1.0
            # Shares are rounded down to what is surely possible.
            possible = (stated - sign * amount) * scale - (1e-6 if field == "attainment" else 0.0)
            found.append(Relaxation(service=named, field=field, stated=stated * scale, possible=possible))
    return tuple(found)


def _freed(service: Service, keep: set[Limit]) -> Service:
    dropped = {field: free for field, free in _FIELDS.items() if (service.name, field) not in keep}
    return service.model_copy(update=dropped)


def _quick_explain(
    background: tuple[Limit, ...],
    grown: bool,
    candidates: tuple[Limit, ...],
    conflicting: Callable[[Sequence[Limit]], bool],
) -> tuple[Limit, ...]:
    """Return the members of ``candidates`` in a smallest conflict with ``background``, which may have ``grown``."""
    if grown and conflicting(background):
        return ()
    if len(candidates) <= 1:
        return candidates
    middle = len(candidates) // 2
    left, right = candidates[:middle], candidates[middle:]
    needed_right = _quick_explain((*background, *left), bool(left), right, conflicting)
    needed_left = _quick_explain((*background, *needed_right), bool(needed_right), left, conflicting)
    return (*needed_left, *needed_right)


def _proven_infeasible(space: PlanningSpace, time_limit_s: float) -> bool:
    """Say whether a solver proves that nothing satisfies ``space``, over classes or over groups."""
    settings = space.problem.settings
    budget = Budget(time_limit_s=max(0.05, time_limit_s), seed=settings.seed)
    linear = solver_for(settings)
    return any(
        isinstance(linear.solve(Formulation(space, classes).model, budget), InfeasibleModel)
        for classes in (space.classes, space.singles)
    )


def _described(
    problem: Problem, limit: Limit, together: Sequence[Limit], clock: Callable[[], float], ends_at_s: float
) -> Conflict:
    name, field = limit
    others = [each for each in together if each != limit]
    if field == "min_replicas":
        service = problem.services.service(name)
        detail = f"needs {service.min_replicas} replicas"
        most = _most_replicas(only(problem, others), name, ends_at_s - clock())
        if most is not None:
            detail += f"; at most {most[0]} fit" + (
                f", because: {most[1]}" if not others else " beside the others named"
            )
    elif field == "attainment":
        detail = f"asks for {problem.settings.attainment:.2%} of the rate to be served"
        most_share = _most_share(only(problem, others), name, ends_at_s - clock())
        detail += "" if most_share is None else f"; at most {most_share:.2%} can be"
    elif field == "keep_after_loss":
        detail = f"asks that {problem.settings.keep_after_loss:.0%} of every rate survive the loss of any node"
    elif field == "affinity":
        detail = "asks that every call stay on its caller's node"
    elif field == "spread":
        spread = problem.services.service(name).spread
        detail = f"asks for replicas over {spread.over}s" if spread is not None else ""
        detail += f" (max_skew {spread.max_skew}, min_domains {spread.min_domains})" if spread is not None else ""
    else:
        value = getattr(problem.services.service(name), field)
        text = ", ".join(value) if isinstance(value, tuple) else f"{value:g}"
        detail = f"{field} {text}"
    return Conflict(service=name, field=field, detail=detail)


def _most_replicas(space: PlanningSpace, name: str, time_limit_s: float) -> tuple[int, str] | None:
    """Return how many replicas of a service fit, and what stops the next; None when that is not known in time."""
    formulation = Formulation(space, space.singles)
    service = space.names.index(name)
    mine = np.flatnonzero(space.service_of[formulation.pair_option] == service)
    objective = np.zeros(len(formulation.model.variables))
    objective[formulation.run[mine]] = 1.0
    answer = _optimum(formulation, objective, time_limit_s)
    if answer is None:
        return None
    return round(answer.objective), binding(space, formulation.decode(answer.values), service).detail


def _most_share(space: PlanningSpace, name: str, time_limit_s: float) -> float | None:
    formulation = Formulation(space, space.singles)
    service = space.names.index(name)
    objective = np.zeros(len(formulation.model.variables))
    objective[formulation.served[service]] = 1.0 / max(float(space.offered_rps[service]), 1e-12)
    answer = _optimum(formulation, objective, time_limit_s)
    return None if answer is None else answer.objective


def _optimum(formulation: Formulation, objective: Floats, time_limit_s: float) -> Solution | None:
    settings = formulation.space.problem.settings
    budget = Budget(time_limit_s=max(0.5, time_limit_s), seed=settings.seed)
    answer = solver_for(settings).solve(formulation.model.with_objective(objective, maximise=True), budget)
    return answer if isinstance(answer, Solution) else None


def _with_slack(
    model: LinearModel, elastic: Sequence[tuple[int, float, float, str, str]]
) -> tuple[LinearModel, Integers]:
    """Give each row a variable that loosens it, integer except for rates, and minimise their sum over their sizes."""
    first, count = len(model.variables), len(elastic)
    columns = np.arange(first, first + count, dtype=np.int64)
    whole = np.array([field != "attainment" for *_, field in elastic], dtype=bool)
    objective = np.concatenate([np.zeros(first), [1.0 / size for _, _, size, _, _ in elastic]])
    order = np.argsort(np.concatenate([model.row_of, [row for row, *_ in elastic]]).astype(np.int64), kind="stable")
    return (
        replace(
            model,
            variables=(*model.variables, *(f"loosen[{service}.{field}]" for *_, service, field in elastic)),
            lower=np.concatenate([model.lower, np.zeros(count)]),
            upper=np.concatenate([model.upper, np.full(count, 1e6)]),
            integer=np.concatenate([model.integer, whole]),
            row_of=np.concatenate([model.row_of, [row for row, *_ in elastic]]).astype(np.int64)[order],
            column_of=np.concatenate([model.column_of, columns])[order],
            value_of=np.concatenate([model.value_of, [sign for _, sign, *_ in elastic]])[order],
            objective=objective,
            maximise=False,
        ),
        columns,
    )
