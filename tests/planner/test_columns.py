"""Column generation against the exact model, alone and as part of a whole plan."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from planner import Infeasible, Problem, Settings, Solved, solve
from planner.columns import ColumnSearch
from planner.formulation import Formulation
from planner.greedy import greedy
from planner.linking import Linking, node_kinds
from planner.mapping import map_loadouts
from planner.master import Master, Network, converge
from planner.objective import GOODPUT, with_kept
from planner.planning import method_for
from planner.space import build_space
from planner.tier import Outcome
from plans.service import Edge, LatencySlo, Spread, Workflow
from tests.planner.brute_force import best_goodput
from tests.planner.problems import (
    FEATURES,
    QUIET,
    cluster,
    crowd,
    demand,
    featured,
    generated,
    latency_service,
    problem,
    profile,
)
from tests.planner.rules import assert_sound

COLUMNS = replace(QUIET, method="columns")


class Ticks:
    """A clock that stands still, so that only convergence ends a search."""

    def __call__(self) -> float:
        return 0.0


def mixed(seed: int) -> Problem:
    """Return one of many small problems: several types, parallelisms, loads and, for some, one feature more."""
    wanted = generated(
        500 + seed,
        services=2 + seed % 4,
        nodes=1 + seed % 3,
        gpus=2 if seed % 5 == 0 else 1,
        types=1 + seed % 2,
        load=(0.5, 1.0, 2.0, 4.0)[seed % 4],
        parallelisms=((1, 1), (2, 1)) if seed % 5 == 0 else ((1, 1),),
    )
    kinds = (None, *FEATURES)
    feature = kinds[seed % len(kinds)]
    return wanted if feature is None else featured(wanted, feature)


def agree(seed: int, *, with_cbc: bool) -> None:
    wanted = mixed(seed)
    limited = replace(wanted.settings, time_limit_s=8.0)
    kinds = [{"method": "direct"}, {"method": "columns"}, *([{"backend": "cbc"}] if with_cbc else [])]
    results = [solve(replace(wanted, settings=replace(limited, **kind))) for kind in kinds]  # type: ignore[arg-type]
    assert len({type(result) for result in results}) == 1, results
    plans = [result.plan for result in results if isinstance(result, Solved)]
    for one, other in itertools.permutations(plans, 2):
        assert one.solver.objective == pytest.approx(other.solver.objective, rel=1e-5, abs=1e-6)
    assert [plan.solver.name for plan in plans[:2]] == ["highs", "highs+columns"][: len(plans)]


@pytest.mark.parametrize("seed", range(16))
def test_direct_and_columns_agree(seed: int) -> None:
    agree(seed, with_cbc=False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(16, 200))
def test_direct_columns_and_cbc_agree(seed: int) -> None:
    agree(seed, with_cbc=True)


@pytest.mark.parametrize("seed", range(8))
def test_columns_alone_come_close_and_their_bound_holds(seed: int) -> None:
    """Law: no feasible value is beyond the bound; never worse than greedy. Without the exact model at the end."""
    shape = {"services": 3, "nodes": 2} if seed % 2 else {"services": 2, "nodes": 1, "gpus": 2}
    wanted = generated(seed, load=1.5, batches=(4,), types=1, **shape)  # type: ignore[arg-type]
    best = best_goodput(wanted)
    space = build_space(wanted)
    outcome = ColumnSearch(space, Ticks(), 5.0, finish=False).run()
    if best is None:
        assert not isinstance(outcome, Outcome)
        return
    start = greedy(space)
    if not isinstance(outcome, Outcome):
        assert start is None
        return
    tier = outcome.tiers[0]
    assert tier.bound >= best * (1 - 1e-6)
    assert tier.value <= best * (1 + 1e-6)
    assert tier.value >= 0.9 * best
    if start is not None:
        assert tier.value >= GOODPUT.value(space, start) * (1 - 2e-4)


def master_of(wanted: Problem) -> Master:
    space = build_space(wanted)
    joined = Formulation(space, space.classes, loadouts=False)
    linking = Linking.of(joined, with_kept(joined, GOODPUT, ()))
    return Master(space, linking, Network.of(space, linking), space.share_cap[linking.pair_option])


@pytest.mark.parametrize("seed", [1, 4, 6])
def test_more_rounds_never_lower_the_master_nor_raise_its_bound(seed: int) -> None:
    wanted = generated(seed, services=5, nodes=4, gpus=2, load=3.0, parallelisms=((1, 1), (2, 1)))
    services = tuple(service.model_copy(update={"min_replicas": 0}) for service in wanted.services.services)
    wanted = replace(wanted, services=wanted.services.model_copy(update={"services": services}))
    objectives, bounds = [], []
    for rounds in (1, 2, 4, 8, 40):
        master = master_of(wanted)
        master.foresee(5.0)
        solution = converge(master, Ticks(), 5.0, gap=0.0, rounds=rounds)
        assert solution is not None
        objectives.append(solution.objective)
        bounds.append(master.bound)
    assert all(later >= earlier - 1e-6 * earlier for earlier, later in itertools.pairwise(objectives))
    assert all(later <= earlier + 1e-6 * earlier for earlier, later in itertools.pairwise(bounds))
    assert objectives[-1] <= bounds[-1] * (1 + 1e-6)
    assert objectives[-1] == pytest.approx(bounds[-1], rel=0.05)


def test_the_same_seed_gives_the_same_plan() -> None:
    wanted = generated(5, services=8, nodes=6, load=3.0, settings=replace(COLUMNS, time_limit_s=60.0, gap=0.02))
    plans = [result.plan for result in (solve(wanted), solve(wanted)) if isinstance(result, Solved)]
    assert len(plans) == 2
    assert_sound(plans[0], wanted)
    assert plans[0].groups == plans[1].groups
    assert plans[0].solver.tiers == plans[1].solver.tiers


def test_out_of_time_the_plan_is_sound_and_no_worse_than_the_running_one() -> None:
    wanted = generated(12, services=5, nodes=3, load=2.0)
    running = solve(wanted)
    assert isinstance(running, Solved)
    hurried = solve(replace(wanted, current=running.plan, settings=replace(COLUMNS, time_limit_s=1e-3)))
    assert isinstance(hurried, Solved)
    assert_sound(hurried.plan, wanted)
    assert hurried.plan.solver.objective >= running.plan.solver.objective * (1 - 2e-4)


def test_the_method_follows_the_size_unless_it_is_stated() -> None:
    small = generated(1)
    assert method_for(build_space(small)) == "direct"
    assert method_for(build_space(replace(small, settings=COLUMNS))) == "columns"
    many = problem(
        cluster(*((f"n{index}", "gpu", 8) for index in range(400))),
        [latency_service(f"s{index}", ("m", 1.0), deadline_s=0.05 * (index + 1)) for index in range(8)],
        [profile("m", batches=(1, 2, 4, 8, 16), growth=0.3)],
        demand(**{f"s{index}": 10.0 for index in range(8)}),
        settings=Settings(),
    )
    assert method_for(build_space(many)) == "columns"


def test_a_column_plan_planned_again_moves_nothing() -> None:
    wanted = generated(11, services=4, nodes=3, load=1.0, settings=COLUMNS)
    first = solve(wanted)
    assert isinstance(first, Solved)
    again = solve(replace(wanted, current=first.plan))
    assert isinstance(again, Solved)
    moved = next(tier for tier in again.plan.solver.tiers if tier.name == "bytes-moved")
    assert moved.objective == 0.0


def test_infeasible_is_proven_by_the_exact_model() -> None:
    wanted = problem(
        cluster(("a", "gpu", 1)),
        [latency_service("s", ("m", 1.0), min_replicas=2)],
        [profile("m")],
        demand(s=1.0),
        settings=COLUMNS,
    )
    assert isinstance(solve(wanted), Infeasible)


def test_a_node_is_worth_its_best_tiling() -> None:
    wanted = generated(3, nodes=1, gpus=4, parallelisms=((1, 1), (2, 1), (4, 1)))
    space = build_space(wanted)
    (kind,) = node_kinds(space)
    sizes = [each.gpus for each in space.classes]
    worth = [{1: 1.0, 2: 2.5, 4: 4.9}[size] for size in sizes]
    assert kind.best(worth) == pytest.approx(5.0)
    assert kind.best([5.1 if size == 4 else each for size, each in zip(sizes, worth, strict=True)]) == pytest.approx(
        5.1
    )


def test_mapping_deals_replicas_over_nodes_and_zones_and_fits_large_tiles() -> None:
    wanted = generated(3, services=2, nodes=4, gpus=4, parallelisms=((1, 1), (2, 1), (4, 1)))
    space = build_space(wanted)
    joined = Formulation(space, space.classes, loadouts=False)
    place = {each.gpus: index for index, each in enumerate(space.classes)}
    pair = {size: int(np.flatnonzero(joined.pair_class == index)[0]) for size, index in place.items()}
    counts = {(place[size], (pair[size],)): count for size, count in ((1, 4), (2, 2), (4, 2))}
    shares = {loadout: np.array([0.5]) for loadout in counts}
    placement = map_loadouts(space, joined.pair_option, counts, shares)
    assert len(placement) == 8
    taken = [(space.groups[p.group].node, gpu) for p in placement for gpu in space.groups[p.group].gpus]
    assert len(taken) == len(set(taken)) == 16
    for size, count in ((1, 2), (2, 2), (4, 2)):
        nodes = {space.groups[p.group].node for p in placement if len(space.groups[p.group].gpus) == size}
        assert len(nodes) == count


@pytest.mark.parametrize("times", [1.0, 1e5])
def test_every_objective_is_left_with_a_bound_of_use_whatever_the_units_of_demand(times: float) -> None:
    wanted = generated(3, services=6, nodes=5, types=1, load=0.6, batches=(1, 4))
    heavier = tuple(
        service.model_copy(update={"weight": service.weight * times}) for service in wanted.services.services
    )
    wanted = replace(wanted, services=wanted.services.model_copy(update={"services": heavier}))
    outcome = ColumnSearch(build_space(wanted), Ticks(), 5.0, finish=False).run()
    assert isinstance(outcome, Outcome)
    assert [tier.objective.name for tier in outcome.tiers] == ["goodput", "accuracy", "gpu-cost"]
    assert all(tier.gap < 0.6 for tier in outcome.tiers), [tier.gap for tier in outcome.tiers]


@pytest.mark.parametrize(
    ("model", "rate"), [("m", 0.0), ("huge", 5.0)], ids=["nothing is asked for", "nothing that is asked for can run"]
)
@pytest.mark.parametrize("objective", ["goodput", "max-min", "utility"])
def test_where_nothing_can_be_placed_the_plan_is_empty(model: str, rate: float, objective: str) -> None:
    wanted = crowd(latency_service("s", (model, 1.0)), s=rate)
    settings = replace(COLUMNS, objective=objective)
    result = solve(replace(wanted, settings=settings))
    assert isinstance(result, Solved)
    assert result.plan.groups == ()
    assert result.plan.solver.gap == 0.0
    assert sum(left.rate_rps for left in result.plan.unserved) == rate


@pytest.mark.parametrize("seed", [1, 4, 7])
def test_columns_alone_find_what_the_greedy_start_breaks(seed: int) -> None:
    wanted = generated(seed, services=6, nodes=6, types=1, load=1.5, batches=(1, 4))
    spread = tuple(
        service.model_copy(update={"spread": Spread(over="node", max_skew=1, min_domains=2)})
        for service in wanted.services.services
    )
    wanted = replace(wanted, services=wanted.services.model_copy(update={"services": spread}))
    search = ColumnSearch(build_space(wanted), Ticks(), 5.0, finish=False)
    assert search._start() is None
    outcome = search.run()
    assert isinstance(outcome, Outcome)
    assert outcome.tiers[0].gap <= 1e-3


@pytest.mark.parametrize("affinity", ["none", "prefer"])
def test_mapping_puts_workflow_neighbours_together_and_replicas_of_one_service_apart(affinity: str) -> None:
    wanted = problem(
        cluster(("a", "gpu", 2), ("b", "gpu", 2)),
        [latency_service("s", ("m", 1.0)), latency_service("t", ("m", 1.0))],
        [profile("m")],
        demand(s=10.0),
    )
    chain = Workflow(
        name="w",
        slo=LatencySlo(deadline_s=1.0),
        edges=(Edge(source="s", target="t", payload_bytes=1000),),
        affinity=affinity,  # type: ignore[arg-type]
    )
    space = build_space(replace(wanted, services=wanted.services.model_copy(update={"workflows": (chain,)})))
    joined = Formulation(space, space.classes, loadouts=False)
    service = space.service_of[joined.pair_option]
    first, second = (int(np.flatnonzero(service == index)[0]) for index in (0, 1))
    loadouts = [(0, (first,)), (0, (second,))]
    shares = {loadout: np.array([0.5]) for loadout in loadouts}

    def nodes(count: int) -> list[tuple[str, str]]:
        placement = map_loadouts(space, joined.pair_option, dict.fromkeys(loadouts, count), shares)
        return sorted((space.options[p.option].service, space.groups[p.group].node) for p in placement)

    assert ({node for _, node in nodes(1)} == {"a"}) == (affinity == "prefer")
    assert nodes(2) == [("s", "a"), ("s", "b"), ("t", "a"), ("t", "b")]
