"""Which options a local search should look at: those of the linear relaxation, and those that it nearly took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from planner.backend import Solution
from planner.board import NEGLIGIBLE
from planner.formulation import Formulation
from planner.linear import Floats, LinearModel

__all__ = ["Guidance", "guidance_of"]

_PROMISING = 40
"""Options that the relaxation nearly took, which are remembered."""

_PER_SERVICE = 4
"""Most of these of one service."""

_DRAWN = 10
"""How many of them one step of the search looks at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """What a relaxation over classes says about options.

    Attributes:
        used: Options that it gives compute to.
        promising: The options that lose least at its prices, these first; none where the solver tells no prices.
    """

    used: frozenset[int] = frozenset()
    promising: tuple[int, ...] = ()

    def with_used(self, options: Iterable[int]) -> Guidance:
        """Return the same with ``options`` used too."""
        return replace(self, used=self.used | frozenset(options))

    def draw(self, generator: np.random.Generator) -> frozenset[int]:
        """Return the options used and a few of the promising ones, drawn at random."""
        if not self.promising:
            return self.used
        drawn = generator.choice(self.promising, size=min(_DRAWN, len(self.promising)), replace=False)
        return self.used | frozenset(drawn.tolist())


def guidance_of(formulation: Formulation, model: LinearModel, answer: Solution) -> Guidance:
    """Return what the optimum ``answer`` of the linear relaxation ``model`` over ``formulation`` says."""
    given = answer.values[formulation.share] > NEGLIGIBLE
    used = frozenset(formulation.pair_option[given].tolist())
    if answer.prices is None or not len(formulation.pair_option):
        return Guidance(used=used)
    entries = model.value_of * answer.prices[model.row_of]
    reduced = model.objective - np.bincount(model.column_of, entries, minlength=len(model.variables))
    return Guidance(used=used, promising=_promising(formulation, reduced if model.maximise else -reduced))


def _promising(formulation: Formulation, reduced: Floats) -> tuple[int, ...]:
    """Return the options that lose least at the reduced costs c of shape (variable,), some of every service.

    A replica that serves a share a of compute loses -(c[a] a + c[x]); an option is judged by the smallest replica that
    serves its demand, or else fills a group, per share.
    """
    cap = np.maximum(formulation.space.share_cap[formulation.pair_option], NEGLIGIBLE)
    loss = -(reduced[formulation.share] + reduced[formulation.run] / cap)
    found: dict[int, None] = {}
    taken: Counter[int] = Counter()
    for pair in np.argsort(loss, kind="stable"):
        option = int(formulation.pair_option[pair])
        service = int(formulation.space.service_of[option])
        if option not in found and taken[service] < _PER_SERVICE:
            found[option] = None
            taken[service] += 1
            if len(found) == _PROMISING:
                break
    return tuple(found)
