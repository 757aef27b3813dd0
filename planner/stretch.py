"""Larger batches where nothing speaks against them: room for bursts that costs no rate."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from planner.space import Placed, Placement, PlanningSpace

__all__ = ["stretch_batches"]


def stretch_batches(space: PlanningSpace, placement: Placement) -> Placement:
    """Return ``placement`` with each largest batch as large as memory, deadlines and neighbours on its group allow.

    A device never waits for company, so a larger limit changes nothing while requests come one by one, and absorbs
    them when they come together. Models see rates only and are content with the smallest batch that sustains them.
    Rates stay; an option is taken only when it sustains at least as much as the one that it replaces.
    """
    larger = _larger(space)
    stretched: list[Placed] = []
    known: dict[tuple[tuple[int, ...], tuple[float, ...]], tuple[int, ...]] = {}
    for group, members in groupby(sorted(placement), key=lambda placed: placed.group):
        before = list(members)
        options = tuple(placed.option for placed in before)
        key = (options, tuple(placed.share for placed in before) if space.token_ratio[list(options)].any() else ())
        if key not in known:
            known[key] = _stretched(space, larger, before)
        for placed, option in zip(before, known[key], strict=True):
            share = placed.share * space.sustained_rps[placed.option] / space.sustained_rps[option]
            stretched.append(Placed(group, option, float(share)))
    return tuple(sorted(stretched))


def _stretched(
    space: PlanningSpace, larger: dict[tuple[object, ...], list[int]], before: Sequence[Placed]
) -> tuple[int, ...]:
    """Return the options of one group, each at its largest batch given the others as they are by then."""
    chosen = [placed.option for placed in before]
    rates = [placed.share * space.sustained_rps[placed.option] for placed in before]
    for position, option in enumerate(chosen):
        neighbours = [other for index, other in enumerate(chosen) if index != position]
        memory_left = 1.0 - space.memory[neighbours].sum(axis=0)
        fitting = [
            other
            for other in larger[_replica(space, option)]
            if space.options[other].batch >= space.options[option].batch
            and space.sustained_rps[other] >= space.sustained_rps[option]
            and (space.memory[other] <= memory_left + 1e-9).all()
            and not space.conflicts([other], neighbours).any()
            and _tokens_in_time(space, [*chosen[:position], other, *chosen[position + 1 :]], rates)
        ]
        chosen[position] = max(fitting, key=lambda other: space.options[other].batch, default=option)
    return tuple(chosen)


def _tokens_in_time(space: PlanningSpace, options: Sequence[int], rates: Sequence[float]) -> bool:
    """Tell whether neighbours leave every service its time per further token, at ``rates`` of requests: (4.22)."""
    shares = np.array([rate / space.sustained_rps[option] for rate, option in zip(rates, options, strict=True)])
    return all(run.max() + busy @ shares <= 1.0 + 1e-9 for run, busy in space.token_rows(options))


def _replica(space: PlanningSpace, option: int) -> tuple[object, ...]:
    """Return what options that run the same variant for the same service in the same way have in common."""
    one = space.options[option]
    return (one.service, one.variant, one.gpu_type, one.tp, one.pp, one.multi_frame)


def _larger(space: PlanningSpace) -> dict[tuple[object, ...], list[int]]:
    """Return the options of each kind of replica."""
    found: dict[tuple[object, ...], list[int]] = {}
    for option in range(len(space.options)):
        found.setdefault(_replica(space, option), []).append(option)
    return found
