"""Confidence intervals over seeds."""

import numpy as np
import pytest

from evaluator.paired import mean_interval, paired_difference


def test_one_seed_says_nothing_about_the_spread():
    found = mean_interval([0.5])
    assert (found.mean, found.low, found.high) == (0.5, None, None)
    assert not found.excludes_zero


def test_runs_that_are_not_paired_are_refused():
    with pytest.raises(ValueError, match="argument"):
        paired_difference([1.0, 2.0], [1.0])


def test_the_interval_of_five_seeds_is_students():
    """Mean 3, standard deviation sqrt(2.5), t(0.975, 4) = 2.7764: half width 1.9632."""
    found = mean_interval([1, 2, 3, 4, 5])
    assert found.high - found.mean == pytest.approx(2.7764451 * np.sqrt(2.5 / 5), rel=1e-6)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


def test_it_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = sum(
        found.low <= 0 <= found.high for found in (mean_interval(generator.normal(size=6)) for _ in range(1000))
    )
    assert 930 <= covered <= 968


def test_pairing_removes_what_the_seeds_have_in_common():
    generator = np.random.default_rng(2)
    common = generator.normal(size=10)
    found = paired_difference(list(common + 0.1 + generator.normal(size=10) * 0.01), list(common))
    assert found.excludes_zero
    assert found.mean == pytest.approx(0.1, abs=0.01)
