"""Outliving the loss of a node: starts that can, and a bound over classes that knows what it takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner import requirements
from planner.backend import Budget, Solution, solver
from planner.formulation import Formulation
from planner.lexicographic import Search
from planner.objective import GOODPUT, with_kept
from planner.redundancy import Redundant, placed_apart, redundant_starts
from planner.space import PlanningSpace, build_space
from tests.planner.problems import cluster, demand, generated, latency_service, problem, profile


@pytest.fixture(autouse=True)
def one_routing_for_every_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "_MOST_LOSS_PAIRS", 0)


def surviving(seed: int, *, nodes: int = 3, load: float = 1.0, keep: float = 1.0) -> PlanningSpace:
    base = generated(seed, services=3, nodes=nodes, load=load, types=1, batches=(1, 4))
    return build_space(replace(base, settings=replace(base.settings, keep_after_loss=keep)))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_over_classes_no_placement_beats_the_bound(seed: int, keep: float) -> None:
    """Law: (4.21) is a relaxation of (4.20)."""
    space = surviving(seed, load=(0.5, 2.0)[seed % 2], keep=keep)
    assert space.requirements.one_emergency
    assert len(space.classes) < len(space.groups)
    answers = [
        solver("highs").solve(with_kept(Formulation(space, over), GOODPUT, ()), Budget(time_limit_s=20.0))
        for over in (space.classes, space.singles)
    ]
    assert isinstance(answers[0], Solution) == isinstance(answers[1], Solution)
    if isinstance(answers[0], Solution) and isinstance(answers[1], Solution):
        assert answers[0].bound >= answers[1].objective * (1 - 1e-6)


def test_two_nodes_keep_everything_when_each_can_serve_it_all() -> None:
    wanted = problem(
        cluster(("a", "gpu", 1), ("b", "gpu", 1)),
        [latency_service("s", ("m", 1.0)), latency_service("t", ("m", 1.0))],
        [profile("m")],
        demand(s=10.0, t=10.0),
    )
    space = build_space(replace(wanted, settings=replace(wanted.settings, keep_after_loss=1.0)))
    starts = [search.best_rates(pairs, GOODPUT, ()) for search, pairs in _starts(space)]
    best = max(GOODPUT.value(space, start) for start in starts if start is not None)
    assert best == pytest.approx(20.0, rel=1e-6)


def _starts(space: PlanningSpace) -> list[tuple[Search, list[tuple[int, int]]]]:
    search = Search(space, lambda: 0.0, 5.0)
    return [(search, [(placed.group, placed.option) for placed in start]) for start in redundant_starts(space)]


def test_replicas_of_one_service_are_placed_on_different_nodes() -> None:
    space = surviving(2, nodes=3)
    option = next(index for index, each in enumerate(space.options) if space.memory[index].max() <= 0.3)
    placement = placed_apart(space, [Redundant(option=option, replicas=9, share=0.2)])
    nodes = [space.groups[placed.group].node for placed in placement if placed.option == option]
    assert len(nodes) == len(set(nodes)) == 3
