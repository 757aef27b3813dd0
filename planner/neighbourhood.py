"""Large-neighbourhood search: free a few groups at a time, solve them exactly, keep what is better.

Source: P. Shaw, "Using constraint programming and local search methods to solve vehicle routing problems", CP 1998.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from planner.space import Placement, PlanningSpace

__all__ = ["cells", "neighbourhoods"]


def cells(space: PlanningSpace) -> tuple[tuple[int, ...], ...]:
    """Return the groups (positions) in sets that share no GPU with each other: the units that can be freed alone."""
    holders: dict[tuple[str, int], list[int]] = {}
    for position, group in enumerate(space.groups):
        for gpu in group.gpus:
            holders.setdefault((group.node, gpu), []).append(position)
    root = list(range(len(space.groups)))

    def find(position: int) -> int:
        while root[position] != position:
            root[position] = root[root[position]]
            position = root[position]
        return position

    for places in holders.values():
        for place in places[1:]:
            root[find(place)] = find(places[0])
    members: dict[int, list[int]] = {}
    for position in range(len(space.groups)):
        members.setdefault(find(position), []).append(position)
    return tuple(tuple(each) for each in members.values())


def neighbourhoods(
    space: PlanningSpace,
    placement: Placement,
    options: Sequence[frozenset[int]],
    generator: np.random.Generator,
    *,
    most_pairs: int,
) -> Iterator[tuple[list[tuple[int, int]], list[tuple[int, int]]]]:
    """Yield for ever (pairs to decide, pairs that stay) for random sets of cells of about ``most_pairs`` pairs.

    Args:
        space: The planning space.
        placement: The placement whose neighbourhood it is.
        options: Per group, the options to consider there, besides what runs.
        generator: Source of the choice.
        most_pairs: Size at which a set is large enough; it has at least two cells where there are two.
    """
    all_cells = cells(space)
    standing: dict[int, set[int]] = {}
    for placed in placement:
        standing.setdefault(placed.group, set()).add(placed.option)
    while True:
        free: list[tuple[int, int]] = []
        freed: set[int] = set()
        for count, index in enumerate(generator.permutation(len(all_cells))):
            cell = all_cells[index]
            pairs = [
                (group, option) for group in cell for option in sorted(options[group] | standing.get(group, set()))
            ]
            if count >= 2 and len(free) + len(pairs) > most_pairs:
                break
            free.extend(pairs)
            freed.update(cell)
        stays = [(placed.group, placed.option) for placed in placement if placed.group not in freed]
        yield free, stays
