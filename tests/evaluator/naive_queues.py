"""Sections 5 and 6: queues, bundles, batches and how long these take."""

from __future__ import annotations

import math
from collections.abc import Iterable

from plans import LoadoutEntry
from tests.evaluator.naive_parts import (
    Batch,
    Bundle,
    Group,
    Replica,
    Request,
    quantile,
    uniform,
)
from tests.evaluator.naive_state import COMPLETION, DISPLACED, HOPELESS, TIMER, State


class Queues(State):
    """What happens on groups."""

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
        first = len(bundle.frames) == 1
        if len(bundle.frames) >= frames_of(replica.entry) or (first and latest_s <= self.now):
            self.flush(replica, bundle)
        elif first:
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
            start_s = max(clock, group.stage_free_s[stage])
            clock = start_s + stage_s * factor
            group.held[stage].append((start_s, clock))
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
        self.last_s = max(self.last_s, self.now)
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


def frames_of(entry: LoadoutEntry) -> int:
    return min(entry.multi_frame, entry.max_batch)
