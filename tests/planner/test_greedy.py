from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.backend import Budget, solver
from planner.balance import balance
from planner.formulation import Formulation
from planner.greedy import greedy, pack
from planner.neighbourhood import neighbourhoods
from planner.prediction import predict
from planner.space import Placed, PlanningSpace, build_space
from tests.planner.problems import cluster, demand, generated, latency_service, problem, profile, town


def feasible(space: PlanningSpace, placement: tuple[Placed, ...]) -> bool:
    formulation = Formulation(space, space.singles, ordered=False)
    return formulation.model.violation(formulation.encode(placement)) < 1e-6


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    services=st.integers(1, 5),
    nodes=st.integers(1, 3),
    gpus=st.sampled_from([1, 2]),
    load=st.floats(0.2, 5.0),
)
def test_greedy_placements_keep_every_constraint(seed: int, services: int, nodes: int, gpus: int, load: float) -> None:
    shapes = ((1, 1), (2, 1)) if gpus == 2 else ((1, 1),)
    space = build_space(
        generated(seed, services=services, nodes=nodes, gpus=gpus, load=load, parallelisms=shapes, types=nodes)
    )
    placement = greedy(space)
    if placement is not None:
        assert feasible(space, placement)


@pytest.mark.parametrize("order", ["memory", "share", "density"])
def test_packed_counts_keep_every_constraint(order: str) -> None:
    space = build_space(generated(3, services=5, nodes=4, load=3.0))
    targets = [
        (place, option, 1.5, 2) for place, each in enumerate(space.classes) for option in each.options if option % 2
    ]
    placement = pack(space, targets, order)  # type: ignore[arg-type]
    assert placement is not None
    assert feasible(space, placement)


def test_an_empty_demand_places_nothing() -> None:
    wanted = problem(cluster(("a", "gpu", 1)), [latency_service("s", ("m", 1.0))], [profile("m")], demand(s=0.0))
    assert greedy(build_space(wanted)) == ()


def test_minimum_replicas_stand_even_without_demand() -> None:
    wanted = problem(
        cluster(("a", "gpu", 3)),
        [latency_service("s", ("m", 1.0), min_replicas=2)],
        [profile("m")],
        demand(s=0.0),
    )
    placement = greedy(build_space(wanted))
    assert placement is not None
    assert len({placed.group for placed in placement}) == 2


def test_greedy_admits_that_minimum_replicas_find_no_place() -> None:
    wanted = problem(
        cluster(("a", "gpu", 1)), [latency_service("s", ("m", 1.0), min_replicas=2)], [profile("m")], demand(s=1.0)
    )
    assert greedy(build_space(wanted)) is None


def test_balancing_moves_load_from_full_to_empty_groups_and_keeps_the_rates() -> None:
    wanted = problem(
        cluster(("a", "gpu", 2)), [latency_service("s", ("m", 1.0))], [profile("m", batches=(1,))], demand(s=40.0)
    )
    space = build_space(wanted)
    share = 40.0 / float(space.sustained_rps[0])
    lopsided = (Placed(0, 0, share), Placed(1, 0, 0.0))
    even = balance(space, lopsided, solver("highs"), Budget(time_limit_s=5))
    assert space.served_rps(even) == pytest.approx(space.served_rps(lopsided))
    assert [placed.share for placed in even] == pytest.approx([share / 2, share / 2], abs=0.06)


def test_balancing_nothing_gives_nothing() -> None:
    assert balance(build_space(town()), (), solver("highs"), Budget(time_limit_s=1)) == ()


def test_neighbourhoods_split_the_placement_and_cover_every_group_in_time() -> None:
    space = build_space(generated(1, services=4, nodes=4, load=2.0))
    placement = greedy(space)
    assert placement is not None
    options = [frozenset(group.options) for group in space.groups]
    stream = neighbourhoods(space, placement, options, np.random.default_rng(0), most_pairs=1)
    standing = {(placed.group, placed.option) for placed in placement}
    freed = set()
    for _ in range(50):
        free, stays = next(stream)
        assert not set(free) & set(stays)
        assert standing <= set(free) | set(stays)
        assert len({group for group, _ in free}) == 2
        freed |= {group for group, _ in free}
    assert freed == set(range(len(space.groups)))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), load=st.floats(0.1, 3.0))
def test_predictions_are_consistent(seed: int, load: float) -> None:
    space = build_space(generated(seed, services=3, nodes=2, load=load))
    placement = greedy(space) or ()
    served = space.served_rps(placement)
    for index, prediction in enumerate(predict(space, placement)):
        assert prediction.goodput_rps <= min(served[index], space.offered_rps[index]) * (1 + 1e-9)
        if prediction.latency_s.p50 is None:
            assert served[index] == 0
            continue
        assert prediction.latency_s.p99 is not None
        assert prediction.latency_s.p99 >= prediction.latency_s.p50
        fastest = min(
            space.options[placed.option].hold_s / space.options[placed.option].batch
            for placed in placement
            if space.service_of[placed.option] == index
        )
        assert prediction.latency_s.p50 >= fastest * (1 - 1e-9)


def test_more_load_on_a_replica_never_improves_its_prediction() -> None:
    wanted = problem(
        cluster(("a", "gpu", 1)), [latency_service("s", ("m", 1.0), deadline_s=0.08)], [profile("m")], demand(s=100.0)
    )
    space = build_space(wanted)
    option = len(space.options) - 1
    found = [predict(space, (Placed(0, option, share),))[0] for share in (0.2, 0.5, 0.8, 1.0)]
    p99 = [each.latency_s.p99 for each in found]
    assert p99 == sorted(p99)  # type: ignore[type-var]
    lone = wanted.profiles.latency("m", "gpu", 1, 1)
    assert lone is not None
    assert all(each.latency_s.p50 is not None and each.latency_s.p50 >= lone.at(1).mean_s for each in found)
