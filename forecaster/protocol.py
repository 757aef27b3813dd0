"""What every forecasting method takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from traces.table import RateTrace

__all__ = ["FittedForecaster", "Forecaster", "History", "Outlook"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class History:
    """What is known when a forecast is made: counts without gaps.

    Attributes:
        services: Names, sorted.
        counts: Shape (service, window), requests per window; at least one window.
        window_s: Length of a window, seconds.
        end_s: End of the last window, seconds: where the forecast begins.
        filled: Number of (service, window) pairs that nobody counted and that stand as zero.
    """

    services: tuple[str, ...]
    counts: Floats
    window_s: float
    end_s: float
    filled: int

    @property
    def windows(self) -> int:
        """Number of windows."""
        return int(self.counts.shape[1])

    @classmethod
    def of(cls, trace: RateTrace) -> History:
        """Return the history that ``trace`` tells, its gaps filled with zero."""
        return cls(
            services=trace.services,
            counts=trace.counts().astype(np.float64),
            window_s=trace.window_s,
            end_s=trace.end_s,
            filled=trace.gaps,
        )

    def first(self, windows: int) -> History:
        """Return the history as it was after its first ``windows`` windows."""
        return History(
            services=self.services,
            counts=self.counts[:, :windows],
            window_s=self.window_s,
            end_s=self.end_s - (self.windows - windows) * self.window_s,
            filled=self.filled,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outlook:
    """A forecast in requests per window.

    Attributes:
        mean: Shape (service, window).
        quantiles: Shape (service, window, level): does not fall along the levels.
    """

    mean: Floats
    quantiles: Floats


class FittedForecaster(Protocol):
    """A method that has seen a history."""

    @property
    def description(self) -> str:
        """The method's name and what it decided about this history, for people and for ``Demand.method``."""

    def outlook(self, windows: int, levels: Sequence[float], *, seed: int) -> Outlook:
        """Return the forecast for the ``windows`` windows after the history, at quantile ``levels`` (ascending)."""


class Forecaster(Protocol):
    """A forecasting method."""

    @property
    def name(self) -> str:
        """Its name on the command line."""

    def least_windows(self) -> int:
        """Return the number of windows of history without which it cannot say anything."""

    def fit(self, history: History) -> FittedForecaster:
        """Look at ``history``, which has at least ``least_windows()`` windows."""
