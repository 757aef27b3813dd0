"""Loadouts onto groups: keep what runs, spread replicas over nodes and zones; docs/formulation.md, section 9."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

import numpy as np

from planner.linear import Floats, Integers
from planner.rates import Loadout
from planner.space import Placed, Placement, PlanningSpace

__all__ = ["map_loadouts"]


def map_loadouts(
    space: PlanningSpace,
    pair_option: Integers,
    counts: Mapping[Loadout, int],
    shares: Mapping[Loadout, Floats],
) -> Placement:
    """Return a placement with ``counts`` groups of each loadout; groups for which no tile is left are missing.

    Large tiles first, so that aligned tiles never block each other. Within a size, loadouts that find most of their
    weights where they already run go there; the rest is dealt to free tiles node by node and zone by zone, over what
    costs the running plan least, so that replicas of a service, which come one after the other, spread. Where workflows
    have an affinity, of tiles that cost the same those go first whose node has fewest replicas of the same services,
    and of these the ones beside what calls them or what they call.
    """
    board = _Tiles(space)
    placement: list[Placed] = []
    sizes = sorted({space.classes[place].gpus for place, _ in counts}, reverse=True)
    for size in sizes:
        mine = {each: count for each, count in sorted(counts.items()) if space.classes[each[0]].gpus == size}
        left = Counter(mine)
        taken: list[tuple[int, Loadout]] = []
        for _, group, loadout in _stays(space, pair_option, mine):
            if left[loadout] > 0 and board.free(group):
                options = pair_option[np.array(loadout[1], dtype=np.int64)]
                board.take(group, set(space.service_of[options].tolist()))
                left[loadout] -= 1
                taken.append((group, loadout))
        for place in sorted({place for place, _ in mine}):
            dealt = board.dealt(place)
            for loadout, count in left.items():
                if loadout[0] != place:
                    continue
                services = set(space.service_of[pair_option[np.array(loadout[1], dtype=np.int64)]].tolist())
                for _ in range(count):
                    tile = board.next_tile(dealt, services)
                    if tile is None:
                        break
                    board.take(tile, services)
                    taken.append((tile, loadout))
        for group, loadout in taken:
            options = pair_option[np.array(loadout[1], dtype=np.int64)]
            placement.extend(
                Placed(group, option, share)
                for option, share in zip(options.tolist(), shares[loadout].tolist(), strict=True)
            )
    return tuple(sorted(placement))


def _stays(
    space: PlanningSpace, pair_option: Integers, counts: Mapping[Loadout, int]
) -> list[tuple[float, int, Loadout]]:
    """Return (minus the bytes that need no load, group, loadout) for groups of the running plan, most bytes first."""
    if not space.kept:
        return []
    standing: dict[int, set[int]] = defaultdict(set)
    for group, option in space.kept:
        standing[group].add(option)
    class_of = {member: place for place, each in enumerate(space.classes) for member in each.members}
    holding: dict[tuple[int, int], list[Loadout]] = defaultdict(list)
    for loadout in counts:
        for pair in loadout[1]:
            holding[loadout[0], int(pair_option[pair])].append(loadout)
    found: list[tuple[float, int, Loadout]] = []
    for group, options in standing.items():
        kept: dict[Loadout, float] = defaultdict(float)
        for option in sorted(options):
            for loadout in holding.get((class_of[group], option), ()):
                kept[loadout] += float(space.moved_bytes[option])
        found.extend((-size, group, loadout) for loadout, size in kept.items())
    return sorted(found)


class _Tiles:
    """Which groups are still free, and in which order to deal them."""

    def __init__(self, space: PlanningSpace) -> None:
        self._space = space
        self._used: set[tuple[str, int]] = set()
        self._zone = {node.name: node.zone for node in space.problem.cluster.nodes}
        self._number = {node.name: index for index, node in enumerate(space.problem.cluster.nodes)}
        self._lost: dict[tuple[str, int], float] = defaultdict(float)
        self._on_node: dict[str, Counter[int]] = defaultdict(Counter)
        self._neighbours: dict[int, set[int]] = defaultdict(set)
        for call in space.requirements.calls:
            self._neighbours[call.source].add(call.target)
            self._neighbours[call.target].add(call.source)
        heaviest: dict[int, float] = defaultdict(float)
        for group, option in space.kept:
            heaviest[group] = max(heaviest[group], float(space.moved_bytes[option]))
        for group, size in heaviest.items():
            for gpu in space.groups[group].gpus:
                self._lost[space.groups[group].node, gpu] += size

    def free(self, group: int) -> bool:
        """Whether no GPU of the group is taken."""
        each = self._space.groups[group]
        return not any((each.node, gpu) in self._used for gpu in each.gpus)

    def take(self, group: int, services: set[int]) -> None:
        """Take the group's GPUs for ``services``."""
        each = self._space.groups[group]
        self._used.update((each.node, gpu) for gpu in each.gpus)
        self._on_node[each.node].update(services)

    def next_tile(self, dealt: list[int], services: set[int]) -> int | None:
        """Return the next free tile of ``dealt`` for a loadout of ``services``, taking it off; None without one."""
        while dealt and not self.free(dealt[0]):
            dealt.pop(0)
        if not dealt:
            return None
        neighbours = set().union(*(self._neighbours[service] for service in services)) - services
        if not neighbours:
            return dealt.pop(0)
        cost = self._cost(dealt[0])

        def rank(at: int) -> tuple[int, bool, int]:
            here = self._on_node[self._space.groups[dealt[at]].node]
            return (sum(here[service] for service in services), not any(here[each] for each in neighbours), at)

        alike = (at for at, group in enumerate(dealt) if self._cost(group) == cost and self.free(group))
        return dealt.pop(min(alike, key=rank))

    def _cost(self, group: int) -> float:
        """Return the bytes of the running plan that taking the group's GPUs would clear."""
        each = self._space.groups[group]
        return sum(self._lost.get((each.node, gpu), 0.0) for gpu in each.gpus)

    def dealt(self, place: int) -> list[int]:
        """Return the free groups of a class: what is cheapest to clear first, then round by round over the nodes.

        Within a round, consecutive groups are in different zones.
        """
        free = [group for group in self._space.classes[place].members if self.free(group)]
        seen: Counter[str] = Counter()
        in_zone: Counter[tuple[str, int]] = Counter()
        keys: dict[int, tuple[float, int, int, int]] = {}
        for group in free:
            each = self._space.groups[group]
            cost = self._cost(group)
            round_ = seen[each.node]
            seen[each.node] += 1
            zone = self._zone[each.node]
            turn = in_zone[zone, round_]
            in_zone[zone, round_] += 1
            keys[group] = (cost, round_, turn, self._number[each.node])
        return sorted(free, key=lambda group: keys[group])
