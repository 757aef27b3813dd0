"""Section 11: calls of workflows are released, handed over and lost."""

from __future__ import annotations

from tests.evaluator.naive_parts import (
    Group,
    Request,
    Result,
)
from tests.evaluator.naive_state import ENTRY, State
from tests.evaluator.naive_workflow import Instance


class Calls(State):
    """Instances of workflows at run time."""

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
        self.note_end(instance.position, result)
        for call in [call for calls in instance.calls.values() for call in calls if not call.ended]:
            if call.replica is not None and self.runs(call):
                continue
            call.ended = True
            if call.replica is None:  # it is to enter again
                continue
            for bundle in [b for b in call.replica.queue if call in b.frames]:
                self.take(call.replica, bundle)
            call.replica.outstanding -= 1

    def runs(self, call: Request) -> bool:
        group = call.replica.group
        return call in call.replica.sequences or any(call in batch.requests for batch in group.running + group.lost)
