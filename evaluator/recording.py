"""What becomes of a request is written down here, and nowhere else."""

# mypy: disable-error-code="no-any-return"
# Records and their fields have no types for mypy.

from __future__ import annotations

from typing import Any

import numpy as np

from evaluator.access import floats, group_at, integers, replica_at, row_of, short, small, tiny
from evaluator.memory import compiled
from evaluator.state import CELLS, COUNTED, GOOD, LATE, NOWHERE

__all__ = ["cell_of", "record", "record_busy"]

_SHIFT = 52 - 8  # 8 bits of the mantissa: 256 cells to a doubling
_LOWEST = int(np.float64(2.0**-20).view(np.int64)) >> _SHIFT


@compiled
def cell_of(latency_s: float) -> int:
    """Return the histogram's cell for a latency; cells are at most 0.4 % wide."""
    bits: Any = np.float64(latency_s).view(np.int64)
    return min(max((bits >> _SHIFT) - _LOWEST, 0), CELLS - 1)


@compiled
def record(
    w: Any, position: int, service: int, arrival_s: float, code: int, end_s: float, replica: int, batch: int
) -> None:
    """Write down the end of a request.

    Args:
        w: The world.
        position: Row of the trace.
        service: Its service.
        arrival_s: Its arrival.
        code: What became of it.
        end_s: When: its answer, or its drop or failure.
        replica: Which had it, or NOWHERE.
        batch: Requests in the batch that served it, 0 without.
    """
    if end_s > w.last_s:
        w.last_s = end_s
    if w.log_code != 0:
        floats(w.log_end_s, w.request_count)[position] = end_s
        tiny(w.log_code, w.request_count)[position] = code
        small(w.log_replica, w.request_count)[position] = replica
        short(w.log_batch, w.request_count)[position] = batch
    if arrival_s < w.warmup_s:
        return
    integers(w.counts, w.service_count * COUNTED)[service * COUNTED + code] += 1
    if code == GOOD or code == LATE:  # noqa: SIM109 - a tuple would be built
        if replica != NOWHERE:
            replica_at(w, replica).finished += 1
            replica_at(w, replica).inverse_batch += 1.0 / batch
        if w.histogram != 0:
            small(w.histogram, w.service_count * CELLS)[service * CELLS + cell_of(end_s - arrival_s)] += 1
    if w.timeline != 0:
        window = min(int(arrival_s / w.bin_s), w.bins - 1)
        integers(w.timeline, w.bins * w.service_count * COUNTED)[
            (window * w.service_count + service) * COUNTED + code
        ] += 1


@compiled
def record_busy(w: Any, g: int, stage: int, start_s: float, end_s: float) -> None:
    """Write down that a stage is held from ``start_s`` to ``end_s``, or until its group fails.

    What lies outside the time counted is left out.
    """
    from_s = max(start_s, w.warmup_s)
    held_s = min(end_s, group_at(w, g).fails_s, w.until_s) - from_s
    if held_s > 0.0:
        row_of(w.busy_s, g, w.most_stages)[stage] += held_s
        if stage == 0 and w.busy_timeline_s != 0:
            window = min(int(from_s / w.bin_s), w.bins - 1)
            row_of(w.busy_timeline_s, window, w.group_count)[g] += held_s
