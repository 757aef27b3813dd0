from __future__ import annotations

import dataclasses

import pytest

from executor.admission import NodeFacts, placement_faults
from executor.state import DesiredGroup, GenerationRules
from tests.executor.running_agent import desired, replica

FACTS = NodeFacts(node="node-a", device_count=2, memory_bytes=250, variants=("fake-double",))


def faults(state):
    return [str(fault) for fault in placement_faults(state, FACTS)]


def test_a_state_that_fits_has_no_faults():
    assert faults(desired(1, g0=[replica("a"), replica("b")], g1=[replica("a")])) == []


def test_memory_is_summed_over_the_replicas_of_a_device():
    assert faults(desired(1, g0=[replica("a"), replica("b", memory_bytes=(150,))])) == []
    found = faults(desired(1, g0=[replica("a"), replica("b", memory_bytes=(151,))]))
    assert len(found) == 1
    assert "251 bytes" in found[0]
    assert "device 0" in found[0]


def test_a_model_generates_for_all_services_of_a_group_or_for_none() -> None:
    tokens = replica("a", generation=GenerationRules(ttft_s=1.0, tpot_s=1.0, kv_bytes=10))
    assert faults(desired(1, g0=[tokens], g1=[replica("b")])) == []
    (found,) = faults(desired(1, g0=[tokens, replica("b")]))
    assert "b not" in found
    assert "groups[node-a/0].fake-double" in found


def test_models_that_take_turns_need_room_for_the_largest_but_those_that_generate_stay() -> None:
    facts = dataclasses.replace(FACTS, swaps=True, variants=("fake-count", "fake-double"))
    rules = GenerationRules(ttft_s=1.0, tpot_s=1.0, kv_bytes=10)
    stays = replica("c", "fake-count", memory_bytes=(100,), generation=rules)
    turns = [replica("a", memory_bytes=(150,)), replica("b", memory_bytes=(140,))]
    assert placement_faults(desired(1, g0=[stays, *turns]), facts) == ()
    (fault,) = placement_faults(desired(1, g0=[stays, *turns, replica("d", memory_bytes=(151,))]), facts)
    assert "251 bytes" in str(fault)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (desired(1, g2=[replica("a")]), "a device from 0 to 1"),
        (desired(1, g0=[replica("a", "yolo")]), "'yolo', expected one of fake-double"),
        (dataclasses.replace(desired(1), node="node-b"), "'node-b', expected 'node-a'"),
    ],
)
def test_what_the_node_does_not_have_is_named(state, says):
    found = faults(state)
    assert len(found) == 1
    assert says in found[0]


def test_a_group_may_have_several_devices_with_memory_for_its_part_on_each() -> None:
    def group(size: int) -> DesiredGroup:
        one = replica("a", memory_bytes=(1, size))
        return DesiredGroup(id="node-a/0-1", gpus=(0, 1), tensor_parallel=2, replicas=(one,))

    assert faults(dataclasses.replace(desired(1), groups=(group(1),))) == []
    (found,) = faults(dataclasses.replace(desired(1), groups=(group(10**15),)))
    assert "on device 1" in found


def test_groups_may_share_a_device_whose_memory_holds_both():
    group = DesiredGroup(id="other", gpus=(0,), replicas=(replica("b"),))
    state = desired(1, g0=[replica("a")])
    assert faults(dataclasses.replace(state, groups=(*state.groups, group))) == []
    large = DesiredGroup(id="other", gpus=(0,), replicas=(replica("b", memory_bytes=(10**15,)),))
    assert "on device 0" in faults(dataclasses.replace(state, groups=(*state.groups, large)))[0]


def test_all_faults_are_found_at_once():
    state = desired(1, g2=[replica("a", "yolo", memory_bytes=(999,))])
    assert len(faults(state)) == 3
