"""The best rates for given loadouts: a linear program over loadouts, as groups with the same one are alike."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from planner.linear import Floats, Integers
from planner.linking import Linking
from planner.program import LinearProgram
from planner.space import PlanningSpace

__all__ = ["Loadout", "best_shares"]

Loadout = tuple[int, tuple[int, ...]]
"""(class, pairs of the linking rows, rising)."""


def best_shares(
    space: PlanningSpace, linking: Linking, counts: Mapping[Loadout, int], time_limit_s: float
) -> tuple[dict[Loadout, Floats], float] | None:
    """Return the compute shares of each loadout that are best for the objective of ``linking``, and its value.

    With the loadouts fixed, groups of one loadout may share alike: the program is convex. None when the rows cannot
    be satisfied, or not in time.
    """
    loadouts = sorted(counts)
    lengths = [len(pairs) for _, pairs in loadouts]
    pairs: Integers = np.array([pair for _, mine in loadouts for pair in mine], dtype=np.int64)
    owner = np.repeat(np.arange(len(loadouts)), lengths)
    count = np.array([float(counts[each]) for each in loadouts])
    options = linking.pair_option[pairs]
    statics, rows = len(linking.static_lower), len(linking.rows)

    constant = np.zeros(rows)
    value = 0.0
    for number, (place, _) in zip(count, loadouts, strict=True):
        worth, touched, amounts = linking.use[place]
        value += number * worth
        constant[touched] += number * amounts
    lengths_of = linking.first[pairs + 1] - linking.first[pairs]
    before = np.cumsum(lengths_of) - lengths_of
    at = np.repeat(linking.first[pairs] - before, lengths_of) + np.arange(lengths_of.sum())
    column = np.repeat(np.arange(len(pairs)), lengths_of)
    row, run, share = linking.entry_row[at], linking.entry_run[at], linking.entry_share[at]
    times = count[owner[column]]
    inside = row >= 0
    np.add.at(constant, row[inside], (run * times)[inside])
    value += float((run * times)[~inside].sum())
    objective = np.concatenate([linking.static_objective, np.zeros(len(pairs))])
    np.add.at(objective, statics + column[~inside], share[~inside])
    scale = np.zeros(rows)
    cap, least = space.share_cap[options], space.requirements.least_share[options]
    np.maximum.at(scale, row[inside], np.abs(share[inside]) * np.maximum(cap[column[inside]], 1e-9))
    static_upper = linking.static_upper.copy()
    static_upper[statics - linking.wastes :] = 0.0
    most = np.maximum(cap, least)
    given = float(np.sum(np.abs(objective[statics:]) * most * count[owner]))
    tokens = _token_rows(space, options, owner, count)
    times_free = np.array([free for _, _, free in tokens])
    program = LinearProgram(
        np.concatenate([linking.lower - constant, np.full(len(loadouts) + len(tokens), -np.inf)]),
        np.concatenate([linking.upper - constant, count, times_free]),
        np.concatenate([linking.static_lower, least * count[owner]]),
        np.concatenate([static_upper, most * count[owner]]),
        objective,
        np.concatenate(
            [
                linking.static_row,
                row[inside],
                rows + owner,
                *(np.full(len(at), rows + len(loadouts) + number) for number, (at, _, _) in enumerate(tokens)),
            ]
        ),
        np.concatenate(
            [
                linking.static_of,
                statics + column[inside],
                statics + np.arange(len(pairs)),
                *(statics + at for at, _, _ in tokens),
            ]
        ),
        np.concatenate([linking.static_value, share[inside], np.ones(len(pairs)), *(busy for _, busy, _ in tokens)]),
        row_scale=np.concatenate([linking.scaled(scale), np.maximum(count, 1.0), np.ones(len(tokens))]),
        objective_scale=max(float(np.sum(np.abs(linking.static_objective) * linking.reach)), given) or 1.0,
    )
    found = program.solve(time_limit_s)
    if found is None:
        return None
    shares = np.clip(found.values[statics:] / count[owner], 0.0, 1.0)
    of_loadouts = np.split(shares, np.cumsum(lengths))[:-1]
    return dict(zip(loadouts, of_loadouts, strict=True)), value + found.objective


def _token_rows(
    space: PlanningSpace, options: Integers, owner: Integers, count: Floats
) -> list[tuple[Integers, Floats, float]]:
    """Return (4.22) of each loadout, as pairs, what each counts, and what all its groups together may use."""
    if not space.token_ratio.any():
        return []
    found = []
    for number, times in enumerate(count):
        pairs = np.flatnonzero(owner == number)
        for run, busy in space.token_rows(options[pairs]):
            found.append((pairs, busy, float(times) * (1.0 - float(run.max()))))
    return found
