"""An independent simulator, written from docs/evaluator.md alone: plain Python, one object per thing, no shared code.

It looks at everything again after every event, so it is slow, and reads like the page. Sections are the page's:
`naive_routing` (4 and 7), `naive_queues` (5 and 6), `naive_streams` (8), `naive_generation` (9), `naive_changes` (10),
`naive_workflow` and `naive_calls` (11); `naive_parts` holds what moves about, `naive_state` what is known.
"""

from __future__ import annotations

import heapq
import math
from typing import Any

from plans import Plan, Services
from tests.evaluator.naive_calls import Calls
from tests.evaluator.naive_changes import Changes
from tests.evaluator.naive_generation import Generation
from tests.evaluator.naive_parts import Batch, Group, Request, Result, Row, Scenario
from tests.evaluator.naive_queues import Queues
from tests.evaluator.naive_routing import Routing
from tests.evaluator.naive_state import CHANGE, ENTRY
from tests.evaluator.naive_streams import streams
from tests.evaluator.naive_workflow import Instance
from traces.table import RequestTrace

__all__ = ["Row", "Scenario", "Simulation", "run", "run_trace", "streams"]


def run(scenario: Scenario) -> list[Result | None]:
    """Return what becomes of every row, in order; None for rows that are not offered (after `until_s`)."""
    return Simulation(scenario).run()


def run_trace(plan: Plan, services: Services, trace: RequestTrace, **told: Any) -> list[Result | None]:
    """Return what becomes of every request of a trace without streams and tokens; `told` as for `Scenario`."""
    names = [trace.services[code] for code in trace.codes]
    rows = [Row(arrival_s=time_s, name=name) for time_s, name in zip(trace.arrival_s.tolist(), names, strict=True)]
    return run(Scenario(plan=plan, services=services, rows=rows, **told))


class Simulation(Routing, Queues, Generation, Calls, Changes):
    """One run, from its first event to its last."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        for group in scenario.plan.groups:
            for entry in group.loadout:
                self.replica_of(group, entry).loaded = True
        self.flip(scenario.plan)

    # Section 1: events -----------------------------------------------------------------------------------------------

    def run(self) -> list[Result | None]:
        for position, row in enumerate(self.told.rows):
            self.at(row.arrival_s + self.told.overhead_s, ENTRY, lambda p=position, r=row: self.arrive(p, r))
        for change in self.told.changes:
            self.at(change.time_s, CHANGE, lambda c=change: self.carry_out(c))
        if self.told.controller:
            self.at(self.told.interval_s, CHANGE, lambda: self.ask_controller(1))
        while True:
            group = min(self.groups, key=self.dispatch_s, default=None)
            dispatch_s = math.inf if group is None else self.dispatch_s(group)
            event_s = self.events[0][0] if self.events else math.inf
            if min(dispatch_s, event_s) > self.told.until_s or min(dispatch_s, event_s) == math.inf:
                break
            if group is None or event_s <= dispatch_s:
                self.now, _, _, _, action = heapq.heappop(self.events)
                action()
            else:
                self.now = dispatch_s
                self.dispatch(group)
        return [self.result_of(position) for position in range(len(self.told.rows))]

    # Section 12: what is counted -------------------------------------------------------------------------------------

    @property
    def wall_s(self) -> float:
        """How long the run is; nothing at all counts as a millisecond."""
        end_s = max(self.told.rows[-1].arrival_s, self.last_s) if self.told.until_s == math.inf else self.told.until_s
        return max(end_s, 0.001)

    def utilisation(self) -> dict[str, float]:
        """How busy each group is."""
        cuts_s: dict[str, list[float]] = {}
        for group in self.groups:
            cuts_s.setdefault(group.id, []).append(group.busy_s(self.told.until_s))
        return {
            name: (busy_s[0] if len(busy_s) == 1 else min(sum(busy_s), self.wall_s)) / self.wall_s
            for name, busy_s in cuts_s.items()
        }

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
        result = Result(
            outcome="good" if good else "late",
            finish_s=finish_s,
            group=batch.replica.group.id,
            variant=batch.replica.entry.variant,
            batch=len(batch.requests),
            ttft_s=ttft_s,
            tpot_s=tpot_s,
        )
        self.note_end(request.position, result)

    def end(self, request: Request, outcome: str, reason: str) -> None:
        """Drop or fail a request that is in no queue."""
        if request.ended:
            return
        request.ended = True
        if request.replica is not None:
            request.replica.outstanding -= 1
        if request.instance is None:
            group = request.replica.group.id if request.replica is not None else None
            self.note_end(request.position, Result(outcome=outcome, reason=reason, group=group))
        elif not request.instance.ended and request.instance.lose(request):
            self.end_instance(request.instance, Result(outcome=outcome, reason=reason))
