"""The stops on the way between plans."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

from hypothesis import given

from executor import wire
from executor.apply_plan import Live
from executor.assignment import desired_state, routing_table
from executor.rounds import outlook, running_plan, stops, stops_from
from executor.state import AgentState, GatewayState, ReplicaKey
from plans import transition
from plans.transition import waves_of
from tests.plans.strategies import MEMORY_BYTES, cluster, entry, group, plan
from tests.plans.test_transition import tight_plans


@given(tight_plans(), tight_plans())
def test_every_stop_fits_routes_to_what_it_runs_and_leads_to_the_target(before, after):
    """Law: at each stop no GPU holds more than it has, weights sum to 1, and one replica at least changed."""
    way = stops(before, after, cluster())
    assert way[-1] is after
    assert len(way) <= len(waves_of(transition(before, after, cluster()).steps))
    seen = [before]
    for stop in way[:-1]:
        assert stop.placement_digest == after.placement_digest
        used = defaultdict(int)
        keys = set()
        for node in ("node-0", "node-1"):
            state = desired_state(stop, node, 1)
            assert wire.desired_state_from_proto(wire.desired_state_to_proto(state)) == state
            keys |= {(key.group, key.service) for key in (*state.keys(),)}
            for one in state.groups:
                for replica in one.replicas:
                    for gpu, size in zip(one.gpus, replica.memory_bytes, strict=True):
                        used[node, gpu] += size
        assert max(used.values()) <= MEMORY_BYTES
        table = routing_table(stop, {"node-0": "a:1", "node-1": "b:1"}, 1)
        for service in table.services:
            assert {(target.group, service.service) for target in service.targets} <= keys
            assert abs(sum(target.weight for target in service.targets) - 1) < 1e-9
        assert all(stop.groups != one.groups for one in seen)
        seen.append(stop)


def test_without_a_wait_for_memory_there_is_no_stop():
    before = plan([group("node-0", (0,), [entry("detect", variant="small", memory_bytes=(400,))])])
    after = plan([group("node-0", (0,), [entry("detect", variant="large", memory_bytes=(600,))])])
    assert stops(before, after, cluster()) == (after,)


def test_what_is_still_to_leave_is_routed_to_by_its_rate():
    before, after = (
        plan([group("node-0", (n,), [entry("detect", variant=v, memory_bytes=(600,), rate_rps=r)]) for n in range(2)])
        for v, r in (("small", 2.0), ("large", 4.0))
    )
    stop, last = stops(before, after, cluster())
    assert last is after
    assert {route.group: route.weight for route in stop.routes["detect"]} == {"node-0/0": 2 / 3, "node-0/1": 1 / 3}


def test_a_group_that_is_cut_anew_is_changed_in_one_go():
    before, after = (
        plan([group("node-0", (0, 1), [entry("detect", 2, pp, memory_bytes=(600, 600))], pp=pp)]) for pp in (1, 2)
    )
    assert stops(before, after, cluster()) == (after,)


def test_a_variant_that_fits_replaces_the_old_one_in_its_place_at_the_first_stop():
    """A third replica has to wait for the second wave: until then the first node does not run its old variant on."""
    small = [entry("pose", variant="small", memory_bytes=(300,))]
    large = [entry("pose", variant="large", memory_bytes=(300,))]
    full = [[entry("detect", variant=v, memory_bytes=(600,))] for v in ("small", "large")]
    before = plan([group("node-0", (0,), small), *(group("node-1", (n,), full[0]) for n in range(2))])
    after = plan([group("node-0", (0,), large), *(group("node-1", (n,), full[1]) for n in range(2))])
    way = stops(before, after, cluster())
    assert len(way) == 2
    (here,) = (one for one in way[0].groups if one.id == "node-0/0")
    assert [one.variant for one in here.loadout] == ["large"]


def live(running, generation=4, *, underway=False, digest=None):
    nodes = {node.name: desired_state(running, node.name, generation, underway=underway) for node in cluster().nodes}
    agents = {
        node: AgentState(
            node=node,
            version="",
            generation=generation,
            placement_digest=digest or running.placement_digest,
            committed=state,
        )
        for node, state in nodes.items()
    }
    door = GatewayState(version="", generation=generation, placement_digest=digest or running.placement_digest)
    return Live(agents=agents, gateways={"g:1": door})


@given(tight_plans(), tight_plans())
def test_the_way_from_what_agents_tell_is_that_from_the_plan_itself(before, after):
    """Law: nobody has to keep the running plan. Also from a stop: an apply that was cut short goes on as it would."""
    known = running_plan(live(before), after)
    assert known is not None
    way = stops(before, after, cluster())
    assert _placed(stops(known, after, cluster())) == _placed(way)
    if len(way) > 1:
        further = running_plan(live(way[0], underway=True), after)
        assert further is not None
        assert {key for stop in stops(further, after, cluster()) for key in _keys(stop)} >= set(_keys(after))


def test_what_peers_of_different_places_run_is_no_plan():
    before = plan([group("node-0", (0,), [entry("detect")])])
    after = plan([group("node-0", (1,), [entry("detect")])])
    there = live(before)
    assert running_plan(there, after) is not None
    for agents, gateways in (
        ({}, {"g:1": GatewayState(version="", generation=3, placement_digest="other")}),
        ({"node-0": AgentState(node="node-0", version="", generation=3)}, {}),
        ({"node-0": AgentState(node="node-0", version="", generation=4, placement_digest=before.placement_digest)}, {}),
    ):
        mixed = Live(agents={**there.agents, **agents}, gateways={**there.gateways, **gateways})
        assert running_plan(mixed, after) is None
    assert running_plan(Live(agents={}, gateways={}), after) is None


@given(tight_plans(), tight_plans())
def test_what_an_agent_has_staged_counts_where_others_committed_it_for_the_same_plan(before, after):
    """A kill between the commits of a stop: what was to stand there comes first, and then the rest of the way."""
    way = stops(before, after, cluster())
    there = live(way[0], 5, underway=len(way) > 1)
    behind, ahead = there.agents.values()
    staged = dataclasses.replace(behind, generation=4, placement_digest="old", committed=None, staged=behind.committed)
    mixed = Live(agents={behind.node: staged, ahead.node: ahead}, gateways=live(before, 4).gateways)
    known = running_plan(mixed, after)
    assert known is not None
    assert set(_keys(known)) == set(_keys(way[0]))
    further = stops_from(known, after, cluster(), settled=False)
    assert set(_keys(further[0])) == set(_keys(way[0]))
    assert further[0].placement_digest == after.placement_digest
    assert further[-1] is after
    if after.placement_digest != before.placement_digest:
        assert running_plan(mixed, before) is None  # for another plan they are at different places
    lost = dataclasses.replace(staged, staged=None)
    assert running_plan(Live(agents={behind.node: lost, ahead.node: ahead}, gateways=mixed.gateways), after) is None


@given(tight_plans(), tight_plans())
def test_an_outlook_ends_with_the_target_and_its_waves_follow_each_other(before, after):
    way = stops(before, after, cluster())
    first = {key for key in _keys(way[0]) if key not in _keys(before)}
    for waiting in (set(), first):
        there, now_s = set(_keys(before)), 0.0
        for wave in outlook(there, way, waiting):
            assert wave.leaves or wave.loads
            assert wave.at_s == now_s
            assert there >= set(wave.leaves)
            there = there - set(wave.leaves) | set(wave.loads)
            now_s += wave.for_s
        assert there == set(_keys(after))


def test_an_outlook_counts_the_loads_of_a_node_one_after_the_other_and_the_longest_drain():
    old = [entry("detect", variant="small", memory_bytes=(600,), deadline_s=2.0)]
    new = [entry("detect", variant="large", memory_bytes=(600,), deadline_s=2.0, load_s=3.0)]
    before = plan([group("node-0", (n,), old) for n in range(2)])
    after = plan([group("node-0", (n,), new) for n in range(2)])
    keys = _keys(after)
    beside, swapped = (outlook(_keys(before), (after,), waiting) for waiting in ((), keys))
    assert [(wave.at_s, wave.for_s, len(wave.leaves), len(wave.loads)) for wave in beside] == [
        (0.0, 6.0, 0, 2),
        (6.0, 2.0, 2, 0),
    ]
    assert [(wave.at_s, wave.for_s, len(wave.leaves), len(wave.loads)) for wave in swapped] == [(0.0, 8.0, 2, 2)]


def _keys(one):
    return [
        ReplicaKey(group=group.id, service=entry.service, variant=entry.variant)
        for group in one.groups
        for entry in group.loadout
    ]


def _placed(way):
    return [(set(_keys(stop)), {name: len(routes) for name, routes in stop.routes.items()}) for stop in way]
