from __future__ import annotations

from planner.groups import candidate_groups, group_classes, singletons
from planner.neighbourhood import cells
from planner.option import build_catalogue
from planner.space import build_space
from tests.planner.problems import cluster, demand, latency_service, problem, profile

SHAPES = ((1, 1), (2, 1), (1, 4))


def groups_of(count: int, **service: object):
    wanted = problem(
        cluster(("a", "gpu", count)),
        [latency_service("s", ("m", 1.0), deadline_s=1.0, **service)],  # type: ignore[arg-type]
        [profile("m", parallelisms=SHAPES)],
        demand(s=1.0),
    )
    return candidate_groups(wanted, build_catalogue(wanted).options)


def test_groups_are_aligned_tiles_of_every_profiled_size() -> None:
    found = {(group.gpus, group.tp, group.pp) for group in groups_of(6)}
    singles = {((index,), 1, 1) for index in range(6)}
    assert found == singles | {((0, 1), 2, 1), ((2, 3), 2, 1), ((4, 5), 2, 1), ((0, 1, 2, 3), 1, 4)}


def test_a_forbidden_device_takes_every_tile_that_holds_it() -> None:
    found = {group.gpus for group in groups_of(4, forbid=("a/2",))}
    assert found == {(0,), (1,), (3,), (0, 1)}


def test_a_pin_to_devices_allows_only_tiles_of_them() -> None:
    assert {group.gpus for group in groups_of(4, pin=("a/2", "a/3"))} == {(2,), (3,), (2, 3)}


def test_groups_of_one_kind_with_the_same_options_are_one_class() -> None:
    groups = groups_of(4)
    assert [each.count for each in group_classes(groups)] == [4, 2, 1] or sorted(
        each.count for each in group_classes(groups)
    ) == [1, 2, 4]
    members = sorted(member for each in group_classes(groups) for member in each.members)
    assert members == list(range(len(groups)))
    assert all(each.count == 1 for each in singletons(groups))


def test_a_pin_splits_a_class() -> None:
    wanted = problem(
        cluster(("a", "gpu", 1), ("b", "gpu", 1), ("c", "gpu", 1)),
        [latency_service("s", ("m", 1.0), pin=("a",)), latency_service("t", ("m", 1.0))],
        [profile("m")],
        demand(s=1.0),
    )
    groups = candidate_groups(wanted, build_catalogue(wanted).options)
    assert sorted(each.count for each in group_classes(groups)) == [1, 2]


def test_cells_share_no_gpu() -> None:
    wanted = problem(
        cluster(("a", "gpu", 4), ("b", "gpu", 1)),
        [latency_service("s", ("m", 1.0), deadline_s=1.0)],
        [profile("m", parallelisms=((1, 1), (2, 1)))],
        demand(s=1.0),
    )
    space = build_space(wanted)
    gpus = [
        {(space.groups[group].node, gpu) for group in cell for gpu in space.groups[group].gpus} for cell in cells(space)
    ]
    assert sorted(map(len, gpus)) == [1, 2, 2]
    assert len(set().union(*gpus)) == sum(map(len, gpus))
