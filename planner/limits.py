"""The limits that a user stated, and models in which each of them can be dropped.

A limit is a minimum of replicas, a budget, a pin, a required attainment. GPUs, memory and deadlines are not: they are
what limits conflict over.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from planner.backend import Budget, InfeasibleModel, Solution, solver_for
from planner.formulation import Formulation
from planner.lexicographic import LARGEST_EXACT_MODEL
from planner.linear import Integers, LinearModel
from planner.problem import Problem
from planner.space import PlanningSpace, build_space
from plans.service import Service

__all__ = ["Elastic", "Limit", "LimitModels", "forces", "joined", "limits", "narrowed", "only"]

Limit = tuple[str, str]
"""(service or workflow, field); the name is empty for a setting that holds for all."""

LOSS: Limit = ("", "keep_after_loss")

_FIELDS: dict[str, object] = {
    "min_replicas": 0,
    "max_gpus": None,
    "pin": (),
    "forbid": (),
    "min_accuracy": 0.0,
    "spread": None,
}
"""Fields of a service that limit it, and what they are when they do not."""

_ROWS = {"replicas": "min_replicas", "budget": "max_gpus", "attain": "attainment"}
"""Rows of a formulation that state a limit alone: they are loosened where it is dropped. Others are built anew."""

_CLASSES_SHARE = 0.2
"""Share of the time left that whole counts over classes may take before single groups are tried."""

_PRICED = 1e-9
"""Price of a row, times the largest activity in it, from which on it counts as one."""

_CONFLICTING = 1e-5
"""Shortfall, as a share of what is asked for, from which on a linear relaxation counts as broken."""


def limits(problem: Problem) -> tuple[Limit, ...]:
    """Return every limit that ``problem`` states, those that force something first."""
    services = problem.services.services
    forcing = [(service.name, "min_replicas") for service in services if service.min_replicas]
    if problem.settings.attainment is not None:
        forcing += [(service.name, "attainment") for service in services]
    if problem.settings.keep_after_loss > 0:
        forcing.append(LOSS)
    others = [
        (service.name, field)
        for service in services
        for field, free in _FIELDS.items()
        if field != "min_replicas" and getattr(service, field) != free
    ]
    others += [(each.name, "affinity") for each in problem.services.workflows if each.affinity == "require"]
    return (*forcing, *others)


def forces(problem: Problem, limit: Limit) -> bool:
    """Say whether ``limit`` asks for something, so that a plan without replicas breaks it; the others only forbid."""
    name, field = limit
    if field == "spread":
        spread = problem.services.service(name).spread
        return spread is not None and spread.min_domains > 0
    return field in ("min_replicas", "attainment")


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
    loss = problem.settings.keep_after_loss if LOSS in keep else 0.0
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


def joined(problem: Problem) -> list[frozenset[str]]:
    """Return the services in sets that no workflow joins, in the order of the document."""
    found: dict[str, set[str]] = {service.name: {service.name} for service in problem.services.services}
    for workflow in problem.services.workflows:
        stages = [name for edge in workflow.edges for name in (edge.source, edge.target)]
        together = set[str]().union(*(found[name] for name in stages))
        found |= dict.fromkeys(together, together)
    return [frozenset(names) for names in {id(names): names for names in found.values()}.values()]


def narrowed(problem: Problem, names: Collection[str]) -> Problem:
    """Return ``problem`` with the services ``names`` alone, a union of `joined` sets, and no objective of its own.

    Services that nothing forces to run take nothing from the others, so limits of ``names`` can be kept together here
    exactly when they can be in the whole problem.
    """
    services = tuple(each for each in problem.services.services if each.name in names)
    workflows = tuple(each for each in problem.services.workflows if each.edges[0].source in names)
    plain = replace(problem.settings, objective="goodput", minimize=None, scenarios=0)
    narrow = problem.services.model_copy(update={"services": services, "workflows": workflows})
    return replace(problem, services=narrow, settings=plain)


class LimitModels:
    """Says which limits can be kept together, from models that are built once and loosened.

    Args:
        problem: The problem.
        candidates: The limits to ask about; only the services that they name, and those joined to them, are built.
        clock: Monotonic clock, seconds.
        ends_at_s: When to stop: from then on nothing is known.
    """

    def __init__(
        self, problem: Problem, candidates: Iterable[Limit], clock: Callable[[], float], ends_at_s: float
    ) -> None:
        self._candidates = tuple(candidates)
        names = services_of(problem, self._candidates)
        self._problem = narrowed(problem, names)
        self._clock, self._ends_at_s = clock, ends_at_s
        self._solver = solver_for(self._problem.settings)
        self._built: dict[frozenset[Limit], _Built] = {}
        self._fitting: list[frozenset[Limit]] = []

    @property
    def left_s(self) -> float:
        """Seconds that are left, below 0 when time is over."""
        return self._ends_at_s - self._clock()

    def conflicting(self, kept: Sequence[Limit], *, linear: bool = False) -> bool | None:
        """Say whether ``kept`` cannot be kept together; None when that is not known in time.

        A ``linear`` relaxation never tells that they can be.
        """
        keep = frozenset(kept)
        if any(keep <= each for each in self._fitting):
            return False
        if self.left_s <= 0:
            return None
        built = self.built(keep)
        over_classes = loosened(built.over_classes, keep)
        verdict: bool | None = None
        if isinstance(self.solve(over_classes.relaxed()), InfeasibleModel):
            return True
        if linear:
            return None
        if isinstance(self.solve(over_classes, _CLASSES_SHARE), InfeasibleModel):
            return True
        if built.is_small and self.left_s > 0:
            answer = self.solve(loosened(built.over_groups, keep))
            verdict = {Solution: False, InfeasibleModel: True}.get(type(answer))
        if verdict is False:
            self._fitting.append(keep)
        return verdict

    def built(self, keep: Collection[Limit]) -> _Built:
        """Return the models in which everything of ``keep`` is stated, and all that rows alone state."""
        built = frozenset(limit for limit in self._candidates if limit in keep or limit[1] in _ROWS.values())
        if built not in self._built:
            self._built[built] = _Built(only(self._problem, built))
        return self._built[built]

    def solve(self, model: LinearModel, share: float = 1.0) -> object:
        """Return the solver's answer within ``share`` of the time that is left, proven to 1e-6."""
        settings = self._problem.settings
        return self._solver.solve(
            model, Budget(time_limit_s=max(0.01, share * self.left_s), gap=1e-6, seed=settings.seed)
        )


class _Built:
    """A space with its models, each built when it is first asked for."""

    def __init__(self, space: PlanningSpace) -> None:
        self.space = space

    @property
    def is_small(self) -> bool:
        """Whether a model over single groups is worth building."""
        return sum(len(group.options) for group in self.space.groups) <= LARGEST_EXACT_MODEL

    @cached_property
    def over_classes(self) -> Formulation:
        """The model over classes, a relaxation."""
        return Formulation(self.space, self.space.classes)

    @cached_property
    def over_groups(self) -> Formulation:
        """The exact model."""
        return Formulation(self.space, self.space.singles)


class Elastic:
    """The linear relaxation over classes, in which everything that is asked for may fall short at a price.

    Args:
        problem: The problem, with every limit.
    """

    def __init__(self, problem: Problem) -> None:
        from planner.program import LinearProgram  # MathOpt loads with it

        space = build_space(narrowed(problem, services_of(problem, limits(problem))))
        formulation = Formulation(space, space.classes)
        model = formulation.model
        self._model = model
        self._rows = dict(rows_of(formulation))
        asked = [limit for limit in self._rows if limit[1] in ("attainment", "min_replicas")]
        rows = np.array([self._rows[limit][0] for limit in asked], dtype=np.int64)
        first, count = len(model.variables), len(asked)
        columns = np.arange(first, first + count, dtype=np.int64)
        self._slack = dict(zip(asked, columns.tolist(), strict=True))
        lower, upper = np.append(model.lower, np.zeros(count)), np.append(model.upper, np.ones(count))
        value_of = np.append(model.value_of, model.row_lower[rows])
        column_of, row_of = np.append(model.column_of, columns), np.append(model.row_of, rows)
        scale = np.full(len(model.rows), 1e-9)
        np.maximum.at(scale, row_of, np.abs(value_of) * np.minimum(upper, 1e6)[column_of])
        self._scale = scale
        self._program = LinearProgram(
            model.row_lower,
            model.row_upper,
            lower,
            upper,
            np.append(np.zeros(first), -np.ones(count)),
            row_of,
            column_of,
            value_of,
            row_scale=scale,
            objective_scale=1.0,
        )

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The limits that can be dropped here."""
        return tuple(self._rows)

    def shortfall(self, kept: Collection[Limit], time_limit_s: float) -> frozenset[Limit] | None:
        """Return which of ``kept`` conflict in this relaxation; empty when they do not, None when that is not known.

        These are the rows with a price where as little as possible falls short: the prices prove that the others can be
        left out (duality). What the other rows of the problem ask for stays.
        """
        keep = set(kept)
        low, high = self._model.row_lower.copy(), self._model.row_upper.copy()
        for limit, rows in self._rows.items():
            if limit not in keep:
                low[rows], high[rows] = -np.inf, np.inf
        self._program.set_rows(low, high)
        found = self._program.solve(time_limit_s)
        if found is None:
            return None
        if max((float(found.values[at]) for at in self._slack.values()), default=0.0) <= _CONFLICTING:
            return frozenset()
        priced = np.abs(found.duals) * self._scale > _PRICED
        return frozenset(limit for limit, rows in self._rows.items() if limit in keep and priced[rows].any())


def services_of(problem: Problem, chosen: Iterable[Limit]) -> frozenset[str]:
    """Return the services that ``chosen`` name, by themselves or by their workflow, and all joined to them."""
    entries = {each.name: each.edges[0].source for each in problem.services.workflows}
    names = {entries[name] if field == "affinity" else name for name, field in chosen}
    return frozenset[str]().union(*(each for each in joined(problem) if each & names))


def rows_of(formulation: Formulation) -> Iterator[tuple[Limit, Integers]]:
    """Yield the limits that rows of ``formulation`` state alone, with these rows: the one that names it first."""
    least: dict[str, list[int]] = {}
    found: list[tuple[Limit, int]] = []
    for row, name in enumerate(formulation.model.rows):
        kind, _, rest = name.partition(".")
        if kind in _ROWS:
            found.append(((rest, _ROWS[kind]), row))
        elif kind == "least" and rest.isdecimal():
            option = formulation.pair_option[int(rest)]
            least.setdefault(formulation.space.options[option].service, []).append(row)
    for (name, field), row in found:
        yield (name, field), np.array([row, *(least.get(name, ()) if field == "min_replicas" else ())], dtype=np.int64)


def loosened(formulation: Formulation, kept: Collection[Limit]) -> LinearModel:
    """Return the model of ``formulation`` without the rows of limits that are not ``kept``."""
    model = formulation.model
    low, high = model.row_lower.copy(), model.row_upper.copy()
    for limit, rows in rows_of(formulation):
        if limit not in kept:
            low[rows], high[rows] = -np.inf, np.inf
    return replace(model, row_lower=low, row_upper=high)


def _freed(service: Service, keep: set[Limit]) -> Service:
    dropped = {field: free for field, free in _FIELDS.items() if (service.name, field) not in keep}
    return service.model_copy(update=dropped)
