"""Why a service is not served in full: what binds, in the words of the plan format, with numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from planner.board import NEGLIGIBLE, Board
from planner.option import Rejection
from planner.space import Placement, PlanningSpace
from plans.plan import Unserved
from plans.units import format_bytes, format_seconds

__all__ = ["Binding", "binding", "closest", "unserved"]

Reason = Literal["memory", "compute", "latency", "budget", "accuracy"]

_SERVED_RATIO = 1e-6
"""Share of the demand that may be missing through rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """The constraint that keeps a service from more, and the numbers behind it."""

    reason: Reason
    detail: str


def unserved(space: PlanningSpace, placement: Placement) -> tuple[Unserved, ...]:
    """Return what ``placement`` leaves out, and why, in the order of the services."""
    missing = space.offered_rps - space.served_rps(placement)
    standing = _Standing(space, placement)
    found = []
    for service, name in enumerate(space.names):
        if missing[service] > max(_SERVED_RATIO * space.offered_rps[service], 1e-9):
            why = _binding(standing, service)
            found.append(Unserved(service=name, rate_rps=float(missing[service]), reason=why.reason, detail=why.detail))
    return tuple(found)


def binding(space: PlanningSpace, placement: Placement, service: int) -> Binding:
    """Return what keeps ``service`` (by position) from being served more."""
    return _binding(_Standing(space, placement), service)


class _Standing:
    """What stands, laid out once for all services that are asked about."""

    def __init__(self, space: PlanningSpace, placement: Placement) -> None:
        self.space = space
        self.board = _board(space, placement)
        self.gpus = np.zeros(len(space.names))
        for placed in placement:
            self.gpus[space.service_of[placed.option]] += len(space.groups[placed.group].gpus)
        order = np.argsort(space.service_of, kind="stable")
        cuts = np.searchsorted(space.service_of[order], np.arange(1, len(space.names)))
        self.options = [each.tolist() for each in np.split(order, cuts)]
        self.in_class = [np.unique(space.service_of[list(each.options)]) for each in space.classes]

    def homes(self, service: int) -> NDArray[np.bool_]:
        """Return the groups that some option of a service could run on, shape (group,)."""
        allowed = np.zeros(len(self.space.groups), dtype=bool)
        for each, services in zip(self.space.classes, self.in_class, strict=True):
            if service in services:
                allowed[list(each.members)] = True
        return allowed


def _binding(standing: _Standing, service: int) -> Binding:
    space, options = standing.space, standing.options[service]
    if not options:
        return _no_option(space, space.names[service])
    homes = standing.homes(service)
    if not homes.any():
        return Binding(reason="budget", detail="pin and forbid leave no group of GPUs that its options can run on")
    smallest = min(space.options[option].gpus for option in options)
    used = int(standing.gpus[service])
    limit = space.max_gpus[service]
    if used + smallest > limit:
        detail = f"runs on {used} of at most {limit:.0f} GPUs (max_gpus); its smallest option needs {smallest} more"
        return Binding(reason="budget", detail=detail)
    return _crowded_out(space, standing.board, options, homes)


def _crowded_out(space: PlanningSpace, board: Board, options: list[int], allowed: NDArray[np.bool_]) -> Binding:
    """Say what is in the way on the groups that still have compute to spare."""
    spare = np.flatnonzero(allowed & (board.compute_left > 100 * NEGLIGIBLE) & board.open_groups())
    least = min(options, key=lambda option: (space.memory[option].max(), option))
    if not len(spare):
        cheapest = max(options, key=lambda option: space.sustained_rps[option] / space.options[option].gpus)
        best = space.options[cheapest]
        detail = (
            f"all {int(allowed.sum())} groups that could run it are full; one GPU more would serve up to "
            f"{best.sustained_rps / best.gpus:.4g} rps of it with {best.variant} at batch {best.batch}"
        )
        return Binding(reason="compute", detail=detail)
    room = board.memory_left()[spare]
    needed = float(space.memory[least].max())
    roomy = spare[room >= needed - 1e-9]
    size = format_bytes(max(space.options[least].memory_bytes))
    if not len(roomy):
        detail = (
            f"{len(spare)} groups have compute to spare but at most {room.max():.0%} of their memory free; its "
            f"smallest option, {space.options[least].variant} at batch {space.options[least].batch}, needs {size} "
            f"({needed:.0%})"
        )
        return Binding(reason="memory", detail=detail)
    if any(board.fits(option)[roomy].any() for option in options):
        detail = f"{len(roomy)} groups have room; serving it there would cost other services more than it gains"
        return Binding(reason="compute", detail=detail)
    detail = (
        f"on the {len(roomy)} groups with room, batches of the services there ({space.problem.settings.blocking} "
        f"blocking) or its own would hold the GPU longer than a deadline leaves slack"
    )
    return Binding(reason="latency", detail=detail)


def _no_option(space: PlanningSpace, name: str) -> Binding:
    """Say what ruled out every option of a service: the reason of the option that came closest."""
    rejections = [each for each in space.catalogue.rejections if each.service == name]
    if not rejections:
        return Binding(
            reason="budget", detail="no parallelism of its profiles is allowed by the settings and the nodes"
        )
    nearest = closest(rejections)
    return Binding(reason=nearest.reason, detail=_of_rejection(nearest, len(rejections)))


def closest(rejections: Sequence[Rejection]) -> Rejection:
    """Return the one of ``rejections`` that came closest to working.

    What min_accuracy rules out was asked for; it is named only where nothing else stands in the way.
    """
    order = {"latency": 0, "memory": 1, "accuracy": 2}
    return min(rejections, key=lambda each: (order[each.reason], each.needed / max(each.available, 1e-12)))


def _of_rejection(rejection: Rejection, count: int) -> str:
    where = (
        f"{rejection.variant} on {rejection.gpu_type}, tp {rejection.tp}, pp {rejection.pp}, batch {rejection.batch}"
    )
    texts = {
        "memory": f"needs {format_bytes(rejection.needed)} per GPU, {format_bytes(rejection.available)} are usable",
        "latency": f"takes {format_seconds(rejection.needed)}, the deadline is {format_seconds(rejection.available)}",
        "accuracy": f"has accuracy {rejection.available:.4g}, min_accuracy is {rejection.needed:.4g}",
    }
    return f"none of {count} options works; the closest, {where}, {texts[rejection.reason]}"


def _board(space: PlanningSpace, placement: Placement) -> Board:
    board = Board(space)
    for placed in placement:
        board.place(placed.group, placed.option, placed.share)
    return board
