"""Outliving the loss of a node: starts that can, and a bound over classes that knows what it takes."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from planner import requirements
from planner.backend import Budget, Solution, solver
from planner.columns import ColumnSearch
from planner.formulation import Formulation
from planner.lexicographic import Search
from planner.linking import Linking
from planner.master import Master, Network, converge
from planner.objective import GOODPUT, with_kept
from planner.recourse import served_in
from planner.redundancy import Redundant, placed_apart, redundant_starts
from planner.space import PlanningSpace, build_space
from planner.tier import Outcome
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


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_the_bound_of_column_generation_counts_the_losses(seed: int, keep: float) -> None:
    """Law: the master with (4.21) bounds every placement that keeps (4.20), and by less than one that knows no loss."""
    space = surviving(seed, load=3.0, keep=keep)
    answer = solver("highs").solve(
        with_kept(Formulation(space, space.singles), GOODPUT, ()), Budget(time_limit_s=20.0, gap=1e-4)
    )
    assert isinstance(answer, Solution)
    bound = converged_bound(space)
    assert bound >= answer.objective * (1 - 1e-6)
    assert bound <= converged_bound(surviving(seed, load=3.0, keep=0.0)) * (1 + 1e-6)


def converged_bound(space: PlanningSpace) -> float:
    formulation = Formulation(space, space.classes, loadouts=False)
    linking = Linking.of(formulation, with_kept(formulation, GOODPUT, ()))
    master = Master(space, linking, Network.of(space, linking), space.share_cap[linking.pair_option])
    master.foresee(5.0)
    converge(master, lambda: 0.0, 5.0, gap=1e-6, rounds=30)
    return master.bound


def test_on_two_nodes_the_master_halves_what_fills_both() -> None:
    wanted = problem(
        cluster(("a", "gpu", 1), ("b", "gpu", 1)),
        [latency_service("s", ("m", 1.0))],
        [profile("m")],
        demand(s=1e6),
    )
    alone = converged_bound(build_space(wanted))
    kept = converged_bound(build_space(replace(wanted, settings=replace(wanted.settings, keep_after_loss=1.0))))
    assert kept == pytest.approx(alone / 2, rel=1e-3)


@pytest.mark.parametrize("seed", [1, 2])
def test_column_generation_keeps_the_rates_after_any_loss(seed: int) -> None:
    space = surviving(seed, nodes=4, load=2.0)
    ends_at_s = time.monotonic() + 4.0
    outcome = ColumnSearch(space, time.monotonic, ends_at_s, finish=False).run()
    assert isinstance(outcome, Outcome)
    served = space.served_rps(outcome.placement)
    assert served.sum() > 0
    for block in space.requirements.losses:
        left = served_in(space, outcome.placement, block, solver("highs"), Budget(time_limit_s=10.0))
        assert (left >= served * (1 - 1e-6) - 1e-6).all()
    assert outcome.tiers[0].bound >= outcome.tiers[0].value


@pytest.mark.parametrize("seed", [1, 2])
def test_services_that_need_a_replica_are_placed_to_outlive_a_loss_before_memory_is_gone(seed: int) -> None:
    """Each of their replicas must serve something, (4.12), so one that nothing stands in for makes a start useless."""
    base = generated(seed, services=12, nodes=8, load=8.0, batches=(1, 4))
    assert any(service.min_replicas for service in base.services.services)
    space = build_space(replace(base, settings=replace(base.settings, keep_after_loss=1.0)))
    assert any(search.best_rates(pairs, GOODPUT, ()) is not None for search, pairs in _starts(space))
