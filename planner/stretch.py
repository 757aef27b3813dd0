"""Larger batches where nothing speaks against them: room for bursts that costs no rate."""

from __future__ import annotations

from itertools import groupby

from planner.space import Placed, Placement, PlanningSpace

__all__ = ["stretch_batches"]


def stretch_batches(space: PlanningSpace, placement: Placement) -> Placement:
    """Return ``placement`` with each largest batch as large as memory, deadlines and neighbours on its group allow.

    A device never waits for company, so a larger limit changes nothing while requests come one by one, and absorbs
    them when they come together. Models see rates only and are content with the smallest batch that sustains them.
    Rates stay; an option is taken only when it sustains at least as much as the one that it replaces.
    """
    stretched: list[Placed] = []
    for _, members in groupby(sorted(placement), key=lambda placed: placed.group):
        group = list(members)
        for position in range(len(group)):
            group[position] = _stretched(space, group, position)
        stretched.extend(group)
    return tuple(sorted(stretched))


def _stretched(space: PlanningSpace, group: list[Placed], position: int) -> Placed:
    """Return one member of a group at its largest batch, given the other members as they are."""
    placed = group[position]
    neighbours = [other.option for index, other in enumerate(group) if index != position]
    memory_left = 1.0 - space.memory[neighbours].sum(axis=0)
    now = space.options[placed.option]
    fitting = [
        option
        for option in space.groups[placed.group].options
        if space.options[option].batch >= now.batch
        and _same_replica(space, option, placed.option)
        and space.sustained_rps[option] >= space.sustained_rps[placed.option]
        and (space.memory[option] <= memory_left + 1e-9).all()
        and not space.conflicts([option], neighbours).any()
    ]
    largest = max(fitting, key=lambda option: space.options[option].batch, default=placed.option)
    share = placed.share * space.sustained_rps[placed.option] / space.sustained_rps[largest]
    return Placed(placed.group, largest, float(share))


def _same_replica(space: PlanningSpace, option: int, other: int) -> bool:
    """Whether two options run the same variant for the same service in the same way."""
    one, two = space.options[option], space.options[other]
    return (one.service, one.variant, one.tp, one.pp, one.multi_frame) == (
        two.service,
        two.variant,
        two.tp,
        two.pp,
        two.multi_frame,
    )
