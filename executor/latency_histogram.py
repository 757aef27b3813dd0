"""Latencies counted in buckets that grow with the value, as HdrHistogram does: constant memory, bounded relative error.

Bucket ``i`` holds values from ``_SMALLEST_S * _GROWTH**i`` on; a quantile is told as the upper end of its bucket, so it
is never too low, and at most 1 % too high. Histograms of several processes add up exactly.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["LatencyHistogram"]

_SMALLEST_S = 1e-6
_GROWTH = 1.01
_BUCKETS = 2400  # up to more than six hours
_LOG_GROWTH = math.log(_GROWTH)


class LatencyHistogram:
    """Counts of durations, seconds."""

    def __init__(self, counts: NDArray[np.int64] | None = None) -> None:
        self.counts = np.zeros(_BUCKETS, dtype=np.int64) if counts is None else counts

    def add(self, seconds: float) -> None:
        """Count one duration; what is below a microsecond or above the last bucket goes to the first or last."""
        bucket = int(math.log(max(seconds, _SMALLEST_S) / _SMALLEST_S) / _LOG_GROWTH)
        self.counts[min(bucket, _BUCKETS - 1)] += 1

    def merge(self, other: LatencyHistogram) -> None:
        """Add the counts of ``other``."""
        self.counts += other.counts

    @property
    def count(self) -> int:
        """Durations counted."""
        return int(self.counts.sum())

    def quantile_s(self, share: float) -> float | None:
        """Return the duration that ``share`` (0 to 1) of all do not exceed, at most 1 % too high; None without any."""
        count = self.count
        if not count:
            return None
        rank = max(1, math.ceil(share * count))
        bucket = int(np.searchsorted(np.cumsum(self.counts), rank))
        return float(_SMALLEST_S * _GROWTH ** (bucket + 1))
