"""The world's arrays, as compiled code gets at them (`evaluator.memory`)."""

# mypy: disable-error-code="no-any-return"
# Records and their fields have no types for mypy.

from __future__ import annotations

from typing import Any

import numpy as np

from evaluator.memory import inlined, record_at, view_of
from evaluator.state import GROUP, REPLICA, SERVICE, SLOT, STREAM

__all__ = [
    "floats",
    "free_of",
    "group_at",
    "head_keys",
    "integers",
    "latencies_of",
    "replica_at",
    "row_of",
    "service_at",
    "short",
    "slot_at",
    "small",
    "stages_of",
    "stream_at",
    "tiny",
]

floats = view_of(np.float64)
"""(address, length) -> array of float64."""
integers = view_of(np.int64)
"""(address, length) -> array of int64."""
small = view_of(np.int32)
"""(address, length) -> array of int32."""

short = view_of(np.int16)
"""(address, length) -> array of int16."""
tiny = view_of(np.int8)
"""(address, length) -> array of int8."""

_group_at = record_at(GROUP)
_replica_at = record_at(REPLICA)
_service_at = record_at(SERVICE)
_slot_at = record_at(SLOT)
_stream_at = record_at(STREAM)


@inlined
def group_at(w: Any, g: int) -> Any:
    """Return the record of group ``g``."""
    return _group_at(w.groups, g)


@inlined
def replica_at(w: Any, r: int) -> Any:
    """Return the record of replica ``r``."""
    return _replica_at(w.replicas, r)


@inlined
def service_at(w: Any, service: int) -> Any:
    """Return the record of a service."""
    return _service_at(w.services, service)


@inlined
def slot_at(w: Any, slot: int) -> Any:
    """Return the record of a slot of the pool."""
    return _slot_at(w.pool, slot)


@inlined
def stream_at(w: Any, stream: int) -> Any:
    """Return the record of a stream."""
    return _stream_at(w.streams, stream)


@inlined
def row_of(address: int, row: int, length: int) -> Any:
    """Return row ``row`` of the float64 array at ``address`` whose rows have ``length`` entries."""
    return floats(address + 8 * row * length, length)


@inlined
def head_keys(w: Any) -> Any:
    """Return the smallest key of each queue, shape (replica,)."""
    return floats(w.head_key, w.replica_count)


@inlined
def free_of(w: Any, g: int) -> Any:
    """Return until when each stage of group ``g`` is reserved."""
    return row_of(w.free_s, g, w.most_stages)


@inlined
def latencies_of(w: Any, r: int) -> Any:
    """Return the latency of a batch of b + 1 on replica ``r``."""
    return row_of(w.total_s, r, w.largest)


@inlined
def stages_of(w: Any, r: int, size: int) -> Any:
    """Return how long a batch of ``size`` holds each stage on replica ``r``."""
    return row_of(w.stage_s, r * w.largest + size - 1, w.most_stages)
