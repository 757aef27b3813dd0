"""Where options may be placed: aligned tiles of every node, and classes of tiles that are interchangeable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.option import Option
from planner.problem import Problem
from plans.cluster import Node, group_id

__all__ = ["CandidateGroup", "GroupClass", "candidate_groups", "group_classes", "singletons"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateGroup:
    """GPUs of one node that could work as one unit with ``tp`` x ``pp`` of them.

    ``options`` are the positions in the catalogue of what may run there: profiled for this GPU type and parallelism,
    and allowed by the pins and forbids of its service.
    """

    node: str
    gpus: tuple[int, ...]
    gpu_type: str
    tp: int
    pp: int
    options: tuple[int, ...]

    @property
    def id(self) -> str:
        """The group's id in a plan."""
        return group_id(self.node, self.gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupClass:
    """Candidate groups (positions) that are alike: same GPU type, parallelism and options.

    A model over classes counts replicas; with one member per class it is the exact model over groups.
    """

    members: tuple[int, ...]
    gpu_type: str
    tp: int
    pp: int
    options: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of members."""
        return len(self.members)

    @property
    def gpus(self) -> int:
        """Number of GPUs of each member."""
        return self.tp * self.pp


def candidate_groups(problem: Problem, options: tuple[Option, ...]) -> tuple[CandidateGroup, ...]:
    """Return every aligned tile of every node on which some option may run, and the tiles of the running plan.

    A tile of k GPUs starts at a multiple of k, so tiles of different sizes nest instead of overlapping half.
    """
    by_kind: dict[tuple[str, int, int], list[int]] = {}
    for position, option in enumerate(options):
        by_kind.setdefault((option.gpu_type, option.tp, option.pp), []).append(position)
    kinds = {kind: tuple(positions) for kind, positions in sorted(by_kind.items())}
    constrained = [service for service in problem.services.services if service.pin or service.forbid]
    running: dict[tuple[str, int, int], list[tuple[int, ...]]] = {}
    for group in problem.current.groups if problem.current else ():
        running.setdefault((group.node, group.tp, group.pp), []).append(group.gpus)
    shared: dict[tuple[tuple[str, int, int], frozenset[str]], tuple[int, ...]] = {}
    groups = []
    for node in problem.cluster.nodes:
        for kind, positions in kinds.items():
            gpu_type, tp, pp = kind
            if gpu_type != node.gpus.type:
                continue
            for gpus in _tiles(node, tp * pp, running.get((node.name, tp, pp), [])):
                barred = frozenset(service.name for service in constrained if not service.allows(node.name, gpus))
                if (kind, barred) not in shared:
                    shared[kind, barred] = _allowed(positions, options, barred)
                if allowed := shared[kind, barred]:
                    groups.append(
                        CandidateGroup(node=node.name, gpus=gpus, gpu_type=gpu_type, tp=tp, pp=pp, options=allowed)
                    )
    return tuple(groups)


def group_classes(groups: tuple[CandidateGroup, ...]) -> tuple[GroupClass, ...]:
    """Return the classes of interchangeable groups, in the order of their first members."""
    # Groups share their tuples of options; comparing these by value once per tuple, not once per group, saves minutes.
    known: dict[int, int] = {}
    values: dict[tuple[int, ...], int] = {}
    for group in groups:
        if id(group.options) not in known:
            known[id(group.options)] = values.setdefault(group.options, len(values))
    listed = list(values)
    numbered: dict[tuple[str, int, int, int], list[int]] = {}
    for position, group in enumerate(groups):
        numbered.setdefault((group.gpu_type, group.tp, group.pp, known[id(group.options)]), []).append(position)
    return tuple(
        GroupClass(members=tuple(members), gpu_type=gpu_type, tp=tp, pp=pp, options=listed[number])
        for (gpu_type, tp, pp, number), members in numbered.items()
    )


def singletons(groups: tuple[CandidateGroup, ...]) -> tuple[GroupClass, ...]:
    """Return one class per group."""
    return tuple(
        GroupClass(members=(position,), gpu_type=group.gpu_type, tp=group.tp, pp=group.pp, options=group.options)
        for position, group in enumerate(groups)
    )


def _tiles(node: Node, size: int, running: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the aligned tiles of ``size`` GPUs, then what runs there already with as many."""
    aligned = [tuple(range(first, first + size)) for first in range(0, node.gpus.count - size + 1, size)]
    present = {gpus for gpus in running if max(gpus) < node.gpus.count}
    return [*aligned, *sorted(present - set(aligned))]


def _allowed(positions: tuple[int, ...], options: tuple[Option, ...], barred: frozenset[str]) -> tuple[int, ...]:
    if not barred:
        return positions
    return tuple(position for position in positions if options[position].service not in barred)
