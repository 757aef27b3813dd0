"""The planning space: a problem reduced to options, groups and arrays, from which models and heuristics are built."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.groups import CandidateGroup, GroupClass, candidate_groups, group_classes, singletons
from planner.linear import Floats, Integers
from planner.option import Catalogue, Option, build_catalogue
from planner.problem import Problem, planned_rps
from planner.requirements import Requirements, refined, requirements_of

__all__ = ["Placed", "Placement", "PlanningSpace", "build_space"]


@dataclass(frozen=True, slots=True, order=True)
class Placed:
    """An option on a group, both by position, with the share of the group's compute that it is given, in [0, 1]."""

    group: int
    option: int
    share: float


Placement = tuple[Placed, ...]
"""A whole placement, sorted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningSpace:
    """Everything that models and heuristics need to know of a problem.

    Attributes:
        problem: Where it all comes from.
        catalogue: The options.
        groups: The candidate groups.
        classes: Classes of interchangeable groups.
        singles: One class per group.
        names: The services' names, in the order of the document; positions in it stand for services below.
        offered_rps: Shape (service,): rate to plan for.
        weight: Shape (service,).
        min_replicas: Shape (service,).
        max_gpus: Shape (service,), infinite without a budget.
        service_of: Shape (option,).
        sustained_rps: Shape (option,).
        share_cap: Shape (option,): compute share that serves the whole demand, at most 1.
        accuracy: Shape (option,).
        hold_s: Shape (option,): longest time that it keeps others from the group.
        slack_s: Shape (option,).
        token_ratio: Shape (option,): share of a group's time that neighbours must leave to its tokens, (4.22).
        moved_bytes: Shape (option,): weights that a load moves.
        memory: Shape (option, stage): share of a GPU's usable memory; 0 beyond the option's stages.
        cost: Shape (group,): cost of its GPUs per hour.
        kept: Pairs (group, option) that need no load, because the group runs that variant for that service already.
        requirements: What a plan must keep beyond each group.
    """

    problem: Problem
    catalogue: Catalogue
    groups: tuple[CandidateGroup, ...]
    classes: tuple[GroupClass, ...]
    singles: tuple[GroupClass, ...]
    names: tuple[str, ...]
    offered_rps: Floats
    weight: Floats
    min_replicas: Integers
    max_gpus: Floats
    service_of: Integers
    sustained_rps: Floats
    share_cap: Floats
    accuracy: Floats
    hold_s: Floats
    slack_s: Floats
    token_ratio: Floats
    moved_bytes: Floats
    memory: Floats
    cost: Floats
    kept: frozenset[tuple[int, int]]
    requirements: Requirements

    @property
    def options(self) -> tuple[Option, ...]:
        """The options of the catalogue."""
        return self.catalogue.options

    def served_rps(self, placement: Iterable[Placed]) -> Floats:
        """Return the rate that ``placement`` serves within the SLO, shape (service,)."""
        served = np.zeros(len(self.names))
        for placed in placement:
            served[self.service_of[placed.option]] += placed.share * self.sustained_rps[placed.option]
        return served

    def conflicts(self, options: Integers | Sequence[int], others: Integers | Sequence[int]) -> NDArray[np.bool_]:
        """Return which of ``options`` may not share a group with which of ``others``: (3.3), shape of both."""
        mine, theirs = np.asarray(options, dtype=np.int64)[:, None], np.asarray(others, dtype=np.int64)[None, :]
        factor = self.problem.settings.blocking_factor
        blocked = (factor * self.hold_s[theirs] > self.slack_s[mine]) | (
            factor * self.hold_s[mine] > self.slack_s[theirs]
        )
        clashes: NDArray[np.bool_] = blocked & (self.service_of[mine] != self.service_of[theirs])
        return clashes

    def token_rows(self, options: Sequence[int] | Integers) -> Iterator[tuple[Floats, Floats]]:
        """Yield (4.22) for a group that runs some of ``options``: ``run @ x + share @ a <= 1``, each shape of them.

        One row for each service whose tokens follow each other: what they take, and what neighbours use, at most all.
        """
        chosen = np.asarray(options, dtype=np.int64)
        ratio, services = self.token_ratio[chosen], self.service_of[chosen]
        busy = np.array([self.options[option].utilisation for option in chosen])
        for service in np.unique(services[ratio > 0]):
            mine = services == service
            if not mine.all():
                yield np.where(mine, ratio, 0.0), np.where(mine, 0.0, busy)

    def gpu_count(self, gpu_type: str) -> int:
        """Return how many GPUs of ``gpu_type`` the cluster has."""
        return sum(node.gpus.count for node in self.problem.cluster.nodes if node.gpus.type == gpu_type)

    @property
    def pair_count(self) -> int:
        """Pairs of group and option, by which the size of a problem goes."""
        return sum(len(group.options) for group in self.groups)


def build_space(problem: Problem) -> PlanningSpace:
    """Reduce ``problem`` to arrays. Costs options squared per service, and options times groups."""
    catalogue = build_catalogue(problem)
    options = catalogue.options
    services = problem.services.services
    groups = candidate_groups(problem, options)
    position = {service.name: index for index, service in enumerate(services)}
    planned = planned_rps(problem)
    offered = np.array([planned[service.name] for service in services])
    service_of = np.array([position[option.service] for option in options], dtype=np.int64)
    sustained = np.array([option.sustained_rps for option in options])
    types = problem.cluster.gpu_types
    usable = [types[option.gpu_type].memory_bytes * (1.0 - problem.settings.headroom_ratio) for option in options]
    memory = np.zeros((len(options), max((option.pp for option in options), default=1)))
    for index, option in enumerate(options):
        memory[index, : option.pp] = np.array(option.memory_bytes) / usable[index]
    hold_s = np.array([option.block_s for option in options])
    slack_s = np.array([option.slack_s for option in options])
    return PlanningSpace(
        problem=problem,
        catalogue=catalogue,
        groups=groups,
        classes=refined(group_classes(groups), groups, problem),
        singles=singletons(groups),
        names=tuple(position),
        offered_rps=offered,
        weight=np.array([service.weight for service in services]),
        min_replicas=np.array([service.min_replicas for service in services], dtype=np.int64),
        max_gpus=np.array([np.inf if service.max_gpus is None else float(service.max_gpus) for service in services]),
        service_of=service_of,
        sustained_rps=sustained,
        share_cap=np.minimum(1.0, offered[service_of] / sustained) if options else np.zeros(0),
        accuracy=np.array([option.accuracy for option in options]),
        hold_s=hold_s,
        slack_s=slack_s,
        token_ratio=np.array([option.token_ratio for option in options]),
        moved_bytes=np.array([float(option.weight_bytes) for option in options]),
        memory=memory,
        cost=np.array([types[group.gpu_type].cost_per_hour * group.tp * group.pp for group in groups]),
        kept=_kept(problem, groups, options),
        requirements=requirements_of(problem, groups, options, offered),
    )


def _kept(
    problem: Problem, groups: tuple[CandidateGroup, ...], options: tuple[Option, ...]
) -> frozenset[tuple[int, int]]:
    running = {
        (group.node, group.gpus, group.tp, group.pp): {(entry.service, entry.variant) for entry in group.loadout}
        for group in (problem.current.groups if problem.current else ())
    }
    kinds: dict[tuple[str, str], list[int]] = {}
    for index, option in enumerate(options):
        kinds.setdefault((option.service, option.variant), []).append(index)
    found: set[tuple[int, int]] = set()
    for position, group in enumerate(groups):
        standing: Iterable[tuple[str, str]] = running.get((group.node, group.gpus, group.tp, group.pp), frozenset())
        alike = [index for each in standing for index in kinds.get(each, ())]
        if alike:
            allowed = set(group.options)
            found.update((position, index) for index in alike if index in allowed)
    return frozenset(found)
