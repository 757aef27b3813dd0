from __future__ import annotations

import pytest

from planner.settings import Settings
from plans.errors import InvalidInput


def test_all_faults_are_reported_at_once() -> None:
    with pytest.raises(InvalidInput) as error:
        Settings(time_limit_s=0, headroom_ratio=1.5, backend="gurobi", parallelisms=((0, 1),))  # type: ignore[arg-type]
    assert {fault.field for fault in error.value.faults} == {
        "time_limit_s",
        "headroom_ratio",
        "backend",
        "parallelisms",
    }


def test_the_floor_of_utilisation_may_not_exceed_the_ceiling() -> None:
    with pytest.raises(InvalidInput, match=r"at most 0\.5"):
        Settings(min_utilisation=0.6, max_utilisation=0.5)


def test_blocking_factors_are_ordered() -> None:
    factors = [Settings(blocking=blocking).blocking_factor for blocking in ("strict", "expected", "none")]  # type: ignore[arg-type]
    assert factors == [1.0, 0.5, 0.0]
