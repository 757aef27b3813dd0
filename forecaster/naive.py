"""Methods without parameters: the next window is like the last one, or like the one a season ago.

Both are one rule, y(t + h) = y(t + h - m k) with the smallest k that reaches into the history, for a season of m
windows; the last value is m = 1 (Hyndman and Athanasopoulos, Forecasting: Principles and Practice, 3rd edition, section
5.2).

Their uncertainty is what the rule itself got wrong in the past. A forecast that reaches k seasons back is off by
y(u) - y(u - m k), and every u of the history gives one such error. When fewer than ``LEAST_ERRORS`` windows show the
error for a k, the errors of the largest k that has enough are widened by the square root of the ratio, as a random walk
would have it (section 5.5 there).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from forecaster.protocol import History, Outlook
from plans.errors import InvalidInput

__all__ = ["LEAST_ERRORS", "LastValue", "SeasonalNaive", "seasonal_errors"]

Floats = npt.NDArray[np.float64]

LEAST_ERRORS = 8
"""Fewest past errors from which quantiles are taken."""

_DAY_S = 86400.0
_HOUR_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LastValue:
    """Every window is like the last one seen."""

    name: str = "last-value"

    def least_windows(self) -> int:
        """Return the windows that give `LEAST_ERRORS` one-step errors."""
        return 1 + LEAST_ERRORS

    def fit(self, history: History) -> FittedNaive:
        """Return the fitted method."""
        return FittedNaive(history=history, period=1, description=self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeasonalNaive:
    """Every window is like the one a season earlier.

    Attributes:
        period: Season in windows, >= 1. Left out: one day if the history is longer than one, else one hour if it is at
            least two, else half of the history; which one it was is said in the description.
    """

    period: int | None = None
    name: str = "seasonal-naive"

    def __post_init__(self) -> None:
        if self.period is not None and self.period < 1:
            raise InvalidInput.of("at least 1 window", field="period", found=self.period)

    def least_windows(self) -> int:
        """Return the windows that give `LEAST_ERRORS` errors of one season."""
        return LEAST_ERRORS + (self.period or LEAST_ERRORS)

    def fit(self, history: History) -> FittedNaive:
        """Return the fitted method."""
        if self.period is not None:
            return FittedNaive(history=history, period=self.period, description=self._named(self.period, history, ""))
        period, why = _season(history)
        return FittedNaive(history=history, period=period, description=self._named(period, history, why))

    def _named(self, period: int, history: History, why: str) -> str:
        return f"{self.name} (season of {period} windows, {period * history.window_s:g} s{why})"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FittedNaive:
    """A seasonal rule and the history that it repeats."""

    history: History
    period: int
    description: str

    def outlook(self, windows: int, levels: Sequence[float], *, seed: int) -> Outlook:
        """Return the forecast; there is nothing random in it, so ``seed`` does not matter."""
        del seed
        counts = self.history.counts
        step = np.arange(windows)
        place = self.history.windows - self.period + step % self.period
        mean = counts[:, place]
        quantiles = np.empty((*mean.shape, len(levels)))
        for season in range(1, math.ceil(windows / self.period) + 1):
            span = slice((season - 1) * self.period, min(season * self.period, windows))
            errors = _errors(counts, self.period, season)
            spread = np.quantile(errors, levels, axis=1).T  # shape (service, level)
            quantiles[:, span] = mean[:, span, None] + spread[:, None, :]
        return Outlook(mean=mean, quantiles=np.maximum(quantiles, 0.0))


def seasonal_errors(counts: Floats, period: int, seasons: int) -> Floats:
    """Return y(u) - y(u - period * seasons) for every u that has it, shape (service, error), requests per window."""
    lag = period * seasons
    return counts[:, lag:] - counts[:, :-lag]


def _errors(counts: Floats, period: int, seasons: int) -> Floats:
    """Return the errors of a forecast ``seasons`` back, widened from fewer seasons where too few windows show them."""
    shown = min(seasons, (counts.shape[1] - LEAST_ERRORS) // period)
    return seasonal_errors(counts, period, shown) * math.sqrt(seasons / shown)


def _season(history: History) -> tuple[int, str]:
    """Return the season for a history, in windows, and what to say about it."""
    day, hour = round(_DAY_S / history.window_s), round(_HOUR_S / history.window_s)
    room = history.windows - LEAST_ERRORS
    if 1 < day <= room:
        return day, ": one day"
    if 1 < hour <= history.windows // 2 and hour <= room:
        return hour, ": one hour, since the history is not longer than one day"
    return min(history.windows // 2, room), ": half of the history, which is too short for a day or an hour"
