"""Planning from problem to plan: the one entry point, pure but for the clock it is given."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from planner.assemble import assemble, solver_report
from planner.backend import Budget, solver
from planner.balance import balance
from planner.conflict import Conflicts, find_conflicts
from planner.deadline_split import Split, best_split, tight_workflows
from planner.formulation import Formulation
from planner.lexicographic import LARGEST_EXACT_MODEL, Search
from planner.linear import LinearModel
from planner.objective import tiers, with_kept
from planner.problem import Problem, check
from planner.shadow import shadow_prices, shadow_prices_of_loadouts
from planner.space import Placement, PlanningSpace, build_space
from planner.stretch import stretch_batches
from planner.tier import Exhausted, Outcome, Unsatisfiable
from plans.plan import Plan

__all__ = ["Infeasible", "NoPlanFound", "Report", "Solved", "exact_model", "solve"]

_SEARCH_SHARE = 0.9
"""Share of the time limit that the search may take; the rest is for rates, prices and the document."""

_SPLIT_SHARE = 0.6
"""Share of the search that may go into how the end-to-end deadlines of workflows are split."""

_LEAST_PRICING_S = 0.2
"""Seconds that shadow prices may take also when time is over; most problems need a fraction of it."""

_AFTERWARDS_S = 0.003
"""Seconds per group that rates, predictions and the document take on top; at most half the time limit in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How the plan came about.

    Attributes:
        method: How placements were searched: one model over groups, or column generation over loadouts.
        options: Options that could be placed.
        pruned: Options left out because another is at least as good in everything.
        rejected: Options that do not fit, miss the deadline, or are below the minimum accuracy.
        groups: Candidate groups.
        classes: Classes of interchangeable groups.
        open: Names of the objectives that were left with a gap, for want of time or of progress.
    """

    method: Literal["direct", "columns"]
    options: int
    pruned: int
    rejected: int
    groups: int
    classes: int
    open: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """A plan, with its certificate in ``plan.solver``."""

    plan: Plan
    report: Report

    def with_plan(self, plan: Plan) -> Solved:
        """Return the same result with ``plan`` in place of its plan, for callers that fill in the transition."""
        return replace(self, plan=plan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Infeasible:
    """Proven: no plan satisfies the hard constraints; those of ``conflicts`` cannot hold together."""

    conflicts: Conflicts


@dataclass(frozen=True, slots=True, kw_only=True)
class NoPlanFound:
    """The time ran out before any plan was found, and before a proof that there is none."""

    bound: float | None
    detail: str


def solve(
    problem: Problem,
    *,
    created_at: str = "",
    tool_version: str = "",
    clock: Callable[[], float] = time.monotonic,
) -> Solved | Infeasible | NoPlanFound:
    """Plan ``problem`` within its time limit.

    The same problem and seed give the same plan as long as no time limit strikes (``solver.wall_s`` apart). Column
    generation rests on compiled code; loading it, or compiling it once per installation, counts into ``solver.wall_s``
    and not into the time limit.

    Args:
        problem: What to plan.
        created_at: Time stamp to put into the plan, as text.
        tool_version: Version of Foreplan to put into the plan.
        clock: Monotonic clock, seconds.

    Raises:
        InvalidInput: The documents contradict each other; all faults at once.
    """
    started_s = clock()
    warnings = check(problem)
    settings = problem.settings
    space = build_space(problem)
    method = method_for(space)
    tight = tight_workflows(problem)
    splits = bool(tight) and space.pair_count <= LARGEST_EXACT_MODEL
    if not splits:
        warnings += tuple(
            f"{each.name}: its deadline is split over its stages in proportion to their least latencies; at this "
            "size no other split is tried"
            for each in tight
        )
    counts_from_s = started_s + (_compiled_in_s(clock) if method == "columns" else 0.0)
    ends_at_s = counts_from_s + settings.time_limit_s
    search_ends_at_s = counts_from_s + _SEARCH_SHARE * settings.time_limit_s - _AFTERWARDS_S * len(space.groups)
    search_ends_at_s = max(search_ends_at_s, counts_from_s + 0.5 * settings.time_limit_s)
    split: Split | None = None
    if splits:
        split = best_split(problem, clock, counts_from_s + _SPLIT_SHARE * (search_ends_at_s - counts_from_s))
        space = split.space
    outcome = _search(space, method, clock, search_ends_at_s, None if split is None else split.placement).run()
    if isinstance(outcome, Unsatisfiable):
        # Finding out why is worth as much time again.
        return Infeasible(conflicts=find_conflicts(space, clock, clock() + settings.time_limit_s))
    if isinstance(outcome, Exhausted):
        return NoPlanFound(
            bound=outcome.bound,
            detail=f"{settings.time_limit_s:g} s did not suffice to find a placement that keeps every hard constraint",
        )
    if split is not None:
        outcome = _over_splits(outcome, split)
    linear = solver(settings.backend)
    budget = Budget(time_limit_s=max(0.5, ends_at_s - clock()), seed=settings.seed)
    placement = balance(space, stretch_batches(space, outcome.placement), linear, budget)
    if method == "columns":
        prices = shadow_prices_of_loadouts(space, clock, ends_at_s)
    else:
        prices = shadow_prices(space, linear, clock, max(ends_at_s, clock() + _LEAST_PRICING_S))
    plan = assemble(
        space,
        placement,
        solver_report(space, outcome.tiers, clock() - started_s, method=method),
        shadow_prices=prices,
        warnings=warnings,
        created_at=created_at,
        tool_version=tool_version,
    )
    open_tiers = tuple(tier.objective.name for tier in outcome.tiers if tier.open)
    return Solved(plan=plan, report=_report(space, method, open_tiers))


def _compiled_in_s(clock: Callable[[], float]) -> float:
    """Make the compiled code ready; return the seconds that it took, nearly none from the second time on."""
    from planner.pricing import compile_pricing

    started_s = clock()
    compile_pricing()
    return clock() - started_s


def method_for(space: PlanningSpace) -> Literal["direct", "columns"]:
    """Return how ``space`` is searched: as the settings say, or by its size."""
    wanted = space.problem.settings.method
    if wanted != "auto":
        return wanted
    return "columns" if space.pair_count > LARGEST_EXACT_MODEL else "direct"


def _over_splits(outcome: Outcome, split: Split) -> Outcome:
    """Return ``outcome`` with the bound of its first objective over every split, not only over the one chosen."""
    first = outcome.tiers[0]
    if split.bound is None:
        return outcome
    loosest = max if first.objective.maximise else min
    return replace(outcome, tiers=(replace(first, bound=loosest(first.bound, split.bound)), *outcome.tiers[1:]))


def _search(
    space: PlanningSpace, method: str, clock: Callable[[], float], ends_at_s: float, known: Placement | None
) -> Search:
    if method == "direct":
        return Search(space, clock, ends_at_s, known=known)
    from planner.columns import ColumnSearch  # compiled code that small problems do without

    return ColumnSearch(space, clock, ends_at_s, known=known)


def exact_model(problem: Problem) -> LinearModel:
    """Return the model over single groups with the problem's first objective, for export and for second opinions.

    Raises:
        InvalidInput: The documents contradict each other.
    """
    check(problem)
    space = build_space(problem)
    formulation = Formulation(space, space.singles)
    return with_kept(formulation, tiers(space)[0], ())


def _report(space: PlanningSpace, method: Literal["direct", "columns"], open_tiers: tuple[str, ...]) -> Report:
    return Report(
        method=method,
        options=len(space.options),
        pruned=space.catalogue.pruned,
        rejected=len(space.catalogue.rejections),
        groups=len(space.groups),
        classes=len(space.classes),
        open=open_tiers,
    )
