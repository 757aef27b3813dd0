"""The optimum of a tiny problem by enumeration. Shares nothing with the planner but its options and groups."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ortools.linear_solver import pywraplp

from planner.option import Option
from planner.problem import Problem, derived_services
from planner.space import PlanningSpace, build_space
from planner.utility import curve_of
from plans.service import Service

Loadout = tuple[Option, ...]


def best_goodput(problem: Problem) -> float | None:
    """Return the best value of the first objective that any placement reaches, or None when no placement is allowed."""
    space = build_space(problem)
    best: float | None = None
    for loadouts in _placements(space):
        if _allowed(space, loadouts):
            value = _value(space, loadouts)
            if value is not None:
                worse = (lambda new, old: new < old) if problem.settings.minimize else (lambda new, old: new > old)
                best = value if best is None or worse(value, best) else best
    return best


def _placements(space: PlanningSpace) -> Iterator[tuple[Loadout, ...]]:
    """Yield one loadout per group, in every combination; of alike groups on alike nodes only one order."""
    services = space.problem.services
    nodes_differ = bool(
        services.workflows
        or any(service.spread for service in services.services)
        or space.problem.settings.keep_after_loss
    )
    choices = [list(_loadouts(space, group)) for group in range(len(space.groups))]
    for combination in itertools.product(*(range(len(choice)) for choice in choices)):
        ordered = nodes_differ or all(
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
        if any(factor * a.block_s > b.deadline_s - b.latency_s for a, b in itertools.permutations(loadout, 2)):
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
        if service.spread is not None and not _spread(space, service, homes):
            return False
    return True


def _spread(space: PlanningSpace, service: Service, homes: list[int]) -> bool:
    zones = {node.name: node.zone for node in space.problem.cluster.nodes}
    assert service.spread is not None

    def domain(group: int) -> str:
        node = space.groups[group].node
        return node if service.spread.over == "node" else zones[node]  # type: ignore[union-attr]

    able = {
        domain(position)
        for position, group in enumerate(space.groups)
        if any(space.options[option].service == service.name for option in group.options)
    }
    counts = Counter(domain(group) for group in homes)
    numbers = [counts[each] for each in able]
    skew = max(numbers, default=0) - min(numbers, default=0)
    return skew <= service.spread.max_skew and sum(number > 0 for number in numbers) >= service.spread.min_domains


def _value(space: PlanningSpace, loadouts: tuple[Loadout, ...]) -> float | None:
    """Return the best first objective for fixed loadouts: a small program for SCIP; None when nothing is allowed."""
    settings = space.problem.settings
    program = pywraplp.Solver.CreateSolver("SCIP" if settings.objective == "utility" else "GLOP")
    served, replicas = _rates(space, loadouts, program, dict(zip(space.names, space.offered_rps.tolist(), strict=True)))
    services = {service.name: service for service in space.problem.services.services}
    for name, each in replicas.items():
        for option, rate in each:
            wanted, least = float(space.offered_rps[space.names.index(name)]), services[name].min_replicas
            # A replica of a service with min_replicas gets 1 % of a group's compute, or a tenth of its even share.
            program.Add(rate >= (min(0.01 * option.sustained_rps, 0.1 * wanted / least) if least else 0.0))
    offered = dict(zip(space.names, space.offered_rps.tolist(), strict=True))
    if settings.attainment is not None:
        for name in space.names:
            program.Add(served[name] >= settings.attainment * offered[name])
    if settings.keep_after_loss:
        for node in space.problem.cluster.nodes:
            left = tuple(
                () if space.groups[group].node == node.name else loadout for group, loadout in enumerate(loadouts)
            )
            after, _ = _rates(space, left, program, offered)
            for name in space.names:
                program.Add(after[name] >= settings.keep_after_loss * served[name])
    if any(workflow.affinity == "require" for workflow in space.problem.services.workflows):
        _together(space, loadouts, program, replicas, served)
    if settings.minimize == "gpus":
        used = sum(len(_gpus(space, group)) for group, loadout in enumerate(loadouts) if loadout)
        return float(used) if program.Solve() == pywraplp.Solver.OPTIMAL else None
    program.Maximize(_objective(space, program, served, offered))
    if program.Solve() != pywraplp.Solver.OPTIMAL:
        return None
    return float(program.Objective().Value())


def _rates(
    space: PlanningSpace, loadouts: tuple[Loadout, ...], program: Any, offered: dict[str, float]
) -> tuple[dict[str, Any], dict[str, list[tuple[Option, Any]]]]:
    """Add rates of one routing, within compute and demand, children at fan-out times their callers."""
    rates: dict[str, list[tuple[Option, Any]]] = {name: [] for name in space.names}
    for loadout in loadouts:
        busy = []
        for option in loadout:
            rate = program.NumVar(0.0, program.infinity(), "")
            rates[option.service].append((option, rate))
            busy.append(rate * (option.hold_s / option.batch / option.utilisation))
        program.Add(program.Sum(busy) <= 1)
        for option in loadout:  # the time per further token, stretched by what neighbours use, is within the TPOT
            mean_next = option.token_ratio
            others = [b * o.utilisation for b, o in zip(busy, loadout, strict=True) if o.service != option.service]
            if mean_next > 0 and others:
                program.Add(program.Sum(others) <= 1 - mean_next)
    served = {name: program.Sum([rate for _, rate in each]) for name, each in rates.items()}
    for name in space.names:
        program.Add(served[name] <= offered[name])
    for name, callers in derived_services(space.problem).items():
        program.Add(served[name] == program.Sum([fanout * served[caller] for caller, fanout in callers]))
    return served, rates


def _together(
    space: PlanningSpace,
    loadouts: tuple[Loadout, ...],
    program: Any,
    replicas: dict[str, list[tuple[Option, Any]]],
    served: dict[str, Any],
) -> None:
    """Require that every call of a workflow finds its callee on the caller's node."""
    queues = {name: list(each) for name, each in replicas.items()}
    by_node: dict[tuple[str, str], list[Any]] = {}
    for group, loadout in enumerate(loadouts):
        for option in loadout:
            _, rate = queues[option.service].pop(0)
            by_node.setdefault((space.groups[group].node, option.service), []).append(rate)
    flows: dict[tuple[str, str], list[Any]] = {}
    for workflow in space.problem.services.workflows:
        for edge in workflow.edges:
            local = []
            for node in space.problem.cluster.nodes:
                flow = program.NumVar(0.0, program.infinity(), "")
                program.Add(flow <= edge.fanout * program.Sum(by_node.get((node.name, edge.source), [])))
                flows.setdefault((node.name, edge.target), []).append(flow)
                local.append(flow)
            program.Add(program.Sum(local) >= edge.fanout * served[edge.source])
    for (node, target), arriving in flows.items():
        program.Add(program.Sum(arriving) <= program.Sum(by_node.get((node, target), [])))


def _objective(space: PlanningSpace, program: Any, served: dict[str, Any], offered: dict[str, float]) -> Any:
    settings = space.problem.settings
    services = {service.name: service for service in space.problem.services.services}
    shares = {name: served[name] * (1.0 / offered[name]) for name in space.names if offered[name] > 0}
    least, most = program.NumVar(0.0, 1.0, ""), program.NumVar(0.0, 1.0, "")
    for share in shares.values():
        program.Add(least <= share)
        program.Add(most >= share)
    if settings.objective == "max-min":
        return least
    if settings.objective == "fair-sum":
        return program.Sum(list(shares.values())) + len(shares) * (least - most + 1.0)
    if settings.objective == "utility":
        worth = []
        for name, share in shares.items():
            curve = curve_of(settings, services[name].slo.attainment)
            worth.append(services[name].weight * _curved(program, share, curve.points))
        return program.Sum(worth)
    return program.Sum([services[name].weight * served[name] for name in space.names])


def _curved(program: Any, share: Any, points: tuple[tuple[float, float], ...]) -> Any:
    """Return the value at ``share`` of the curve through ``points``: one line of it holds, each with its own share."""
    lines = [*itertools.pairwise(points), (points[-1], points[-1])]
    chosen = [program.BoolVar("") for _ in lines]
    shares = [program.NumVar(0.0, 1.0, "") for _ in lines]
    program.Add(program.Sum(chosen) == 1)
    program.Add(program.Sum(shares) == share)
    values = []
    for ((left, low), (right, high)), here, part in zip(lines, chosen, shares, strict=True):
        program.Add(part >= left * here)
        program.Add(part <= right * here)
        slope = (high - low) / (right - left) if right > left else 0.0
        values.append((high if right == left else low - slope * left) * here + slope * part)
    return program.Sum(values)


def _gpus(space: PlanningSpace, group: int) -> list[tuple[str, int]]:
    return [(space.groups[group].node, gpu) for gpu in space.groups[group].gpus]


def _others(space: PlanningSpace, group: int) -> list[int]:
    return [other for other in range(len(space.groups)) if other != group]
