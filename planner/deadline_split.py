"""Which stage of a workflow gets how much of its end-to-end deadline: a decision over a grid of splits.

docs/formulation.md, section 3. Every split keeps the guarantee that the parts of any path sum to at most the whole. A
linear relaxation bounds what each split can reach, and splits are solved in the order of their bounds until none that
is left can be better: so the result is the best of the grid unless time ends first, and the bound says so then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter

from planner.backend import Budget, InfeasibleModel, Solution, solver_for
from planner.deadlines import longest_through, parts_of, stages, time_for_stages_s
from planner.formulation import Formulation
from planner.lexicographic import Search
from planner.objective import Objective, tiers, with_kept
from planner.problem import Problem, service_demands
from planner.space import Placement, PlanningSpace, build_space
from planner.tier import Outcome, Unsatisfiable
from plans.plan import Plan
from plans.service import Workflow

__all__ = ["Split", "as_planned", "best_split", "grid", "tight_workflows"]

_FINEST = 20
"""Most parts that a workflow's time is cut in."""

_MOST_SPLITS = 64
"""Splits per workflow that are compared; the grid is made coarser until it holds no more."""

_MOST_PARTIAL = 1_000
"""Splits of the first stages that are looked through; the grid is made coarser where there are more."""

_SAME = 1e-6
"""Relative difference below which objectives count as equal."""

_RELAXATIONS_SHARE = 0.4
"""Share of the time that bounds may take."""

_SOLVE_SHARE = 0.4
"""Share of the time left that one split may be solved for."""

_LEAST_S = 0.2
"""Seconds that a relaxation or a solve may take also when time is short."""

_COMPARED = 2
"""Objectives, from the first on, by which splits are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The split chosen, what was found with it, and what no split of the grid can beat.

    Attributes:
        space: The planning space with the split.
        placement: The best placement found with it, None when there is none yet.
        bound: Bound on the first objective over all splits but the chosen one; None when there is none to add.
        complete: Whether every split was solved or ruled out by its bound.
    """

    space: PlanningSpace
    placement: Placement | None
    bound: float | None
    complete: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A split, its space, and bounds on the objectives that splits are compared by, larger is better."""

    space: PlanningSpace
    bounds: tuple[float, ...]


def tight_workflows(problem: Problem) -> tuple[Workflow, ...]:
    """Return the workflows to split: their end-to-end deadline leaves some stage less than its own deadline.

    Those whose split the problem states already are left out.
    """
    demands = service_demands(problem)
    found = []
    for workflow in problem.services.workflows:
        if workflow.name in problem.deadline_shares:
            continue
        parts = parts_of(problem, workflow, demands)
        own_s = {
            name: problem.services.service(name).deadline_s(demands[name].output_tokens if name in demands else None)
            for name in parts
        }
        if any(part.deadline_s < own_s[name] for name, part in parts.items()):
            found.append(workflow)
    return tuple(found)


def grid(workflow: Workflow) -> tuple[dict[str, float], ...]:
    """Return shares of the time per stage: whole parts of it, those of any path at most 1 together, none to be raised.

    (3.11), cut in 20 parts, or in fewer where that makes more than 64 splits. Nothing for workflows of so many stages
    beside each other that not even the coarsest grid can be listed.
    """
    names = stages(workflow)
    for pieces in range(_FINEST, 0, -1):
        found = _assignments(workflow, pieces)
        if found is not None and len(found) <= _MOST_SPLITS:
            return tuple({name: each[name] / pieces for name in names} for each in found)
    return ()


def _assignments(workflow: Workflow, pieces: int) -> list[dict[str, int]] | None:
    """Return whole parts per stage, at least 1, whose sums along paths are at most ``pieces`` and cannot be raised.

    None when there are too many to look through.
    """
    names = stages(workflow)
    before: dict[str, list[str]] = {name: [] for name in names}
    after: dict[str, list[str]] = {name: [] for name in names}
    for edge in workflow.edges:
        before[edge.target].append(edge.source)
        after[edge.source].append(edge.target)
    order = list(TopologicalSorter(before).static_order())
    # What the stages after each one need at least.
    onward: dict[str, int] = {}
    for name in reversed(order):
        onward[name] = max((onward[other] + 1 for other in after[name]), default=0)
    partial: list[tuple[dict[str, int], dict[str, int]]] = [({}, {})]
    for name in order:
        extended = []
        for parts, upto in partial:
            so_far = max((upto[other] for other in before[name]), default=0)
            most = pieces - so_far - onward[name]
            # A last stage takes all that is left: with less it could be raised.
            least = 1 if after[name] else max(most, 1)
            extended += [({**parts, name: part}, {**upto, name: so_far + part}) for part in range(least, most + 1)]
        if len(extended) > _MOST_PARTIAL:
            return None
        partial = extended
    return [parts for parts, upto in partial if _no_slack(order, after, upto, parts, pieces)]


def _no_slack(
    order: Sequence[str],
    after: Mapping[str, Sequence[str]],
    upto: Mapping[str, int],
    parts: Mapping[str, int],
    pieces: int,
) -> bool:
    """Whether a path through every stage takes all of ``pieces``."""
    onward: dict[str, int] = {}
    for name in reversed(order):
        onward[name] = max((onward[other] + parts[other] for other in after[name]), default=0)
    return all(upto[name] + onward[name] == pieces for name in order)


def best_split(problem: Problem, clock: Callable[[], float], ends_at_s: float) -> Split:
    """Return the best split of every workflow that needs one.

    With one such workflow it is the best of its grid, as far as time allows; with more, each is split in turn, and the
    bound is that of a relaxation in which every stage gets the most that any split gives it.
    """
    space = build_space(problem)
    workflows = tight_workflows(problem)
    split = Split(space=space, placement=None, bound=None, complete=True)
    for index, workflow in enumerate(workflows):
        now = clock()
        until_s = now + (ends_at_s - now) / (len(workflows) - index)
        split = _best_of(split.space, workflow, clock, until_s)
    if len(workflows) > 1:
        limit_s = max(_LEAST_S, ends_at_s - clock())
        split = replace(split, bound=_optimistic(split.space, workflows, limit_s), complete=False)
    return split


def _best_of(space: PlanningSpace, workflow: Workflow, clock: Callable[[], float], ends_at_s: float) -> Split:
    """Return the best split of one workflow by the first objectives; what ``space`` has wins ties."""
    objectives = tiers(space)[:_COMPARED]
    signs = [1.0 if each.maximise else -1.0 for each in objectives]
    candidates, complete = _candidates(space, workflow, objectives, clock, ends_at_s)
    best, best_value = Split(space=space, placement=None, bound=None, complete=False), (-math.inf,) * len(objectives)
    reached: list[tuple[PlanningSpace, float]] = []
    for candidate in candidates:
        bound = candidate.bounds[0]
        if _may_be_better(candidate.bounds, best_value):
            late = clock() >= ends_at_s
            complete = complete and not late
            if not late or best.placement is None:
                limit_s = max(_LEAST_S, _SOLVE_SHARE * (ends_at_s - clock()))
                outcome = Search(candidate.space, clock, clock() + limit_s).run()
                if isinstance(outcome, Unsatisfiable):
                    continue  # a split without any plan bounds none
                if isinstance(outcome, Outcome):
                    solved = outcome.tiers[: len(objectives)]
                    value = tuple(sign * each.value for sign, each in zip(signs, solved, strict=True))
                    bound = min(bound, signs[0] * solved[0].bound)
                    if _better(value, best_value):
                        best, best_value = replace(best, space=candidate.space, placement=outcome.placement), value
        reached.append((candidate.space, bound))
    most = max((bound for other, bound in reached if other is not best.space), default=None)
    if not complete and len(candidates) <= len(grid(workflow)):
        return replace(best, bound=_optimistic(space, (workflow,), max(_LEAST_S, ends_at_s - clock())))
    return replace(best, bound=None if most is None else signs[0] * most, complete=complete)


def _candidates(
    space: PlanningSpace,
    workflow: Workflow,
    objectives: Sequence[Objective],
    clock: Callable[[], float],
    ends_at_s: float,
) -> tuple[list[_Candidate], bool]:
    """Return what ``space`` has, then the splits of the grid with the highest bounds first; and whether all of them."""
    until_s = clock() + _RELAXATIONS_SHARE * max(0.0, ends_at_s - clock())
    first = _Candidate(space=space, bounds=_bounds(space, objectives, until_s - clock()))
    others = []
    splits = (*_of_running(space.problem, workflow), *grid(workflow))
    for shares in splits:
        if clock() >= until_s:
            break
        other = build_space(_with_shares(space.problem, workflow, shares))
        others.append(_Candidate(space=other, bounds=_bounds(other, objectives, until_s - clock())))
    others.sort(key=lambda each: each.bounds, reverse=True)
    return [first, *others], len(others) == len(splits)


def _bounds(space: PlanningSpace, objectives: Sequence[Objective], limit_s: float) -> tuple[float, ...]:
    """Return what the linear relaxation over classes leaves possible, objective by objective, larger is better."""
    formulation = Formulation(space, space.classes)
    found = []
    for objective in objectives:
        sign = 1.0 if objective.maximise else -1.0
        model = with_kept(formulation, objective, ()).relaxed(but=formulation.fair.integers)
        budget = Budget(time_limit_s=max(_LEAST_S, limit_s), seed=space.problem.settings.seed)
        answer = solver_for(space.problem.settings).solve(model, budget)
        if isinstance(answer, InfeasibleModel):
            return (-math.inf,) * len(objectives)
        trivial = sign * objective.trivial_bound(space)
        found.append(min(trivial, sign * answer.bound) if isinstance(answer, Solution) else trivial)
    return tuple(found)


def _optimistic(space: PlanningSpace, workflows: Sequence[Workflow], limit_s: float) -> float:
    """Return a bound on the first objective over every split: each stage gets the most that any split gives it."""
    problem = space.problem
    demands = service_demands(problem)
    for workflow in workflows:
        proportional = parts_of(replace(problem, deadline_shares={}), workflow, demands)
        left_s = max(time_for_stages_s(problem, workflow), 1e-12)
        splits = [*grid(workflow), {name: part.deadline_s / left_s for name, part in proportional.items()}]
        most = {name: max(shares[name] for shares in splits) for name in stages(workflow)}
        problem = _with_shares(problem, workflow, most)
    objective = tiers(space)[0]
    (bound,) = _bounds(build_space(problem), [objective], limit_s)
    return bound if objective.maximise else -bound


def _with_shares(problem: Problem, workflow: Workflow, shares: Mapping[str, float]) -> Problem:
    return replace(problem, deadline_shares={**problem.deadline_shares, workflow.name: shares})


def _of_running(problem: Problem, workflow: Workflow) -> tuple[Mapping[str, float], ...]:
    """Return the split of the running plan, where it has one that this workflow's time still allows."""
    if problem.current is None:
        return ()
    shares = as_planned(problem, problem.current).deadline_shares.get(workflow.name)
    if shares is None or max(longest_through(workflow, shares, {}).values()) > 1 + 1e-9:
        return ()
    return (shares,)


def _may_be_better(bounds: Sequence[float], value: Sequence[float]) -> bool:
    """Whether what ``bounds`` leave possible may be lexicographically better than ``value``."""
    for bound, reached in zip(bounds, value, strict=True):
        if not math.isfinite(reached):
            return bound > reached
        if bound > reached + _SAME * abs(reached):
            return True
        if bound < reached - _SAME * abs(reached):
            return False
    return False


def _better(value: Sequence[float], other: Sequence[float]) -> bool:
    """Whether ``value`` is lexicographically better than ``other`` by more than rounding."""
    return _may_be_better(value, other)


def as_planned(problem: Problem, plan: Plan) -> Problem:
    """Return ``problem`` with the split of end-to-end deadlines that the entries of ``plan`` state.

    A stage without a replica keeps its proportional part.
    """
    stated_s: dict[str, float] = {}
    for group in plan.groups:
        for entry in group.loadout:
            stated_s[entry.service] = max(stated_s.get(entry.service, 0.0), entry.deadline_s)
    demands = service_demands(problem)
    planned = problem
    for workflow in tight_workflows(problem):
        left_s = time_for_stages_s(problem, workflow)
        parts = parts_of(problem, workflow, demands)
        if left_s > 0:
            shares = {name: stated_s.get(name, part.deadline_s) / left_s for name, part in parts.items()}
            planned = _with_shares(planned, workflow, shares)
    return planned
