"""The course of a run with changes: plans that follow each other, failures, and a controller (section 10)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from evaluator import operations
from evaluator.changes import Change, Failure, PlanChange, Recovery, Schedule, check_places, schedule
from evaluator.control import Controller, Observation, ServiceObservation
from evaluator.featured_run import FeaturedRun, Features, Generating
from evaluator.fleet import Fleet, FleetGroup, FleetReplica
from evaluator.scenario import Replicas, replica_arrays
from evaluator.settings import Settings
from evaluator.state import DROPPED, FAILED, GOOD, LATE
from evaluator.token_costs import token_costs_of
from evaluator.workflows import group_places
from plans.cluster import Cluster
from plans.plan import Plan
from plans.service import GenerationService, Services
from profiles.library import ProfileLibrary

__all__ = ["Course", "Inventory"]

_Place = tuple[str, str]
"""A group and a service."""


class Inventory:
    """The documents that a fleet is read with.

    Args:
        services: SLOs.
        cluster: Where plans run, if known.
        profiles: Costs, percentiles and interference, if known.
        settings: How to simulate.
    """

    def __init__(
        self, services: Services, cluster: Cluster | None, profiles: ProfileLibrary | None, settings: Settings
    ) -> None:
        self.services = services
        self.cluster = cluster
        self.profiles = profiles
        self.settings = settings

    def replicas(self, fleet: Fleet) -> Replicas:
        """Return the arrays of everything in ``fleet``."""
        groups = [group.planned for group in fleet.groups]
        pairs = [(group.planned, replica.entry) for group, replica in fleet.replicas()]
        weights = [0.0 if group.known else replica.weight for group, replica in fleet.replicas()]
        return replica_arrays(groups, pairs, weights, self.services, cluster=self.cluster, profiles=self.profiles)

    def features(self, fleet: Fleet) -> Features:
        """Return what ``fleet`` has beside replicas."""
        return Features(
            generating=self._generating(fleet),
            places=group_places([group.planned.node for group in fleet.groups], self.cluster),
            overlaps=fleet.overlaps(),
        )

    def _generating(self, fleet: Fleet) -> tuple[Generating, ...]:
        found = []
        if self.settings.admission == "arrival":
            return ()
        for position, (group, replica) in enumerate(fleet.replicas()):
            service = self.services.service(replica.entry.service)
            costs = token_costs_of(
                group.planned,
                replica.entry,
                self.services,
                self.cluster,
                self.profiles,
                most_running=replica.largest_batch,
            )
            if costs is not None and isinstance(service, GenerationService):
                found.append(Generating(replica=position, costs=costs, slo=service.slo))
        return tuple(found)


class Course:
    """Carries out changes in a run, in the order of their times.

    Args:
        run: The run, at its beginning.
        fleet: What is in it.
        inventory: The documents.
        changes: What is known to come.
        controller: What decides on the way, if anything.
        interval_s: Seconds between its turns.
    """

    def __init__(
        self,
        run: FeaturedRun,
        fleet: Fleet,
        inventory: Inventory,
        *,
        changes: Sequence[Change] = (),
        controller: Controller | None = None,
        interval_s: float = 60.0,
    ) -> None:
        self._run = run
        self._fleet = fleet
        self._inventory = inventory
        self._controller = controller
        self._interval_s = interval_s
        self._agenda: list[tuple[float, int, Callable[[float], None]]] = []
        self._created = 0
        self._failures = sorted((c for c in changes if isinstance(c, Failure)), key=lambda failure: failure.at_s)
        self._in_transition = False
        self._waiting: Plan | None = None
        self._since_s = 0.0
        self._asked_at = 0
        self._counted = np.zeros_like(run.world.array("counts"))
        for change in changes:
            self._at(change.at_s, self._action_of(change))
        if controller is not None:
            self._at(interval_s, lambda now: self._ask(1, now))
        self._foresee(range(len(fleet.groups)), -math.inf)

    def finish(self) -> None:
        """Let the run go on to its end, with everything that happens on the way."""
        while self._agenda and self._agenda[0][0] <= self._run.end_s:
            now, _, action = self._agenda[0]
            self._run.advance(now, before=0)
            heapq.heappop(self._agenda)
            action(now)
        self._run.finish()

    def _at(self, time_s: float, action: Callable[[float], None]) -> None:
        heapq.heappush(self._agenda, (time_s, self._created, action))
        self._created += 1

    def _action_of(self, change: Change) -> Callable[[float], None]:
        if isinstance(change, PlanChange):
            return lambda now: self._know(change.plan, now)
        if isinstance(change, Failure):
            return lambda now: self._fail(change, now)
        return lambda now: self._recover(change, now)

    # Plans ---------------------------------------------------------------------------------------------------------

    def _know(self, plan: Plan, now: float) -> None:
        if self._in_transition:
            self._waiting = plan
        else:
            self._change_to(plan, now)

    def _change_to(self, plan: Plan, now: float) -> None:
        """Begin the transition from the plan in force."""
        cluster = self._inventory.cluster
        assert cluster is not None
        steps = schedule(self._fleet.plan, plan, cluster, start_s=now)
        replicas = list(self._fleet.replicas())
        before = {id(replica): (group, replica) for group, replica in self._fleet.add(self._fleet.plan)}
        coming = {id(replica) for _, replica in self._fleet.add(plan)}
        leaving = {
            (group.planned.id, replica.entry.service): (group, replica)
            for key, (group, replica) in before.items()
            if key not in coming
        }
        self._rebuild(replicas, now, new_limits=False)
        for position, group in enumerate(self._fleet.groups):
            if group.failed and not self._run.world.array("groups")["stopped"][position]:
                self._operate(operations.STOP, position, now)
        self._in_transition = True
        for span in (*steps.early_loads, *(span for wave in steps.waves for span in wave.loads)):
            self._fleet.load(span, plan, done=False)
        self._at(steps.flip_s, lambda at: self._flip(plan, steps, 0, leaving, at))

    def _flip(
        self, plan: Plan, steps: Schedule, number: int, old: dict[_Place, tuple[FleetGroup, FleetReplica]], now: float
    ) -> None:
        """Flip routes after so many waves: to what is loaded by now, and away from what leaves in the next."""
        for span in steps.waves[number - 1].loads if number else steps.early_loads:
            self._fleet.load(span, plan, done=True)
        wave = steps.waves[number] if number < len(steps.waves) else None
        gone_s = {(span.group, span.service): span.end_s for span in wave.drains} if wave is not None else {}
        going = {place: pair for place, pair in old.items() if place in gone_s or place not in steps.old_weights}
        for _, replica in going.values():
            replica.loaded = False
        staying = {place: pair for place, pair in old.items() if place not in going}
        self._fleet.flip(plan, {replica: steps.old_weights[place] for place, (_, replica) in staying.items()})
        self._rebuild(list(self._fleet.replicas()), now, new_limits=True)
        for place, (group, replica) in going.items():
            self._fleet.unload(group, replica, gone_s.get(place, now))
        if wave is None:
            self._end_transition(now)
        elif wave.loads:
            self._at(wave.end_s, lambda at: self._flip(plan, steps, number + 1, staying, at))
        else:
            self._at(wave.end_s, self._end_transition)

    def _end_transition(self, now: float) -> None:
        self._in_transition = False
        if self._waiting is not None:
            plan, self._waiting = self._waiting, None
            self._change_to(plan, now)

    def _rebuild(self, before: list[tuple[FleetGroup, FleetReplica]], now: float, *, new_limits: bool) -> None:
        """Let the run have the fleet as it is now; ``before`` is what it has, in order."""
        place = {id(replica): position for position, (_, replica) in enumerate(self._fleet.replicas())}
        moved = np.array([place[id(replica)] for _, replica in before], dtype=np.int64)
        replicas, features = self._inventory.replicas(self._fleet), self._inventory.features(self._fleet)
        known = len(self._run.world.array("groups"))
        self._run.replace(replicas, features, moved, now_s=now, new_limits=new_limits)
        self._foresee(range(known, len(self._fleet.groups)), now)

    # Failures ------------------------------------------------------------------------------------------------------

    def _fail(self, failure: Failure, now: float) -> None:
        detection_s = now + self._run.settings.detection_s
        self._fleet.note_failure(failure)
        for position, group in self._fleet.hit_by(failure):
            group.outages += 1
            if not group.failed:
                group.failed = True
                group.detection_s = detection_s
                self._operate(operations.STOP, position, now)
        self._at(detection_s, lambda at: self._detect(failure, at))

    def _detect(self, failure: Failure, now: float) -> None:
        world = self._run.world
        found = np.zeros(int(world["slot_count"]), dtype=np.int32)
        count = 0
        for position, group in self._fleet.hit_by(failure):
            if group.failed:
                group.known = True
                count = self._operate(operations.CLEAR, position, now, found.ctypes.data, count)
        self._set_weights()
        lost = found[:count]
        calls = world.array("calls")
        order = np.lexsort(
            (np.where(calls["lead"][lost] < 0, 0, calls["number"][lost]), world.array("pool")["position"][lost])
        )
        for slot in lost[order]:
            self._operate(operations.RETRY, int(slot), now, 0, self._run.settings.retries)

    def _recover(self, recovery: Recovery, now: float) -> None:
        self._fleet.note_recovery(recovery)
        loadouts = {group.id: group.loadout for group in self._fleet.plan.groups}
        for position, group in self._fleet.hit_by(recovery):
            if group.failed and self._fleet.is_well(group):
                load_s = 0.0
                for entry in loadouts.get(group.planned.id, ()):
                    load_s += entry.load_s
                self._come_back_at(max(now + load_s, group.detection_s), position, group)

    def _come_back_at(self, time_s: float, position: int, group: FleetGroup) -> None:
        outages = group.outages

        def come_back(now: float) -> None:
            if group.failed and group.outages == outages:
                group.failed = group.known = False
                self._foresee([position], now)
                self._operate(operations.RESTART, position, now)
                self._set_weights()

        self._at(time_s, come_back)

    def _foresee(self, positions: Iterable[int], now: float) -> None:
        """Let groups know when they fail next after ``now``: what they hold is counted until then."""
        groups = self._run.world.array("groups")
        for position in positions:
            group = self._fleet.groups[position]
            later = (failure.at_s for failure in self._failures if failure.at_s > now and group.hit_by(failure))
            groups["fails_s"][position] = next(later, math.inf)

    def _set_weights(self) -> None:
        world = self._run.world
        weights = [0.0 if group.known else replica.weight for group, replica in self._fleet.replicas()]
        world.array("route_weight")[world.array("replicas")["route"]] = weights

    def _operate(self, operation: int, item: int, now: float, found: int = 0, count: int = 0) -> int:
        return operations.operate(self._run.world.record, operation, item, float(now), found, count)

    # The controller ------------------------------------------------------------------------------------------------

    def _ask(self, turn: int, now: float) -> None:
        assert self._controller is not None
        if self._run.arrivals.arrival_s[-1] < now:
            return
        self._at((turn + 1) * self._interval_s, lambda at: self._ask(turn + 1, at))
        if self._in_transition:
            return
        decided = self._controller.observe(self._observation(now))
        if decided is not None:
            check_places(decided.plan, self._inventory.cluster, "the controller's plan")
            self._in_transition = True
            self._at(now + decided.solve_s, lambda at: self._change_to(decided.plan, at))

    def _observation(self, now: float) -> Observation:
        world, arrivals = self._run.world, self._run.arrivals
        counts = world.array("counts")
        ended, self._counted = counts - self._counted, counts.copy()
        sent = arrivals.service_of_code[arrivals.code[self._asked_at : int(world["cursor"])]]
        arrived = np.bincount(sent, minlength=len(counts))
        replicas = world.array("replicas")
        queued = np.zeros(len(counts), dtype=np.int64)
        np.add.at(queued, replicas["service"], replicas["queued"])
        services = self._inventory.services
        names = [each.name for each in (*services.services, *services.workflows)]
        since_s, self._since_s, self._asked_at = self._since_s, now, int(world["cursor"])
        return Observation(
            now_s=now,
            since_s=since_s,
            plan=self._fleet.plan,
            services={
                name: ServiceObservation(
                    arrived=int(arrived[row]),
                    good=int(ended[row, GOOD]),
                    late=int(ended[row, LATE]),
                    dropped=int(ended[row, list(DROPPED)].sum()),
                    failed=int(ended[row, list(FAILED)].sum()),
                    queued=int(queued[row]),
                )
                for row, name in enumerate(names)
            },
            queued=self._queued_by_group(),
            down=frozenset(group.planned.node for group in self._fleet.groups if group.known),
        )

    def _queued_by_group(self) -> dict[str, int]:
        queued: dict[str, int] = {}
        for group, record in zip(self._fleet.groups, self._run.world.array("groups"), strict=True):
            queued[group.planned.id] = queued.get(group.planned.id, 0) + int(record["queued"])
        return queued
