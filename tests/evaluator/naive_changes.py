"""Section 10: plans come, nodes fail and recover, controllers are asked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from plans import Group as PlannedGroup
from plans import LoadoutEntry, Plan, transition
from plans.plan import TransitionStep
from tests.evaluator.naive_parts import (
    Failure,
    Group,
    NewPlan,
    Recovery,
    Replica,
    Request,
    View,
)
from tests.evaluator.naive_state import CHANGE, ENTRY, MOST_GPUS, State


class Changes(State):
    """Changes over time."""

    # Section 10: plans -----------------------------------------------------------------------------------------------

    def carry_out(self, change: NewPlan | Failure | Recovery) -> None:
        if isinstance(change, NewPlan):
            self.know(change.plan)
        elif isinstance(change, Failure):
            self.fail(change)
        else:
            self.recover(change)

    def know(self, plan: Plan) -> None:
        if self.in_transition:
            self.waiting_plan = plan
        else:
            self.change_to(plan)

    def replica_of(self, planned: PlannedGroup, entry: LoadoutEntry) -> Replica:
        """Return the replica, made new where there is none: groups differ by (id, tp, pp), replicas by the variant."""
        cut = planned.id, planned.tp, planned.pp
        group = next((g for g in self.groups if (g.id, g.tp, g.pp) == cut), None)
        if group is None:
            group = Group(planned.id, planned.node, planned.gpus, planned.tp, planned.pp, len(self.groups))
            group.stage_free_s, group.reserved_s = [0.0] * planned.pp, [0.0] * planned.pp
            group.held = [[] for _ in range(planned.pp)]
            group.failed = group.known_failed = any((planned.node, gpu) in self.failed_gpus for gpu in planned.gpus)
            self.groups.append(group)
        same = [r for r in group.replicas if (r.entry.service, r.entry.variant) == (entry.service, entry.variant)]
        if not same:
            same = [Replica(group, entry, self.told.costs(planned, entry))]
            group.replicas += same
        return same[0]

    def planned(self, plan: Plan) -> list[tuple[Replica, LoadoutEntry]]:
        return [(self.replica_of(group, entry), entry) for group in plan.groups for entry in group.loadout]

    def flip(self, plan: Plan, old: dict[Replica, float] | None = None) -> None:
        """Routes as in the plan, for what is loaded; what is old and still there as told; nothing for the rest."""
        for group in self.groups:
            for replica in group.replicas:
                replica.weight = (old or {}).get(replica, 0.0)
        weights = {(service, r.group): r.weight for service, routes in plan.routes.items() for r in routes}
        for planned in plan.groups:
            for entry in planned.loadout:
                replica = self.replica_of(planned, entry)
                if replica.loaded:
                    replica.weight = weights.get((entry.service, planned.id), 0.0)
                    replica.entry, replica.costs = entry, self.told.costs(planned, entry)
        for group in self.groups:
            group.work_s = 0.0
            for replica in group.replicas:
                for _ in range(replica.waiting):
                    group.work_s += replica.share_s

    def change_to(self, target: Plan) -> None:
        """Carry out the transition: first loads and flip; then wave by wave unloads, loads, and another flip."""
        pending = list(transition(self.plan, target, self.told.cluster).steps)
        leaving = {(r.group.id, r.entry.service): r for r in self.leaving(self.plan, target)}
        drains = {(s.group, s.service): s for s in pending if s.action == "drain"}
        rates: dict[str, float] = defaultdict(float)
        for planned in target.groups:
            for entry in planned.loadout:
                rates[entry.service] += entry.rate_rps
        coming = {(r.group.id, e.service): r for r, e in self.planned(target)}
        self.in_transition = True

        def take(*actions: str) -> list[TransitionStep]:
            taken = []
            while pending and pending[0].action in actions:
                taken.append(pending.pop(0))
            return taken

        def flip_to(loads: list[TransitionStep]) -> None:
            for step in loads:
                coming[step.group, step.service].loaded = True
            routed = take("route")
            going = [s for s in take("drain", "unload") if s.action == "drain"]
            for place in [place for place in leaving if place not in drains]:
                leaving.pop(place).loaded = False
            for step in going:
                if (step.group, step.service) in leaving:
                    leaving.pop((step.group, step.service)).loaded = False
            self.plan = target
            self.flip(
                target,
                {r: drains[place].rate_rps / (rates[place[1]] or 1.0) for place, r in leaving.items()},
            )
            unloaded_s = max((self.now + step.est_s for step in going), default=self.now)
            following = take("load") if going or routed else []
            if following:
                self.at(loads_end_s(unloaded_s, following), CHANGE, lambda: flip_to(following))
            elif going:
                self.at(unloaded_s, CHANGE, self.end_transition)
            else:
                self.end_transition()

        first = take("load")
        self.at(loads_end_s(self.now, first), CHANGE, lambda: flip_to(first))

    def leaving(self, before: Plan, after: Plan) -> list[Replica]:
        stay = {replica for replica, _ in self.planned(after)}
        return [replica for replica, _ in self.planned(before) if replica not in stay]

    def end_transition(self) -> None:
        self.in_transition = False
        if self.waiting_plan is not None:
            plan, self.waiting_plan = self.waiting_plan, None
            self.change_to(plan)

    def ask_controller(self, turn: int) -> None:
        if not any(row.arrival_s >= self.now for row in self.told.rows):
            return
        self.at((turn + 1) * self.told.interval_s, CHANGE, lambda: self.ask_controller(turn + 1))
        if self.in_transition:
            return
        queued: dict[str, int] = defaultdict(int)
        for group in self.groups:
            queued[group.id] += sum(replica.waiting for replica in group.replicas)
        decided = self.told.controller(View(now_s=self.now, arrivals=dict(self.arrived), queued=queued))
        self.arrived.clear()
        if decided is not None:
            plan, took_s = decided
            self.in_transition = True
            self.at(self.now + took_s, CHANGE, lambda: self.change_to(plan))

    # Section 10: failures --------------------------------------------------------------------------------------------

    def hit(self, change: Failure | Recovery) -> list[Group]:
        return [g for g in self.groups if any((g.node, gpu) in self.gpus_of(change) for gpu in g.gpus)]

    def gpus_of(self, change: Failure | Recovery) -> set[tuple[str, int]]:
        gpus = range(MOST_GPUS) if change.gpu is None else [change.gpu]
        return {(change.node, gpu) for gpu in gpus}

    def fail(self, failure: Failure) -> None:
        detection_s = self.now + self.told.detection_s
        self.failed_gpus |= self.gpus_of(failure)
        for group in self.hit(failure):
            group.outages += 1
            if not group.failed:
                if group.running:
                    self.last_s = max(self.last_s, self.now)
                group.fail(self.now)
                group.detection_s = detection_s
        self.at(detection_s, CHANGE, lambda: self.detect(failure))

    def detect(self, failure: Failure) -> None:
        found = [group for group in self.hit(failure) if group.failed]
        requests: list[Request] = []
        for group in found:
            group.known_failed = True
            for replica in group.replicas:
                requests += [frame for bundle in replica.queue for frame in bundle.frames]
                requests += [frame for bundle in replica.gathered.values() for frame in bundle.frames]
                requests += replica.sequences
                replica.queue, replica.gathered, replica.sequences = [], {}, []
            requests += [r for batch in group.lost if not batch.iteration for r in batch.requests]
            group.lost = []
            group.work_s = 0.0
        for request in sorted(requests, key=lambda r: (r.position, r.call)):
            self.retry(request)

    def retry(self, request: Request) -> None:
        if request.ended:
            return
        if request.retried >= self.told.retries or (request.instance is not None and request.instance.ended):
            self.end(request, "failed", "lost with its node")
            return
        request.replica.outstanding -= 1
        request.replica = None
        request.retried += 1
        request.produced = 0
        self.at(self.now, ENTRY, lambda: None if request.ended else self.route_and_enter(request))

    def recover(self, recovery: Recovery) -> None:
        self.failed_gpus -= self.gpus_of(recovery)
        loads_s = {group.id: group.loadout for group in self.plan.groups}
        for group in self.hit(recovery):
            if group.failed and not any((group.node, gpu) in self.failed_gpus for gpu in group.gpus):
                load_s = 0.0
                for entry in loads_s.get(group.id, ()):
                    load_s += entry.load_s
                back_s = max(self.now + load_s, group.detection_s)
                self.at(back_s, CHANGE, lambda g=group, n=group.outages: self.come_back(g, n))

    def come_back(self, group: Group, outages: int) -> None:
        if group.failed and group.outages == outages:
            group.failed = group.known_failed = False
            group.stage_free_s = [self.now] * group.pp


def loads_end_s(start_s: float, loads: Sequence[TransitionStep]) -> float:
    """Each node loads one after the other, nodes work side by side."""
    clock: dict[str, float] = defaultdict(lambda: start_s)
    for step in loads:
        clock[step.group.rpartition("/")[0]] += step.est_s
    return max(clock.values(), default=start_s)
