"""State of what a plain run does not have: generating replicas, workflows, and the order of events across groups.

The fields stand in every world (`evaluator.state.WORLD`), the arrays only where they are used. Records with one row for
each slot go along with the pool of requests in flight.
"""

# mypy: disable-error-code="no-any-return"
# Records and their fields have no types for mypy.

from __future__ import annotations

from typing import Any, Final

import numpy as np

from evaluator.memory import inlined, record_at, view_of

__all__ = [
    "AGENDA",
    "CALL",
    "ENDED",
    "EXTRA_FIELDS",
    "FLOW",
    "FLOW_EDGE",
    "FLOW_STAGE",
    "GENERATOR",
    "IDLE",
    "INSIDE",
    "INSTANCE",
    "INSTANCE_STAGE",
    "ORPHANED",
    "PLACE",
    "SEQUENCE",
    "TRANSIT",
    "agenda_at",
    "call_at",
    "flow_at",
    "flow_edge_at",
    "flow_stage_at",
    "generator_at",
    "instance_at",
    "instance_stage_at",
    "place_at",
    "sequence_at",
    "small_of",
    "taken_of",
]

_i1, _i4, _i8, _f8 = np.int8, np.int32, np.int64, np.float64

# Where a call of a workflow is.
IDLE: Final = 0
"""Not released."""
TRANSIT: Final = 1
"""Routed and on its way."""
INSIDE: Final = 2
"""In a queue or running."""
ENDED: Final = 3
"""Finished, dropped or failed."""
ORPHANED: Final = 4
"""On its way or running although its instance has ended: its slot is freed when that is over."""

GENERATOR: Final = np.dtype(
    [
        ("points", _i8),  # of the prefill curve
        ("decode_token_s", _f8),
        ("kv_limit_tokens", _i8),
        ("ttft_s", _f8),  # time allowed to the first token
        ("tpot_s", _f8),  # time allowed to each further one
        ("running", _i8),  # sequences admitted and not ended
        ("starting", _i8),  # those among them whose prefill runs now
        ("context", _i8),  # tokens of context of all running
        ("decodes", _i8),  # decodes that have ended
        ("admissions", _i8),  # sequences admitted so far
        ("newest", _i8),  # slot of the sequence admitted last; NOWHERE without
        ("end_s", _f8),  # end of the last iteration that has ended
        ("heaped", _i8),  # size of the heap of running sequences beyond their prefill, by their end
    ],
    align=True,
)
"""A replica with token costs."""

SEQUENCE: Final = np.dtype(
    [
        ("prompt", _i8),
        ("output", _i8),  # tokens to produce
        ("produced", _i8),  # tokens produced; while it runs beyond its prefill, those at the end of that
        ("last_decode", _i8),  # number of the decode that produces its last token
        ("admission", _i8),  # number of its admission
        ("before", _i4),  # the running sequence of its replica admitted before it, or NOWHERE
        ("after", _i4),
        ("first_s", _f8),  # end of the iteration that made its first token; NaN until then
    ],
    align=True,
)
"""A request to a replica with token costs, in the row of its slot."""

CALL: Final = np.dtype(
    [
        ("lead", _i4),  # slot of the first call of its instance, which stands for it; NOWHERE for plain requests
        ("stage", _i4),
        ("number", _i4),  # calls of its instance that were released before it
        ("after", _i4),  # next call of its instance, by stage
        ("state", _i1),
        ("enter_s", _f8),  # when it enters, if it is on its way
        ("order", _i8),  # of entries at the same time
    ],
    align=True,
)
"""A call of a workflow, or whatever else enters later than it was sent, in the row of its slot."""

INSTANCE: Final = np.dtype(
    [
        ("workflow", _i4),
        ("released_calls", _i4),  # calls released so far
        ("open_last", _i4),  # calls of stages with nothing behind them that have not finished
        ("over", _i1),  # it has ended; its lead may still run as an orphan
    ],
    align=True,
)
"""An instance of a workflow, in the row of its lead."""

INSTANCE_STAGE: Final = np.dtype(
    [
        ("calls", _i4),  # 0 when it is skipped
        ("unfinished", _i4),
        ("lost", _i4),  # calls that were dropped or failed
        ("first", _i4),  # slot of its first call
        ("released", _i1),
    ],
    align=True,
)
"""A stage of an instance; shape (slot, most stages of a workflow)."""

FLOW: Final = np.dtype(
    [("deadline_s", _f8), ("first_stage", _i4), ("stages", _i4), ("first_edge", _i4), ("edges", _i4)], align=True
)
"""A workflow; its stages and edges are numbered from 0."""

FLOW_STAGE: Final = np.dtype(
    [
        ("service", _i4),
        ("join_any", _i1),
        ("entry", _i1),  # no edge leads to it
        ("tail_s", _f8),  # least time that the stages behind it take
        ("drawn", _i8),  # calls in the instance drawn last
    ],
    align=True,
)
"""A stage of a workflow."""

FLOW_EDGE: Final = np.dtype(
    [
        ("source", _i4),
        ("target", _i4),
        ("fanout", _f8),
        ("payload_bytes", _f8),
        ("probability", _f8),  # NaN where it is always taken
        ("drawn", _i8),  # calls in the instance drawn last
    ],
    align=True,
)
"""An edge of a workflow."""

PLACE: Final = np.dtype([("node", _i4), ("intra_bandwidth", _f8)], align=True)
"""Where a group is: its node, and the bytes per second between groups there."""

AGENDA: Final = np.dtype([("next_s", _f8), ("priority", _i8)], align=True)
"""The next event of a group."""

EXTRA_FIELDS: Final = [
    ("generation", _i1),  # some replica has token costs
    ("workflows", _i1),  # the trace may hold instances
    ("overlaps", _i1),  # some groups share a GPU
    ("max_prefill_tokens", _i8),
    ("generators", _i8),  # GENERATOR (generator,)
    ("sequences", _i8),  # SEQUENCE (slot,)
    ("most_points", _i8),
    ("most_running", _i8),
    ("prefill_tokens", _i8),  # f8 (generator, most_points), rising
    ("prefill_s", _i8),  # f8 (generator, most_points)
    ("decode_s", _i8),  # f8 (generator, most_running)
    ("ends", _i8),  # i4 (generator, most_running): the heap of each
    ("input_tokens", _i8),  # f8 (request,) or none
    ("log_ttft_s", _i8),  # f8 (request,) or none
    ("log_tpot_s", _i8),  # f8 (request,) or none
    ("flow_count", _i8),
    ("most_flow_stages", _i8),
    ("most_flow_edges", _i8),
    ("flows", _i8),  # FLOW (workflow,)
    ("flow_stages", _i8),  # FLOW_STAGE (stage,)
    ("flow_edges", _i8),  # FLOW_EDGE (edge,)
    ("calls", _i8),  # CALL (slot,)
    ("instances", _i8),  # INSTANCE (slot,)
    ("instance_stages", _i8),  # INSTANCE_STAGE (slot, most_flow_stages)
    ("taken", _i8),  # i1 (slot, most_flow_edges)
    ("places", _i8),  # PLACE (group,)
    ("network_bandwidth", _f8),
    ("network_latency_s", _f8),
    ("overlap_first", _i8),  # i4 (group + 1,): g shares a GPU with overlap_other[overlap_first[g]:overlap_first[g + 1]]
    ("overlap_other", _i8),
    ("agenda", _i8),  # AGENDA (group,)
    ("tree", _i8),  # i4 (2 * leaves,): a tournament; node i is won by the earlier of nodes 2 i and 2 i + 1
    ("leaves", _i8),
    ("pending", _i8),  # i4 (slot,): what enters later, a heap
    ("pending_count", _i8),
    ("pending_order", _i8),
    ("ended", _i8),  # i4 (slot,): calls that the last event finished
    ("ended_count", _i8),
    ("touched", _i8),  # i4 (slot, 2): replicas whose group may have to look again
    ("touched_count", _i8),
]
"""Fields of the world; lengths and addresses as in `evaluator.state.WORLD`."""

_small = view_of(np.int32)
_tiny = view_of(np.int8)
_agenda_at = record_at(AGENDA)
_call_at = record_at(CALL)
_flow_at = record_at(FLOW)
_flow_edge_at = record_at(FLOW_EDGE)
_flow_stage_at = record_at(FLOW_STAGE)
_generator_at = record_at(GENERATOR)
_instance_at = record_at(INSTANCE)
_instance_stage_at = record_at(INSTANCE_STAGE)
_place_at = record_at(PLACE)
_sequence_at = record_at(SEQUENCE)


@inlined
def agenda_at(w: Any, g: int) -> Any:
    """Return the next event of group ``g``."""
    return _agenda_at(w.agenda, g)


@inlined
def call_at(w: Any, slot: int) -> Any:
    """Return the record of the call in ``slot``."""
    return _call_at(w.calls, slot)


@inlined
def flow_at(w: Any, workflow: int) -> Any:
    """Return the record of a workflow."""
    return _flow_at(w.flows, workflow)


@inlined
def flow_stage_at(w: Any, workflow: int, stage: int) -> Any:
    """Return the record of a stage of a workflow."""
    return _flow_stage_at(w.flow_stages, flow_at(w, workflow).first_stage + stage)


@inlined
def flow_edge_at(w: Any, workflow: int, edge: int) -> Any:
    """Return the record of an edge of a workflow."""
    return _flow_edge_at(w.flow_edges, flow_at(w, workflow).first_edge + edge)


@inlined
def generator_at(w: Any, row: int) -> Any:
    """Return the record of a replica with token costs."""
    return _generator_at(w.generators, row)


@inlined
def instance_at(w: Any, lead: int) -> Any:
    """Return the record of the instance of which ``lead`` is the first call."""
    return _instance_at(w.instances, lead)


@inlined
def instance_stage_at(w: Any, lead: int, stage: int) -> Any:
    """Return the record of a stage of an instance."""
    return _instance_stage_at(w.instance_stages, lead * w.most_flow_stages + stage)


@inlined
def taken_of(w: Any, lead: int) -> Any:
    """Return which edges an instance takes, shape (edge,)."""
    return _tiny(w.taken + lead * w.most_flow_edges, w.most_flow_edges)


@inlined
def place_at(w: Any, g: int) -> Any:
    """Return where group ``g`` is."""
    return _place_at(w.places, g)


@inlined
def sequence_at(w: Any, slot: int) -> Any:
    """Return the record of the sequence in ``slot``."""
    return _sequence_at(w.sequences, slot)


@inlined
def small_of(address: int, length: int) -> Any:
    """Return the array of int32 at ``address``."""
    return _small(address, length)
