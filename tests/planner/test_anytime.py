"""What more time brings: incumbents only get better, bounds only tighter, and no start is ever lost."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest

from planner import Problem, Settings, Solved, solve
from planner.columns import ColumnSearch
from planner.lexicographic import Search
from planner.objective import tiers
from planner.space import Placement, build_space
from planner.tier import Tier
from plans.plan import Plan
from tests.planner.problems import FEATURES, featured, generated, town

METHODS = ("direct", "columns")


def hard(seed: int, method: str = "direct") -> Problem:
    """Return a problem whose first placements are not optimal, to be solved to the end."""
    exact = Settings(time_limit_s=8.0, gap=0.0, tolerance=0.0, method=method)  # type: ignore[arg-type]
    return generated(seed, services=9, nodes=6, load=3.0, batches=(1, 2, 4, 8, 16), settings=exact)


def ticking(tick_s: float) -> Callable[[], float]:
    """Return a clock on which every look takes ``tick_s``: time runs out at the same place on every machine."""
    ticks = itertools.count()
    return lambda: next(ticks) * tick_s


def planned(wanted: Problem, tick_s: float = 1e-3) -> Plan:
    result = solve(wanted, clock=ticking(tick_s))
    assert isinstance(result, Solved)
    return result.plan


def watched(search: type[Search]) -> type[Search]:
    """Return ``search`` with a record of every incumbent: objective, value and bound."""

    class Watched(search):  # type: ignore[misc, valid-type]
        seen: list[tuple[Tier, float, float]]

        def _offer(self, tier: Tier, placement: Placement | None) -> None:
            super()._offer(tier, placement)
            if tier.best is not None:
                value = tier.objective.value(self._space, tier.best)
                self.seen.append((tier, value, tier.known_bound))

    return Watched


@pytest.mark.parametrize("kind", [Search, ColumnSearch])
@pytest.mark.parametrize("seed", [5])
def test_within_a_run_no_incumbent_is_given_up_and_no_bound_loosened(kind: type[Search], seed: int) -> None:
    space = build_space(hard(seed))
    search = watched(kind)(space, ticking(1e-3), 8.0)
    search.seen = []  # type: ignore[attr-defined]
    search.run()
    seen = search.seen  # type: ignore[attr-defined]
    assert {tier.objective.name for tier, _, _ in seen} == {each.name for each in tiers(space)}
    steps = [(a, b) for a, b in itertools.pairwise(seen) if a[0] is b[0]]
    assert any(b[1] != a[1] for a, b in steps)
    for (tier, before, loose), (_, after, tight) in steps:
        sign = 1.0 if tier.objective.maximise else -1.0
        assert sign * after >= sign * before - 1e-9
        assert sign * tight <= sign * loose + 1e-9
        assert sign * after <= sign * tight + 1e-6 * max(1.0, abs(tight))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [5])
def test_what_is_cut_short_is_no_better_than_the_optimum_and_its_bound_no_tighter(seed: int, method: str) -> None:
    wanted = hard(seed, method)
    done = planned(wanted)
    assert done.solver.status == "optimal"
    for tick_s in (4.0, 0.6, 0.1):
        hurried = planned(wanted, tick_s)
        assert hurried.solver.objective <= done.solver.objective * (1 + 1e-6)
        assert hurried.solver.bound >= done.solver.objective * (1 - 1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [5])
def test_going_on_from_a_plan_with_more_time_never_loses(seed: int, method: str) -> None:
    wanted = hard(seed, method)
    values = []
    for tick_s in (4.0, 0.6, 0.1, 1e-3):
        plan = planned(wanted, tick_s)
        values.append(plan.solver.objective)
        wanted = replace(wanted, current=plan)
    assert all(later >= earlier * (1 - 1e-9) for earlier, later in itertools.pairwise(values))
    assert values[-1] > values[0]


@pytest.mark.parametrize("feature", FEATURES)
def test_without_any_time_left_the_running_plan_is_kept_at_least(feature: str) -> None:
    base = featured(generated(74, services=3, nodes=3, load=1.5, batches=(2, 8)), feature)
    running = planned(base)
    hurried = planned(replace(base, current=running), tick_s=100.0)
    sign = -1.0 if base.settings.minimize else 1.0
    assert sign * hurried.solver.objective >= sign * running.solver.objective - 1e-5 * abs(running.solver.objective)


def test_a_running_plan_that_a_limit_has_outgrown_is_no_start() -> None:
    """The hint is checked: what runs where it is now forbidden is neither kept nor passed on."""
    wanted = town()
    running = planned(wanted)
    homes = {group.node for group in running.groups if group.entry("street")}
    assert homes == {"east"}
    moved = tuple(
        service.model_copy(update={"pin": ("west",)}) if service.name == "street" else service
        for service in wanted.services.services
    )
    services = wanted.services.model_copy(update={"services": moved})
    after = planned(replace(wanted, services=services, current=running))
    assert {group.node for group in after.groups if group.entry("street")} == {"west"}
