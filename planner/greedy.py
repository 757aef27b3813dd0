"""Placements without a solver: densest first with best fit, the packing of replica counts, and the running plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from planner.board import NEGLIGIBLE, Board
from planner.space import Placement, PlanningSpace

__all__ = ["Order", "Target", "add_minimum", "fill", "greedy", "pack", "running"]

Target = tuple[int, int, float, int]
"""(class, option, compute share over the class, least number of replicas)."""

Order = Literal["memory", "share", "density"]


def greedy(space: PlanningSpace) -> Placement | None:
    """Return a placement: minimum replicas first, then services by weighted rate per GPU, each where it fits best.

    None when the minimum replicas find no place this way; that proves nothing.
    """
    for smallest_first in (False, True):
        board = Board(space)
        if add_minimum(board, smallest_first=smallest_first):
            fill(board)
            return board.placement()
    return None


def pack(space: PlanningSpace, targets: Sequence[Target], order: Order) -> Placement | None:
    """Place the replicas and shares that a model over classes asks for, then fill what is left greedily.

    Within a class, whole groups go first, then what is left in ``order``, into the fullest group that takes it whole;
    when none does, the emptiest takes a part.
    """
    board = Board(space)
    for option, share, groups in _ordered(space, targets, order):
        _place_target(board, option, share, groups)
    for _, option, _, least in targets:
        # Replicas asked for without compute count only towards the minimum.
        missing = min(least, int(space.min_replicas[space.service_of[option]])) - board.replicas(
            int(space.service_of[option])
        )
        for _ in range(max(0, missing)):
            _place_best(board, option, float(space.requirements.least_share[option]))
    if not add_minimum(board, smallest_first=True):
        return None
    fill(board)
    return board.placement()


def running(space: PlanningSpace) -> Placement | None:
    """Return the running plan as a placement, as far as it still fits; None without one, or without its replicas."""
    plan = space.problem.current
    if plan is None:
        return None
    place_of = {(group.node, group.gpus, group.tp, group.pp): index for index, group in enumerate(space.groups)}
    option_of = {option.key: index for index, option in enumerate(space.options)}
    board = Board(space)
    for group in plan.groups:
        place = place_of.get((group.node, group.gpus, group.tp, group.pp))
        if place is None:
            continue
        for entry in group.loadout:
            kind = space.groups[place].gpu_type
            option = option_of.get((entry.service, entry.variant, kind, group.tp, group.pp, entry.max_batch))
            if option is not None and place in board.candidates(option):
                share = min(entry.rate_rps / space.sustained_rps[option], board.compute_left[place])
                board.place(place, option, min(share, board.wanted_share(option)))
    enough = all(board.replicas(service) >= least for service, least in enumerate(space.min_replicas))
    return board.placement() if enough else None


def fill(board: Board) -> None:
    """Serve what remains: first on replicas that stand with compute to spare, then on new ones."""
    space = board.space
    for group, option in board.running():
        share = min(board.compute_left[group], board.wanted_share(option))
        if share > NEGLIGIBLE:
            board.feed(group, option, share)
    density = _density(space)
    order = sorted(range(len(space.options)), key=lambda option: (-density[option], option))
    for option in order:
        if board.remaining_rps[space.service_of[option]] <= 0:
            continue
        least = max(NEGLIGIBLE, float(space.requirements.least_share[option]))
        while (wanted := board.wanted_share(option)) > least and _place_best(board, option, wanted, least=least):
            pass


def _place_best(board: Board, option: int, wanted: float, *, least: float = 0.0) -> bool:
    """Place ``option`` in the fullest group with ``wanted`` compute left, else in the emptiest; used groups first.

    Groups with less than ``least`` left are left out.
    """
    candidates = board.candidates(option)
    candidates = candidates[board.compute_left[candidates] > max(least, NEGLIGIBLE * (wanted > 0)) - NEGLIGIBLE / 2]
    if not len(candidates):
        return False
    left = board.compute_left[candidates]
    enough = left >= min(wanted, 1.0) - 1e-12
    if enough.any():
        keys = np.lexsort((candidates, left, ~board.used[candidates], ~enough))
    else:
        keys = np.lexsort((candidates, -left))
    group = int(candidates[keys[0]])
    share = min(wanted, float(board.compute_left[group]))
    if wanted > 0 and share <= NEGLIGIBLE:
        return False
    board.place(group, option, max(share, 0.0))
    return True


def add_minimum(board: Board, *, smallest_first: bool = True) -> bool:
    """Place replicas until every service has its minimum; False when one finds no place."""
    space = board.space
    density = _density(space)
    size = space.memory.max(axis=1) if len(space.options) else np.zeros(0)
    least = space.requirements.least_share
    services = [service for service in range(len(space.names)) if space.min_replicas[service] > 0]
    homes = np.zeros(len(space.names), dtype=np.int64)
    for each in space.classes:
        homes[np.unique(space.service_of[list(each.options)])] += each.count
    for service in sorted(services, key=lambda service: (homes[service] - space.min_replicas[service], service)):
        options = [int(option) for option in np.flatnonzero(space.service_of == service)]
        options.sort(key=lambda option: (size[option] if smallest_first else -density[option], option))
        while board.replicas(service) < space.min_replicas[service]:
            if not any(_place_best(board, option, float(least[option])) for option in options):
                return False
    return True


def _place_target(board: Board, option: int, share: float, groups: Sequence[int]) -> None:
    inside = np.zeros(len(board.space.groups), dtype=bool)
    inside[np.array(groups)] = True
    share = min(share, board.wanted_share(option))
    while share > NEGLIGIBLE:
        candidates = board.candidates(option)
        candidates = candidates[inside[candidates] & (board.compute_left[candidates] > NEGLIGIBLE)]
        if not len(candidates):
            return
        left = board.compute_left[candidates]
        enough = left >= min(share, 1.0) - 1e-9
        keys = np.lexsort((candidates, left, ~enough)) if enough.any() else np.lexsort((candidates, -left))
        group = int(candidates[keys[0]])
        given = min(share, float(board.compute_left[group]))
        board.place(group, option, given)
        share -= given


def _ordered(space: PlanningSpace, targets: Sequence[Target], order: Order) -> list[tuple[int, float, tuple[int, ...]]]:
    """Split shares above 1 into whole groups and a rest; whole ones first, then the rests in ``order``."""
    density = _density(space)
    whole, rest = [], []
    for place, option, share, _ in targets:
        members = space.classes[place].members
        full = int(share + 1e-9)
        whole.extend([(option, 1.0, members)] * full)
        if share - full > NEGLIGIBLE:
            rest.append((option, share - full, members))
    keys = {
        "memory": lambda item: (-space.memory[item[0]].max(), -item[1], item[0]),
        "share": lambda item: (-item[1], -space.memory[item[0]].max(), item[0]),
        "density": lambda item: (-density[item[0]], -item[1], item[0]),
    }
    return whole + sorted(rest, key=keys[order])


def _density(space: PlanningSpace) -> list[float]:
    """Return the weighted rate per GPU of each option."""
    return [
        float(space.weight[service] * rate / option.gpus)
        for option, service, rate in zip(space.options, space.service_of, space.sustained_rps, strict=True)
    ]
