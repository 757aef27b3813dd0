"""Spreading rates evenly once the placement is decided: full groups are late groups."""

from __future__ import annotations

import numpy as np

from planner.backend import Budget, Solution, Solver
from planner.linear import ModelBuilder
from planner.space import Placed, Placement, PlanningSpace

__all__ = ["balance"]

_EDGES = np.concatenate([[0.0], np.geomspace(1e-4, 1.0, 41)])
"""Ends of the segments of utilisation, each a quarter longer than the one before, so that idle groups are told apart
as well as busy ones. A unit of a segment costs its upper end: rising, so that peaks are levelled first."""


_FINE = 300
"""Different loadouts up to which every segment is told apart; beyond, four are taken together."""


def balance(space: PlanningSpace, placement: Placement, solver: Solver, budget: Budget) -> Placement:
    """Return ``placement`` with the same replicas, rates per service and variant, and more even utilisations.

    Minimises the sum over groups of a convex, piecewise linear price of utilisation (section 6 of
    docs/formulation.md), so wherever two groups can trade load, the fuller one gives.
    """
    if not placement:
        return placement
    alike = _alike(space, placement)
    edges = _EDGES if len(alike) <= _FINE else _EDGES[::4]
    widths = np.diff(edges)
    builder = ModelBuilder()
    prices: list[float] = []
    columns: dict[int, tuple[int, int]] = {}
    in_kind: dict[tuple[int, float, str], list[tuple[int, float, float]]] = {}
    for number, members in enumerate(alike):
        count, first = float(len(members)), members[0]
        options = [placement[index].option for index in first]
        share = builder.add_variables(
            [f"share[{number},{option}]" for option in options], upper=count * space.share_cap[options], integer=False
        )
        prices.extend([0.0] * len(options))
        segments = builder.add_variables(
            [f"load[{number},{i}]" for i in range(len(widths))], upper=count * widths, integer=False
        )
        prices.extend(edges[1:])
        utilisation = np.array([space.options[option].utilisation for option in options])
        builder.add_row(f"compute[{number}]", share, np.ones(len(share)), upper=count)
        for position, (run, busy) in enumerate(space.token_rows(options)):
            free = count * (1.0 - float(run.max()))  # one option of each service: the only one with a ratio
            builder.add_row(f"tokens[{number},{position}]", share, busy, upper=free)
        builder.add_row(
            f"load[{number}]",
            np.concatenate([share, segments]),
            np.concatenate([utilisation, -np.ones(len(segments))]),
            lower=0.0,
            upper=0.0,
        )
        # Where bytes should stay on a node, rates stay there too.
        node = space.groups[placement[first[0]].group].node if space.requirements.calls else ""
        for position, option in enumerate(options):
            shares = [placement[member[position]].share for member in members]
            # No less than a replica must have; where the placement gives less, no less than that.
            least = min(float(space.requirements.least_share[option]), min(shares))
            builder.add_row(f"least[{number},{option}]", [int(share[position])], [1.0], lower=count * least)
            kind = (int(space.service_of[option]), float(space.accuracy[option]), node)
            rate = float(space.sustained_rps[option])
            in_kind.setdefault(kind, []).append((int(share[position]), rate, rate * sum(shares)))
            columns.update((member[position], (int(share[position]), len(members))) for member in members)
    for kind, mine in sorted(in_kind.items()):
        total = sum(rate for _, _, rate in mine)
        scale = max(total, 1e-9)
        rates = np.array([rate for _, rate, _ in mine])
        builder.add_row(
            f"rate{kind}", [column for column, _, _ in mine], rates / scale, lower=total / scale, upper=total / scale
        )
    model = builder.build().with_objective(np.array(prices), maximise=False)
    answer = solver.solve(model, budget)
    if not isinstance(answer, Solution):
        return placement
    # A solver's zero may be negative; adding zero makes it plain.
    return tuple(
        Placed(
            placed.group,
            placed.option,
            min(max(float(answer.values[columns[index][0]]) / columns[index][1], 0.0), 1.0) + 0.0,
        )
        for index, placed in enumerate(placement)
    )


def _alike(space: PlanningSpace, placement: Placement) -> list[list[list[int]]]:
    """Return groups that run the same, as lists of the positions of their members in ``placement``.

    The price is convex, so that sharing alike is best for them; where calls tie rates to nodes they stay apart.
    """
    of_group: dict[int, list[int]] = {}
    for index, placed in enumerate(placement):
        of_group.setdefault(placed.group, []).append(index)
    found: dict[tuple[tuple[int, ...], str], list[list[int]]] = {}
    for group, members in of_group.items():
        node = space.groups[group].node if space.requirements.calls else ""
        found.setdefault((tuple(placement[index].option for index in members), node), []).append(members)
    return list(found.values())
