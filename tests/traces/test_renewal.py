"""Arrivals from a fitted model: what it keeps of the trace, and when it says that it does not apply."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces.renewal import RenewalModel, looks_renewal
from traces.synthesis import Diurnal, Gamma, Poisson, synthesise
from traces.table import RequestTrace


def test_rates_and_burstiness_are_found_again():
    trace = synthesise({"a": Poisson(rate_rps=50), "b": Gamma(rate_rps=20, cv=3)}, duration_s=500, seed=1)
    model = RenewalModel.fit(trace)
    assert model.services == ("a", "b")
    assert model.rate_rps == pytest.approx([50, 20], rel=0.1)
    assert model.cv == pytest.approx([1, 3], rel=0.15)
    # cv / sqrt(n)
    assert model.spread == pytest.approx([1 / 25000**0.5, 3 / 10000**0.5], rel=0.2)


def test_equal_rates_are_shrunk_together_and_different_ones_stay_apart():
    alike = synthesise({f"s{k}": Gamma(rate_rps=2, cv=6) for k in range(12)}, duration_s=300, seed=2)
    raw = np.bincount(alike.codes) / alike.duration_s
    assert RenewalModel.fit(alike).rate_rps.std() < 0.5 * raw.std()
    apart = synthesise({f"s{k}": Poisson(rate_rps=2.0**k) for k in range(6)}, duration_s=300, seed=2)
    assert RenewalModel.fit(apart).rate_rps == pytest.approx(np.bincount(apart.codes) / 300, rel=0.02)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.floats(0.5, 8), st.floats(0, 0.5), st.integers(0, 100))
def test_all_samples_together_hold_what_is_expected(count, cv, spread, seed):
    """Over all traces a service gets its expected number, to one; times are sorted and inside."""
    model = RenewalModel(
        services=("a", "b"), rate_rps=np.array([3.0, 0.0]), spread=np.array([spread, 0.0]), cv=np.array([cv, 1.0])
    )
    samples = model.sample(40.0, count, np.random.default_rng(seed))
    assert len(samples) == count
    for arrival_s, codes in samples:
        assert (np.diff(arrival_s) >= 0).all()
        assert ((arrival_s >= 0) & (arrival_s <= 40.0)).all()
        assert (codes == 0).all()
    total = sum(len(arrival_s) for arrival_s, _ in samples)
    if spread == 0:
        assert abs(total - 120 * count) <= 1
    assert total >= 120 * count * 0.5


def test_samples_are_as_bursty_as_the_model():
    model = RenewalModel(services=("a",), rate_rps=np.array([10.0]), spread=np.zeros(1), cv=np.array([4.0]))
    ((arrival_s, _),) = model.sample(4000.0, 1, np.random.default_rng(3))
    gaps = np.diff(arrival_s)
    assert gaps.std() / gaps.mean() == pytest.approx(4.0, rel=0.1)


def test_the_same_seed_gives_the_same_samples():
    model = RenewalModel.fit(synthesise({"a": Gamma(rate_rps=5, cv=2)}, duration_s=100, seed=1))
    first, again, other = (model.sample(50.0, 3, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(one[0], two[0]) for one, two in zip(first, again, strict=True))
    assert not np.array_equal(first[0][0], other[0][0])


def test_constant_rates_look_like_renewal_and_moving_ones_do_not():
    assert looks_renewal(synthesise({"a": Poisson(rate_rps=20), "b": Gamma(rate_rps=9, cv=5)}, duration_s=400, seed=1))
    waves = {name: Diurnal(mean_rps=20, amplitude_ratio=0.9, period_s=400) for name in "ab"}
    assert not looks_renewal(synthesise(waves, duration_s=400, seed=1))


def test_services_that_move_together_do_not_look_like_independent_ones():
    generator = np.random.default_rng(5)
    busy = np.repeat(generator.random(20) < 0.5, 50) * 20 + 0
    arrival_s = np.sort(np.concatenate([np.arange(1000) + generator.random(1000) * 0.5 for _ in range(8)]))
    keep = busy[np.minimum(arrival_s.astype(int), 999)] > 0
    arrival_s = arrival_s[keep]
    names = np.array(list("abcdefgh"))[generator.integers(0, 8, len(arrival_s))]
    assert not looks_renewal(RequestTrace(pd.DataFrame({"arrival_s": arrival_s, "service": names}), duration_s=1000))


def test_a_trace_too_short_to_tell_is_taken_for_renewal():
    assert looks_renewal(RequestTrace(pd.DataFrame({"arrival_s": [0.0, 1.0], "service": ["a", "a"]})))
