"""The compiled engine and the naive simulator, both written from docs/evaluator.md, say the same of every request."""

from __future__ import annotations

import pytest

from tests.evaluator.comparison import disagreements, is_static
from tests.evaluator.random_scenarios import FEATURES, random_case

SCENARIOS = 504


@pytest.mark.parametrize("feature", FEATURES)
def test_every_request_ends_as_in_the_naive_simulator(feature):
    """Law: outcome, reason, group, batch and finish of every request are those of the page, whoever reads it.

    See `comparison.reduced` for a way from a failing seed to a small scenario.
    """
    cases = {s: random_case(s) for s in range(SCENARIOS) if FEATURES[s % len(FEATURES)] == feature}
    differing = {s: found[:2] for s, case in cases.items() if is_static(case) and (found := disagreements(case))}
    assert not differing
