"""From a plan to a better one by simulation: what may be polished, the search, and the plan document again."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from planner.assemble import Drafts, assemble
from planner.backend import Budget, solver
from planner.balance import balance
from planner.deadline_split import as_planned
from planner.lexicographic import Search
from planner.linear import Floats, Integers
from planner.objective import tiers
from planner.planning import method_for
from planner.polish_limits import Pairs, PolishLimits, PolishOutcome
from planner.prediction import latency_model
from planner.problem import Problem, check
from planner.recourse import routed_in
from planner.scoring import Scorer
from planner.space import Placed, Placement, PlanningSpace, build_space
from plans.demand import ServiceDemand
from plans.plan import Plan

if TYPE_CHECKING:
    from planner.worth import Worth

__all__ = ["Polished", "Refused", "ScoringTables", "polish_plan", "scoring_tables"]

_REPLAN_SHARE = 0.1
"""Share of the time for solving again with corrected utilisations."""

_SEARCH_SHARE = 0.1
"""The least share of the time that is left for the search, however long its preparation took."""

_LOSS_LIMIT_S = 10.0
"""For the linear program of one lost node; it takes milliseconds."""

_RATES_LIMIT_S = 10.0
"""For the linear program of the rates of one placement, likewise."""

_BATCHING_GAIN = 1.15
"""Requests per second at the best batch over those of single requests from which on batches decide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringTables:
    """What a simulator needs to know of the options and services of a planning space.

    Attributes:
        names: The services.
        stage_s: Shape (option, stage): seconds that a single request holds each stage; 0 beyond the last.
        batch_stage_s: Shape (option, largest batch, stage): seconds that a batch of b + 1 does; 0 beyond the option's
            largest. None where batches gain so little that single requests tell enough.
        max_batch: Shape (option,): the largest batch of each.
        deadline_s: Shape (service,): seconds from arrival within which a request is good; infinite without options.
        offered_rps: Shape (service,): the rate that is planned for.
        gpus: GPUs of the cluster; groups are named by their first one.
        worth: What a simulation is worth under the objective.
        draft: Makes a plan of (group, option) pairs, where only a simulation of whole plans knows what is served: of
            tokens, and of services that call each other. None where stages and batches tell.
    """

    names: tuple[str, ...]
    stage_s: Floats
    batch_stage_s: Floats | None
    max_batch: Integers
    deadline_s: Floats
    offered_rps: Floats
    gpus: int
    worth: Worth
    draft: Callable[[Pairs], Plan] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Polished:
    """A plan after the search, with what the search found; the same plan where it found nothing better."""

    plan: Plan
    outcome: PolishOutcome
    scorer: str
    judge: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The problem asks for something that the search does not keep or the simulation does not model."""

    reason: str


def polish_plan(
    problem: Problem,
    plan: Plan,
    scorers: Callable[[ScoringTables], tuple[Scorer, Scorer]],
    limits: PolishLimits,
    *,
    clock: Callable[[], float],
) -> Polished | Refused:
    """Search for a placement with more simulated goodput than that of ``plan``; never return one with less.

    The time covers all of it but what is compiled, once on a machine, and the plan document at the end.

    Args:
        problem: What ``plan`` was made from.
        plan: A plan for it. Its certificate is kept: it is that of the placement that the search started from.
        scorers: Makes the simulator that guides the search, and the one that has the last word, on other arrivals.
        limits: When to end.
        clock: Monotonic clock, seconds.
    """
    from planner.polish import polish  # numba loads with it

    began_s = clock()
    problem = as_planned(problem, plan)
    space = build_space(problem)
    reason = _refusal(space)
    if reason is not None:
        return Refused(reason=reason)
    start, candidates = _pairs_of(space, plan), _candidates(space)
    tables = scoring_tables(space, {*candidates, *(option for _, option in start)})
    if _needs_whole_plans(space):
        tables = replace(tables, draft=Drafts(space, plan.solver))
    search, judge = scorers(tables)
    prepared_s = clock() - began_s
    _compile(space, search)
    began_s = clock()
    others = _corrections(space, start, search, limits, clock)
    spent_s = prepared_s + clock() - began_s
    outcome = polish(
        space,
        start,
        search,
        judge,
        tables.worth,
        candidates,
        replace(limits, time_s=max(limits.time_s - spent_s, _SEARCH_SHARE * limits.time_s)),
        clock,
        others=others,
        allowed=lambda pairs: _is_kept(space, pairs, judge, clock),
    )
    if outcome.pairs == start:
        return Polished(plan=plan, outcome=outcome, scorer=search.name, judge=judge.name)
    placement = _rated(space, outcome.pairs, judge, clock)
    assert placement is not None, "what is allowed has rates"
    better = assemble(
        space,
        placement,
        plan.solver,
        shadow_prices=dict(plan.shadow_prices),
        warnings=check(problem),
        created_at=plan.created_at,
        tool_version=plan.tool_version,
    )
    return Polished(plan=better, outcome=outcome, scorer=search.name, judge=judge.name)


def _compile(space: PlanningSpace, scorer: Scorer) -> None:
    """Compile the moves and the scorer, where no process on this machine has: not what the time is for."""
    from planner.arranged import Arrangement  # numba loads with it

    scorer.walk(Arrangement(space, ()), 0.0, 0)


def _corrections(
    space: PlanningSpace, start: Pairs, search: Scorer, limits: PolishLimits, clock: Callable[[], float]
) -> tuple[Pairs, ...]:
    """Return what the ILP plans once it knows how busy the groups of ``start`` could be; nothing for large problems."""
    from planner.correction import corrected, replanned  # numba loads with it

    if not start or method_for(space) != "direct" or _needs_whole_plans(space):
        return ()
    time_s = min(space.problem.settings.time_limit_s, _REPLAN_SHARE * limits.time_s)
    found = replanned(corrected(space, start, search), clock, time_s)
    return () if found is None else (found,)


def _survives(space: PlanningSpace, placement: Placement) -> bool:
    """Return whether ``placement`` keeps what has to be kept when any one node is lost: (4.19), a routing for each."""
    settings = space.problem.settings
    budget = Budget(time_limit_s=_LOSS_LIMIT_S, seed=settings.seed)
    return all(
        routed_in(space, placement, loss, solver(settings.backend), budget) for loss in space.requirements.losses
    )


def _refusal(space: PlanningSpace) -> str | None:
    """Return why the search would break a promise or simulate something else; None when it does neither."""
    settings, needs = space.problem.settings, space.requirements
    unknown = [name for name in _generating(space) if not _has_tokens(space.problem.demand.of(name))]
    if unknown:
        return f"the demand does not state the tokens of {', '.join(unknown)}, which would be simulated"
    if settings.minimize is not None:
        return f"the plan is for fewest {settings.minimize}, and the search uses all that there are"
    if settings.attainment is not None:
        return "it does not keep a required attainment, which is one of rates"
    if needs.scenarios:
        return "it samples one demand, and the plan is for several scenarios"
    return None


def _generating(space: PlanningSpace) -> list[str]:
    offered = dict(zip(space.names, space.offered_rps, strict=True))
    services = space.problem.services.services
    return [each.name for each in services if each.request_class == "generation" and offered[each.name] > 0]


def _has_tokens(demand: ServiceDemand | None) -> bool:
    return demand is not None and demand.input_tokens is not None and demand.output_tokens is not None


def _needs_whole_plans(space: PlanningSpace) -> bool:
    """Say whether only a simulation of whole plans tells what is served: of tokens, and of services in workflows."""
    return bool(_generating(space) or space.problem.services.workflows)


def _is_kept(space: PlanningSpace, pairs: Pairs, judge: Scorer, clock: Callable[[], float]) -> bool:
    """Say whether ``pairs`` can be given rates that keep every promise of the plan."""
    if not space.requirements.losses and not _needs_whole_plans(space):
        return True
    placement = _rated(space, pairs, judge, clock)
    return placement is not None and (not space.requirements.losses or _survives(space, placement))


def _rated(space: PlanningSpace, pairs: Pairs, judge: Scorer, clock: Callable[[], float]) -> Placement | None:
    """Return ``pairs`` with the rates to plan for: those simulated, or where rates depend on each other the fluid ones.

    The latter keep the ratios along workflows, and leave tokens their time (4.22); None where no rates do.
    """
    if not _needs_whole_plans(space):
        return _with_rates(space, pairs, judge)
    best = Search(space, clock, clock() + _RATES_LIMIT_S).best_rates(list(pairs), tiers(space)[0], ())
    if best is None:
        return None
    settings = space.problem.settings
    budget = Budget(time_limit_s=_RATES_LIMIT_S, seed=settings.seed)
    return balance(space, best, solver(settings.backend), budget)


def scoring_tables(space: PlanningSpace, wanted: Collection[int] | None = None) -> ScoringTables:
    """Return what simulators need to know of ``space``; stage times of the options ``wanted`` only, or of all."""
    from planner.worth import worth_of  # numba loads with it

    options = space.options
    most_stages = max((option.pp for option in options), default=1)
    stage_s = np.zeros((max(1, len(options)), most_stages))
    largest = max((option.batch for option in options), default=1)
    batch_stage_s = np.zeros((max(1, len(options)), largest, most_stages)) if _batches_matter(space) else None
    deadline_s = np.full(len(space.names), np.inf)
    for position, option in enumerate(options):
        service = space.service_of[position]
        deadline_s[service] = min(deadline_s[service], option.deadline_s)
        if wanted is not None and position not in wanted:
            continue
        model = latency_model(space, option)
        stage_s[position, : option.pp] = model.at(1).stage_s
        if batch_stage_s is not None:
            batch_stage_s[position, : option.batch, : option.pp] = model.stage_latency_table(option.batch)
    return ScoringTables(
        names=space.names,
        stage_s=stage_s,
        batch_stage_s=batch_stage_s,
        max_batch=np.array([option.batch for option in options], dtype=np.int64),
        deadline_s=deadline_s,
        offered_rps=space.offered_rps,
        gpus=sum(node.gpus.count for node in space.problem.cluster.nodes),
        worth=worth_of(space),
    )


def _kinds(space: PlanningSpace) -> dict[tuple[str, str, str, int, int], list[int]]:
    """Return the options of each service, variant and kind of group, the smallest batch first."""
    kinds: dict[tuple[str, str, str, int, int], list[int]] = {}
    for position in sorted(range(len(space.options)), key=lambda position: space.options[position].batch):
        kinds.setdefault(space.options[position].key[:5], []).append(position)
    return kinds


def _batches_matter(space: PlanningSpace) -> bool:
    """Say whether some service gains enough from batches that single requests do not tell what a placement serves."""
    return any(
        space.options[members[0]].request_s > _BATCHING_GAIN * min(space.options[each].request_s for each in members)
        for members in _kinds(space).values()
    )


def _candidates(space: PlanningSpace) -> tuple[int, ...]:
    """Return the options worth placing: the smallest batch where batches do not matter.

    Where they do, the batch that sustains most and the largest, which absorbs bursts: a device never waits for company.
    """
    kinds = _kinds(space).values()
    if not _batches_matter(space):
        return tuple(sorted(members[0] for members in kinds))
    best = {max(members, key=lambda each: float(space.sustained_rps[each])) for members in kinds}
    return tuple(sorted(best | {members[-1] for members in kinds}))


def _pairs_of(space: PlanningSpace, plan: Plan) -> Pairs:
    """Return the placement of ``plan`` in terms of ``space``."""
    groups = {(group.node, group.gpus, group.tp, group.pp): place for place, group in enumerate(space.groups)}
    options = {option.key: position for position, option in enumerate(space.options)}
    pairs = []
    for group in plan.groups:
        place = groups[group.node, group.gpus, group.tp, group.pp]
        kind = space.groups[place].gpu_type
        pairs += [
            (place, options[entry.service, entry.variant, kind, group.tp, group.pp, entry.max_batch])
            for entry in group.loadout
        ]
    return tuple(sorted(pairs))


def _with_rates(space: PlanningSpace, pairs: Pairs, judge: Scorer) -> Placement:
    """Return ``pairs`` with the rates that the simulation serves, scaled from what was simulated to what is planned."""
    from planner.arranged import Arrangement  # numba loads with it

    arrangement = Arrangement(space, (option for _, option in pairs))
    arrangement.restore(pairs)
    hosts, served = arrangement.now, judge.good(arrangement)
    offered: Integers = judge.offered.sum(axis=0)
    share: dict[tuple[int, int], float] = {}
    for service in range(len(space.names)):
        for replica in range(hosts.replicas[service]):
            option = int(hosts.option[service, replica])
            # Half a request more, so that no replica that the simulation hardly used loses its route.
            good = (float(served[service, replica]) + 0.5) / (float(offered[service]) + 0.5 * hosts.replicas[service])
            rate_rps = good * space.offered_rps[service]
            group = int(hosts.group_at[hosts.slot[service, replica]])
            share[group, option] = rate_rps / float(space.sustained_rps[option])
    busy: dict[int, float] = {}
    for (group, option), part in share.items():
        busy[group] = busy.get(group, 0.0) + part * space.options[option].utilisation
    return tuple(
        Placed(group, option, share[group, option] / max(1.0, busy[group] * (1 + 1e-9))) for group, option in pairs
    )
