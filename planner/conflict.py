"""Why no placement satisfies the hard limits: an irreducible conflicting set of what the user stated.

The set is irreducible: it cannot be satisfied, and without any one of its members it can. It is found by deletion: a
limit without which the rest still conflicts is dropped (J. W. Chinneck and E. W. Dravnieks, "Locating minimal
infeasible constraint sets in linear programs", ORSA J. Computing 3, 1991). What is left conflicts at any time, so that
time running out costs irreducibility alone. First the services are tried one by one, then the linear relaxation.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from planner.backend import Solution
from planner.formulation import Formulation
from planner.limits import LOSS, Elastic, Limit, LimitModels, forces, joined, limits, loosened, services_of
from planner.linear import Floats
from planner.problem import Problem
from planner.relaxation import Relaxation, least_relaxation
from planner.space import PlanningSpace, build_space
from planner.unserved import binding

__all__ = ["Conflict", "Conflicts", "Infeasibility", "explain_infeasible", "find_conflicts"]

_CONFLICT_SHARE = 0.75
"""Share of the time that finding the conflict may take; the rest is for the least relaxation."""

_ALONE_SHARE = 0.3
"""Share of that which trying services one by one may take."""

_LINEAR_SHARE = 0.5
"""Share of what is left then that narrowing the conflict down in the linear relaxation may take."""

_LEAST_LINEAR_S = 1.0
"""Seconds that the first linear relaxation may take also when time is over: without it nothing is known."""

_MOST_DESCRIBED = 6
"""Members of a conflict up to which it is worked out how much of each would be possible."""

_APART = 3
"""Members with one field that are still listed one by one."""

_SCREEN_LINES, _SCREEN_COLUMNS = 40, 116
"""Lines of a screen, and columns but for the indent."""

_MOST_STEPS = 12
"""Steps of a relaxation that are listed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """One limit of a conflicting set: the service (or workflow), the field that states it, and what it meets."""

    service: str
    field: str
    detail: str

    def __str__(self) -> str:
        return f"{self.service}.{self.field}: {self.detail}" if self.service else f"{self.field}: {self.detail}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflicts:
    """Limits that cannot be kept together; ``minimal`` says whether without any one of them the others are known to."""

    members: tuple[Conflict, ...]
    minimal: bool

    @property
    def title(self) -> str:
        """What the members are, in words."""
        if self.minimal:
            return "these limits cannot be kept together; without any one of them the others can:"
        return "these limits cannot be kept together (time ran out: the set may be larger than needed):"

    def lines(self) -> Iterator[str]:
        """Yield the members as text that fits a screen: many with one field share an entry."""
        fields = list(dict.fromkeys(each.field for each in self.members))
        texts = [text for field in fields for text in _grouped([each for each in self.members if each.field == field])]
        found = [line for text in texts for line in textwrap.wrap(text, _SCREEN_COLUMNS, subsequent_indent="    ")]
        yield from found if len(found) < _SCREEN_LINES else [*found[: _SCREEN_LINES - 2], "..."]


@dataclass(frozen=True, slots=True, kw_only=True)
class Infeasibility:
    """Why a problem has no plan, and what to relax.

    Attributes:
        conflicts: Limits that conflict; None when nothing is proven to.
        relaxation: The least change of numbers that helps; empty when there is none, or none was found in time.
        least: Whether it is proven that no smaller change helps.
        everywhere: Whether it is worked out for the whole problem; otherwise for the services of the conflict alone.
        kept: Where nothing is proven to conflict: whether it is proven that all limits can be kept.
    """

    conflicts: Conflicts | None
    relaxation: tuple[Relaxation, ...] = ()
    least: bool = True
    everywhere: bool = True
    kept: bool = False

    def lines(self) -> Iterator[str]:
        """Yield the answer as lines of text that fit a screen: at most 40 of at most 120 characters."""
        if self.conflicts is None:
            yield (
                "nothing conflicts: there is a plan that keeps all of these limits"
                if self.kept
                else "nothing is proven to conflict, nor that all of these limits can be kept; "
                "a longer --time-limit may tell"
            )
            return
        steps = [str(step) for step in self.relaxation]
        shown = (
            steps
            if len(steps) <= _MOST_STEPS
            else [*steps[: _MOST_STEPS - 1], f"and {len(steps) + 1 - _MOST_STEPS} more"]
        )
        members = list(self.conflicts.lines())
        most = _SCREEN_LINES - len(shown) - 2
        yield self.conflicts.title
        yield from (f"  {line}" for line in (members if len(members) <= most else [*members[: most - 1], "..."]))
        if shown:
            what = "the least change" if self.least else "a change, not proven to be the least,"
            yield f"{what} of numbers that helps{'' if self.everywhere else ' these services'}:"
            yield from (f"  {step}" for step in shown)


def explain_infeasible(problem: Problem, *, clock: Callable[[], float], time_limit_s: float) -> Infeasibility:
    """Return an irreducible conflict of ``problem`` and its least relaxation, in ``time_limit_s`` but for building."""
    space = build_space(problem)
    started_s = clock()
    found = _conflicting_limits(space, clock, started_s + _CONFLICT_SHARE * time_limit_s)
    if found is None:
        stated = limits(problem)
        kept = LimitModels(problem, stated, clock, started_s + time_limit_s).conflicting(stated) is False
        return Infeasibility(conflicts=None, kept=kept)
    chosen, minimal = found
    conflicts = _described_all(problem, chosen, minimal, clock, started_s + _CONFLICT_SHARE * time_limit_s)
    relaxation, least, everywhere = least_relaxation(problem, chosen, clock, started_s + time_limit_s)
    return Infeasibility(conflicts=conflicts, relaxation=relaxation, least=least, everywhere=everywhere)


def find_conflicts(space: PlanningSpace, clock: Callable[[], float], ends_at_s: float) -> Conflicts:
    """Return limits of ``space``, which is known to be infeasible, that cannot be kept together."""
    problem = space.problem
    chosen, minimal = _conflicting_limits(space, clock, ends_at_s) or (limits(problem), False)
    return _described_all(problem, chosen, minimal, clock, ends_at_s)


def _conflicting_limits(
    space: PlanningSpace, clock: Callable[[], float], ends_at_s: float
) -> tuple[tuple[Limit, ...], bool] | None:
    """Return limits that are proven to conflict, and whether they are irreducible; None when nothing is proven."""
    problem, stated = space.problem, _by_importance(space)
    elastic = Elastic(problem)
    # Like building, one linear program is worth its time even when that is over.
    short = elastic.shortfall(stated, max(_LEAST_LINEAR_S, ends_at_s - clock()))
    alone = _alone(problem, stated, short or (), clock, clock() + _ALONE_SHARE * (ends_at_s - clock()), ends_at_s)
    if alone is not None:
        return alone
    if short:
        narrow = _narrowed(problem, stated, short, elastic, clock, clock() + _LINEAR_SHARE * (ends_at_s - clock()))
        models = LimitModels(problem, narrow, clock, ends_at_s)
        if (verdict := models.conflicting(narrow)) is not False:
            return _irreducible(narrow, models.conflicting) if verdict else (narrow, False)
    models = LimitModels(problem, stated, clock, ends_at_s)
    if models.conflicting(stated):
        return _irreducible(stated, models.conflicting)
    return (stated, False) if short else None


def _by_importance(space: PlanningSpace) -> tuple[Limit, ...]:
    """Return the limits, those first that ask for most: dropped last, they make the smallest sets."""
    best_rps = np.full(len(space.names), 1e-12)
    np.maximum.at(best_rps, space.service_of, space.sustained_rps / np.array([each.gpus for each in space.options]))
    gpus = space.offered_rps / best_rps
    size = {
        (name, field): amount
        for service, name in enumerate(space.names)
        for field, amount in (("attainment", gpus[service]), ("min_replicas", float(space.min_replicas[service])))
    }
    return tuple(sorted(limits(space.problem), key=lambda limit: -float(size.get(limit, 0.0))))


def _alone(
    problem: Problem,
    stated: Sequence[Limit],
    short: Collection[Limit],
    clock: Callable[[], float],
    until_s: float,
    ends_at_s: float,
) -> tuple[tuple[Limit, ...], bool] | None:
    """Return a conflict of services that workflows join, mostly of a single one; None when there is none, or no time.

    Where some are ``short`` in the linear relaxation, it is mostly one of those, and shows there.
    """
    suspected = services_of(problem, short)
    named = {limit: services_of(problem, [limit]) for limit in stated}
    for names in joined(problem):
        mine = [limit for limit in stated if named[limit] <= names]
        if (suspected and not names & suspected) or not any(forces(problem, limit) for limit in mine):
            continue
        if clock() >= until_s:
            return None
        models = LimitModels(problem, mine, clock, ends_at_s)
        if models.conflicting(mine, linear=bool(suspected)):
            return _irreducible(mine, models.conflicting)
    return None


def _narrowed(
    problem: Problem,
    stated: Sequence[Limit],
    short: Collection[Limit],
    elastic: Elastic,
    clock: Callable[[], float],
    until_s: float,
) -> tuple[Limit, ...]:
    """Return what of ``short`` conflicts in the linear relaxation, with what else is stated for those services."""

    def conflicting(kept: Sequence[Limit]) -> bool | None:
        left_s = until_s - clock()
        found = elastic.shortfall(kept, left_s) if left_s > 0 else None
        return None if found is None else bool(found)

    found, _ = _irreducible([limit for limit in stated if limit in short], conflicting)
    services = services_of(problem, found)
    others = [limit for limit in stated if limit not in elastic.limits]
    near = [limit for limit in others if limit == LOSS or services_of(problem, [limit]) <= services]
    return (*found, *near)


def _irreducible(
    candidates: Sequence[Limit], conflicting: Callable[[Sequence[Limit]], bool | None]
) -> tuple[tuple[Limit, ...], bool]:
    """Return which of ``candidates``, which conflict, cannot be left out, and whether that is known of each.

    Drops as many at a time as goes well: twice as many after a success, half as many after a failure.
    """
    left, needed = list(candidates), list[Limit]()
    known, step = True, max(1, len(left) // 2)
    while left:
        step = min(step, len(left))
        verdict = conflicting([*left[:-step], *needed])
        if verdict:
            del left[-step:]
            step *= 2
        elif step > 1:
            step //= 2
        else:
            known = known and verdict is False
            needed.insert(0, left.pop())
    return tuple(needed), known


def _described_all(
    problem: Problem, chosen: Sequence[Limit], minimal: bool, clock: Callable[[], float], ends_at_s: float
) -> Conflicts:
    models = LimitModels(problem, chosen, clock, ends_at_s)
    worked_out = minimal and len(chosen) <= _MOST_DESCRIBED
    return Conflicts(
        members=tuple(_described(problem, limit, chosen, models if worked_out else None) for limit in chosen),
        minimal=minimal,
    )


def _described(problem: Problem, limit: Limit, together: Sequence[Limit], models: LimitModels | None) -> Conflict:
    """Say what ``limit`` asks for, and with ``models`` what would be possible beside the others, if time allows."""
    name, field = limit
    others = [each for each in together if each != limit]
    if field == "min_replicas":
        service = problem.services.service(name)
        detail = f"needs {service.min_replicas} replicas"
        most = None if models is None else _most_replicas(models, others, name)
        if most is not None:
            detail += f"; at most {most[0]} fit" + (
                f", because: {most[1]}" if not others else " beside the others named"
            )
    elif field == "attainment":
        detail = f"asks for {problem.settings.attainment:.2%} of the rate to be served"
        most_share = None if models is None else _most_share(models, others, name)
        if most_share is not None:
            detail += f"; at most {most_share:.2%} can be" + (" beside the others named" if others else "")
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


def _most_replicas(models: LimitModels, others: Sequence[Limit], name: str) -> tuple[int, str] | None:
    """Return how many replicas of a service fit beside ``others``, and what stops the next; None when not in time."""

    def replicas(formulation: Formulation) -> Floats:
        service = formulation.space.names.index(name)
        objective = np.zeros(len(formulation.model.variables))
        objective[formulation.run[formulation.space.service_of[formulation.pair_option] == service]] = 1.0
        return objective

    found = _optimum(models, others, replicas)
    if found is None:
        return None
    formulation, answer = found
    space = formulation.space
    detail = binding(space, formulation.decode(answer.values), space.names.index(name)).detail
    return round(answer.objective), detail


def _most_share(models: LimitModels, others: Sequence[Limit], name: str) -> float | None:
    def share(formulation: Formulation) -> Floats:
        service = formulation.space.names.index(name)
        objective = np.zeros(len(formulation.model.variables))
        objective[formulation.served[service]] = 1.0 / max(float(formulation.space.offered_rps[service]), 1e-12)
        return objective

    found = _optimum(models, others, share)
    return None if found is None else found[1].objective


def _optimum(
    models: LimitModels, kept: Sequence[Limit], objective: Callable[[Formulation], Floats]
) -> tuple[Formulation, Solution] | None:
    """Return the proven optimum over single groups with ``kept`` alone; None when it takes too long."""
    if models.left_s <= 0:
        return None
    built = models.built(kept)
    if not built.is_small:
        return None
    formulation = built.over_groups
    model = loosened(formulation, kept).with_objective(objective(formulation), maximise=True)
    answer = models.solve(model)
    return (formulation, answer) if isinstance(answer, Solution) and answer.stopped == "optimal" else None


def _grouped(alike: Sequence[Conflict]) -> Iterator[str]:
    """Yield the conflicts of one field one by one, or as one where there are many."""
    if len(alike) <= _APART:
        yield from (str(each) for each in alike)
        return
    details = dict.fromkeys(each.detail for each in alike)
    for detail in details if len(details) <= _APART else ["they ask for different amounts"]:
        named = [each.service for each in alike if len(details) > _APART or each.detail == detail]
        if len(named) == 1:
            yield f"{named[0]}.{alike[0].field}: {detail}"
            continue
        shown = ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
        yield f"{alike[0].field} of {len(named)} services ({shown}): {detail}"
