"""Confidence intervals of paired comparisons: every policy served the same arrivals, so only differences matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Interval", "mean_interval", "paired_difference"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean with the bounds of its confidence interval; the bounds are None where one sample says nothing of them."""

    mean: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside: the difference is significant at the interval's level."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean_interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """Return the mean of ``values`` with its Student t interval.

    Args:
        values: At least one, one per seed.
        level: Confidence, in (0, 1).
    """
    found = np.asarray(values, dtype=np.float64)
    mean = float(found.mean())
    if found.size < 2:
        return Interval(mean=mean, low=None, high=None)
    from scipy.stats import t  # here, because it takes half a second to import

    half = float(t.ppf((1 + level) / 2, found.size - 1)) * float(found.std(ddof=1)) / math.sqrt(found.size)
    return Interval(mean=mean, low=mean - half, high=mean + half)


def paired_difference(values: Sequence[float], reference: Sequence[float], *, level: float = 0.95) -> Interval:
    """Return the mean of ``values[i] - reference[i]`` with its Student t interval.

    Raises:
        ValueError: The two are not of one length.
    """
    return mean_interval(
        [value - other for value, other in zip(values, reference, strict=True)],
        level=level,
    )
