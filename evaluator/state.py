"""The state of a run: flat arrays that the compiled functions read and write, and nothing else.

`World` holds it all. Its arrays are records (one per group, replica, service, request in flight), so that what is used
together lies together, and every compiled function takes the world alone (`evaluator.memory` says how). A run can be
stopped between any two events, looked at, changed and continued; when the pool of requests in flight is full, the
kernel returns and is called again with a larger one (`World.grow`).

Times that do not exist are `numpy.inf`, places in lists that do not exist are -1: compiled code knows no None.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from evaluator.extras import EXTRA_FIELDS

__all__ = [
    "ADMISSION",
    "CELLS",
    "CORRECTED",
    "COUNTED",
    "CREDITS",
    "DISPLACED",
    "DROPPED",
    "EARLIEST_FREE",
    "EXPONENTIAL",
    "FAILED",
    "FEATURED_WORLD",
    "FINISHED",
    "GOOD",
    "GROUP",
    "HOPELESS",
    "LATE",
    "LEAST_FINISH",
    "LOST",
    "MEAN",
    "NOWHERE",
    "PROFILE",
    "REASONS",
    "REPLICA",
    "ROUND_ROBIN",
    "SERVICE",
    "SHORTEST_QUEUE",
    "SLOT",
    "STREAM",
    "TOO_LARGE",
    "UNKNOWN",
    "UNROUTED",
    "WEIGHTED",
    "WEIGHTED_RANDOM",
    "WORLD",
    "World",
]

NOWHERE: Final = -1

# What became of a request. A code below `FINISHED` is not an end; `REASONS` says why one was dropped or failed.
UNKNOWN: Final = 0
GOOD: Final = 1
LATE: Final = 2
HOPELESS: Final = 3
DISPLACED: Final = 4
ADMISSION: Final = 5
TOO_LARGE: Final = 6
UNROUTED: Final = 7
LOST: Final = 8
COUNTED: Final = 9
"""Number of codes."""

FINISHED: Final = (GOOD, LATE)
DROPPED: Final = (HOPELESS, DISPLACED, ADMISSION, TOO_LARGE)
FAILED: Final = (UNROUTED, LOST)
REASONS: Final = {
    HOPELESS: "deadline cannot be met",
    DISPLACED: "gave way to a full batch",
    ADMISSION: "not admitted",
    TOO_LARGE: "larger than the KV memory",
    UNROUTED: "no route",
    LOST: "lost with its node",
}

WEIGHTED: Final = 0
WEIGHTED_RANDOM: Final = 1
ROUND_ROBIN: Final = 2
SHORTEST_QUEUE: Final = 3
LEAST_FINISH: Final = 4
EARLIEST_FREE: Final = 5
CREDITS: Final = 6
CORRECTED: Final = 7

MEAN: Final = 0
PROFILE: Final = 1
EXPONENTIAL: Final = 2

CELLS: Final = 44 * 256
"""Cells of a latency histogram: 256 to each doubling, from 2^-20 s (1 us) to 2^24 s."""

_i4, _i8, _f8 = np.int32, np.int64, np.float64

GROUP: Final = np.dtype(
    [
        ("dispatch_s", _f8),  # when it will look for something to start; inf: not before something enters
        ("end_s", _f8),  # when the first of its running batches ends; inf: none runs
        ("flush_s", _f8),  # when the first of its gathering bundles must enter; inf: none gathers
        ("work_s", _f8),  # sum of the shares of what is queued
        ("busy_until_s", _f8),  # with concurrency: until when it is held by what has started
        ("fails_s", _f8),  # when it fails next; inf: it does not
        ("first", _i4),  # its replicas are first to last - 1
        ("last", _i4),
        ("stages", _i4),
        ("concurrency", _i4),
        ("queued", _i4),  # requests in its queues
        ("running", _i4),  # slot that leads the running batch that ends first; batches are linked by `batch_after`
        ("running_last", _i4),
        ("running_count", _i4),
        ("started", _i8),  # batches and iterations started so far
        ("generating", _i4),  # sequences that run
        ("stopped", np.int8),  # starts and ends nothing: its node failed
    ],
    align=True,
)

REPLICA: Final = np.dtype(
    [
        ("head", _i4),  # first slot of the list of what entered in order
        ("tail", _i4),
        ("heap", _i4),  # root of the heap of what entered out of order
        ("queued", _i4),  # requests in the queue
        ("open", _i4),  # requests that were routed here and have not ended
        ("group", _i4),
        ("service", _i4),
        ("max_batch", _i4),
        ("frames", _i4),  # frames of one stream that enter together
        ("route", _i4),  # its place in the arrays route_*
        ("gather", _i4),  # slot that leads the gathering bundle whose time comes first; linked by `batch_after`
        ("gather_last", _i4),
        ("generates", _i4),  # row of its token costs, or NOWHERE
        ("largest_s", _f8),  # latency of the largest batch
        ("share_s", _f8),  # longest stage of the largest batch over that batch
        ("finished", _i8),  # requests counted as finished here
        ("inverse_batch", _f8),  # sum of 1 / batch over those
    ],
    align=True,
)

SERVICE: Final = np.dtype(
    [
        ("allowed_s", _f8),  # deadline after arrival
        ("allowed_per_token_s", _f8),  # more of it for each token after the first
        ("turn", _i8),  # requests routed so far by round robin
        ("first", _i4),  # its replicas are first to last of the arrays route_*
        ("last", _i4),
        ("sticky", np.int8),  # streams stay with their replica
    ],
    align=True,
)

SLOT: Final = np.dtype(
    [
        # What every request is asked for comes first: one line of the processor's cache.
        ("arrival_s", _f8),
        ("deadline_s", _f8),
        ("due_s", _f8),  # deadline less the way back: what decisions go by
        ("key", _f8),  # its place in the queue: due_s or entry_s
        ("sequence", _i8),  # order of entry into queues
        ("position", _i8),  # row of the trace
        ("service", _i4),
        ("replica", _i4),
        ("after", _i4),  # next in the queue, in the batch, or of the free slots
        ("frames", _i4),  # requests that enter together with it, itself included
        ("frame_after", _i4),  # next of them
        ("stream", _i4),
        ("entry_s", _f8),  # when it came to its replica
        # of the request that leads a batch or a gathering bundle:
        ("end_s", _f8),  # when the batch ends; when the bundle must enter
        ("batch", _i4),  # requests in the batch
        ("batch_after", _i4),  # next running batch or gathering bundle
        # of few:
        ("child", _i4),  # heap: first of those below; gathering: the bundle's last frame
        ("sibling", _i4),  # heap: next under the same parent; gathering: the bundle before
        ("retries", _i4),  # times that it entered again
        ("waiting", np.int8),  # it is in a queue
        ("withdrawn", np.int8),  # left its queue from the middle; its slot is freed when it comes to the head
    ],
    align=True,
)

STREAM: Final = np.dtype(
    [
        ("replica", _i4),  # where its last frame went
        ("gather", _i4),  # slot that leads the bundle that its last frame joined, while that gathers
        ("moved", np.int8),  # it has been on more than one replica
    ],
    align=True,
)

_FIELDS: Final[list[tuple[str, Any]]] = [
    # The run so far.
    ("cursor", _i8),  # next row of the trace
    ("sequence", _i8),  # of the next entry into a queue
    ("free", _i8),  # first free slot of the pool
    ("in_use", _i8),  # slots in use
    ("most_in_use", _i8),
    ("last_s", _f8),  # the latest end of a request or a batch so far
    # The settings (`evaluator.settings.Settings`); constant.
    ("seed", np.uint64),
    ("routing", _i8),
    ("latency", _i8),
    ("credit_target", _i8),
    ("batch_delay_s", _f8),
    ("margin_s", _f8),
    ("overhead_s", _f8),
    ("response_s", _f8),
    ("iteration_overhead_s", _f8),
    ("credit_increase", _f8),
    ("credit_decrease", _f8),
    ("warmup_s", _f8),
    ("until_s", _f8),
    ("edf", np.int8),
    ("early_drop", np.int8),
    ("admission", np.int8),
    ("bundles", np.int8),  # some replica gathers frames
    ("in_order", np.int8),  # events are processed in the order of their times: every group is as of now
    ("withdrawals", np.int8),  # requests may leave a queue from its middle
    # Lengths.
    ("request_count", _i8),
    ("group_count", _i8),
    ("replica_count", _i8),
    ("largest", _i8),  # largest batch of any replica
    ("most_stages", _i8),
    ("most_concurrent", _i8),
    ("bins", _i8),  # of the timeline
    ("bin_s", _f8),
    ("service_count", _i8),  # and workflows, which come after the services
    ("slot_count", _i8),  # of the pool
    # Addresses of arrays; 0: there is none.
    ("arrival_s", _i8),  # f8 (request,), sorted
    ("code", _i8),  # i8 (request,): which of the trace's names
    ("service_of_code", _i8),  # i4 (name,)
    ("stream_of", _i8),  # i4 (request,) or none: stream, or NOWHERE
    ("output_tokens", _i8),  # f8 (request,) or none
    ("groups", _i8),  # GROUP (group,)
    ("replicas", _i8),  # REPLICA (replica,)
    ("services", _i8),  # SERVICE (service,)
    ("streams", _i8),  # STREAM (stream,)
    ("pool", _i8),  # SLOT (slot,)
    ("head_key", _i8),  # f8 (replica,): smallest key of each queue; inf: empty
    ("free_s", _i8),  # f8 (group, most_stages): until when each stage is reserved
    ("stage_s", _i8),  # f8 (replica, largest, most_stages): seconds that a batch of b + 1 holds a stage
    ("total_s", _i8),  # f8 (replica, largest): latency of a batch of b + 1
    ("quantile", _i8),  # f8 (replica, largest, 4) or none: factor of a batch of b + 1 at u = 0, 0.5, 0.95, 0.99
    ("interference", _i8),  # f8 (replica, most_concurrent): factor of a batch that runs beside b others
    # Replicas by service, then position; what is not routable has weight 0.
    ("route_replica", _i8),  # i4 (replica,)
    ("route_weight", _i8),  # f8 (replica,)
    ("route_balance", _i8),  # f8 (replica,): of the smooth round robins
    ("route_credit", _i8),  # f8 (replica,)
    ("scratch", _i8),  # f8 (replica,)
    # What is counted.
    ("counts", _i8),  # i8 (service, COUNTED)
    ("histogram", _i8),  # i4 (service, CELLS) or none: latencies of finished requests
    ("busy_s", _i8),  # f8 (group, most_stages): seconds that each stage was held, from warm-up to end of run
    ("timeline", _i8),  # i8 (bin, service, COUNTED) or none: by time of arrival
    ("busy_timeline_s", _i8),  # f8 (bin, group) or none: seconds that the first stage was held, by their start
    # What is kept of every request, or none. The end of a drop is when it was.
    ("log_end_s", _i8),  # f8 (request,)
    ("log_code", _i8),  # i1 (request,)
    ("log_replica", _i8),  # i4 (request,)
    ("log_batch", _i8),  # i2 (request,)
]

WORLD: Final = np.dtype([*_FIELDS, ("plain", np.int8)], align=True)
"""The world of a run of latency and frequency services on one plan.

Its last field keeps it from being the beginning of the other: numba would take that one for a subtype, with a warning.
"""

FEATURED_WORLD: Final = np.dtype([*_FIELDS, *EXTRA_FIELDS], align=True)
"""The same with generation, workflows and changes: compiled code for it is more."""


_ITEMS: Final[dict[str, Any]] = {
    "groups": GROUP,
    "replicas": REPLICA,
    "services": SERVICE,
    "streams": STREAM,
    "pool": SLOT,
    "log_code": np.int8,
    "log_batch": np.int16,
    **dict.fromkeys(("service_of_code", "stream_of", "route_replica", "histogram", "log_replica"), np.int32),
    **dict.fromkeys(("code", "counts", "timeline"), np.int64),
    **dict.fromkeys(("arrival_s", "output_tokens", "head_key", "free_s", "stage_s", "total_s", "quantile"), np.float64),
    **dict.fromkeys(("interference", "route_weight", "route_balance", "route_credit", "scratch"), np.float64),
    **dict.fromkeys(("busy_s", "busy_timeline_s", "log_end_s"), np.float64),
}
"""What compiled code takes the items of an array for."""


class World:
    """A run: the record that compiled code reads and writes, and the arrays that it points to.

    Args:
        dtype: `WORLD` or `FEATURED_WORLD`.

    Attributes:
        record: Shape (1,), of that type; the argument of every compiled entry point.
    """

    def __init__(self, dtype: np.dtype[Any] = WORLD) -> None:
        self.record: Any = np.zeros(1, dtype)
        self._arrays: dict[str, NDArray[Any]] = {}
        self._per_slot: dict[str, int] = {}

    def attach(self, name: str, array: NDArray[Any]) -> None:
        """Let the field ``name`` point to ``array``, which is kept alive (an empty one counts as none)."""
        expected = np.dtype(_ITEMS.get(name, array.dtype))
        if array.dtype != expected or not array.flags.c_contiguous:
            raise ValueError(f"{name}: an array of {expected} in C order, found {array.dtype}")
        self._arrays[name] = array
        self.record[name] = array.ctypes.data if array.size else 0

    def attach_per_slot(self, name: str, dtype: Any, width: int = 1) -> None:
        """Let the field ``name`` point to zeros, ``width`` for each slot of the pool; they grow with it."""
        self._per_slot[name] = width
        self.attach(name, np.zeros(int(self["slot_count"]) * width, dtype))

    def array(self, name: str) -> Any:
        """Return the array that the field ``name`` points to."""
        return self._arrays[name]

    def __getitem__(self, name: str) -> Any:
        return self.record[name][0]

    def __setitem__(self, name: str, value: Any) -> None:
        self.record[name] = value

    def grow(self, slots: int) -> None:
        """Enlarge the pool by ``slots`` free slots; what is in it stays where it is."""
        old = len(self._arrays["pool"]) if "pool" in self._arrays else 0
        pool = np.zeros(old + slots, SLOT)
        if old:
            pool[:old] = self._arrays["pool"]
        pool["replica"][old:] = NOWHERE
        pool["after"][old:] = np.arange(old + 1, old + slots + 1)
        pool["after"][-1] = self["free"] if old else NOWHERE
        self["free"] = old
        self["slot_count"] = old + slots
        self.attach("pool", pool)
        for name, width in self._per_slot.items():
            before = self._arrays[name]
            longer = np.zeros((old + slots) * width, before.dtype)
            longer[: len(before)] = before
            self.attach(name, longer)
