"""Utilisations corrected by simulation: what groups bore in place of what the tail bound allows, and a plan with it.

The bound of docs/formulation.md, section 3, asks for so little load that hardly any request of a bursty service is
late. Where not all can be served that is beside the point: what counts is how busy a group of this class is with
requests that are served in time. The simulation shows it for the classes and services in use; the class's mean stands
for the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from planner.arranged import Arrangement
from planner.lexicographic import Search
from planner.polish_limits import Pairs
from planner.scoring import Scorer
from planner.space import PlanningSpace
from planner.tier import Outcome

__all__ = ["corrected", "replanned"]

_ROOM = 1.1
"""A group that loses nothing is taken to bear this much more than it was seen to."""

_Shape = tuple[str, int, int]


def corrected(space: PlanningSpace, pairs: Pairs, scorer: Scorer) -> PlanningSpace:
    """Return ``space`` with utilisations as ``pairs`` bore them when simulated, within the limits of the settings."""
    settings = space.problem.settings
    seen = _borne(space, pairs, scorer)
    by_shape: dict[_Shape, list[float]] = {}
    for (shape, _), borne in seen.items():
        by_shape.setdefault(shape, []).append(borne)
    mean_of = {shape: sum(borne) / len(borne) for shape, borne in by_shape.items()}
    options = []
    for position, option in enumerate(space.options):
        shape = (option.gpu_type, option.tp, option.pp)
        utilisation = seen.get((shape, int(space.service_of[position])), mean_of.get(shape, option.utilisation))
        within = min(max(utilisation, settings.min_utilisation), settings.max_utilisation)
        options.append(replace(option, utilisation=within))
    sustained = np.array([option.sustained_rps for option in options])
    return replace(
        space,
        catalogue=replace(space.catalogue, options=tuple(options)),
        sustained_rps=sustained,
        share_cap=np.minimum(1.0, space.offered_rps[space.service_of] / sustained),
    )


def replanned(space: PlanningSpace, clock: Callable[[], float], time_s: float) -> Pairs | None:
    """Return the placement that the ILP finds for ``space`` in ``time_s``; None when it finds none."""
    outcome = Search(space, clock, clock() + time_s).run()
    if not isinstance(outcome, Outcome):
        return None
    return tuple(sorted((placed.group, placed.option) for placed in outcome.placement))


def _borne(space: PlanningSpace, pairs: Pairs, scorer: Scorer) -> dict[tuple[_Shape, int], float]:
    """Return the mean utilisation that groups of each shape bore while they served each service."""
    arrangement = Arrangement(space, (option for _, option in pairs))
    arrangement.restore(pairs)
    hosts, served_by, offered = arrangement.now, scorer.good(arrangement), scorer.offered
    busy = np.zeros(len(hosts.owner))
    replicas = [
        (service, int(hosts.slot[service, each]), int(hosts.option[service, each]), int(served_by[service, each]))
        for service in range(len(space.names))
        for each in range(hosts.replicas[service])
    ]
    for _, slot, option, good in replicas:
        busy[slot] += good * space.options[option].request_s / scorer.simulated_s
    served = served_by.sum(axis=1) / np.maximum(1, offered.sum(axis=0))
    found: dict[tuple[_Shape, int], list[float]] = {}
    for service, slot, option, _ in replicas:
        group = space.groups[int(hosts.group_at[slot])]
        target = space.problem.services.services[service].slo.attainment
        room = _ROOM if served[service] >= target else 1.0
        borne = max(float(busy[slot]) * room, space.options[option].utilisation if room > 1 else 0.0)
        found.setdefault(((group.gpu_type, group.tp, group.pp), service), []).append(borne)
    return {key: sum(each) / len(each) for key, each in found.items()}
