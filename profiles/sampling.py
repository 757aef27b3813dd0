"""Statistics of repeated timings that outliers cannot spoil: nearest ranks and order-statistic intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

from profiles.document import LatencyStatistics

__all__ = ["median_interval_ranks", "median_interval_ratio", "nearest_rank", "summarise"]

_EXACT_UP_TO = 70
_Z_95 = 1.96
_LEAST_SAMPLES = {0.95: 20, 0.99: 100}
"""Fewest samples with one beyond the percentile: below, its nearest rank would be the largest sample."""


def nearest_rank(ordered: Sequence[float], level: float) -> float:
    """Return the smallest of the sorted samples that at least a share ``level`` of them does not exceed."""
    return ordered[max(0, math.ceil(level * len(ordered) - 1e-9) - 1)]


def median_interval_ranks(samples: int) -> tuple[int, int] | None:
    """Return the ranks, from 1, of the samples that bound the median with at least 95 % confidence.

    None below 6 samples, where no such pair exists. Free of any distribution: the number of samples below the median is
    binomial with p = 1/2, so ranks (j, samples + 1 - j) cover it with probability 1 - 2 P(B < j). Exact up to 70
    samples, then by the normal approximation (Le Boudec, "Performance Evaluation of Computer and Communication
    Systems", 2010, theorem 2.1 and appendix A).
    """
    if samples > _EXACT_UP_TO:
        lower = math.floor(samples / 2 - _Z_95 * math.sqrt(samples) / 2)
        return lower, samples + 1 - lower
    below = 0
    rank = 0
    while below + math.comb(samples, rank) <= 0.025 * 2**samples:
        below += math.comb(samples, rank)
        rank += 1
    return (rank, samples + 1 - rank) if rank else None


def median_interval_ratio(ordered: Sequence[float]) -> float | None:
    """Return how far the 95 % interval of the median reaches to its farther side, as a share of the median.

    None where there are too few samples for an interval. ``ordered`` is sorted and positive.
    """
    ranks = median_interval_ranks(len(ordered))
    if ranks is None:
        return None
    median = nearest_rank(ordered, 0.5)
    lower, upper = (ordered[rank - 1] for rank in ranks)
    return max(upper - median, median - lower) / median


def summarise(samples: Sequence[float]) -> LatencyStatistics:
    """Return mean and percentiles of ``samples``, seconds.

    The mean is that of all samples, since a device spends the slow ones too. p95 needs 20 samples and p99 a hundred;
    with fewer they are left out rather than guessed.

    Raises:
        ValueError: There are no samples.
    """
    if not samples:
        raise ValueError("statistics need at least one sample")
    ordered = sorted(samples)
    stated = {level: nearest_rank(ordered, level) for level, least in _LEAST_SAMPLES.items() if len(ordered) >= least}
    return LatencyStatistics(
        mean=math.fsum(ordered) / len(ordered),
        p50=nearest_rank(ordered, 0.5),
        p95=stated.get(0.95),
        p99=stated.get(0.99),
    )
