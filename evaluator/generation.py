"""Iterations of generating replicas: who runs, what memory holds, and who ends when (docs/evaluator.md, section 9).

Compiled functions on flat arrays. Running sequences form a list per replica in the order of their admission. As every
decode gives one token to each of them, the end of a sequence is known as a count of decodes when it is admitted: a heap
of these counts makes an iteration O(1) beside the sequences that start or end in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from evaluator.token_costs import TokenCosts, cost_arrays

__all__ = [
    "Generators",
    "Sequences",
    "admit",
    "decode_time_s",
    "end_decode",
    "end_prefill",
    "fits_another",
    "make_generators",
    "make_sequences",
    "preempt",
    "prefill_time_s",
    "release_all",
]

_Integers = NDArray[np.int64]
_Floats = NDArray[np.float64]


class Generators(NamedTuple):
    """Costs and state of each replica; those without token costs have ``points`` 0 and stay as they are.

    Attributes:
        points: Shape (replica,): points of the prefill curve.
        prefill_tokens: Shape (replica, most points).
        prefill_s: Shape (replica, most points).
        decode_s: Shape (replica, largest batch).
        decode_token_s: Shape (replica,).
        kv_limit_tokens: Shape (replica,).
        running: Shape (replica,): sequences admitted and not ended.
        starting: Shape (replica,): those among them whose prefill runs now.
        context: Shape (replica,): tokens of context of all running.
        decodes: Shape (replica,): decodes that have ended.
        admissions: Shape (replica,): sequences admitted so far.
        newest: Shape (replica,): slot of the sequence admitted last; -1 without.
        end_s: Shape (replica,): end of the last iteration, which may still run.
        heap: Shape (replica, largest batch): slots of running sequences beyond their prefill, a heap by their end.
        heaped: Shape (replica,): its size.
    """

    points: _Integers
    prefill_tokens: _Floats
    prefill_s: _Floats
    decode_s: _Floats
    decode_token_s: _Floats
    kv_limit_tokens: _Integers
    running: _Integers
    starting: _Integers
    context: _Integers
    decodes: _Integers
    admissions: _Integers
    newest: _Integers
    end_s: _Floats
    heap: _Integers
    heaped: _Integers


class Sequences(NamedTuple):
    """State of each slot that holds a sequence, all shape (slot,).

    Attributes:
        prompt: Prompt tokens.
        output: Tokens to produce.
        produced: Tokens produced; while it runs beyond its prefill, those at the end of that.
        last_decode: Number of the decode that produces its last token.
        admission: Number of its admission.
        before: The running sequence of its replica admitted before it, or -1.
        after: The one admitted after it, or -1.
        first_s: End of the iteration that made its first token; NaN until then.
    """

    prompt: _Integers
    output: _Integers
    produced: _Integers
    last_decode: _Integers
    admission: _Integers
    before: _Integers
    after: _Integers
    first_s: _Floats


def make_generators(costs: Sequence[TokenCosts | None]) -> Generators:
    """Return the state of replicas that run nothing."""
    arrays = cost_arrays(costs)
    replicas = len(costs)
    counts = np.zeros((6, replicas), dtype=np.int64)
    return Generators(
        points=arrays.points,
        prefill_tokens=arrays.prefill_tokens,
        prefill_s=arrays.prefill_s,
        decode_s=arrays.decode_s,
        decode_token_s=arrays.decode_token_s,
        kv_limit_tokens=arrays.kv_limit_tokens,
        running=counts[0].copy(),
        starting=counts[1].copy(),
        context=counts[2].copy(),
        decodes=counts[3].copy(),
        admissions=counts[4].copy(),
        newest=np.full(replicas, -1, dtype=np.int64),
        end_s=np.zeros(replicas),
        heap=np.zeros(arrays.decode_s.shape, dtype=np.int64),
        heaped=counts[5].copy(),
    )


def make_sequences(slots: int) -> Sequences:
    """Return ``slots`` slots."""
    counts = np.zeros((5, slots), dtype=np.int64)
    return Sequences(
        prompt=counts[0].copy(),
        output=counts[1].copy(),
        produced=counts[2].copy(),
        last_decode=counts[3].copy(),
        admission=counts[4].copy(),
        before=np.full(slots, -1, dtype=np.int64),
        after=np.full(slots, -1, dtype=np.int64),
        first_s=np.full(slots, np.nan),
    )


@numba.njit(cache=True)
def prefill_time_s(generators: Any, replica: int, tokens: int) -> float:
    """Return the seconds that an iteration over ``tokens`` prompt tokens takes."""
    points = generators.points[replica]
    x = generators.prefill_tokens[replica]
    y = generators.prefill_s[replica]
    if tokens <= x[0]:
        return float(y[0])
    if points == 1:
        return float(y[0] * tokens / x[0])
    segment = 0
    while segment < points - 2 and tokens >= x[segment + 1]:
        segment += 1
    return float(y[segment] + (tokens - x[segment]) * (y[segment + 1] - y[segment]) / (x[segment + 1] - x[segment]))


@numba.njit(cache=True)
def decode_time_s(generators: Any, replica: int) -> float:
    """Return the seconds that one token more for every running sequence takes."""
    base_s = generators.decode_s[replica, generators.running[replica] - 1]
    return float(base_s + generators.decode_token_s[replica] * generators.context[replica])


@numba.njit(cache=True)
def fits_another(generators: Any, replica: int, context: int) -> bool:
    """Say whether memory holds a sequence of ``context`` more, and one token more for it and for each that runs."""
    tokens = generators.context[replica] + context + generators.running[replica] + 1
    return bool(tokens <= generators.kv_limit_tokens[replica])


@numba.njit(cache=True)
def admit(generators: Any, sequences: Any, replica: int, slot: int) -> None:
    """Let the sequence in ``slot`` start with a prefill."""
    newest = generators.newest[replica]
    sequences.before[slot] = newest
    sequences.after[slot] = -1
    if newest >= 0:
        sequences.after[newest] = slot
    generators.newest[replica] = slot
    sequences.admission[slot] = generators.admissions[replica]
    generators.admissions[replica] += 1
    generators.running[replica] += 1
    generators.starting[replica] += 1
    generators.context[replica] += sequences.prompt[slot] + sequences.produced[slot]


@numba.njit(cache=True)
def preempt(generators: Any, sequences: Any, replica: int) -> int:
    """Stop the sequence admitted last, between two iterations, and return its slot; it keeps what it has produced."""
    slot = generators.newest[replica]
    sequences.produced[slot] = sequences.output[slot] - (sequences.last_decode[slot] - generators.decodes[replica])
    place = 0
    while generators.heap[replica, place] != slot:
        place += 1
    _remove(generators, sequences, replica, place)
    _leave(generators, sequences, replica, slot)
    return int(slot)


@numba.njit(cache=True)
def end_prefill(generators: Any, sequences: Any, replica: int, end_s: float, ended: Any) -> int:
    """Give a token to each sequence that started.

    Returns:
        How many have all their tokens; their slots are in ``ended``, in the order of admission.
    """
    slot = generators.newest[replica]
    for _ in range(generators.starting[replica] - 1):
        slot = sequences.before[slot]
    count = 0
    while generators.starting[replica] > 0:
        generators.starting[replica] -= 1
        follower = sequences.after[slot]
        sequences.produced[slot] += 1
        generators.context[replica] += 1
        if np.isnan(sequences.first_s[slot]):
            sequences.first_s[slot] = end_s
        if sequences.produced[slot] == sequences.output[slot]:
            _leave(generators, sequences, replica, slot)
            ended[count] = slot
            count += 1
        else:
            more = sequences.output[slot] - sequences.produced[slot]
            sequences.last_decode[slot] = generators.decodes[replica] + more
            _push(generators, sequences, replica, slot)
        slot = follower
    return count


@numba.njit(cache=True)
def end_decode(generators: Any, sequences: Any, replica: int, ended: Any) -> int:
    """Give a token to each running sequence; returns and fills ``ended`` as `end_prefill` does."""
    generators.decodes[replica] += 1
    generators.context[replica] += generators.running[replica]
    count = 0
    while generators.heaped[replica] > 0:
        slot = generators.heap[replica, 0]
        if sequences.last_decode[slot] > generators.decodes[replica]:
            break
        _remove(generators, sequences, replica, 0)
        sequences.produced[slot] = sequences.output[slot]
        _leave(generators, sequences, replica, slot)
        ended[count] = slot
        count += 1
    return count


@numba.njit(cache=True)
def release_all(generators: Any, sequences: Any, replica: int, released: Any) -> int:
    """Take out every running sequence with nothing produced; returns how many, their slots in ``released``."""
    count = 0
    while generators.newest[replica] >= 0:
        slot = generators.newest[replica]
        _leave(generators, sequences, replica, slot)
        sequences.produced[slot] = 0
        sequences.first_s[slot] = np.nan
        released[count] = slot
        count += 1
    generators.context[replica] = 0
    generators.starting[replica] = 0
    generators.heaped[replica] = 0
    return count


@numba.njit(cache=True)
def _leave(generators: Any, sequences: Any, replica: int, slot: int) -> None:
    before = sequences.before[slot]
    after = sequences.after[slot]
    if before >= 0:
        sequences.after[before] = after
    if after >= 0:
        sequences.before[after] = before
    else:
        generators.newest[replica] = before
    generators.running[replica] -= 1
    generators.context[replica] -= sequences.prompt[slot] + sequences.produced[slot]


@numba.njit(cache=True)
def _precedes(sequences: Any, slot: int, other: int) -> bool:
    if sequences.last_decode[slot] != sequences.last_decode[other]:
        return bool(sequences.last_decode[slot] < sequences.last_decode[other])
    return bool(sequences.admission[slot] < sequences.admission[other])


@numba.njit(cache=True)
def _push(generators: Any, sequences: Any, replica: int, slot: int) -> None:
    generators.heap[replica, generators.heaped[replica]] = slot
    generators.heaped[replica] += 1
    _rise(generators, sequences, replica, generators.heaped[replica] - 1)


@numba.njit(cache=True)
def _rise(generators: Any, sequences: Any, replica: int, place: int) -> None:
    heap = generators.heap[replica]
    slot = heap[place]
    while place > 0 and _precedes(sequences, slot, heap[(place - 1) // 2]):
        heap[place] = heap[(place - 1) // 2]
        place = (place - 1) // 2
    heap[place] = slot


@numba.njit(cache=True)
def _remove(generators: Any, sequences: Any, replica: int, place: int) -> None:
    heap = generators.heap[replica]
    generators.heaped[replica] -= 1
    size = generators.heaped[replica]
    if place == size:
        return
    slot = heap[size]
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and _precedes(sequences, heap[child + 1], heap[child]):
            child += 1
        if not _precedes(sequences, heap[child], slot):
            break
        heap[place] = heap[child]
        place = child
    heap[place] = slot
    _rise(generators, sequences, replica, place)
