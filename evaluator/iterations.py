"""Turns of generating replicas: `evaluator.generation` on the queues of the world."""

# mypy: disable-error-code="no-any-return"
# Records and their fields have no types for mypy.

from __future__ import annotations

from typing import Any

import numpy as np

from evaluator import generation
from evaluator.access import floats, group_at, replica_at, slot_at
from evaluator.extras import call_at, generator_at, sequence_at, small_of
from evaluator.memory import compiled, int64
from evaluator.queues import enqueue, first_slot, free_slot, pop, set_head_key
from evaluator.recording import record
from evaluator.state import GOOD, LATE, NOWHERE

__all__ = ["begin", "end_iteration", "is_hopeless", "prepare"]

_DEFAULT_TOKENS = 128


@compiled
def _tokens(w: Any, column: int, position: int) -> int:
    if column == 0 or np.isnan(floats(column, w.request_count)[position]):
        return _DEFAULT_TOKENS
    return max(1, int(floats(column, w.request_count)[position]))


@compiled
def prepare(w: Any, slot: int) -> bool:
    """Make a sequence of a request that comes to a generating replica; say whether memory could ever hold it."""
    request = slot_at(w, slot)
    sequence = sequence_at(w, slot)
    generator = generator_at(w, replica_at(w, request.replica).generates)
    sequence.prompt = _tokens(w, w.input_tokens, request.position)
    sequence.output = _tokens(w, w.output_tokens, request.position)
    sequence.produced = 0
    sequence.first_s = np.nan
    if call_at(w, slot).lead == NOWHERE:
        request.due_s = request.arrival_s + generator.ttft_s - w.response_s
    return bool(sequence.prompt + sequence.output <= generator.kv_limit_tokens)


@compiled
def is_hopeless(w: Any, r: int, now: float) -> bool:
    """Say whether the first token of the head of ``r`` cannot come in time any more."""
    if replica_at(w, r).queued == 0 or not w.early_drop:
        return False
    slot = first_slot(w, r)
    sequence = sequence_at(w, slot)
    if sequence.produced > 0:
        return False
    return bool(
        now + generation.prefill_time_s(w, replica_at(w, r).generates, sequence.prompt) > slot_at(w, slot).due_s
    )


@compiled
def begin(w: Any, r: int) -> tuple[int, float]:
    """Choose what the next iteration of ``r`` does.

    Returns:
        The slot of a sequence that runs in it (NOWHERE: there is nothing to do) and the seconds that it takes.
    """
    replica = replica_at(w, r)
    row = int64(replica.generates)
    generator = generator_at(w, row)
    before = generator.running
    tokens = 0
    while replica.queued > 0 and generator.running < replica.max_batch:
        slot = int64(first_slot(w, r))
        context = sequence_at(w, slot).prompt + sequence_at(w, slot).produced
        if generator.starting > 0 and tokens + context > w.max_prefill_tokens:
            break
        if not generation.fits_another(w, row, context):
            break
        pop(w, r)
        generation.admit(w, row, slot)
        tokens += context
    takes_s = 0.0
    if generator.starting > 0:
        takes_s = generation.prefill_time_s(w, row, tokens) + w.iteration_overhead_s
    elif generator.running > 0:
        while generator.running > 1 and generator.context + generator.running > generator.kv_limit_tokens:
            enqueue(w, generation.preempt(w, row))
        takes_s = generation.decode_time_s(w, row) + w.iteration_overhead_s
    group_at(w, replica.group).generating += generator.running - before
    return int64(generator.newest), takes_s


@compiled
def end_iteration(w: Any, r: int, end_s: float) -> None:
    """Give every sequence of the iteration that ends now its token, and end those that have all of theirs."""
    replica = replica_at(w, r)
    row = int64(replica.generates)
    generator = generator_at(w, row)
    ended = small_of(w.ended, max(1, w.in_use))
    generator.end_s = end_s
    batch = generator.starting
    if batch > 0:
        count = generation.end_prefill(w, row, end_s, ended)
    else:
        batch = generator.running
        count = generation.end_decode(w, row, ended)
    group_at(w, replica.group).generating -= count
    replica.open -= count
    w.ended_count = 0
    for place in range(count):
        slot = int64(ended[place])
        if call_at(w, slot).lead != NOWHERE:
            ended[w.ended_count] = slot
            w.ended_count += 1
        else:
            _finish(w, r, slot, end_s, batch)
    set_head_key(w, r)


@compiled
def _finish(w: Any, r: int, slot: int, end_s: float, batch: int) -> None:
    request = slot_at(w, slot)
    sequence = sequence_at(w, slot)
    generator = generator_at(w, replica_at(w, r).generates)
    more = sequence.output - 1
    ttft_s = sequence.first_s + w.response_s - request.arrival_s
    tpot_s = (end_s - sequence.first_s) / more if more > 0 else 0.0
    code = GOOD if ttft_s <= generator.ttft_s and tpot_s <= generator.tpot_s else LATE
    if w.log_ttft_s != 0:
        floats(w.log_ttft_s, w.request_count)[request.position] = ttft_s
        floats(w.log_tpot_s, w.request_count)[request.position] = tpot_s
    record(w, request.position, request.service, request.arrival_s, code, end_s + w.response_s, r, batch)
    free_slot(w, slot)
