"""From a plan to a better one by simulation: what may be polished, the search, and the plan document again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from planner.arrangement import Arrangement
from planner.assemble import assemble
from planner.linear import Floats, Integers
from planner.polish import Pairs, PolishLimits, PolishOutcome, polish
from planner.problem import Problem, check
from planner.scoring import Scorer
from planner.space import Placed, Placement, PlanningSpace, build_space
from plans.plan import Plan

__all__ = ["Polished", "Refused", "ScoringTables", "polish_plan"]

_ACCURACY_WORTH = 1e-3
"""Goodput that one unit of accuracy is worth: enough to break ties, as accuracy is the objective after goodput."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringTables:
    """What a simulator needs to know of the options and services of a planning space.

    Attributes:
        names: The services.
        stage_s: Shape (option, stage): seconds that a single request holds each stage; 0 beyond the last.
        deadline_s: Shape (service,): seconds from arrival within which a request is good; infinite without options.
        offered_rps: Shape (service,): the rate that is planned for.
        gpus: GPUs of the cluster; groups are named by their first one.
    """

    names: tuple[str, ...]
    stage_s: Floats
    deadline_s: Floats
    offered_rps: Floats
    gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Polished:
    """A plan after the search, with what the search found; the same plan where it found nothing better."""

    plan: Plan
    outcome: PolishOutcome
    scorer: str


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

    Args:
        problem: What ``plan`` was made from.
        plan: A plan for it. Its certificate is kept: it is that of the placement that the search started from.
        scorers: Makes the simulator that guides the search, and the one that has the last word, on other arrivals.
        limits: When to end.
        clock: Monotonic clock, seconds.
    """
    space = build_space(problem)
    reason = _refusal(space)
    if reason is not None:
        return Refused(reason=reason)
    search, judge = scorers(_tables(space))
    start = _pairs_of(space, plan)
    outcome = polish(space, start, search, judge, _worth(space), _alone(space), limits, clock)
    if outcome.pairs == start:
        return Polished(plan=plan, outcome=outcome, scorer=search.name)
    better = assemble(
        space,
        _with_rates(space, outcome.pairs, judge),
        plan.solver,
        shadow_prices=dict(plan.shadow_prices),
        warnings=check(problem),
        created_at=plan.created_at,
        tool_version=plan.tool_version,
    )
    return Polished(plan=better, outcome=outcome, scorer=search.name)


def _refusal(space: PlanningSpace) -> str | None:
    """Return why the search would break a promise or simulate something else; None when it does neither."""
    settings, needs = space.problem.settings, space.requirements
    generation = [each.name for each in space.problem.services.services if each.request_class == "generation"]
    if generation:
        return f"its simulation does not generate tokens ({', '.join(generation)})"
    if settings.minimize is not None or settings.objective != "goodput":
        return "it raises goodput, and the plan is for another objective"
    if needs.spreads or needs.couplings or needs.calls or needs.losses or needs.scenarios or needs.least_rps.any():
        return "it does not keep spreading, workflows, lost nodes, scenarios or a required attainment"
    return None


def _tables(space: PlanningSpace) -> ScoringTables:
    options = space.options
    stage_s = np.zeros((max(1, len(options)), max((option.pp for option in options), default=1)))
    deadline_s = np.full(len(space.names), np.inf)
    for position, option in enumerate(options):
        model = space.problem.profiles.latency(option.variant, option.gpu_type, option.tp, option.pp)
        assert model is not None, "an option is only made from a profile"
        stage_s[position, : option.pp] = model.at(1).stage_s
        service = space.service_of[position]
        deadline_s[service] = min(deadline_s[service], option.deadline_s)
    return ScoringTables(
        names=space.names,
        stage_s=stage_s,
        deadline_s=deadline_s,
        offered_rps=space.offered_rps,
        gpus=sum(node.gpus.count for node in space.problem.cluster.nodes),
    )


def _worth(space: PlanningSpace) -> Floats:
    """Return what a request served in time by each option counts, shape (option,)."""
    worth: Floats = space.weight[space.service_of] * (1.0 + _ACCURACY_WORTH * space.accuracy)
    return worth


def _alone(space: PlanningSpace) -> tuple[int, ...]:
    """Return, of each variant on each kind of group, the option with the smallest batch: batches do not matter here."""
    smallest: dict[tuple[str, str, str, int, int], int] = {}
    for position, option in enumerate(space.options):
        kind = option.key[:5]
        if kind not in smallest or option.batch < space.options[smallest[kind]].batch:
            smallest[kind] = position
    return tuple(sorted(smallest.values()))


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
    arrangement = Arrangement(space, (option for _, option in pairs))
    arrangement.restore(pairs)
    hosts = arrangement.deployment
    heat = judge.race(
        hosts,
        np.ones(len(space.options)),
        rival=np.zeros(len(judge.offered)),
        needed=-np.inf,
        start=0,
        least=len(judge.offered),
    )
    offered: Integers = judge.offered.sum(axis=0)
    share: dict[tuple[int, int], float] = {}
    for service in range(len(space.names)):
        for replica in range(hosts.count[service]):
            option = int(hosts.option[service, replica])
            # Half a request more, so that no replica that the simulation hardly used loses its route.
            good = (float(heat.good[service, replica]) + 0.5) / (float(offered[service]) + 0.5 * hosts.count[service])
            rate_rps = good * space.offered_rps[service]
            group = int(arrangement.group_at[hosts.slot[service, replica]])
            share[group, option] = rate_rps / float(space.sustained_rps[option])
    busy: dict[int, float] = {}
    for (group, option), part in share.items():
        busy[group] = busy.get(group, 0.0) + part * space.options[option].utilisation
    return tuple(
        Placed(group, option, share[group, option] / max(1.0, busy[group] * (1 + 1e-9))) for group, option in pairs
    )
