"""The stops on the way between plans."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given

from executor.assignment import desired_state, routing_table
from executor.rounds import stops
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
