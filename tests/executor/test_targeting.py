from __future__ import annotations

import pytest

from executor.targeting import is_part_of, targeted
from plans.errors import InvalidInput
from plans.plan import Prior
from tests.executor.placements import placement

LIVE = placement({"a/0": {"chat": "v1"}, "b/0": {"chat": "v1"}, "b/1": {"other": "v1"}})
NEW = placement({"a/0": {"chat": "v2"}, "a/1": {"chat": "v2"}, "b/0": {"chat": "v2"}})
PRIOR = Prior(generation=4, digest=LIVE.placement_digest)


def test_the_targets_follow_the_plan_and_the_rest_stays_as_it_is() -> None:
    merged = targeted(NEW, LIVE, ["a"], PRIOR)
    assert {group.id: group.loadout[0].variant for group in merged.groups} == {
        "a/0": "v2",
        "a/1": "v2",
        "b/0": "v1",
        "b/1": "v1",
    }
    assert {route.group: round(route.weight, 3) for route in merged.routes["chat"]} == {
        "a/0": 0.333,
        "a/1": 0.333,
        "b/0": 0.333,
    }
    assert merged.prior == PRIOR
    assert "only a" in merged.warnings[-1]


def test_targeting_every_node_gives_the_plans_own_groups() -> None:
    assert targeted(NEW, LIVE, ["a", "b"], PRIOR).groups == NEW.groups


def test_the_rest_may_follow_and_nothing_else() -> None:
    part = targeted(NEW, LIVE, ["a"], PRIOR)
    assert is_part_of(part, NEW)
    assert is_part_of(targeted(NEW, part, ["b"], PRIOR), NEW)
    assert not is_part_of(part, LIVE)
    assert not is_part_of(LIVE, NEW)
    assert not is_part_of(targeted(LIVE, part, ["b"], PRIOR), NEW)


def test_targeting_a_node_twice_changes_nothing_more() -> None:
    once = targeted(NEW, LIVE, ["a"], PRIOR)
    assert targeted(NEW, once, ["a"], PRIOR).placement_digest == once.placement_digest


def test_on_an_empty_cluster_only_the_targets_run() -> None:
    assert {group.node for group in targeted(NEW, None, ["b"], None).groups} == {"b"}
    with pytest.raises(InvalidInput, match="--target"):
        targeted(NEW, LIVE, [], PRIOR)
