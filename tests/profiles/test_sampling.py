from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.sampling import median_interval_ranks, median_interval_ratio, nearest_rank, summarise


@given(st.lists(st.floats(1e-6, 10), min_size=1, max_size=300), st.floats(0.01, 1.0))
def test_a_nearest_rank_is_a_sample_that_the_share_does_not_exceed(samples: list[float], level: float) -> None:
    ordered = sorted(samples)
    value = nearest_rank(ordered, level)
    assert sum(sample <= value for sample in ordered) >= level * len(ordered) - 1e-6
    assert sum(sample < value for sample in ordered) < level * len(ordered) + 1e-6


@pytest.mark.parametrize(("samples", "lower"), [(6, 1), (9, 2), (20, 6), (30, 10), (50, 18), (70, 27)])
def test_ranks_are_those_of_the_published_table(samples: int, lower: int) -> None:
    """Le Boudec 2010, table A.1: confidence intervals of the median at 95 %."""
    assert median_interval_ranks(samples) == (lower, samples + 1 - lower)


@pytest.mark.parametrize("samples", range(6))
def test_fewer_than_six_samples_bound_no_median(samples: int) -> None:
    assert median_interval_ranks(samples) is None


@given(st.integers(6, 70))
def test_the_interval_covers_at_least_95_percent_and_the_next_narrower_does_not(samples: int) -> None:
    """P(cover) = 1 - 2 P(B < j) with B binomial(samples, 1/2)."""

    def coverage(rank: int) -> float:
        return 1 - 2 * sum(math.comb(samples, k) for k in range(rank)) / 2**samples

    ranks = median_interval_ranks(samples)
    assert ranks is not None
    assert coverage(ranks[0]) >= 0.95
    assert ranks[0] + 1 > (samples + 1) // 2 or coverage(ranks[0] + 1) < 0.95


@pytest.mark.parametrize("samples", [15, 71, 200])
def test_the_interval_covers_the_true_median_of_a_skewed_distribution(samples: int) -> None:
    ranks = median_interval_ranks(samples)
    assert ranks is not None
    draws = np.sort(np.random.default_rng(7).lognormal(size=(4000, samples)), axis=1)
    covered = (draws[:, ranks[0] - 1] <= 1.0) & (draws[:, ranks[1] - 1] >= 1.0)
    assert covered.mean() >= 0.94


def test_equal_samples_have_an_interval_of_no_width() -> None:
    assert median_interval_ratio([0.5] * 6) == 0.0
    assert median_interval_ratio([0.5] * 5) is None


def test_an_outlier_moves_neither_the_median_nor_its_interval() -> None:
    samples = [1.0 + index / 1000 for index in range(40)]
    spoiled = [*samples[:-1], 1000.0]
    assert summarise(spoiled).p50 == summarise(samples).p50
    assert summarise(spoiled).p95 == summarise(samples).p95
    assert median_interval_ratio(spoiled) == median_interval_ratio(samples)


@pytest.mark.parametrize(("samples", "p95", "p99"), [(19, False, False), (20, True, False), (100, True, True)])
def test_a_percentile_is_stated_only_with_samples_beyond_it(samples: int, p95: bool, p99: bool) -> None:
    found = summarise([1.0 + index for index in range(samples)])
    assert (found.p95 is not None, found.p99 is not None) == (p95, p99)


def test_percentiles_are_nearest_ranks_of_all_samples() -> None:
    found = summarise([float(index) for index in range(100, 0, -1)])
    assert (found.mean, found.p50, found.p95, found.p99) == (50.5, 50.0, 95.0, 99.0)


def test_no_samples_have_no_statistics() -> None:
    with pytest.raises(ValueError, match="at least one"):
        summarise([])
