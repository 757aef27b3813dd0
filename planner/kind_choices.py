"""Which kinds the GPUs run together: every choice that may still beat a mapping, with a bound for each.

A choice is a kind per GPU, whatever their order. docs/formulation.md, section 11: prices of the patterns leave few
choices (11.9), and with the kinds given the relaxation (11.1) to (11.3) has a closed form (11.10).
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from planner.client_patterns import Kinds, best_patterns, reachable_fps
from planner.linear import Floats, Integers

__all__ = ["Choices", "promising_choices", "whole_bounds"]

_MOST_DIFFERENT = 10
"""Different kinds up to which (11.10) is computed; its cost doubles with each."""

_HALVINGS = 8
"""How often the range of the threshold is halved where there are too many choices."""

_ROUNDING = 1e-7
"""Relative rounding by which a bound is widened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Choices of kinds, best bound first.

    Attributes:
        kinds: Shape (choice, gpu): the kinds of one choice, most accurate first.
        bound: Shape (choice,), falling: proven bound on mappings of each choice.
        others: Proven bound on mappings of all choices that are not listed.
    """

    kinds: Integers
    bound: Floats
    others: float


def promising_choices(kinds: Kinds, gpus: int, prices: Floats, value: float, *, most: int) -> Choices:
    """Return the choices that may reach more than ``value``; only those of the best prices where they are too many.

    Args:
        kinds: What a GPU may run.
        gpus: How many there are, at least 1.
        prices: Shape (client,), at least 0: any are sound, those of the patterns' program leave the fewest choices.
        value: What other choices need not exceed.
        most: Choices that are looked at.
    """
    _, _, worth = best_patterns(kinds, prices)
    worth = np.maximum(worth, 0.0)
    order = np.argsort(-worth, kind="stable")
    base = float(prices.sum())
    all_of_them = (base + gpus * float(worth.max(initial=0.0))) * (1 + _ROUNDING)
    none = np.zeros((0, gpus), dtype=np.int64), np.zeros(0)

    def counted(others: float) -> int:
        return int(_enumerated(worth[order], gpus, others / (1 + _ROUNDING) - base, most, *none))

    others, count = value, counted(value)
    if count > most:
        too_low, others, count = value, all_of_them, 0
        for _ in range(_HALVINGS):
            middle = (too_low + others) / 2
            found = counted(middle)
            too_low, others, count = (middle, others, count) if found > most else (too_low, middle, found)
    places, priced = np.zeros((count, gpus), dtype=np.int64), np.zeros(count)
    _enumerated(worth[order], gpus, others / (1 + _ROUNDING) - base, count, places, priced)
    chosen = order[places]
    by_accuracy = np.argsort(-kinds.accuracy[chosen], axis=1, kind="stable")
    chosen = np.take_along_axis(chosen, by_accuracy, axis=1)
    bound = np.minimum((base + priced) * (1 + _ROUNDING), whole_bounds(kinds, chosen))
    kept = np.flatnonzero(bound > others)
    ranked = kept[np.argsort(-bound[kept], kind="stable")]
    return Choices(kinds=chosen[ranked], bound=bound[ranked], others=others)


def whole_bounds(kinds: Kinds, chosen: Integers) -> Floats:
    """Return (11.10) for choices of shape (choice, gpu), most accurate kinds first; infinite with too many kinds."""
    bound = _cut_bounds(chosen, kinds.accuracy, reachable_fps(kinds), kinds.able, kinds.fps, _MOST_DIFFERENT)
    return np.asarray(bound * (1 + _ROUNDING))


@numba.njit(cache=True)
def _enumerated(worth, gpus, room, most, places, sums):  # type: ignore[no-untyped-def]
    """Write to ``places`` the multisets, rising, of ``gpus`` places in the falling ``worth`` with sums above ``room``.

    Returns how many there are; it counts no further than one beyond ``most``, and writes as many as fit.
    """
    at = np.zeros(gpus, dtype=np.int64)
    before = np.zeros(gpus + 1)
    count = level = 0
    while level >= 0 and count <= most:
        # Places after this one are worth at most as much: all the rest of them here bounds what can follow.
        if at[level] >= len(worth) or before[level] + (gpus - level) * worth[at[level]] <= room:
            level -= 1
            if level >= 0:
                at[level] += 1
            continue
        before[level + 1] = before[level] + worth[at[level]]
        if level + 1 < gpus:
            level += 1
            at[level] = at[level - 1]
            continue
        if count < len(places):
            places[count] = at
            sums[count] = before[gpus]
        count += 1
        at[level] += 1
    return count


@numba.njit(cache=True)
def _within(kind, able, fps):  # type: ignore[no-untyped-def]
    """Return, per set of places in ``kind`` (a bit each), the rates of the clients that no kind outside it serves."""
    different = len(kind)
    within = np.zeros(1 << different)
    for client in range(len(fps)):
        served_by = 0
        for place in range(different):
            if able[kind[place], client]:
                served_by |= 1 << place
        within[served_by] += fps[client]
    for place in range(different):
        for group in range(1 << different):
            if group >> place & 1:
                within[group] += within[group ^ (1 << place)]
    return within


@numba.njit(cache=True)
def _cut_bounds(chosen, accuracy, reach, able, fps, most_different):  # type: ignore[no-untyped-def]
    """Return, per choice, the steps of accuracy times the rate that the more accurate GPUs can serve: a minimum cut."""
    choices, gpus = chosen.shape
    bound = np.full(choices, np.inf)
    kind = np.zeros(gpus, dtype=np.int64)
    room = np.zeros(gpus)
    for choice in range(choices):
        different = 0
        for gpu in range(gpus):
            if gpu == 0 or chosen[choice, gpu] != chosen[choice, gpu - 1]:
                kind[different] = chosen[choice, gpu]
                room[different] = 0.0
                different += 1
            room[different - 1] += reach[chosen[choice, gpu]]
        if different > most_different:
            continue
        within, rooms = _within(kind[:different], able, fps), np.zeros(1 << different)
        every = (1 << different) - 1
        bound[choice] = 0.0
        for first in range(1, different + 1):
            leading = (1 << first) - 1
            least = within[every] - within[every ^ leading]
            for full in range(1, leading + 1):
                place = 0
                while not full >> place & 1:
                    place += 1
                rooms[full] = rooms[full & (full - 1)] + room[place]
                least = min(least, rooms[full] + within[every] - within[every ^ (leading ^ full)])
            step = accuracy[kind[first - 1]] - (accuracy[kind[first]] if first < different else 0.0)
            bound[choice] += step * least
    return bound
