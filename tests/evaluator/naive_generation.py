"""Section 9: iterations over running sequences."""

from __future__ import annotations

from collections.abc import Iterable

from tests.evaluator.naive_parts import (
    Batch,
    Replica,
    Request,
)
from tests.evaluator.naive_state import HOPELESS, State


class Generation(State):
    """Replicas with token costs."""

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
        start_s = max(self.now, *group.stage_free_s)
        end_s = start_s + (takes_s + self.told.iteration_overhead_s) * factor
        for held in group.held:
            held.append((start_s, end_s))
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


def context_of(sequences: Iterable[Request]) -> int:
    return sum(sequence.context for sequence in sequences)
