"""An independent simulator, written from docs/evaluator.md alone: plain Python, one object per thing, no shared code.

It looks at everything again after every event, so it is slow, and reads like the page. Sections are the page's.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from plans import Group as PlannedGroup
from plans import LoadoutEntry, Plan, Services, transition
from plans.plan import TransitionStep
from tests.evaluator.naive_parts import (
    Batch,
    Bundle,
    Failure,
    Group,
    NewPlan,
    Recovery,
    Replica,
    Request,
    Result,
    Row,
    Scenario,
    View,
    quantile,
    uniform,
)
from tests.evaluator.naive_workflow import Instance, tails_of
from traces.table import RequestTrace

CHANGE, COMPLETION, ENTRY, TIMER, DISPATCH = range(5)
MOST_GPUS = 64  # of a node, in the scenarios of the tests
HOPELESS = "deadline cannot be met"
DISPLACED = "gave way to a full batch"


def run(scenario: Scenario) -> list[Result | None]:
    """Return what becomes of every row, in order; None for rows that are not offered (after `until_s`)."""
    return Simulation(scenario).run()


def run_trace(plan: Plan, services: Services, trace: RequestTrace, **told: Any) -> list[Result | None]:
    """Return what becomes of every request of a trace without streams and tokens; `told` as for `Scenario`."""
    names = [trace.services[code] for code in trace.codes]
    rows = [Row(arrival_s=time_s, name=name) for time_s, name in zip(trace.arrival_s.tolist(), names, strict=True)]
    return run(Scenario(plan=plan, services=services, rows=rows, **told))


class Simulation:
    """The state of a run."""

    def __init__(self, scenario: Scenario) -> None:
        self.told = scenario
        self.services = {service.name: service for service in scenario.services.services}
        self.workflows = {workflow.name: workflow for workflow in scenario.services.workflows}
        self.now = 0.0
        self.events: list[tuple[float, int, int, int, Callable[[], None]]] = []
        self.created = 0
        self.entered = 0
        self.groups: list[Group] = []
        self.followed: dict[tuple[str, str], Replica] = {}
        self.turn_of: dict[str, int] = defaultdict(int)
        self.failed_gpus: set[tuple[str, int]] = set()
        self.requests: list[Request | Instance] = []
        self.ends: dict[int, Result] = {}
        self.arrived: dict[str, int] = defaultdict(int)
        self.plan = scenario.plan
        self.in_transition = False
        self.waiting_plan: Plan | None = None
        self.tails = {name: tails_of(w, scenario.plan) for name, w in self.workflows.items()}
        for group in scenario.plan.groups:
            for entry in group.loadout:
                self.replica_of(group, entry).loaded = True
        self.flip(scenario.plan)

    # Section 1: events -----------------------------------------------------------------------------------------------

    def at(self, time_s: float, priority: int, action: Callable[[], None], group: Group | None = None) -> None:
        position = group.position if group else 0
        heapq.heappush(self.events, (time_s, priority, position, self.created, action))
        self.created += 1

    def run(self) -> list[Result | None]:
        for position, row in enumerate(self.told.rows):
            self.at(row.arrival_s + self.told.overhead_s, ENTRY, lambda p=position, r=row: self.arrive(p, r))
        for change in self.told.changes:
            self.at(change.time_s, CHANGE, lambda c=change: self.carry_out(c))
        if self.told.controller:
            self.at(self.told.interval_s, CHANGE, lambda: self.ask_controller(1))
        while True:
            group = min(self.groups, key=self.dispatch_s)
            dispatch_s = self.dispatch_s(group)
            event_s = self.events[0][0] if self.events else math.inf
            if min(dispatch_s, event_s) > self.told.until_s or min(dispatch_s, event_s) == math.inf:
                break
            if event_s <= dispatch_s:
                self.now, _, _, _, action = heapq.heappop(self.events)
                action()
            else:
                self.now = dispatch_s
                self.dispatch(group)
        return [self.result_of(position) for position in range(len(self.told.rows))]

    def result_of(self, position: int) -> Result | None:
        if position in self.ends:
            return self.ends[position]
        return Result(outcome="in_flight") if self.told.rows[position].arrival_s <= self.told.until_s else None

    def dispatch_s(self, group: Group) -> float:
        """When the group could start something, as things are."""
        ready = [ready_s for replica in group.replicas for ready_s in self.ready_s(replica)]
        if group.failed or not ready:
            return math.inf
        return max(self.now, group.first_stage_free_s(self.told.concurrency, self.now), min(ready))

    # Section 2 and 11: arrivals --------------------------------------------------------------------------------------

    def arrive(self, position: int, row: Row) -> None:
        self.arrived[row.name] += 1
        if row.name in self.workflows:
            instance = Instance(self.workflows[row.name], position, self.told.seed)
            for stage in instance.roots():
                self.release(instance, stage, [])
            return
        service = self.services[row.name]
        allowed_s = service.deadline_s(row.output_tokens)
        first_s = service.slo.ttft_s if service.request_class == "generation" else 0.0
        request = Request(
            position=position,
            service=row.name,
            arrival_s=row.arrival_s,
            deadline_s=row.arrival_s + allowed_s,
            due_s=row.arrival_s + allowed_s - self.told.response_s,
            first_due_s=row.arrival_s + first_s - self.told.response_s,
            stream=row.stream if service.request_class == "frequency" else None,
            prompt=max(1, row.input_tokens),
            output=max(1, row.output_tokens),
        )
        self.route_and_enter(request)

    def route_and_enter(self, request: Request) -> None:
        if self.route(request):
            self.enter(request)

    # Section 4: routing ----------------------------------------------------------------------------------------------

    def route(self, request: Request) -> bool:
        """Choose the replica; say whether there is one."""
        replicas = [r for g in self.groups for r in g.replicas if r.entry.service == request.service and r.routable]
        if not replicas:
            self.end(request, "failed", "no route")
            return False
        request.replica = self.choose(request, replicas)
        request.replica.outstanding += 1
        return True

    def choose(self, request: Request, replicas: list[Replica]) -> Replica:
        if request.stream is None:
            return self.by_policy(request, replicas)
        stream = request.service, request.stream
        if self.followed.get(stream) not in replicas:
            self.followed[stream] = self.by_policy(request, replicas)
        return self.followed[stream]

    def by_policy(self, request: Request, replicas: list[Replica]) -> Replica:
        policy = self.told.routing
        if policy == "weighted":
            return in_smooth_turns(replicas, [r.weight for r in replicas])
        if policy == "credits":
            return in_smooth_turns(replicas, [r.credit for r in replicas])
        if policy == "weighted-random":
            return self.at_random(request, replicas)
        if policy == "round-robin":
            turn = self.turn_of[request.service]
            self.turn_of[request.service] += 1
            return replicas[turn % len(replicas)]
        if policy == "shortest-queue":
            return min(replicas, key=lambda r: r.outstanding)
        if policy == "least-finish":
            return min(replicas, key=self.expected_finish_s)
        assert policy == "earliest-free"
        return min(replicas, key=lambda r: r.group.reserved_s[-1])

    def at_random(self, request: Request, replicas: list[Replica]) -> Replica:
        index = request.position if request.instance is None else request.position * 4096 + request.call
        total = 0.0
        for replica in replicas:
            total += replica.weight
        mark = uniform(self.told.seed, 0, index) * total
        cumulated = 0.0
        for replica in replicas:
            cumulated += replica.weight
            if mark < cumulated:
                return replica
        return replicas[-1]

    def expected_finish_s(self, replica: Replica) -> float:
        if self.told.admission == "arrival":
            return self.predicted(replica)[-1] + self.told.response_s
        free_s = replica.group.first_stage_free_s(self.told.concurrency, self.now)
        return max(self.now, free_s) + replica.group.work_s + replica.latency_s(1)

    # Section 7: admission --------------------------------------------------------------------------------------------

    def predicted(self, replica: Replica) -> list[float]:
        """When each stage would end, after what was accepted before."""
        clock, ends = self.now, []
        for reserved_s, stage_s in zip(replica.group.reserved_s, replica.entry.stage_latency_s[0], strict=True):
            clock = max(clock, reserved_s) + stage_s
            ends.append(clock)
        return ends

    def admits(self, request: Request, replica: Replica) -> bool:
        ends = self.predicted(replica)
        if ends[-1] + self.told.response_s + self.told.admission_margin_s > request.deadline_s:
            return False
        replica.group.reserved_s = ends
        return True

    # Section 5: queues -----------------------------------------------------------------------------------------------

    def enter(self, request: Request) -> None:
        replica = request.replica
        if replica.costs and not replica.costs.holds(request.prompt + request.output):
            self.end(request, "dropped", "larger than the KV memory")
        elif self.told.admission == "arrival" and not self.admits(request, replica):
            self.end(request, "dropped", "not admitted")
        elif request.stream is not None and frames_of(replica.entry) > 1 and self.told.admission == "dispatch":
            self.gather(request, replica)
        else:
            due_s = request.due_s
            if replica.costs and request.instance is None:
                due_s = request.first_due_s
            self.queue(replica, Bundle(due_s=due_s, entered_s=self.now, frames=[request]))

    def gather(self, frame: Request, replica: Replica) -> None:
        """Multi-frame: hold frames of a stream until there are enough or waiting longer would be late."""
        bundle = replica.gathered.get(frame.stream)
        if bundle is None:
            bundle = Bundle(due_s=frame.due_s, entered_s=self.now, frames=[])
            replica.gathered[frame.stream] = bundle
        bundle.frames.append(frame)
        latest_s = bundle.due_s - replica.largest_s
        if len(bundle.frames) >= frames_of(replica.entry) or latest_s <= self.now:
            self.flush(replica, bundle)
        elif len(bundle.frames) == 1:
            self.at(latest_s, TIMER, lambda: self.flush(replica, bundle), replica.group)

    def flush(self, replica: Replica, bundle: Bundle) -> None:
        stream = bundle.frames[0].stream
        if replica.gathered.get(stream) is bundle:
            del replica.gathered[stream]
            self.queue(replica, bundle)

    def queue(self, replica: Replica, bundle: Bundle) -> None:
        bundle.sequence = self.entered
        self.entered += 1
        self.put(replica, bundle)

    def put(self, replica: Replica, bundle: Bundle) -> None:
        replica.queue.append(bundle)
        replica.queue.sort(key=lambda b: (self.key_s(b), b.sequence))
        for _ in bundle.frames:
            replica.group.work_s += replica.share_s

    def take(self, replica: Replica, bundle: Bundle) -> None:
        replica.queue.remove(bundle)
        for _ in bundle.frames:
            replica.group.work_s -= replica.share_s
        if not any(r.queue for r in replica.group.replicas):
            replica.group.work_s = 0.0

    def key_s(self, bundle: Bundle) -> float:
        return bundle.due_s if self.told.order == "edf" else bundle.entered_s

    # Section 5: dispatch ---------------------------------------------------------------------------------------------

    def ready_s(self, replica: Replica) -> Iterable[float]:
        """From when the replica has something to start; nothing when it has nothing."""
        if replica.sequences:
            yield -math.inf
        elif replica.queue:
            head = replica.queue[0]
            if replica.costs or self.told.batch_delay_s == 0 or replica.waiting >= replica.entry.max_batch:
                yield -math.inf
            else:
                yield min(head.entered_s + self.told.batch_delay_s, head.due_s - replica.largest_s)

    def dispatch(self, group: Group) -> None:
        while self.dispatch_s(group) <= self.now:
            ready = [r for r in group.replicas if any(ready_s <= self.now for ready_s in self.ready_s(r))]
            replica = min(ready, key=self.turn_key)
            if replica.costs:
                self.iterate(replica)
                continue
            size = self.batch_size(replica)
            if isinstance(size, str):
                bundle = replica.queue[0]
                self.take(replica, bundle)
                for frame in bundle.frames:
                    self.end(frame, "dropped", size)
            else:
                self.start_batch(replica, size)

    def turn_key(self, replica: Replica) -> tuple[float, float]:
        """The key of the replica; with FIFO, equal times of entry go by sequence of entry."""
        fifo = self.told.order == "fifo"
        keys = [(self.key_s(b), b.sequence if fifo else 0.0) for b in replica.queue[:1]]
        if replica.sequences:
            tpot_s = 0.0 if fifo else self.services[replica.entry.service].slo.tpot_s
            keys.append((replica.iteration_end_s + tpot_s, math.inf if fifo else 0.0))
        return min(keys)

    def batch_size(self, replica: Replica) -> int | str:
        """The size of the batch to start now, or why the head is dropped."""
        if self.told.admission == "arrival":
            return 1
        due_s, queued, largest = replica.queue[0].due_s, replica.waiting, replica.entry.max_batch
        meets = [b for b in range(1, min(queued, largest) + 1) if self.now + replica.latency_s(b) <= due_s]
        if self.told.early_drop:
            if not meets:
                return HOPELESS
            if queued > largest and self.now + replica.largest_s > due_s:
                return DISPLACED
        return max(meets, default=min(queued, largest))

    def start_batch(self, replica: Replica, size: int) -> None:
        frames: list[Request] = []
        while replica.queue and (not frames or len(frames) + len(replica.queue[0].frames) <= size):
            bundle = replica.queue[0]
            self.take(replica, bundle)
            frames += bundle.frames
        factor = self.factor(replica, len(frames))
        group, clock = replica.group, self.now
        if group.slots(self.told.concurrency) > 1:
            group.stage_free_s = [self.now]
        for stage, stage_s in enumerate(replica.entry.stage_latency_s[len(frames) - 1]):
            clock = max(clock, group.stage_free_s[stage]) + stage_s * factor
            group.stage_free_s[stage] = clock
        self.start(Batch(replica=replica, requests=frames, end_s=clock))

    def start(self, batch: Batch) -> None:
        batch.replica.group.started += 1
        batch.replica.group.running.append(batch)
        self.at(batch.end_s, COMPLETION, lambda: self.complete(batch), batch.replica.group)

    def factor(self, replica: Replica, size: int, *, iteration: bool = False) -> float:
        """Sections 5 and 6: by how much this batch takes longer than the table says."""
        u = uniform(self.told.seed, 1, replica.group.position * 2**32 + replica.group.started)
        drawn = 1.0
        if self.told.latency == "exponential":
            drawn = -math.log(1 - u)
        elif self.told.latency == "profile" and not iteration:
            ratios = self.told.ratios.get((replica.entry.service, replica.entry.variant))
            drawn = quantile(ratios[size - 1], u) if ratios else 1.0
        interference = 1.0
        if replica.group.slots(self.told.concurrency) > 1:
            together = len(replica.group.running) + 1
            measured = self.told.interference.get((replica.entry.service, replica.entry.variant), {})
            interference = 1.0 if together == 1 else measured.get(together, float(together))
        here = replica.group
        overlapping = sum(1 for g in self.groups if g is not here and g.shares_a_gpu_with(here) and g.running)
        return drawn * interference * (1.0 + overlapping)

    def complete(self, batch: Batch) -> None:
        if batch.lost:
            return
        replica = batch.replica
        replica.group.running.remove(batch)
        if batch.iteration:
            replica.iteration_end_s = self.now
            ended = [sequence for sequence in batch.requests if self.add_token(sequence)]
        else:
            ended = batch.requests
        replica.outstanding -= len(ended)
        self.adapt_credit(replica)
        for request in ended:
            self.finish(request, batch)

    def adapt_credit(self, replica: Replica) -> None:
        if replica.waiting <= self.told.credit_target:
            replica.credit += self.told.credit_increase
        else:
            replica.credit *= self.told.credit_decrease
        replica.credit = min(20.0, max(0.05, replica.credit))

    # Section 9: generation -------------------------------------------------------------------------------------------

    def iterate(self, replica: Replica) -> None:
        """One turn: drop hopeless heads, admit, and start a prefill or a decode."""
        costs, running = replica.costs, replica.sequences
        while replica.queue and self.told.early_drop:
            head = replica.queue[0].frames[0]
            if head.produced or self.now + costs.prefill_s(head.context) <= replica.queue[0].due_s:
                break
            self.take(replica, replica.queue[0])
            self.end(head, "dropped", HOPELESS)
        admitted: list[Request] = []
        while replica.queue and len(running) + len(admitted) < replica.entry.max_batch:
            head = replica.queue[0].frames[0]
            if admitted and context_of([*admitted, head]) > self.told.max_prefill_tokens:
                break
            together = [*running, *admitted, head]
            if len(together) > 1 and not costs.holds(context_of(together) + len(together)):
                break
            replica.bundle_of[head] = replica.queue[0]
            self.take(replica, replica.queue[0])
            admitted.append(head)
        if admitted:
            running += admitted
            self.start_iteration(replica, admitted, costs.prefill_s(context_of(admitted)))
        elif running:
            while len(running) > 1 and not costs.holds(context_of(running) + len(running)):
                self.put(replica, replica.bundle_of[running.pop()])
            self.start_iteration(replica, list(running), costs.decode_of(len(running), context_of(running)))

    def start_iteration(self, replica: Replica, sequences: list[Request], takes_s: float) -> None:
        group = replica.group
        factor = self.factor(replica, len(sequences), iteration=True)
        end_s = max(self.now, *group.stage_free_s) + takes_s * factor
        group.stage_free_s = [end_s] * group.pp
        self.start(Batch(replica=replica, requests=sequences, end_s=end_s, iteration=True))

    def add_token(self, sequence: Request) -> bool:
        """Give a sequence its token; say whether it was the last."""
        if sequence.produced == 0:
            sequence.first_s = self.now
        sequence.produced += 1
        if sequence.produced < sequence.output:
            return False
        sequence.replica.sequences.remove(sequence)
        return True

    # Sections 2, 9 and 11: ends --------------------------------------------------------------------------------------

    def finish(self, request: Request, batch: Batch) -> None:
        request.ended = True
        if request.instance is not None:
            self.finish_call(request)
            return
        finish_s = self.now + self.told.response_s
        good, ttft_s, tpot_s = finish_s <= request.deadline_s, None, None
        if batch.iteration:
            slo = self.services[request.service].slo
            ttft_s = request.first_s + self.told.response_s - request.arrival_s
            tpot_s = (self.now - request.first_s) / (request.output - 1) if request.output > 1 else 0.0
            good = ttft_s <= slo.ttft_s and tpot_s <= slo.tpot_s
        self.ends[request.position] = Result(
            outcome="good" if good else "late",
            finish_s=finish_s,
            group=batch.replica.group.id,
            variant=batch.replica.entry.variant,
            batch=len(batch.requests),
            ttft_s=ttft_s,
            tpot_s=tpot_s,
        )

    def end(self, request: Request, outcome: str, reason: str) -> None:
        """Drop or fail a request that is in no queue."""
        if request.ended:
            return
        request.ended = True
        if request.replica is not None:
            request.replica.outstanding -= 1
        if request.instance is None:
            group = request.replica.group.id if request.replica is not None else None
            self.ends[request.position] = Result(outcome=outcome, reason=reason, group=group)
        elif not request.instance.ended and request.instance.lose(request):
            self.end_instance(request.instance, Result(outcome=outcome, reason=reason))

    # Section 11: workflows -------------------------------------------------------------------------------------------

    def release(self, instance: Instance, stage: str, inputs: list[tuple[Request, int]]) -> None:
        workflow, row = instance.workflow, self.told.rows[instance.position]
        deadline_s = row.arrival_s + workflow.slo.deadline_s - self.tails[workflow.name][stage]
        instance.released.add(stage)
        calls = [
            Request(
                position=instance.position,
                service=stage,
                arrival_s=row.arrival_s,
                deadline_s=deadline_s,
                due_s=deadline_s - self.told.response_s,
                prompt=max(1, row.input_tokens),
                output=max(1, row.output_tokens),
                instance=instance,
                stage=instance.stages.index(stage),
                call=instance.next_call + number,
            )
            for number in range(instance.count[stage])
        ]
        instance.next_call += len(calls)
        instance.calls[stage] = calls
        for call in calls:
            if instance.ended or not self.route(call):
                continue
            if inputs:
                transfer_s = max(self.transfer_s(done.replica.group, call.replica.group, size) for done, size in inputs)
                self.at(self.now + transfer_s, ENTRY, lambda c=call: self.arrive_call(c))
            else:
                self.enter(call)

    def transfer_s(self, source: Group, target: Group, size: int) -> float:
        cluster = self.told.cluster
        if cluster is None or source is target:
            return 0.0
        if source.node == target.node:
            bandwidth = cluster.node(source.node).intra_bandwidth
            return size / bandwidth if bandwidth else 0.0
        return cluster.network.latency_s + size / cluster.network.bandwidth

    def arrive_call(self, call: Request) -> None:
        if call.ended:
            return
        if call.replica.routable:
            self.enter(call)
        else:
            call.replica.outstanding -= 1
            call.replica = None
            self.route_and_enter(call)

    def finish_call(self, call: Request) -> None:
        instance = call.instance
        if instance.ended:
            return
        for stage, inputs in instance.finish(call):
            if not instance.ended:
                self.release(instance, stage, inputs)
        if instance.complete and not instance.ended:
            row = self.told.rows[instance.position]
            finish_s = self.now + self.told.response_s
            good = finish_s <= row.arrival_s + instance.workflow.slo.deadline_s
            self.end_instance(instance, Result(outcome="good" if good else "late", finish_s=finish_s))

    def end_instance(self, instance: Instance, result: Result) -> None:
        """Note the end; calls that wait or are under way end with it, those that run do so without effect."""
        instance.ended = True
        self.ends[instance.position] = result
        for call in [call for calls in instance.calls.values() for call in calls if not call.ended]:
            if call.replica is None or self.runs(call):
                continue
            for bundle in [b for b in call.replica.queue if call in b.frames]:
                self.take(call.replica, bundle)
            call.ended = True
            call.replica.outstanding -= 1

    def runs(self, call: Request) -> bool:
        group = call.replica.group
        return call in call.replica.sequences or any(call in batch.requests for batch in group.running + group.lost)

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
            group.failed = group.known_failed = any((planned.node, gpu) in self.failed_gpus for gpu in planned.gpus)
            self.groups.append(group)
        same = [r for r in group.replicas if (r.entry.service, r.entry.variant) == (entry.service, entry.variant)]
        if not same:
            same = [Replica(group, entry, self.told.costs(planned, entry))]
            group.replicas += same
        return same[0]

    def planned(self, plan: Plan) -> list[tuple[Replica, LoadoutEntry]]:
        return [(self.replica_of(group, entry), entry) for group in plan.groups for entry in group.loadout]

    def flip(self, plan: Plan) -> None:
        """Routes as in the plan, for what is loaded; nothing for the rest."""
        for group in self.groups:
            for replica in group.replicas:
                replica.weight = 0.0
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
        """Carry out the transition: first loads, first flip, unloads, late loads, last flip."""
        steps = transition(self.plan, target, self.told.cluster).steps
        first = [s for n, s in enumerate(steps) if all(earlier.action == "load" for earlier in steps[: n + 1])]
        late = [s for s in steps if s.action == "load" and s not in first]
        drain_s = [s.est_s for s in steps if s.action == "drain"]
        leaving = self.leaving(self.plan, target)
        coming = {(r.group.id, e.service): r for r, e in self.planned(target)}
        self.in_transition = True
        flip_s = loads_end_s(self.now, first)

        def flip_first() -> None:
            for step in first:
                coming[step.group, step.service].loaded = True
            self.plan = target
            self.flip(target)
            unloaded_s = max((self.now + est_s for est_s in drain_s), default=self.now)
            for replica in leaving:
                replica.loaded = False
            if not late:
                self.at(unloaded_s, CHANGE, self.end_transition)
            else:
                self.at(loads_end_s(unloaded_s, late), CHANGE, flip_last)

        def flip_last() -> None:
            for step in late:
                coming[step.group, step.service].loaded = True
            self.flip(target)
            self.end_transition()

        self.at(flip_s, CHANGE, flip_first)

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
        queued = {(g.id, r.entry.service): r.waiting for g in self.groups for r in g.replicas}
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
                group.failed = True
                group.detection_s = detection_s
                group.lost = group.running
                group.running = []
                for batch in group.lost:
                    batch.lost = True
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


# Small rules ---------------------------------------------------------------------------------------------------------


def in_smooth_turns(replicas: list[Replica], weights: list[float]) -> Replica:
    """Everybody gains his weight, the richest (first of equals) is chosen and pays the total."""
    total = 0.0
    for replica, weight in zip(replicas, weights, strict=True):
        replica.balance += weight
        total += weight
    chosen = max(replicas, key=lambda r: r.balance)
    chosen.balance -= total
    return chosen


def frames_of(entry: LoadoutEntry) -> int:
    return min(entry.multi_frame, entry.max_batch)


def context_of(sequences: Iterable[Request]) -> int:
    return sum(sequence.context for sequence in sequences)


def loads_end_s(start_s: float, loads: Sequence[TransitionStep]) -> float:
    """Each node loads one after the other, nodes work side by side."""
    clock: dict[str, float] = defaultdict(lambda: start_s)
    for step in loads:
        clock[step.group.rpartition("/")[0]] += step.est_s
    return max(clock.values(), default=start_s)


def streams(scenario: Scenario, results: Sequence[Result | None]) -> Mapping[tuple[str, str], tuple[float, ...]]:
    """Section 8: by service and stream, frames offered and good, fps, mean and largest jitter (NaN where undefined)."""
    frames: dict[tuple[str, str], list[tuple[float, Result]]] = defaultdict(list)
    video = {s.name: s.slo.fps for s in scenario.services.services if s.request_class == "frequency"}
    for row, result in zip(scenario.rows, results, strict=True):
        if result is not None and row.stream is not None and row.name in video:
            frames[row.name, row.stream].append((row.arrival_s, result))
    return {(name, stream): one_stream(found, 1 / video[name]) for (name, stream), found in frames.items()}


def one_stream(frames: Sequence[tuple[float, Result]], period_s: float) -> tuple[float, ...]:
    good = sum(result.outcome == "good" for _, result in frames)
    span_s = frames[-1][0] - frames[0][0]
    mean_period_s = span_s / (len(frames) - 1) if span_s > 0 else period_s
    finished = [(time_s, result.finish_s) for time_s, result in frames if result.finish_s is not None]
    jitter = [abs((f - before_f) - (a - before_a)) for (before_a, before_f), (a, f) in pairwise(finished)]
    mean_s, largest_s = (sum(jitter) / len(jitter), max(jitter)) if jitter else (math.nan, math.nan)
    return len(frames), good, good / (span_s + mean_period_s), mean_s, largest_s
