"""A placement that a search changes in place: groups opened and closed, services added and removed, and all undone."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from planner.scoring import Deployment
from planner.space import Placed, Placement, PlanningSpace

__all__ = ["Arrangement"]

_ROUNDING = 1e-9

_Change = tuple[bool, bool, int, int, int]
"""(whether a replica and not a group, whether added and not removed, slot, service or group, option)."""


class Arrangement:
    """Groups in use and their loadouts, with what the planner holds hard: memory, budgets, pins, one option a service.

    A group is named by its *slot*, the cluster-wide position of its first GPU. Every change is logged, so that
    `rollback` returns to any earlier point. The rule that keeps services apart whose batches would block each other is
    not kept here: the simulation shows what blocking costs.

    Attributes:
        space: The planning space.
        deployment: The same as arrays for a scorer.
        group_at: Group (position in the space) by slot, -1 where none begins.
    """

    def __init__(self, space: PlanningSpace, options: Iterable[int]) -> None:
        """Start empty. ``options`` are the only ones that will be placed."""
        self.space = space
        nodes = space.problem.cluster.nodes
        offsets, gpus = {}, 0
        for node in nodes:
            offsets[node.name] = gpus
            gpus += node.gpus.count
        self.gpus = gpus
        self.slot_of = [offsets[group.node] + min(group.gpus) for group in space.groups]
        self.covered = [tuple(offsets[group.node] + gpu for gpu in group.gpus) for group in space.groups]
        wanted = set(options)
        self.choices: list[dict[int, tuple[int, ...]]] = []
        known: dict[tuple[int, ...], dict[int, tuple[int, ...]]] = {}
        for group in space.groups:
            if group.options not in known:
                by_service: dict[int, list[int]] = {}
                for option in group.options:
                    if option in wanted:
                        by_service.setdefault(int(space.service_of[option]), []).append(option)
                known[group.options] = {service: tuple(each) for service, each in by_service.items()}
            self.choices.append(known[group.options])
        services = len(space.names)
        self.deployment = Deployment(
            count=np.zeros(services, dtype=np.int32),
            slot=np.zeros((services, gpus), dtype=np.int32),
            option=np.zeros((services, gpus), dtype=np.int32),
        )
        self.group_at: NDArray[np.int64] = np.full(gpus, -1, dtype=np.int64)
        self.loadouts: dict[int, dict[int, int]] = {}
        self._owner = [-1] * gpus
        self._used = np.zeros((gpus, space.memory.shape[1]))
        self._gpus_of = np.zeros(services)
        self._log: list[_Change] = []

    def fits(self, slot: int, option: int) -> bool:
        """Return whether ``option`` may join the group at ``slot``, which does not run its service yet."""
        service = self.space.service_of[option]
        size = len(self.covered[self.group_at[slot]])
        if self._gpus_of[service] + size > self.space.max_gpus[service]:
            return False
        return bool((self._used[slot] + self.space.memory[option] <= 1.0 + _ROUNDING).all())

    def affordable(self, slot: int, service: int) -> bool:
        """Return whether the budget of ``service`` covers one more replica at ``slot``."""
        size = len(self.covered[self.group_at[slot]])
        return bool(self._gpus_of[service] + size <= self.space.max_gpus[service])

    def spare(self, service: int) -> bool:
        """Return whether ``service`` has more replicas than it must have."""
        return bool(self.deployment.count[service] > self.space.min_replicas[service])

    def complete(self) -> bool:
        """Return whether every service has its minimum of replicas."""
        return bool((self.deployment.count >= self.space.min_replicas).all())

    def open(self, group: int) -> int:
        """Put ``group``, none of whose GPUs is in use, to use; return its slot."""
        self._open(group)
        self._log.append((False, True, self.slot_of[group], group, 0))
        return self.slot_of[group]

    def close(self, slot: int) -> None:
        """Take the group at ``slot`` out of use, with all that it runs."""
        for service in list(self.loadouts[slot]):
            self.remove(slot, service)
        group = int(self.group_at[slot])
        self._close(slot)
        self._log.append((False, False, slot, group, 0))

    def add(self, slot: int, option: int) -> None:
        """Let the group at ``slot`` run ``option``, which must fit."""
        self._add(slot, option)
        self._log.append((True, True, slot, int(self.space.service_of[option]), option))

    def remove(self, slot: int, service: int) -> None:
        """Take ``service`` off the group at ``slot``."""
        option = self._remove(slot, service)
        self._log.append((True, False, slot, service, option))

    def overlapping(self, group: int) -> list[int]:
        """Return the slots of the groups in use that hold a GPU of ``group``."""
        return sorted({self._owner[gpu] for gpu in self.covered[group] if self._owner[gpu] >= 0})

    def unused(self, gpus: Iterable[int]) -> set[int]:
        """Return which of ``gpus`` no group holds."""
        return {gpu for gpu in gpus if self._owner[gpu] < 0}

    def mark(self) -> int:
        """Return the point in time to which `rollback` returns."""
        return len(self._log)

    def rollback(self, mark: int) -> None:
        """Undo everything after ``mark``."""
        while len(self._log) > mark:
            replica, added, slot, which, option = self._log.pop()
            if replica and added:
                self._remove(slot, which)
            elif replica:
                self._add(slot, option)
            elif added:
                self._close(slot)
            else:
                self._open(which)

    def forget(self) -> None:
        """Drop the log: what stands can no longer be undone."""
        self._log.clear()

    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Return what stands as sorted (group, option) pairs."""
        return tuple(
            sorted(
                (int(self.group_at[slot]), option)
                for slot, loadout in self.loadouts.items()
                for option in loadout.values()
            )
        )

    def restore(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Make ``pairs`` stand, whatever stood before; pairs that do not fit are left out."""
        for slot in list(self.loadouts):
            self.close(slot)
        for group, option in pairs:
            slot = self.slot_of[group]
            if self.group_at[slot] != group:
                if self.overlapping(group):
                    continue
                self.open(group)
            if self.space.service_of[option] not in self.loadouts[slot] and self.fits(slot, option):
                self.add(slot, option)

    def placement(self, share: dict[tuple[int, int], float]) -> Placement:
        """Return what stands, each pair (group, option) with its share of the compute."""
        return tuple(Placed(group, option, share.get((group, option), 0.0)) for group, option in self.pairs())

    def _open(self, group: int) -> None:
        slot = self.slot_of[group]
        for gpu in self.covered[group]:
            self._owner[gpu] = slot
        self.group_at[slot] = group
        self.loadouts[slot] = {}

    def _close(self, slot: int) -> None:
        for gpu in self.covered[self.group_at[slot]]:
            self._owner[gpu] = -1
        self.group_at[slot] = -1
        self._used[slot] = 0.0
        del self.loadouts[slot]

    def _add(self, slot: int, option: int) -> None:
        service = int(self.space.service_of[option])
        self.loadouts[slot][service] = option
        self._used[slot] += self.space.memory[option]
        self._gpus_of[service] += len(self.covered[self.group_at[slot]])
        hosts, count = self.deployment, int(self.deployment.count[service])
        place = int(np.searchsorted(hosts.slot[service, :count], slot))
        for row, entry in ((hosts.slot[service], slot), (hosts.option[service], option)):
            row[place + 1 : count + 1] = row[place:count].copy()
            row[place] = entry
        hosts.count[service] = count + 1

    def _remove(self, slot: int, service: int) -> int:
        option = self.loadouts[slot].pop(service)
        self._used[slot] -= self.space.memory[option]
        self._gpus_of[service] -= len(self.covered[self.group_at[slot]])
        hosts, count = self.deployment, int(self.deployment.count[service])
        place = int(np.searchsorted(hosts.slot[service, :count], slot))
        for row in (hosts.slot[service], hosts.option[service]):
            row[place : count - 1] = row[place + 1 : count].copy()
        hosts.count[service] = count - 1
        return option
