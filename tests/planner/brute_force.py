"""The optimum of a tiny problem by enumeration. Shares nothing with the planner but its options and groups."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from ortools.linear_solver import pywraplp

from planner.option import Option
from planner.problem import Problem
from planner.space import PlanningSpace, build_space

Loadout = tuple[Option, ...]


def best_goodput(problem: Problem) -> float | None:
    """Return the highest weighted goodput that any placement reaches, or None when no placement is allowed."""
    space = build_space(problem)
    best: float | None = None
    for loadouts in _placements(space):
        if _allowed(space, loadouts):
            value = _goodput(space, loadouts)
            best = value if best is None else max(best, value)
    return best


def _placements(space: PlanningSpace) -> Iterator[tuple[Loadout, ...]]:
    """Yield one loadout per group, in every combination; of alike single groups only one order."""
    choices = [list(_loadouts(space, group)) for group in range(len(space.groups))]
    for combination in itertools.product(*(range(len(choice)) for choice in choices)):
        ordered = all(
            combination[first] <= combination[second]
            for first, second in itertools.pairwise(range(len(choices)))
            if space.groups[first].options == space.groups[second].options
            and not set(_gpus(space, first)) & {gpu for other in _others(space, first) for gpu in _gpus(space, other)}
            and not set(_gpus(space, second)) & {gpu for other in _others(space, second) for gpu in _gpus(space, other)}
        )
        if ordered:
            yield tuple(choice[index] for choice, index in zip(choices, combination, strict=True))


def _loadouts(space: PlanningSpace, group: int) -> Iterator[Loadout]:
    """Yield every set of options that fits the memory of a group, names no service twice, and blocks nobody."""
    problem = space.problem
    options = [space.options[index] for index in space.groups[group].options]
    by_service: dict[str, list[Option | None]] = {}
    for option in options:
        by_service.setdefault(option.service, [None]).append(option)
    usable = problem.cluster.gpu_types[space.groups[group].gpu_type].memory_bytes * (
        1 - problem.settings.headroom_ratio
    )
    for chosen in itertools.product(*by_service.values()):
        loadout = tuple(option for option in chosen if option is not None)
        stages = range(space.groups[group].pp)
        if any(sum(option.memory_bytes[stage] for option in loadout) > usable for stage in stages):
            continue
        factor = {"strict": 1.0, "expected": 0.5, "none": 0.0}[problem.settings.blocking]
        if any(factor * a.hold_s > b.deadline_s - b.latency_s for a, b in itertools.permutations(loadout, 2)):
            continue
        yield loadout


def _allowed(space: PlanningSpace, loadouts: tuple[Loadout, ...]) -> bool:
    used = [group for group, loadout in enumerate(loadouts) if loadout]
    taken = [gpu for group in used for gpu in _gpus(space, group)]
    if len(taken) != len(set(taken)):
        return False
    for service in space.problem.services.services:
        homes = [group for group in used if any(option.service == service.name for option in loadouts[group])]
        if len(homes) < service.min_replicas:
            return False
        if service.max_gpus is not None and sum(len(space.groups[group].gpus) for group in homes) > service.max_gpus:
            return False
    return True


def _goodput(space: PlanningSpace, loadouts: tuple[Loadout, ...]) -> float:
    """Return the best weighted rate for fixed loadouts: a linear program, solved by GLOP."""
    solver = pywraplp.Solver.CreateSolver("GLOP")
    rates: dict[str, list[pywraplp.Variable]] = {name: [] for name in space.names}
    for loadout in loadouts:
        busy = []
        for option in loadout:
            rate = solver.NumVar(0, solver.infinity(), "")
            rates[option.service].append(rate)
            busy.append(rate * (option.hold_s / option.batch / option.utilisation))
        solver.Add(solver.Sum(busy) <= 1)
    for service, offered in zip(space.names, space.offered_rps, strict=True):
        solver.Add(solver.Sum(rates[service]) <= float(offered))
    weights = {service.name: service.weight for service in space.problem.services.services}
    solver.Maximize(solver.Sum(weights[service] * rate for service, each in rates.items() for rate in each))
    assert solver.Solve() == pywraplp.Solver.OPTIMAL
    return float(solver.Objective().Value())


def _gpus(space: PlanningSpace, group: int) -> list[tuple[str, int]]:
    return [(space.groups[group].node, gpu) for gpu in space.groups[group].gpus]


def _others(space: PlanningSpace, group: int) -> list[int]:
    return [other for other in range(len(space.groups)) if other != group]
