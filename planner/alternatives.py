"""What a plan does not do for a service, and what speaks against it: other parallelisms, nodes and variants."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.board import Board
from planner.option import Option, Rejection
from planner.space import Placed, Placement, PlanningSpace
from planner.unserved import closest
from plans.units import format_bytes, format_seconds

__all__ = ["MOST_LINES", "Alternative", "parallelisms", "places", "variants"]

MOST_LINES = 6
"""Alternatives of one kind that are listed, so that the answer fits a screen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Something the plan does not do, and the reason with its numbers."""

    what: str
    why_not: str


def parallelisms(
    space: PlanningSpace, service: int, running: list[Option], served_in_full: bool
) -> tuple[Alternative, ...]:
    """Compare every parallelism that is not used with what is: the same variant where it has it."""
    name = space.names[service]
    mine = list(space.catalogue.of(name))
    used = {(option.gpu_type, option.tp, option.pp) for option in running}
    offered = {(option.gpu_type, option.tp, option.pp) for option in mine}
    variants = {option.variant for option in running}
    found = []
    for kind in sorted(offered - used):
        there = [each for each in mine if (each.gpu_type, each.tp, each.pp) == kind]
        option = max(there, key=lambda each: (each.variant in variants, _rate_per_gpu(each)))
        why = _against(space, service, option, running, served_in_full)
        found.append(Alternative(what=f"tp {kind[1]}, pp {kind[2]} on {kind[0]}", why_not=why))
    rejected = [each for each in space.catalogue.rejections if each.service == name]
    for kind in sorted({(each.gpu_type, each.tp, each.pp) for each in rejected} - used - offered):
        nearest = closest([each for each in rejected if (each.gpu_type, each.tp, each.pp) == kind])
        why = f"no option works: {_short(nearest)}"
        found.append(Alternative(what=f"tp {kind[1]}, pp {kind[2]} on {kind[0]}", why_not=why))
    return tuple(found[:MOST_LINES])


def _against(space: PlanningSpace, service: int, option: Option, running: list[Option], served_in_full: bool) -> str:
    """Compare ``option`` with the best one that runs, of the same variant and GPU type where there is one."""
    rate = f"{_rate_per_gpu(option):.4g} rps per GPU ({option.variant}, batch {option.batch})"
    if not running:
        return rate
    placed = max(
        running,
        key=lambda each: (each.variant == option.variant, each.gpu_type == option.gpu_type, _rate_per_gpu(each)),
    )
    text = f"{rate} against {_rate_per_gpu(placed):.4g} as placed ({placed.variant} on {placed.gpu_type})"
    return f"{text}; {_decided_by(space, service, option, placed, served_in_full)}"


def _decided_by(space: PlanningSpace, service: int, option: Option, placed: Option, served_in_full: bool) -> str:
    """Say what speaks for ``placed`` and against ``option``: a limit, or the first objective that tells them apart."""
    settings = space.problem.settings
    first = {"max-min": "max-min fairness"}.get(settings.objective, settings.objective)
    first = {None: first, "gpus": "fewest GPUs", "cost": "least cost"}[settings.minimize]
    if option.gpus > space.max_gpus[service]:
        return f"max_gpus {space.max_gpus[service]:.0f} is below its {option.gpus} GPUs"
    if served_in_full and option.accuracy < placed.accuracy:
        return f"its accuracy {option.accuracy:.4g} is below {placed.accuracy:.4g}, and accuracy comes before GPU cost"
    prices = space.problem.cluster.gpu_types
    cost = prices[option.gpu_type].cost_per_hour / _rate_per_gpu(option)
    cost_placed = prices[placed.gpu_type].cost_per_hour / _rate_per_gpu(placed)
    if served_in_full and option.accuracy == placed.accuracy and cost > cost_placed * (1 + 1e-9):
        return f"GPU cost decides: {cost:.4g} per hour for each rps against {cost_placed:.4g}"
    if _rate_per_gpu(option) < _rate_per_gpu(placed):
        return f"{first} decides: GPUs used so serve less"
    if served_in_full:
        return "served in full as placed"
    which = "its GPU serves" if option.gpus == 1 else f"its {option.gpus} GPUs of one node serve"
    return f"{first} decides: {which} more otherwise"


def places(
    space: PlanningSpace, placement: Placement, service: int, mine: list[Placed], *, first: str | None
) -> tuple[Alternative, ...]:
    """Say for every node without the service what is in the way there; ``first`` comes first."""
    board = Board(space)
    for placed in placement:
        board.place(placed.group, placed.option, placed.share)
    hosts = {space.groups[placed.group].node for placed in mine}
    document = space.problem.services.service(space.names[service])
    options = np.flatnonzero(space.service_of == service).tolist()
    its_options = set(options)
    able: dict[str, list[int]] = {}
    for index, group in enumerate(space.groups):
        if not its_options.isdisjoint(group.options):
            able.setdefault(group.node, []).append(index)
    found: list[Alternative] = []
    for node in sorted(space.problem.cluster.nodes, key=lambda each: each.name != first):
        if node.name in hosts:
            continue
        if len(found) == MOST_LINES:
            break
        if not any(document.allows(node.name, (gpu,)) for gpu in range(node.gpus.count)):
            why = "pin or forbid rules it out"
        elif node.name not in able:
            why = f"no option works on {node.gpus.type}"
        else:
            why = _in_the_way(space, board, able[node.name], options)
        found.append(Alternative(what=node.name, why_not=why))
    return tuple(found)


def _in_the_way(space: PlanningSpace, board: Board, homes: list[int], options: list[int]) -> str:
    is_open = board.open_groups()
    free = [home for home in homes if is_open[home]]
    if not free:
        return "its GPUs work in groups of another parallelism"
    left = float(board.compute_left[free].max())
    if left < 0.01:
        return "its GPUs are planned to their limit of utilisation"
    spare = [home for home in free if board.compute_left[home] >= 0.01]
    room = float(board.memory_left()[spare].max())
    needed = float(space.memory[options].max(axis=1).min())
    if room < needed:
        return f"{room:.0%} of memory free at most, the smallest option needs {needed:.0%}"
    service = int(space.service_of[options[0]])
    if min(len(space.groups[home].gpus) for home in spare) > board.budget_left(service):
        return f"max_gpus {space.max_gpus[service]:.0f} is reached"
    if not any(board.fits(option)[spare].any() for option in options):
        return "what runs there would block it, or be blocked by it, beyond a deadline"
    return f"not needed: {left:.0%} of its compute would be free"


def variants(space: PlanningSpace, index: int, running: list[Option], served_in_full: bool) -> tuple[Alternative, ...]:
    """Compare every variant that is not used with what is, on the GPU types in use where it has options there."""
    service = space.names[index]
    used = {option.variant for option in running}
    types = {option.gpu_type for option in running}
    document = space.problem.services.service(service)
    found = []
    for variant in document.variants:
        if variant.model in used:
            continue
        options = [option for option in space.catalogue.of(service) if option.variant == variant.model]
        rejected = [
            each for each in space.catalogue.rejections if each.service == service and each.variant == variant.model
        ]
        if options:
            option = max(options, key=lambda each: (each.gpu_type in types, _rate_per_gpu(each)))
            why = f"accuracy {variant.accuracy:.4g}, {_against(space, index, option, running, served_in_full)}"
        elif rejected:
            why = _short(closest(rejected))
        else:
            why = "dominated by another option, or without a profile on the GPU types present"
        found.append(Alternative(what=variant.model, why_not=why))
    return tuple(found[:MOST_LINES])


def _rate_per_gpu(option: Option) -> float:
    return option.sustained_rps / option.gpus


def _short(rejection: Rejection) -> str:
    needed, available = rejection.needed, rejection.available
    which = f"{rejection.variant} at batch {rejection.batch}"
    if rejection.reason == "memory":
        return f"memory: {which} needs {format_bytes(needed)}, {format_bytes(available)} usable per GPU"
    if rejection.reason == "latency":
        return f"latency: {which} takes {format_seconds(needed)} against a deadline of {format_seconds(available)}"
    return f"accuracy: {available:.4g} of {rejection.variant} is below min_accuracy {needed:.4g}"
