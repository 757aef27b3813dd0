"""A placement in the making: what is where, and what still fits. The working state of the heuristics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from planner.linear import Floats, Integers
from planner.space import Placed, Placement, PlanningSpace

__all__ = ["NEGLIGIBLE", "Board"]

NEGLIGIBLE = 1e-6
"""Compute share that is not worth a replica."""

_Kind = tuple[str, int, int]


class Board:
    """Groups with what was placed on them; keeps memory, compute, blocking, budgets and GPU exclusivity.

    Attributes:
        space: The planning space.
        compute_left: Shape (group,): share of each group's compute that is free.
        remaining_rps: Shape (service,): demand not served yet.
    """

    def __init__(self, space: PlanningSpace) -> None:
        self.space = space
        groups, services = len(space.groups), len(space.names)
        self.compute_left: Floats = np.ones(groups)
        self.remaining_rps: Floats = space.offered_rps.copy()
        self.used: NDArray[np.bool_] = np.zeros(groups, dtype=bool)
        self._memory_used = np.zeros((groups, space.memory.shape[1]))
        self._open = np.ones(groups, dtype=bool)
        self._barred = np.ones((groups, services), dtype=bool)
        for each in space.classes:
            allowed = np.unique(space.service_of[list(each.options)])
            self._barred[np.ix_(np.array(each.members), allowed)] = False
        self._of_kind = _of_kind(space)
        self._longest_s = np.zeros(groups)
        self._least_slack_s = np.full(groups, np.inf)
        self._gpus = np.array([group.tp * group.pp for group in space.groups], dtype=np.int64)
        self._budget_left = space.max_gpus.copy()
        self._replicas = np.zeros(services, dtype=np.int64)
        self._overlaps = _overlaps(space)
        self._share: dict[tuple[int, int], float] = {}
        self._options_on: dict[int, list[int]] = {}

    def candidates(self, option: int) -> Integers:
        """Return the groups that ``option`` could join, rising; what compute is left there does not count."""
        space = self.space
        one = space.options[option]
        groups = self._of_kind[one.gpu_type, one.tp, one.pp]
        service = int(space.service_of[option])
        factor = space.problem.settings.blocking_factor
        fitting = self._open[groups] & ~self._barred[groups, service]
        fitting &= self._gpus[groups] <= self._budget_left[service]
        fitting &= factor * self._longest_s[groups] <= space.slack_s[option]
        fitting &= factor * space.hold_s[option] <= self._least_slack_s[groups]
        if space.token_ratio[option] > 0:  # what runs there leaves its tokens enough of the group's time: (4.22)
            fitting &= np.array([self._given(group) for group in groups]) <= 1.0 - space.token_ratio[option] + 1e-9
        fitting &= (self._memory_used[groups] + space.memory[option] <= 1.0 + 1e-9).all(axis=1)
        found: Integers = groups[fitting]
        return found

    def fits(self, option: int) -> NDArray[np.bool_]:
        """Return whether ``option`` could join each group, shape (group,); see `candidates`."""
        fitting: NDArray[np.bool_] = np.zeros(len(self.space.groups), dtype=bool)
        fitting[self.candidates(option)] = True
        return fitting

    def open_groups(self) -> NDArray[np.bool_]:
        """Return the groups none of whose GPUs is in another used group, shape (group,)."""
        return self._open.copy()

    def budget_left(self, service: int) -> float:
        """Return how many GPUs of its budget ``service`` (by position) has left; infinite without one."""
        return float(self._budget_left[service])

    def memory_left(self) -> Floats:
        """Return the share of memory that is free on the fullest stage of each group, shape (group,)."""
        left: Floats = 1.0 - self._memory_used.max(axis=1)
        return left

    def place(self, group: int, option: int, share: float) -> None:
        """Put ``option`` on ``group``, which must fit, and give it ``share`` of the compute."""
        service = self.space.service_of[option]
        self._share[group, option] = 0.0
        self._options_on.setdefault(group, []).append(option)
        self._memory_used[group] += self.space.memory[option]
        self._barred[group, service] = True
        self._longest_s[group] = max(self._longest_s[group], self.space.hold_s[option])
        self._least_slack_s[group] = min(self._least_slack_s[group], self.space.slack_s[option])
        self._budget_left[service] -= self._gpus[group]
        self._replicas[service] += 1
        self.used[group] = True
        for other in self._overlaps.get(group, ()):
            self._open[other] = False
        self.feed(group, option, share)

    def feed(self, group: int, option: int, share: float) -> None:
        """Give ``option``, which runs on ``group``, ``share`` more of the compute."""
        self._share[group, option] += share
        self.compute_left[group] -= share
        for other in self._options_on[group]:
            if self.space.token_ratio[other] > 0 and len(self._options_on[group]) > 1:
                neighbours = self._given(group) - self._share[group, other]
                left = 1.0 - float(self.space.token_ratio[other]) - neighbours
                self.compute_left[group] = min(float(self.compute_left[group]), max(0.0, left))
        service = self.space.service_of[option]
        self.remaining_rps[service] = max(0.0, self.remaining_rps[service] - share * self.space.sustained_rps[option])

    def _given(self, group: int) -> float:
        """Return the share of the compute of ``group`` that is given to what runs there."""
        return sum(self._share[group, option] for option in self._options_on.get(group, ()))

    def running(self) -> list[tuple[int, int]]:
        """Return the (group, option) pairs placed so far, in order."""
        return list(self._share)

    def replicas(self, service: int) -> int:
        """Return how many groups run ``service``."""
        return int(self._replicas[service])

    def wanted_share(self, option: int) -> float:
        """Return the compute share with which ``option`` would serve what remains of its service's demand."""
        return float(self.remaining_rps[self.space.service_of[option]] / self.space.sustained_rps[option])

    def placement(self) -> Placement:
        """Return what stands on the board."""
        return tuple(sorted(Placed(group, option, min(share, 1.0)) for (group, option), share in self._share.items()))


def _of_kind(space: PlanningSpace) -> dict[_Kind, Integers]:
    """Return the groups of each GPU type and parallelism."""
    found: dict[_Kind, list[int]] = {}
    for position, group in enumerate(space.groups):
        found.setdefault((group.gpu_type, group.tp, group.pp), []).append(position)
    kinds = {(option.gpu_type, option.tp, option.pp) for option in space.options}
    return {kind: np.array(found.get(kind, []), dtype=np.int64) for kind in kinds | found.keys()}


def _overlaps(space: PlanningSpace) -> dict[int, Sequence[int]]:
    """Return, for each group that shares a GPU with others, those others."""
    holders: dict[tuple[str, int], list[int]] = {}
    for position, group in enumerate(space.groups):
        for gpu in group.gpus:
            holders.setdefault((group.node, gpu), []).append(position)
    found: dict[int, set[int]] = {}
    for places in holders.values():
        for place in places:
            if len(places) > 1:
                found.setdefault(place, set()).update(places)
    return {place: tuple(sorted(others - {place})) for place, others in found.items()}
