"""Placements that outlive the loss of a node: every service on several nodes, with compute to spare on each.

What (4.20) of docs/formulation.md asks for: with equal shares on n nodes, losing one leaves (n - 1) / n, so every node
sets aside a part 1 / (n - 1) of what has to be kept. Rates are the business of a linear program afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.board import NEGLIGIBLE, Board
from planner.greedy import Order, Target, add_minimum
from planner.space import Placement, PlanningSpace

__all__ = ["Redundant", "largest_first", "placed_apart", "redundant_starts", "with_room"]

_FEWEST_NODES = (2, 3, 4, 6)
"""Least numbers of nodes per service that a start is made with: few leave memory, many leave compute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Redundant:
    """An option that is to run on ``replicas`` different nodes, with ``share`` of the compute on each."""

    option: int
    replicas: int
    share: float


def redundant_starts(space: PlanningSpace) -> list[Placement]:
    """Return placements in which every service, those worth most per GPU first, runs on several nodes.

    Services with a minimum of replicas come before all others: these have to serve something, (4.12), so one replica
    of them that no other node can stand in for makes a placement useless.
    """
    return [placed_apart(space, _wanted(space, fewest)) for fewest in _FEWEST_NODES]


def _wanted(space: PlanningSpace, fewest: int) -> list[Redundant]:
    """Return every service's option of most weighted rate per GPU, on ``fewest`` nodes or on more where it has to."""
    keep = space.requirements.keep_after_loss
    gpus = np.array([float(option.gpus) for option in space.options])
    density = space.weight[space.service_of] * space.sustained_rps / gpus if len(gpus) else np.zeros(0)
    wanted: list[Redundant] = []
    seen: set[int] = set()
    optional = space.min_replicas[space.service_of] == 0 if len(gpus) else np.zeros(0, dtype=bool)
    for option in np.lexsort((np.arange(len(gpus)), -density, optional)).tolist():
        service = int(space.service_of[option])
        if service in seen or space.offered_rps[service] <= 0:
            continue
        seen.add(service)
        groups = float(space.offered_rps[service] / space.sustained_rps[option])
        replicas = max(fewest, math.ceil(keep * groups) + 1, math.ceil(groups))
        share = max(keep * groups / (replicas - 1), groups / replicas)
        wanted.append(Redundant(option=option, replicas=replicas, share=min(1.0, share)))
    return wanted


def placed_apart(space: PlanningSpace, wanted: Sequence[Redundant]) -> Placement:
    """Return a placement of ``wanted`` in its order, as far as there is room, and of the minimum replicas.

    Replicas of a service go to different nodes, each where its share leaves least of the compute; where no node has
    that much left, to the one with most.
    """
    board = Board(space)
    nodes = {node.name: index for index, node in enumerate(space.problem.cluster.nodes)}
    node_of = np.array([nodes[group.node] for group in space.groups], dtype=np.int64)
    barred = np.zeros((len(space.names), len(nodes)), dtype=bool)
    for each in wanted:
        service = int(space.service_of[each.option])
        for _ in range(each.replicas):
            candidates = board.candidates(each.option)
            candidates = candidates[
                ~barred[service, node_of[candidates]] & (board.compute_left[candidates] > NEGLIGIBLE)
            ]
            if not len(candidates):
                break
            left = board.compute_left[candidates]
            enough = left >= each.share - 1e-9
            keys = np.lexsort((candidates, left, ~enough)) if enough.any() else np.lexsort((candidates, -left))
            group = int(candidates[keys[0]])
            board.place(group, each.option, min(each.share, float(board.compute_left[group])))
            barred[service, node_of[group]] = True
    add_minimum(board)
    return board.placement()


def with_room(space: PlanningSpace, targets: list[Target]) -> list[Redundant]:
    """Return the counts of ``targets`` with room to spare on each for the loss of one."""
    keep = space.requirements.keep_after_loss
    found = []
    for _, option, share, replicas in targets:
        least = max(replicas, 1)
        spare = max(share / least, keep * share / (least - 1) if least > 1 else 1.0)
        found.append(Redundant(option=option, replicas=least, share=min(1.0, spare)))
    return found


def largest_first(space: PlanningSpace, wanted: list[Redundant], order: Order) -> list[Redundant]:
    """Return ``wanted`` with the largest first, by memory or by share, after those of which replicas are required."""
    size = space.memory.max(axis=1) if len(space.options) else np.zeros(0)
    optional = space.min_replicas == 0

    def key(each: Redundant) -> tuple[bool, float, float, int]:
        by_size, by_share = -float(size[each.option]), -each.share
        first, second = (by_size, by_share) if order == "memory" else (by_share, by_size)
        return bool(optional[space.service_of[each.option]]), first, second, each.option

    return sorted(wanted, key=key)
