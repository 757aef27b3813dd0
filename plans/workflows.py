"""Rules of workflows that simulator and executor share: stages, tails, and what is drawn (docs/evaluator.md, 11)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from plans.plan import Plan
from plans.service import Workflow

__all__ = ["DRAW_EDGES", "DRAW_SWITCHES", "drawn_calls", "drawn_share", "least_latencies_s", "stages_of", "tails_s"]

DRAW_SWITCHES, DRAW_EDGES = 2, 3
"""Purposes of draws: which edge of a switch is taken, and the calls of an edge."""

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def stages_of(workflow: Workflow) -> tuple[str, ...]:
    """Return the services of ``workflow`` in topological order, of several that could be next the first mentioned."""
    mentioned = list(dict.fromkeys(name for edge in workflow.edges for name in (edge.source, edge.target)))
    order: list[str] = []
    while len(order) < len(mentioned):
        waiting = {edge.target for edge in workflow.edges if edge.source not in order}
        order.append(next(name for name in mentioned if name not in waiting and name not in order))
    return tuple(order)


def least_latencies_s(plan: Plan) -> dict[str, float]:
    """Return the least seconds that a batch of one takes, by service, over the replicas of ``plan``."""
    least: dict[str, float] = {}
    for group in plan.groups:
        for entry in group.loadout:
            least[entry.service] = min(least.get(entry.service, math.inf), entry.batch_latency_s(1))
    return least


def tails_s(stages: Sequence[str], workflow: Workflow, least_s: Mapping[str, float]) -> list[float]:
    """Return the least seconds that the stages behind each of ``stages`` take, along the longest path.

    Args:
        stages: Of ``workflow``, in topological order.
        workflow: Whose edges are followed.
        least_s: Of a call of each service; 0 where it is missing.
    """
    tail: dict[str, float] = {}
    for stage in reversed(stages):
        behind = [edge.target for edge in workflow.edges if edge.source == stage]
        tail[stage] = max((least_s.get(name, 0.0) + tail[name] for name in behind), default=0.0)
    return [tail[stage] for stage in stages]


def drawn_share(seed: int, purpose: int, index: int) -> float:
    """Return the draw from [0, 1) that belongs to (seed, purpose, index) (docs/evaluator.md, section 3)."""
    h = _mix(seed + _GOLDEN)
    h = _mix(h + _GOLDEN * (purpose + 1))
    h = _mix(h + _GOLDEN * (index + 1))
    return (h >> 11) * 2.0**-53


def drawn_calls(fanout: float, calls: int, share: float) -> int:
    """Return the calls that an edge makes of ``calls`` of its source: ``floor(fanout * calls + share + 1e-9)``."""
    return math.floor(fanout * calls + share + 1e-9)


def _mix(z: int) -> int:
    z &= _MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)
