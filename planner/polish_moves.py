"""Moves of the polish: small ones within the loadouts, large ones that cut groups of GPUs anew."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np

from planner.arrangement import Arrangement
from planner.linear import Floats, Integers

__all__ = ["Insight", "Moves"]

_MOST_EVICTED = 5
_TRIES = 6


class Insight:
    """What the last simulation showed, to aim moves: value lost per service, value served per replica."""

    def __init__(self, arrangement: Arrangement, value: Floats) -> None:
        services = len(arrangement.space.names)
        self._arrangement = arrangement
        self._value = value
        self.lost: list[float] = [1.0] * services
        self.served: dict[tuple[int, int], float] = {}
        self._cumulated = list(accumulate(self.lost))

    def update(self, good: Integers, most: Floats) -> None:
        """Take in a simulation: good per replica beside the deployment, and the most each service could have had."""
        hosts = self._arrangement.deployment
        option, slot, count = hosts.option.tolist(), hosts.slot.tolist(), hosts.count.tolist()
        table = good.tolist()
        self.served = {}
        for service, replicas in enumerate(count):
            had = 0.0
            for replica in range(replicas):
                worth = table[service][replica] * float(self._value[option[service][replica]])
                self.served[slot[service][replica], service] = worth
                had += worth
            self.lost[service] = max(0.0, float(most[service]) - had)
        self._accumulate()

    def saved(self) -> tuple[list[float], dict[tuple[int, int], float]]:
        """Return what `load` brings back."""
        return list(self.lost), self.served

    def load(self, saved: tuple[list[float], dict[tuple[int, int], float]]) -> None:
        """Return to what was known when ``saved`` was taken."""
        self.lost, self.served = list(saved[0]), saved[1]
        self._accumulate()

    def _accumulate(self) -> None:
        floor = 0.02 * sum(self.lost) / max(1, len(self.lost)) + 1e-12
        self._cumulated = list(accumulate(lost + floor for lost in self.lost))

    def wanting(self, generator: random.Random) -> int:
        """Return a service at random, those that lose more more often."""
        return bisect_right(self._cumulated, generator.random() * self._cumulated[-1] * (1 - 1e-12))


class Moves:
    """Random changes of an arrangement. A move that returns False may have changed it: roll back."""

    def __init__(self, arrangement: Arrangement, insight: Insight, generator: random.Random) -> None:
        self._now = arrangement
        self._insight = insight
        self._random = generator
        space = arrangement.space
        self._kinds: dict[tuple[str, int, int], list[int]] = {}
        self._nodes: dict[tuple[str, str, int, int], list[int]] = {}
        for position, group in enumerate(space.groups):
            if arrangement.choices[position]:
                self._kinds.setdefault((group.gpu_type, group.tp, group.pp), []).append(position)
                self._nodes.setdefault((group.node, group.gpu_type, group.tp, group.pp), []).append(position)
        self.kinds = tuple(self._kinds)
        self._node_kinds = tuple(self._nodes)
        self._inside: dict[int, list[int]] = {}
        for position in range(len(space.groups)):
            if arrangement.choices[position]:
                for gpu in arrangement.covered[position]:
                    self._inside.setdefault(gpu, []).append(position)
        self._touched: list[int] = []
        self._has_choice = any(len(each) > 1 for choice in arrangement.choices for each in choice.values())

    def small(self) -> bool:
        """Change a few replicas; False when the draw leads nowhere."""
        if not self._now.loadouts:
            return False
        self._touched.clear()
        if not self._change():
            return False
        # What was freed beside is filled: a large model against several small ones is one move, not a sequence.
        if self._random.random() < 0.5:
            for slot in self._touched:
                self._top_up(slot)
        return True

    def _change(self) -> bool:
        draw = self._random.random()
        if draw < 0.4:
            return self._add()
        if draw < 0.5:
            return self._drop()
        if draw < 0.7:
            return self._shift()
        if draw < 0.95 or not self._has_choice:
            return self._swap()
        return self._exchange()

    def large(self) -> list[int]:
        """Cut some GPUs anew and return the slots that need loadouts; empty when the draw leads nowhere."""
        if self._random.random() < 0.3 and len(self._node_kinds) > 1:
            place = self._random.choice(self._node_kinds)
            groups = self._nodes[place]
            if len(groups) > 1 and self._random.random() < 0.5:
                half = len(groups) // 2
                groups = groups[:half] if self._random.random() < 0.5 else groups[half:]
            return self.recut(groups)
        group = self._random.choice(self._kinds[self._random.choice(self.kinds)])
        if self._now.group_at[self._now.slot_of[group]] == group:
            return []
        return self.recut([group])

    def recut(self, groups: Sequence[int]) -> list[int]:
        """Open ``groups`` in place of what overlaps them; return their slots and those that fill the gaps."""
        now = self._now
        displaced = sorted({slot for group in groups for slot in now.overlapping(group)})
        freed = {gpu for slot in displaced for gpu in now.covered[int(now.group_at[slot])]}
        freed |= {gpu for group in groups for gpu in now.covered[group]}
        kinds = [now.space.groups[int(now.group_at[slot])] for slot in displaced]
        tenants = {service for slot in displaced for service in now.loadouts[slot]}
        worth = {
            service: sum(self._insight.served.get((slot, service), 0.0) for slot in displaced) for service in tenants
        }
        for slot in displaced:
            now.close(slot)
        opened = [now.open(group) for group in groups if not now.overlapping(group)]
        opened += self._close_gaps(freed, {(kind.tp, kind.pp) for kind in kinds})
        heavy = sorted(tenants, key=lambda service: (-worth[service], service))
        for slot in opened:
            for service in heavy:
                self._admit(slot, service)
        return opened

    def open_all(self, kind: tuple[str, int, int]) -> list[int]:
        """Open every group of ``kind`` that overlaps none in use; return their slots."""
        return [self._now.open(group) for group in self._kinds[kind] if not self._now.overlapping(group)]

    def _close_gaps(self, gpus: Iterable[int], shapes: set[tuple[int, int]]) -> list[int]:
        """Open groups on the ``gpus`` that no group holds, of the ``shapes`` that stood there where possible."""
        now = self._now
        groups = now.space.groups
        opened = []
        left = now.unused(gpus)
        while left:
            gpu = min(left)
            fitting = [
                group
                for group in self._inside.get(gpu, ())
                if left.issuperset(now.covered[group]) and min(now.covered[group]) == gpu
            ]
            if not fitting:
                left.discard(gpu)
                continue
            alike = [group for group in fitting if (groups[group].tp, groups[group].pp) in shapes]
            group = self._random.choice(alike or fitting)
            opened.append(now.open(group))
            left -= set(now.covered[group])
        return opened

    def _admit(self, slot: int, service: int) -> bool:
        """Let ``slot`` run ``service`` with one of its options that fits, if any."""
        now = self._now
        choices = now.choices[int(now.group_at[slot])].get(service)
        if not choices or service in now.loadouts[slot]:
            return False
        first = self._random.randrange(len(choices)) if len(choices) > 1 else 0
        for offset in range(len(choices)):
            option = choices[(first + offset) % len(choices)]
            if now.fits(slot, option):
                now.add(slot, option)
                return True
        return False

    def admit_wanting(self, slots: Sequence[int]) -> int:
        """Give each of ``slots`` the service that loses most of those that fit; return how many found one."""
        order = sorted(range(len(self._insight.lost)), key=lambda service: (-self._insight.lost[service], service))
        found = 0
        for position, slot in enumerate(slots):
            for offset in range(len(order)):
                # Slots begin at different services, so that one round does not give all of them the same.
                service = order[(position + offset) % len(order)]
                if self._insight.lost[service] > 0 and self._admit(slot, service):
                    found += 1
                    break
        return found

    def complete(self) -> bool:
        """Add replicas until every service has its minimum; False when one finds no place."""
        now = self._now
        for service in np.flatnonzero(now.deployment.count < now.space.min_replicas).tolist():
            slots = list(now.loadouts)
            self._random.shuffle(slots)
            while now.deployment.count[service] < now.space.min_replicas[service]:
                if not any(self._squeeze(slot, service) for slot in slots):
                    return False
        return True

    def _squeeze(self, slot: int, service: int) -> bool:
        """Let ``slot`` run ``service``, evicting others while it does not fit."""
        now = self._now
        choices = now.choices[int(now.group_at[slot])].get(service)
        if not choices or service in now.loadouts[slot] or not now.affordable(slot, service):
            return False
        option = choices[self._random.randrange(len(choices))] if len(choices) > 1 else choices[0]
        mark = now.mark()
        for _ in range(_MOST_EVICTED):
            if now.fits(slot, option):
                now.add(slot, option)
                return True
            victims = [each for each in now.loadouts[slot] if now.spare(each)]
            if not victims:
                break
            now.remove(slot, self._weakest(slot, victims))
            self._touched.append(slot)
        if now.fits(slot, option):
            now.add(slot, option)
            return True
        now.rollback(mark)
        return False

    def _top_up(self, slot: int) -> None:
        """Let ``slot`` run services that lose, as long as a few draws find one that fits."""
        misses = 0
        while misses < _TRIES:
            if not self._admit(slot, self._insight.wanting(self._random)):
                misses += 1

    def _weakest(self, slot: int, services: list[int]) -> int:
        """Return the less serving of two random replicas, so that each may go and the idle go first."""
        one, two = self._random.choice(services), self._random.choice(services)
        served = self._insight.served
        return one if served.get((slot, one), 0.0) <= served.get((slot, two), 0.0) else two

    def _slot(self) -> int:
        slots = list(self._now.loadouts)
        return slots[self._random.randrange(len(slots))]

    def _add(self) -> bool:
        service = self._insight.wanting(self._random)
        return any(self._squeeze(self._slot(), service) for _ in range(_TRIES))

    def _drop(self) -> bool:
        now = self._now
        slot = self._slot()
        loose = [service for service in now.loadouts[slot] if now.spare(service)]
        if not loose:
            return False
        now.remove(slot, self._weakest(slot, loose))
        self._touched.append(slot)
        return True

    def _shift(self) -> bool:
        now = self._now
        source, target = self._slot(), self._slot()
        if source == target or not now.loadouts[source]:
            return False
        service = self._random.choice(list(now.loadouts[source]))
        now.remove(source, service)
        self._touched.append(source)
        return self._squeeze(target, service)

    def _swap(self) -> bool:
        now = self._now
        one, two = self._slot(), self._slot()
        if one == two:
            return False
        mine = [service for service in now.loadouts[one] if service not in now.loadouts[two]]
        theirs = [service for service in now.loadouts[two] if service not in now.loadouts[one]]
        if not mine or not theirs:
            return False
        here, there = self._random.choice(mine), self._random.choice(theirs)
        now.remove(one, here)
        now.remove(two, there)
        self._touched += [one, two]
        return self._squeeze(one, there) and self._squeeze(two, here)

    def _exchange(self) -> bool:
        """Give one replica another option: another variant or batch."""
        now = self._now
        slot = self._slot()
        if not now.loadouts[slot]:
            return False
        service = self._random.choice(list(now.loadouts[slot]))
        choices = now.choices[int(now.group_at[slot])][service]
        if len(choices) < 2:
            return False
        other = self._random.choice([option for option in choices if option != now.loadouts[slot][service]])
        now.remove(slot, service)
        if not now.fits(slot, other):
            return False
        now.add(slot, other)
        return True
