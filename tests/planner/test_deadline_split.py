"""Splitting end-to-end deadlines: safe on every path, and the best of the grid."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreplan.planning import verify
from planner import Solved, planning, solve
from planner.deadline_split import as_planned, best_split, grid, tight_workflows
from planner.deadlines import longest_through, stages
from planner.lexicographic import Search
from planner.problem import Problem
from planner.space import build_space
from planner.tier import Outcome
from plans.service import Edge, LatencySlo, Workflow
from tests.planner.problems import QUIET, cluster, demand, latency_service, problem, profile


def chain(*names: str, deadline_s: float = 0.1) -> Workflow:
    edges = tuple(Edge(source=before, target=after) for before, after in itertools.pairwise(names))
    return Workflow(name="w", slo=LatencySlo(deadline_s=deadline_s), edges=edges, affinity="none")


def staged(
    *growths: float,
    rate: float = 400.0,
    deadline_s: float = 0.1,
    nodes: int = 2,
    bases_s: tuple[float, ...] = (0.01, 0.01, 0.01),
) -> Problem:
    """Return a chain of stages with these least latencies, which gain differently from larger batches."""
    names = [f"stage{index}" for index in range(len(growths))]
    plain = problem(
        cluster(*((f"node{index}", "gpu", 1) for index in range(nodes))),
        [latency_service(name, (name, 1.0), deadline_s=1.0) for name in names],
        [
            profile(name, growth=growth, base_s=base_s, batches=(1, 2, 4, 8, 16))
            for name, growth, base_s in zip(names, growths, bases_s, strict=False)
        ],
        demand(**{names[0]: rate}),
        settings=replace(QUIET, time_limit_s=60.0),
    )
    with_workflow = plain.services.model_copy(update={"workflows": (chain(*names, deadline_s=deadline_s),)})
    return replace(plain, services=with_workflow)


def goodput_of(wanted: Problem) -> float:
    outcome = Search(build_space(wanted), time.monotonic, time.monotonic() + 20.0).run()
    assert isinstance(outcome, Outcome)
    assert outcome.tiers[0].gap <= 1e-6
    return outcome.tiers[0].value


@st.composite
def workflows(draw: st.DrawFn) -> Workflow:
    names = [f"s{index}" for index in range(draw(st.integers(2, 5)))]
    edges = [Edge(source=names[draw(st.integers(0, index - 1))], target=names[index]) for index in range(1, len(names))]
    extra = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=3))
    edges += [Edge(source=names[a], target=names[b]) for a, b in extra if a < b < len(names)]
    different = {(edge.source, edge.target): edge for edge in edges}
    return Workflow(name="w", slo=LatencySlo(deadline_s=1.0), edges=tuple(different.values()))


@settings(max_examples=30)
@given(workflows())
def test_every_split_gives_every_stage_a_part_and_no_path_more_than_the_whole(workflow: Workflow) -> None:
    splits = grid(workflow)
    assert 0 < len(splits) <= 64
    for shares in splits:
        assert set(shares) == set(stages(workflow))
        assert min(shares.values()) > 0
        assert max(longest_through(workflow, shares, {}).values()) <= 1 + 1e-9


@settings(max_examples=30)
@given(workflows())
def test_no_stage_of_a_split_could_be_given_more(workflow: Workflow) -> None:
    for shares in grid(workflow):
        assert min(longest_through(workflow, shares, {}).values()) == pytest.approx(1.0)


def test_a_chain_of_two_is_cut_in_twentieths() -> None:
    assert [shares["a"] for shares in grid(chain("a", "b"))] == pytest.approx([part / 20 for part in range(1, 20)])


@pytest.mark.parametrize(
    ("growths", "deadline_s"), [((0.05, 0.9), 0.06), ((0.9, 0.05), 0.05), ((0.3, 0.3), 0.06), ((0.02, 0.8, 0.8), 0.12)]
)
def test_no_split_of_the_grid_beats_the_one_that_is_chosen(growths: tuple[float, ...], deadline_s: float) -> None:
    """Brute force: every split solved on its own."""
    wanted = staged(*growths, deadline_s=deadline_s)
    (workflow,) = wanted.services.workflows
    every = [goodput_of(replace(wanted, deadline_shares={"w": shares})) for shares in grid(workflow)]
    proportional = goodput_of(wanted)
    split = best_split(wanted, time.monotonic, time.monotonic() + 60.0)
    assert split.complete
    chosen = goodput_of(split.space.problem)
    assert chosen == pytest.approx(max(*every, proportional), rel=1e-5)
    assert split.bound is None or max(split.bound, chosen) == pytest.approx(chosen, rel=1e-3)


def test_a_stage_that_gains_from_batches_is_given_more_than_its_proportional_part() -> None:
    wanted = staged(0.1, 0.9, deadline_s=0.06, rate=3000.0, bases_s=(0.002, 0.02))
    result = solve(wanted)
    assert isinstance(result, Solved)
    assert not verify(result.plan, wanted.cluster, wanted.services, wanted.profiles)
    deadlines_s = {entry.service: entry.deadline_s for group in result.plan.groups for entry in group.loadout}
    assert deadlines_s["stage0"] > 0.06 * 0.002 / 0.022 * 1.2
    assert sum(deadlines_s.values()) <= 0.06 + 1e-9
    assert result.plan.solver.objective > goodput_of(wanted) * 1.05
    assert as_planned(wanted, result.plan).deadline_shares["w"] == pytest.approx(
        {name: deadlines_s[name] / 0.06 for name in deadlines_s}, rel=0.1
    )


def test_the_bound_holds_for_every_split_also_when_time_is_short() -> None:
    wanted = staged(0.02, 0.9, deadline_s=0.06, rate=3000.0)
    best = max(
        goodput_of(replace(wanted, deadline_shares={"w": shares})) for shares in grid(wanted.services.workflows[0])
    )
    hurried = best_split(wanted, time.monotonic, time.monotonic())
    assert not hurried.complete
    assert hurried.bound is not None
    assert hurried.bound >= best * (1 - 1e-6)


def test_workflows_with_time_to_spare_and_splits_that_are_stated_are_left_alone() -> None:
    assert tight_workflows(staged(0.5, 0.5, deadline_s=100.0)) == ()
    wanted = staged(0.5, 0.5)
    assert len(tight_workflows(wanted)) == 1
    assert tight_workflows(replace(wanted, deadline_shares={"w": {"stage0": 0.5, "stage1": 0.5}})) == ()


def test_both_methods_choose_the_same_split_of_a_small_problem() -> None:
    wanted = staged(0.1, 0.9, deadline_s=0.06, rate=3000.0, bases_s=(0.002, 0.02))
    results = [
        solve(replace(wanted, settings=replace(wanted.settings, method=method))) for method in ("direct", "columns")
    ]
    plans = [result.plan for result in results if isinstance(result, Solved)]
    assert len(plans) == 2
    assert plans[0].solver.objective == pytest.approx(plans[1].solver.objective, rel=1e-5)
    assert not any("in proportion" in warning for plan in plans for warning in plan.warnings)


def test_a_large_problem_says_that_it_is_split_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "LARGEST_EXACT_MODEL", 0)
    wanted = staged(0.5, 0.5)
    result = solve(replace(wanted, settings=replace(wanted.settings, time_limit_s=4.0)))
    assert isinstance(result, Solved)
    assert any("in proportion" in warning for warning in result.plan.warnings)
