"""What a simulation is worth under the objective of the plan: one number per sampled trace, compiled.

The objectives are those of docs/formulation.md, section 5, with the share served in time in place of the fluid one, and
their mean over the traces. Lexicographic max-min fairness is an ordered weighted average with weights that fall by a
factor (R. R. Yager, IEEE Trans. SMC 18, 1988; it tends to the lexicographic order as the factor grows). What comes
after the first objective is a thousandth part of goodput, accuracy included, so that ties are broken by it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.fairness import curves
from planner.layout import Indices, inner
from planner.linear import Floats
from planner.space import PlanningSpace

__all__ = ["Worth", "worth_of", "worth_of_block"]

_ACCURACY_WORTH = 1e-3
"""Goodput that one unit of accuracy is worth: enough to break ties, as accuracy is the objective after goodput."""
_LATER_WORTH = 1e-3
_FALL = 4.0
_RANKS = 32
"""Least shares that (12.4) looks at: what comes after them counts less than rounding. Sorting takes long to compile."""
_GOODPUT, _UTILITY, _FAIR_SUM, _MAX_MIN = range(4)
_KINDS = {"goodput": _GOODPUT, "utility": _UTILITY, "fair-sum": _FAIR_SUM, "max-min": _MAX_MIN}


class Worth(NamedTuple):
    """The objective as arrays.

    Attributes:
        kind: Shape (1,): which objective.
        value: Shape (option,): what a request served in time counts in goodput.
        service_of: Shape (option,).
        weight: Shape (service,).
        points: Shape (service,): points of its utility curve.
        share: Shape (service, point): served shares, rising.
        utility: Shape (service, point): the utility there, never falling; two points at one share are a jump.
    """

    kind: Indices
    value: Floats
    service_of: Indices
    weight: Floats
    points: Indices
    share: Floats
    utility: Floats


def worth_of(space: PlanningSpace) -> Worth:
    """Return the objective of ``space``."""
    service_of = space.service_of if len(space.options) else np.zeros(1, dtype=np.int64)
    accuracy = space.accuracy if len(space.options) else np.zeros(1)
    shapes = [curve.points for curve in curves(space)]
    table = np.zeros((len(shapes), max(map(len, shapes), default=1), 2))
    for service, points in enumerate(shapes):
        table[service, : len(points)] = points
    return Worth(
        kind=np.array([_KINDS[space.problem.settings.objective]], dtype=np.int32),
        value=space.weight[service_of] * (1.0 + _ACCURACY_WORTH * accuracy),
        service_of=service_of.astype(np.int32),
        weight=np.ascontiguousarray(space.weight),
        points=np.array([len(points) for points in shapes], dtype=np.int32),
        share=np.ascontiguousarray(table[:, :, 0]),
        utility=np.ascontiguousarray(table[:, :, 1]),
    )


@inner
def worth_of_block(worth: Worth, good: NDArray[np.int64], value: Floats, offered: NDArray[np.int64]) -> float:
    """Return what a trace is worth in which each service was served so: (12.1) to (12.4) of docs/formulation.md.

    Args:
        worth: The objective.
        good: Shape (service,): requests served in time.
        value: Shape (service,): what they count in goodput, `Worth.value` summed.
        offered: Shape (service,): requests.
    """
    total = float(value.sum())
    if worth.kind[0] == _GOODPUT:
        return total
    shares = np.empty(len(good))
    services, most, first = 0, 0.0, 0.0
    for service in range(len(good)):
        if offered[service] > 0:
            share = good[service] / offered[service]
            shares[services] = share
            services += 1
            most += worth.weight[service] * offered[service]
            if worth.kind[0] == _UTILITY:
                first += worth.weight[service] * _utility(worth, service, share)
    if services == 0:
        return 0.0
    found = shares[:services]
    if worth.kind[0] == _FAIR_SUM:
        first = found.sum() + services * (found.min() - found.max() + 1.0)
    elif worth.kind[0] == _MAX_MIN:
        part = 1.0
        for rank in range(min(services, _RANKS)):
            least = rank
            for other in range(rank + 1, services):
                if found[other] < found[least]:
                    least = other
            found[rank], found[least] = found[least], found[rank]
            first += part * found[rank]
            part /= _FALL
    return float(first + _LATER_WORTH * total / most)


@inner
def _utility(worth: Worth, service: int, share: float) -> float:
    """Return the curve's value at ``share``, the higher one at a jump; as `planner.utility.Curve.at`."""
    found = 0.0
    for point in range(worth.points[service]):
        left, low = worth.share[service, point], worth.utility[service, point]
        if left <= share + 1e-6:
            found = max(found, float(low))
            if point + 1 < worth.points[service] and share < worth.share[service, point + 1]:
                width = worth.share[service, point + 1] - left
                rise = worth.utility[service, point + 1] - low
                found = max(found, float(low + rise * max(share - left, 0.0) / width))
    return found
