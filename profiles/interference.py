"""How much co-located models slow each other down: what was measured, and a model fitted to it for what was not.

Each model has a *sensitivity* s and a *pressure* p; beside others, its latency grows by the factor 1 + s * (sum of
their pressures) (after Mars et al. 2011, "Bubble-Up: increasing utilization in modern warehouse scale computers via
sensible co-locations", with one resource). Copies of a model are neighbours like any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from profiles.document import Neighbour, Profile

__all__ = ["InterferenceModel", "Observation"]

_LEAST_EXCESS = 0.001
"""A slow-down below a thousandth counts as this one, so that it has a logarithm."""

_PRIOR_WEIGHT = 0.05
"""Weight of the mean over all models against one observation: it decides where nothing was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """``model`` took ``factor`` times as long beside ``neighbours``, at least 1."""

    model: str
    neighbours: tuple[str, ...]
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class InterferenceModel:
    """Slow-downs of co-located models on one GPU type.

    Attributes:
        sensitivity: By model.
        pressure: By model.
        measured: What was measured, by model and sorted neighbours; it goes before the fit.
        error_ratio: Mean distance of the fit from what was measured, as a share of it; None where nothing was.
    """

    sensitivity: Mapping[str, float]
    pressure: Mapping[str, float]
    measured: Mapping[tuple[str, tuple[str, ...]], float]
    error_ratio: float | None

    @classmethod
    def of(cls, profiles: Iterable[Profile]) -> InterferenceModel:
        """Fit the model to the ``interference`` and ``neighbours`` of ``profiles``, all of one GPU type."""
        observations = []
        for profile in profiles:
            for concurrency, factor in profile.interference.items():
                if concurrency > 1:
                    copies = (profile.model,) * (concurrency - 1)
                    observations.append(Observation(model=profile.model, neighbours=copies, factor=factor))
            observations += [_observation(profile.model, each) for each in profile.neighbours]
        return cls.fit(observations)

    @classmethod
    def fit(cls, observations: Sequence[Observation]) -> InterferenceModel:
        """Fit by least squares on the logarithm of the excess: log(f - 1) = log s + log(sum of p).

        Where the neighbours of an observation differ, its sum is split evenly between them, once: exact for copies and
        for pairs. Cost: cubic in the number of models.
        """
        names = sorted({name for each in observations for name in (each.model, *each.neighbours)})
        if not names:
            return cls(sensitivity={}, pressure={}, measured={}, error_ratio=None)
        column = {name: position for position, name in enumerate(names)}
        rows, targets, weights = [], [], []
        for each in observations:
            share = max(each.factor - 1, _LEAST_EXCESS) / len(each.neighbours)
            for neighbour in each.neighbours:
                row = np.zeros(2 * len(names))
                row[column[each.model]] += 1
                row[len(names) + column[neighbour]] += 1
                rows.append(row)
                targets.append(math.log(share))
                weights.append(1 / len(each.neighbours))
        typical = float(np.average(targets, weights=weights)) / 2
        prior = math.sqrt(_PRIOR_WEIGHT)
        matrix = np.vstack([np.array(rows) * np.sqrt(weights)[:, None], prior * np.eye(2 * len(names))])
        wanted = np.concatenate([np.array(targets) * np.sqrt(weights), np.full(2 * len(names), prior * typical)])
        solution = np.exp(np.linalg.lstsq(matrix, wanted, rcond=None)[0])
        fitted = cls(
            sensitivity={name: float(solution[column[name]]) for name in names},
            pressure={name: float(solution[len(names) + column[name]]) for name in names},
            measured={},
            error_ratio=None,
        )
        errors = [abs(fitted.factor(each.model, each.neighbours) / each.factor - 1) for each in observations]
        return cls(
            sensitivity=fitted.sensitivity,
            pressure=fitted.pressure,
            measured={(each.model, tuple(sorted(each.neighbours))): each.factor for each in observations},
            error_ratio=sum(errors) / len(errors),
        )

    def factor(self, model: str, neighbours: Sequence[str]) -> float:
        """Return the slow-down of ``model`` beside ``neighbours``, at least 1.

        As measured if this very group was; else by the fit, with the means of all models for one that was never seen.
        Without any measurement, everything on the device waits for everything else in full.
        """
        known = self.measured.get((model, tuple(sorted(neighbours))))
        if known is not None:
            return known
        if not self.sensitivity:
            return 1.0 + len(neighbours)
        sensitivity = self.sensitivity.get(model, _mean(self.sensitivity))
        usual = _mean(self.pressure)
        return 1.0 + sensitivity * sum(self.pressure.get(name, usual) for name in neighbours)


def _observation(model: str, neighbour: Neighbour) -> Observation:
    return Observation(model=model, neighbours=(neighbour.model,), factor=neighbour.factor)


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
