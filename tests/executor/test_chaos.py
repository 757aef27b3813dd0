from __future__ import annotations

from pathlib import Path

import pytest

from tests.executor.chaos import KINDS, Chaos, run_chaos

CLEAR = {"OK", "UNAVAILABLE"}
"""How a request may end while processes are killed: answered, or told that it may be sent again."""


def check(chaos: Chaos, kills: int) -> None:
    """Whatever dies behind the gateway, its clients are answered: only what a gateway takes with it is lost."""
    assert sum(map(len, chaos.recovery_s.values())) == kills
    assert set(chaos.statuses) <= CLEAR, chaos.problems
    assert chaos.unanswered == 0
    assert all(chaos.ended[kind]["OK"] > 0 for kind in KINDS), chaos.ended
    lost = {kind: count for kind, ended in chaos.ended.items() if (count := ended["UNAVAILABLE"])}
    assert set(lost) <= {"gateway"}, chaos.problems


def test_one_kill_of_each_kind_leaves_no_request_without_an_answer_and_the_plan_in_force(tmp_path: Path) -> None:
    check(run_chaos(tmp_path, len(KINDS), seed=1), len(KINDS))


@pytest.mark.slow
def test_a_soak_of_a_hundred_kills(tmp_path: Path) -> None:
    check(run_chaos(tmp_path, 100, seed=2, limit_s=600.0), 100)
