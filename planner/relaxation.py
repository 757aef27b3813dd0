"""The least change of the numbers that a user asked for with which a problem has a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

import numpy as np

from planner.backend import Budget, Solution, Solver, solver_for
from planner.formulation import Formulation
from planner.greedy import greedy
from planner.lexicographic import LARGEST_EXACT_MODEL
from planner.limits import Limit, limits, narrowed, services_of
from planner.linear import Floats, LinearModel
from planner.problem import Problem
from planner.space import PlanningSpace, build_space

__all__ = ["Relaxation", "least_relaxation"]

_ROUNDING = 1e-6
"""By how much a share is put below what the solver says is possible."""

_MOST = 1e6
"""By how much a count may grow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxation:
    """One step of the least relaxation: ``field`` of ``service`` from what is asked to what can be had.

    ``service`` is empty for the settings that are one number for all services.
    """

    service: str
    field: str
    stated: float
    possible: float

    @property
    def change(self) -> float:
        """By which share of what is asked it changes; an amount where nothing is asked."""
        return abs(self.stated - self.possible) / (self.stated or 1.0)

    def __str__(self) -> str:
        # Cut, not rounded: what is printed must be possible.
        possible = math.floor(self.possible * 1e4 + 1e-9) / 1e4
        name = f"{self.service}.{self.field}" if self.service else self.field
        return f"{name}: {self.stated:.4g} -> {possible:.6g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Number:
    """A number that may give way: a column of 0 up to ``upper``, which costs ``cost`` per unit.

    Attributes:
        service: Name of the service, empty for all.
        field: What the user stated.
        stated: As stated.
        sign: 1 where it grows, -1 where it falls.
        cost: Per unit.
        upper: Most that it may give way.
        integer: Whether only by whole units.
        entries: Coefficients of the column in rows (positions) of the model.
        above: Rows (positions) whose upper limit alone the column raises, by one per unit.
        opens: Columns of which none may be above 0 while this one is 0; the column then is 0 or 1.
    """

    service: str
    field: str
    stated: float
    sign: float
    cost: float
    upper: float
    integer: bool = True
    entries: tuple[tuple[int, float], ...] = ()
    above: tuple[int, ...] = ()
    opens: tuple[int, ...] = ()


def least_relaxation(
    problem: Problem, conflict: Collection[Limit], clock: Callable[[], float], ends_at_s: float
) -> tuple[tuple[Relaxation, ...], bool, bool]:
    """Return which numbers to relax by how much: the least sum of changes, each as a share of what is asked.

    Minimum replicas, domains and accuracy, required shares and what survives a loss may fall; budgets and skews may
    grow. Without steps when nothing of that helps, or no answer was found in time.

    Args:
        problem: The problem.
        conflict: Limits of it that conflict. Where all of it is too large a model over single groups, their services
            alone are looked at.
        clock: Monotonic clock, seconds.
        ends_at_s: When to stop.

    Returns:
        The steps, whether they are proven least, and whether the whole problem was looked at.
    """
    everywhere = True
    space = _without_accuracy(problem, services_of(problem, limits(problem)))
    if space.pair_count > LARGEST_EXACT_MODEL:
        everywhere = False
        space = _without_accuracy(problem, services_of(problem, conflict))
    if clock() >= ends_at_s or space.pair_count > LARGEST_EXACT_MODEL:
        return (), False, everywhere
    formulation = Formulation(space, space.singles)
    numbers = tuple(_numbers(problem, formulation))
    steps, least = _solved(formulation, numbers, clock, ends_at_s)
    if {"attainment", "keep_after_loss"} <= {each.field for each in steps}:
        # Their rows are exact for each alone; together they cost more than the model says.
        tried = [steps]
        for field in ("attainment", "keep_after_loss"):
            alone = tuple(each for each in numbers if each.field != field)
            tried.append(_solved(formulation, alone, clock, ends_at_s)[0])
        return min(filter(None, tried), key=lambda each: sum(step.change for step in each)), False, everywhere
    return steps, least, everywhere


def _solved(
    formulation: Formulation, numbers: tuple[_Number, ...], clock: Callable[[], float], ends_at_s: float
) -> tuple[tuple[Relaxation, ...], bool]:
    """Return the least change of ``numbers``, empty when none was found, and whether it is proven least."""
    if clock() >= ends_at_s:
        return (), False
    settings = formulation.space.problem.settings
    model = _with_numbers(formulation.model, numbers)
    linear = solver_for(settings)
    start = _start(formulation, model, linear, Budget(time_limit_s=max(0.01, ends_at_s - clock())))
    budget = Budget(time_limit_s=max(0.01, ends_at_s - clock()), gap=1e-6, seed=settings.seed)
    answer = linear.solve(model, budget, start)
    if not isinstance(answer, Solution):
        return (), False
    amounts = answer.values[len(formulation.model.variables) :]
    return tuple(_steps(numbers, amounts)), answer.stopped == "optimal"


def _start(formulation: Formulation, model: LinearModel, linear: Solver, budget: Budget) -> Floats | None:
    """Return values of ``model`` with the replicas that greedy places; None when no change of shares makes them do."""
    placement = greedy(formulation.space)
    if placement is None:
        return None
    values = formulation.encode(placement)
    at = np.concatenate([formulation.use, formulation.run])
    lower, upper = model.lower.copy(), model.upper.copy()
    lower[at] = upper[at] = values[at]
    answer = linear.solve(model.with_bounds(lower, upper), budget)
    return answer.values if isinstance(answer, Solution) and model.violation(answer.values) <= _ROUNDING else None


def _without_accuracy(problem: Problem, names: Collection[str]) -> PlanningSpace:
    """Return the space of the services ``names`` with the options that only a minimum accuracy rules out as well."""
    narrow = narrowed(problem, names)
    services = tuple(each.model_copy(update={"min_accuracy": 0.0}) for each in narrow.services.services)
    return build_space(replace(narrow, services=narrow.services.model_copy(update={"services": services})))


def _numbers(problem: Problem, formulation: Formulation) -> Iterator[_Number]:
    rows = {name: row for row, name in enumerate(formulation.model.rows)}
    for name in formulation.space.names:
        yield from _counts(problem, rows, name)
        yield from _accuracies(problem, formulation, name)
    yield from _shares(problem, formulation.space, rows)


def _counts(problem: Problem, rows: dict[str, int], name: str) -> Iterator[_Number]:
    """Yield the minimum replicas and the budget of a service, and what its spread asks for."""
    service = problem.services.service(name)
    least, domains = float(service.min_replicas), float(getattr(service.spread, "min_domains", 0))
    for row, field, stated, sign in (
        (f"replicas.{name}", "min_replicas", least, -1.0),
        (f"domains.{name}", "spread.min_domains", domains, -1.0),
        (f"budget.{name}", "max_gpus", float(service.max_gpus or 0), 1.0),
    ):
        if row in rows:
            yield _Number(
                service=name,
                field=field,
                stated=stated,
                sign=sign,
                cost=1.0 / max(stated, 1.0),
                upper=stated if sign < 0 else _MOST,
                entries=((rows[row], -sign),),
            )
    spread = tuple(row for text, row in rows.items() if text.startswith(f"spread.{name}."))
    if service.spread is not None and spread:
        skew = float(service.spread.max_skew)
        yield _Number(
            service=name,
            field="spread.max_skew",
            stated=skew,
            sign=1.0,
            cost=1.0 / max(skew, 1.0),
            upper=_MOST,
            above=spread,
        )


def _accuracies(problem: Problem, formulation: Formulation, name: str) -> Iterator[_Number]:
    """Yield a step for every accuracy below the least that is asked for: it opens the options at most as accurate."""
    stated = problem.services.service(name).min_accuracy
    space = formulation.space
    of_pair = space.accuracy[formulation.pair_option]
    mine = space.service_of[formulation.pair_option] == space.names.index(name)
    above = stated
    for level in sorted({float(each) for each in of_pair[mine & (of_pair < stated)]}, reverse=True):
        yield _Number(
            service=name,
            field="min_accuracy",
            stated=stated,
            sign=-1.0,
            cost=(above - level) / stated,
            upper=1.0,
            opens=tuple(int(column) for column in formulation.run[mine & (of_pair <= level)]),
        )
        above = level


def _shares(problem: Problem, space: PlanningSpace, rows: dict[str, int]) -> Iterator[_Number]:
    """Yield the required attainment and what has to survive a loss, one number each for all services."""
    settings = problem.settings
    asked = settings.attainment
    if asked is None:
        return
    attain = [(rows[row], float(rate)) for row, rate in _named(rows, space, "attain.") if rate > 0]
    yield _Number(
        service="",
        field="attainment",
        stated=asked,
        sign=-1.0,
        cost=1.0 / asked,
        upper=asked,
        integer=False,
        entries=tuple(attain),
    )
    if settings.keep_after_loss > 0:
        # z' >= (K - k) z, for z = A d; a plan never needs more than A d.
        places = ["", *(node.name for node in problem.cluster.nodes)]
        survive = [
            (rows[row], asked * float(rate))
            for place in places
            for row, rate in _named(rows, space, f"survive.{place}.")
            if rate > 0
        ]
        yield _Number(
            service="",
            field="keep_after_loss",
            stated=settings.keep_after_loss,
            sign=-1.0,
            cost=1.0 / settings.keep_after_loss,
            upper=settings.keep_after_loss,
            integer=False,
            entries=tuple(survive),
        )


def _named(rows: dict[str, int], space: PlanningSpace, prefix: str) -> Iterator[tuple[str, float]]:
    for name, rate in zip(space.names, space.offered_rps.tolist(), strict=True):
        if f"{prefix}{name}" in rows:
            yield f"{prefix}{name}", rate


def _with_numbers(model: LinearModel, numbers: tuple[_Number, ...]) -> LinearModel:
    """Return ``model`` with a column for every number that may give way, which minimises what that costs."""
    first, count = len(model.variables), len(numbers)
    rows = [row for each in numbers for row, _ in each.entries]
    columns = [first + index for index, each in enumerate(numbers) for _ in each.entries]
    values = [value for each in numbers for _, value in each.entries]
    row_of = np.append(model.row_of, np.array(rows, dtype=np.int64))
    order = np.argsort(row_of, kind="stable")
    upper = model.row_upper.copy()
    raised = [row for each in numbers for row in each.above]
    upper[raised] = np.inf
    wider = replace(
        model,
        variables=(*model.variables, *(f"loosen[{index}.{each.field}]" for index, each in enumerate(numbers))),
        lower=np.append(model.lower, np.zeros(count)),
        upper=np.append(model.upper, [each.upper for each in numbers]),
        integer=np.append(model.integer, np.array([each.integer for each in numbers], dtype=bool)),
        row_of=row_of[order],
        column_of=np.append(model.column_of, np.array(columns, dtype=np.int64))[order],
        value_of=np.append(model.value_of, np.array(values, dtype=np.float64))[order],
        row_upper=upper,
        objective=np.append(np.zeros(first), [each.cost for each in numbers]),
        maximise=False,
    )
    for column, each in enumerate(numbers, start=first):
        for row in each.above:
            dense = _dense(model, row, first + count)
            dense[column] = -1.0
            wider = wider.with_row(f"above.{column}.{row}", dense, upper=float(model.row_upper[row]))
        if each.opens:
            dense = np.zeros(first + count)
            dense[list(each.opens)] = 1.0
            dense[column] = -float(len(each.opens))
            wider = wider.with_row(f"opens.{column}", dense, upper=0.0)
    return wider


def _dense(model: LinearModel, row: int, size: int) -> Floats:
    dense = np.zeros(size)
    entries = model.row_of == row
    np.add.at(dense, model.column_of[entries], model.value_of[entries])
    return dense


def _steps(numbers: tuple[_Number, ...], amounts: Floats) -> Iterator[Relaxation]:
    found: dict[tuple[str, str], Relaxation] = {}
    attainment_left = 1.0
    for each, amount in zip(numbers, amounts.tolist(), strict=True):
        if amount <= _ROUNDING:
            continue
        change = amount
        if each.opens:
            change = amount * each.cost * each.stated
            earlier = found.get((each.service, each.field))
            change += 0.0 if earlier is None else earlier.stated - earlier.possible
        elif each.field == "attainment":
            attainment_left = max(0.0, 1.0 - amount / each.stated)
        elif each.field == "keep_after_loss":
            # Its rows were loosened for the attainment as stated.
            change = amount / attainment_left if attainment_left > 0 else each.stated
        rounding = 0.0 if each.integer else _ROUNDING
        possible = max(0.0, each.stated + each.sign * change - rounding)
        found[each.service, each.field] = Relaxation(
            service=each.service, field=each.field, stated=each.stated, possible=possible
        )
    yield from found.values()
