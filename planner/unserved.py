"""Why a service is not served in full: what binds, in the words of the plan format, with numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from planner.board import NEGLIGIBLE, Board
from planner.option import Rejection
from planner.settings import Settings
from planner.space import Placed, Placement, PlanningSpace
from plans.plan import Unserved
from plans.units import format_bytes, format_seconds

__all__ = ["Binding", "binding", "closest", "unserved"]

Reason = Literal["memory", "compute", "latency", "budget", "accuracy"]

_SPARE_SHARE = 0.005
"""Share of a group's compute from which on it counts as something to give, or as taken by somebody."""

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
        self.placement = placement
        self.board = _board(space, placement)
        self.served_rps = space.served_rps(placement)
        self.gpus = np.zeros(len(space.names))
        self.on: list[list[Placed]] = [[] for _ in space.names]
        for placed in placement:
            self.gpus[space.service_of[placed.option]] += len(space.groups[placed.group].gpus)
            self.on[space.service_of[placed.option]].append(placed)
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

    def spare(self, service: int) -> NDArray[np.int64]:
        """Return the replicas' groups on which a service could be given more compute."""
        groups = np.array([placed.group for placed in self.on[service]], dtype=np.int64)
        return groups[self.board.compute_left[groups] > _SPARE_SHARE]

    def nodes_with_room(self, service: int) -> set[str]:
        """Return the nodes on which a service could be given more compute, or one more replica with some."""
        fits = np.zeros(len(self.space.groups), dtype=bool)
        for option in self.options[service]:
            fits |= self.board.fits(option)
        fits &= self.board.compute_left > _SPARE_SHARE
        return {self.space.groups[group].node for group in (*np.flatnonzero(fits), *self.spare(service))}

    def neighbours(self, service: int) -> list[str]:
        """Return the services that share groups with a service, each with some of the compute."""
        groups = {placed.group for placed in self.on[service]}
        others = {
            int(self.space.service_of[placed.option])
            for placed in self.placement
            if placed.group in groups and placed.share > _SPARE_SHARE
        }
        return [self.space.names[other] for other in sorted(others - {service})]


def _binding(standing: _Standing, service: int) -> Binding:
    found, has_room = _alone(standing, service)
    if not has_room:
        return found
    return _joined(standing, service) or found


def _alone(standing: _Standing, service: int) -> tuple[Binding, bool]:
    """Return what keeps a service from more by itself, and whether there is room for more of it all the same."""
    space, options = standing.space, standing.options[service]
    if not options:
        return _no_option(space, space.names[service]), False
    homes = standing.homes(service)
    if not homes.any():
        detail = "pin and forbid leave no group of GPUs that its options can run on"
        return Binding(reason="budget", detail=detail), False
    lost = _outlives_no_loss(standing, service, homes)
    if lost is not None:
        return lost, False
    if len(standing.spare(service)):
        return _held_back(standing, service), True
    smallest = min(space.options[option].gpus for option in options)
    used, limit = int(standing.gpus[service]), space.max_gpus[service]
    if used + smallest > limit:
        detail = f"runs on {used} of at most {limit:.0f} GPUs (max_gpus); its smallest option needs {smallest} more"
        others = standing.neighbours(service)
        if others:
            detail = f"shares its groups with {', '.join(others)}: {_FIRST[_objective(space)]}; it {detail}"
        return Binding(reason="compute" if others else "budget", detail=detail), False
    return _crowded_out(space, standing.board, options, homes)


def _outlives_no_loss(standing: _Standing, service: int, homes: NDArray[np.bool_]) -> Binding | None:
    """Say why a service cannot outlive the loss of a node, where that is asked for and it cannot."""
    space, keep = standing.space, standing.space.requirements.keep_after_loss
    if keep <= 0:
        return None
    asked = f"keep_after_loss asks that {keep:.0%} of it outlive the loss of any node"
    able = {space.groups[group].node for group in np.flatnonzero(homes)}
    if len(able) < 2:
        return Binding(reason="budget", detail=f"{asked}, but only {', '.join(able)} can run it")
    smallest = min(space.options[option].gpus for option in standing.options[service])
    limit = space.max_gpus[service]
    if 2 * smallest > limit:
        detail = f"{asked}, but max_gpus {limit:.0f} leaves it one replica: its smallest option needs {smallest} GPUs"
        return Binding(reason="budget", detail=detail)
    room = standing.nodes_with_room(service)
    if not standing.on[service] and len(room) == 1:
        return Binding(reason="compute", detail=f"{asked}, but only {', '.join(room)} has room for a replica")
    return None


def _held_back(standing: _Standing, service: int) -> Binding:
    """Say what leaves compute of a service's own groups unused, though not all of it is served."""
    space, settings = standing.space, standing.space.problem.settings
    room = f"{len(standing.spare(service))} of its {len(standing.on[service])} groups have compute to spare"
    keep = space.requirements.keep_after_loss
    if keep > 0:
        detail = f"{room}, which keep_after_loss {keep:.0%} holds back for the loss of a node"
        return Binding(reason="compute", detail=detail)
    return Binding(reason="compute", detail=f"{room}; {_FIRST[_objective(space)]}{_first_of_all(settings)}")


_FIRST = {
    "goodput": "serving more there would cost other services more than it gains",
    "max-min": "max-min fairness gives compute to the services of whose demand less is served",
    "fair-sum": "fair-sum gains more from services of whose demand less is served",
    "utility": "the utility gains more from other services, or nothing from more of this one",
    "gpus": "fewest GPUs come before serving more than the attainment asked for",
    "cost": "least cost comes before serving more than the attainment asked for",
}
"""What the first objective does to a service for which there would be room."""


def _objective(space: PlanningSpace) -> str:
    settings = space.problem.settings
    return settings.minimize or settings.objective


def _first_of_all(settings: Settings) -> str:
    return "" if settings.attainment is None else f"; {settings.attainment:.2%} of every service's rate come first"


def _joined(standing: _Standing, service: int) -> Binding | None:
    """Say which other service keeps one that has room from more: what it calls, what calls it, or must be beside it."""
    space = standing.space
    asked = space.requirements
    for coupling in asked.couplings:
        callers = [caller for caller, _ in coupling.callers]
        if coupling.child == service:
            short = [each for each in callers if standing.served_rps[each] < space.offered_rps[each] * (1 - 1e-6)]
            if short:
                rates = ", ".join(
                    f"{space.names[each]} ({standing.served_rps[each]:.4g} of {space.offered_rps[each]:.4g} rps)"
                    for each in short
                )
                reason = _alone(standing, short[0])[0].reason
                detail = f"only workflows call it, and its callers are not served in full: {rates}"
                return Binding(reason=reason, detail=detail)
        elif service in callers:
            found, has_room = _alone(standing, coupling.child)
            if not has_room:
                detail = f"what it calls, {space.names[coupling.child]}, cannot serve more: {found.detail}"
                return Binding(reason=found.reason, detail=detail)
    for call in asked.calls:
        if call.required and service in (call.source, call.target):
            other = call.target if service == call.source else call.source
            if not standing.nodes_with_room(service) & standing.nodes_with_room(other):
                name = space.names[other]
                detail = f"no node has room for it and {name} both, and affinity keeps each call on one node"
                return Binding(reason="compute", detail=detail)
    return None


def _crowded_out(
    space: PlanningSpace, board: Board, options: list[int], allowed: NDArray[np.bool_]
) -> tuple[Binding, bool]:
    """Say what is in the way on the groups that still have compute to spare, and whether nothing is."""
    settings = space.problem.settings
    spare = np.flatnonzero(allowed & (board.compute_left > 100 * NEGLIGIBLE) & board.open_groups())
    least = min(options, key=lambda option: (space.memory[option].max(), option))
    if not len(spare):
        divided = "" if _objective(space) == "goodput" else f"; {_FIRST[_objective(space)]}"
        detail = f"all {int(allowed.sum())} groups that could run it are full; {_one_more(space, options)}{divided}"
        return Binding(reason="compute", detail=detail + _first_of_all(settings)), False
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
        return Binding(reason="memory", detail=detail), False
    if any(board.fits(option)[roomy].any() for option in options):
        detail = f"{len(roomy)} groups have room; {_FIRST[_objective(space)]}{_first_of_all(settings)}"
        return Binding(reason="compute", detail=detail), True
    detail = (
        f"on the {len(roomy)} groups with room, batches of the services there ({settings.blocking} "
        f"blocking) or its own would hold the GPU longer than a deadline leaves slack"
    )
    return Binding(reason="latency", detail=detail), False


def _one_more(space: PlanningSpace, options: list[int]) -> str:
    """Say what one more GPU would serve, or one more group where no option runs on a single GPU."""
    fewest = min(space.options[option].gpus for option in options)
    best = max(
        (space.options[option] for option in options if space.options[option].gpus == fewest),
        key=lambda option: option.sustained_rps,
    )
    what = "one GPU more" if fewest == 1 else f"one more group of {fewest} GPUs"
    return f"{what} would serve up to {best.sustained_rps:.4g} rps of it with {best.variant} at batch {best.batch}"


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
