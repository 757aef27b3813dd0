"""Iterations of generating replicas: who runs, what memory holds, and who ends when (docs/evaluator.md, section 9).

Running sequences form a list per replica in the order of their admission. As every decode gives one token to each of
them, the end of a sequence is known as a count of decodes when it is admitted: a heap of these counts makes an
iteration O(1) beside the sequences that start or end in it. ``row`` is that of the replica's `GENERATOR`.
"""

# mypy: disable-error-code="no-any-return"
# Records and their fields have no types for mypy.

from __future__ import annotations

from typing import Any

import numpy as np

from evaluator.access import row_of
from evaluator.extras import generator_at, sequence_at, small_of
from evaluator.memory import compiled, int64
from evaluator.state import NOWHERE

__all__ = [
    "admit",
    "decode_time_s",
    "end_decode",
    "end_prefill",
    "fits_another",
    "preempt",
    "prefill_time_s",
    "release_all",
    "turn_key",
]


@compiled
def prefill_time_s(w: Any, row: int, tokens: int) -> float:
    """Return the seconds that an iteration over ``tokens`` prompt tokens takes."""
    points = generator_at(w, row).points
    x = row_of(w.prefill_tokens, row, w.most_points)
    y = row_of(w.prefill_s, row, w.most_points)
    if points == 1:
        return float(y[0] * tokens / x[0])
    if tokens <= x[0]:
        return float(y[0])
    segment = 0
    while segment < points - 2 and tokens > x[segment + 1]:
        segment += 1
    return float(y[segment] + (tokens - x[segment]) * (y[segment + 1] - y[segment]) / (x[segment + 1] - x[segment]))


@compiled
def decode_time_s(w: Any, row: int) -> float:
    """Return the seconds that one token more for every running sequence takes."""
    generator = generator_at(w, row)
    base_s = row_of(w.decode_s, row, w.most_running)[generator.running - 1]
    return float(base_s + generator.decode_token_s * generator.context)


@compiled
def fits_another(w: Any, row: int, context: int) -> bool:
    """Say whether memory holds a sequence of ``context`` more, and one token more for it and for each that runs.

    A sequence alone always fits: it did when it came, and a change of plan that lowered the limit must not stop it.
    """
    generator = generator_at(w, row)
    if generator.running == 0:
        return True
    return bool(generator.context + context + generator.running + 1 <= generator.kv_limit_tokens)


@compiled
def turn_key(w: Any, row: int) -> float:
    """Return the key by which the running sequences ask for the replica's turn; inf where none runs."""
    generator = generator_at(w, row)
    if generator.running == 0:
        return np.inf
    return float(generator.end_s + generator.tpot_s if w.edf else generator.end_s)


@compiled
def admit(w: Any, row: int, slot: int) -> None:
    """Let the sequence in ``slot`` start with a prefill."""
    generator = generator_at(w, row)
    sequence = sequence_at(w, slot)
    sequence.before = generator.newest
    sequence.after = NOWHERE
    if generator.newest != NOWHERE:
        sequence_at(w, generator.newest).after = slot
    generator.newest = slot
    sequence.admission = generator.admissions
    generator.admissions += 1
    generator.running += 1
    generator.starting += 1
    generator.context += sequence.prompt + sequence.produced


@compiled
def preempt(w: Any, row: int) -> int:
    """Stop the sequence admitted last, between two iterations, and return its slot; it keeps what it has produced."""
    generator = generator_at(w, row)
    slot = generator.newest
    sequence = sequence_at(w, slot)
    sequence.produced = sequence.output - (sequence.last_decode - generator.decodes)
    heap = small_of(w.ends + 4 * row * w.most_running, w.most_running)
    place = 0
    while heap[place] != slot:
        place += 1
    _remove(w, row, place)
    _leave(w, row, slot)
    return int64(slot)


@compiled
def end_prefill(w: Any, row: int, end_s: float, ended: Any) -> int:
    """Give a token to each sequence that started.

    Returns:
        How many have all their tokens; their slots are in ``ended``, in the order of admission.
    """
    generator = generator_at(w, row)
    slot = generator.newest
    for _ in range(generator.starting - 1):
        slot = int64(sequence_at(w, slot).before)
    count = 0
    while generator.starting > 0:
        generator.starting -= 1
        sequence = sequence_at(w, slot)
        follower = int64(sequence.after)
        sequence.produced += 1
        generator.context += 1
        if np.isnan(sequence.first_s):
            sequence.first_s = end_s
        if sequence.produced == sequence.output:
            _leave(w, row, slot)
            ended[count] = slot
            count += 1
        else:
            sequence.last_decode = generator.decodes + sequence.output - sequence.produced
            _push(w, row, slot)
        slot = follower
    return count


@compiled
def end_decode(w: Any, row: int, ended: Any) -> int:
    """Give a token to each running sequence; returns and fills ``ended`` as `end_prefill` does."""
    generator = generator_at(w, row)
    generator.decodes += 1
    generator.context += generator.running
    heap = small_of(w.ends + 4 * row * w.most_running, w.most_running)
    count = 0
    while generator.heaped > 0:
        slot = int64(heap[0])
        sequence = sequence_at(w, slot)
        if sequence.last_decode > generator.decodes:
            break
        _remove(w, row, 0)
        sequence.produced = sequence.output
        _leave(w, row, slot)
        ended[count] = slot
        count += 1
    return count


@compiled
def release_all(w: Any, row: int, released: Any) -> int:
    """Take out every running sequence with nothing produced; returns how many, their slots in ``released``."""
    generator = generator_at(w, row)
    count = 0
    while generator.newest != NOWHERE:
        slot = generator.newest
        _leave(w, row, slot)
        released[count] = slot
        count += 1
    generator.context = 0
    generator.starting = 0
    generator.heaped = 0
    return count


@compiled
def _leave(w: Any, row: int, slot: int) -> None:
    generator = generator_at(w, row)
    sequence = sequence_at(w, slot)
    if sequence.before != NOWHERE:
        sequence_at(w, int64(sequence.before)).after = sequence.after
    if sequence.after != NOWHERE:
        sequence_at(w, int64(sequence.after)).before = sequence.before
    else:
        generator.newest = sequence.before
    generator.running -= 1
    generator.context -= sequence.prompt + sequence.produced


@compiled
def _precedes(w: Any, slot: int, other: int) -> bool:
    one, two = sequence_at(w, slot), sequence_at(w, other)
    if one.last_decode != two.last_decode:
        return bool(one.last_decode < two.last_decode)
    return bool(one.admission < two.admission)


@compiled
def _push(w: Any, row: int, slot: int) -> None:
    generator = generator_at(w, row)
    heap = small_of(w.ends + 4 * row * w.most_running, w.most_running)
    heap[generator.heaped] = slot
    generator.heaped += 1
    _rise(w, heap, generator.heaped - 1)


@compiled
def _rise(w: Any, heap: Any, place: int) -> None:
    slot = int64(heap[place])
    while place > 0 and _precedes(w, slot, int64(heap[(place - 1) // 2])):
        heap[place] = heap[(place - 1) // 2]
        place = (place - 1) // 2
    heap[place] = slot


@compiled
def _remove(w: Any, row: int, place: int) -> None:
    generator = generator_at(w, row)
    heap = small_of(w.ends + 4 * row * w.most_running, w.most_running)
    generator.heaped -= 1
    size = generator.heaped
    if place == size:
        return
    slot = int64(heap[size])
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and _precedes(w, int64(heap[child + 1]), int64(heap[child])):
            child += 1
        if not _precedes(w, int64(heap[child]), slot):
            break
        heap[place] = heap[child]
        place = child
    heap[place] = slot
    _rise(w, heap, place)
