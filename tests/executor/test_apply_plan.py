from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.apply_plan import (
    Fresh,
    InForce,
    Live,
    Stale,
    assess,
    changes,
    check_plan,
    check_rotation,
    left_over,
    live_prior,
    not_serving,
    replicas_of,
)
from executor.assignment import routing_table
from executor.state import AgentState, DesiredState, GatewayState, Phase, ReplicaKey, ReplicaState, TargetState
from plans.cluster import Cluster
from plans.errors import InvalidInput
from plans.plan import Plan, Prior
from tests.executor.placements import placement

NODES = ("a", "b", "c")
ADDRESSES = dict.fromkeys(NODES, "h:1")
GROUPS = [f"{node}/{gpu}" for node in NODES for gpu in (0, 1)]


def plan(groups: dict[str, tuple[str, ...]]) -> Plan:
    """A plan that runs ``groups``: group to services, each as variant "v"."""
    return placement({group: dict.fromkeys(services, "v") for group, services in groups.items()}, max_batch=1)


def running(wanted: Plan, generation: int) -> Live:
    """The state of a cluster that runs ``wanted`` and nothing else."""
    digest = wanted.placement_digest
    table = routing_table(wanted, ADDRESSES, generation)
    gateway = GatewayState(
        version="",
        generation=generation,
        placement_digest=digest,
        targets=tuple(
            TargetState(service=routes.service, group=target.group, healthy=True, address=ADDRESSES[target.node])
            for routes in table.services
            for target in routes.targets
        ),
        ready=True,
    )
    agents = {
        node: AgentState(
            node=node,
            version="",
            generation=generation,
            placement_digest=digest,
            replicas=tuple(ReplicaState(key=key, phase=Phase.SERVING) for key in sorted(replicas_of(wanted, node))),
            ready=True,
        )
        for node in NODES
    }
    return Live(agents=agents, gateways={"g:1": gateway})


NOTHING = Live(
    agents={node: AgentState(node=node, version="") for node in NODES}, gateways={"g:1": GatewayState(version="")}
)
placements = st.dictionaries(
    st.sampled_from(GROUPS), st.sampled_from([("s",), ("t",), ("s", "t")]), min_size=1, max_size=6
).map(plan)
generations = st.integers(1, 10**6)


def with_agent(live: Live, node: str, state: AgentState) -> Live:
    return Live(agents={**live.agents, node: state}, gateways=live.gateways)


class TestLaws:
    @given(placements, generations)
    def test_a_plan_that_runs_everywhere_leaves_nothing_to_do(self, wanted: Plan, generation: int) -> None:
        live = running(wanted, generation)
        assert assess(wanted, None, live, ADDRESSES) == InForce(generation=generation, left_over=())
        assert left_over(wanted, generation, live, ADDRESSES) == ()
        assert {change.action for change in changes(wanted, live)} == {"keep"}

    @given(placements, placements, generations)
    def test_a_plan_made_against_what_is_live_follows_it_with_a_higher_generation(
        self, old: Plan, new: Plan, generation: int
    ) -> None:
        live = running(old, generation)
        standing = assess(new, Prior(generation=1, digest=old.placement_digest), live, ADDRESSES)
        if old.placement_digest == new.placement_digest:
            assert isinstance(standing, InForce)
        else:
            assert standing == Fresh(generation=generation + 1)

    @given(placements, placements)
    def test_any_other_prior_is_stale(self, old: Plan, new: Plan) -> None:
        if old.placement_digest != new.placement_digest:
            assert isinstance(assess(new, None, running(old, 3), ADDRESSES), Stale)
            assert isinstance(
                assess(new, Prior(generation=3, digest="sha256:other"), running(old, 3), ADDRESSES), Stale
            )

    @given(placements, placements, generations)
    def test_changes_turn_what_runs_into_what_shall_run(self, old: Plan, new: Plan, generation: int) -> None:
        live = running(old, generation)
        found = changes(new, live)
        for node in NODES:
            acts = {action: {c.key for c in found if c.node == node and c.action == action} for action in _ACTIONS}
            before = {replica.key for replica in live.agents[node].replicas}
            assert (before | acts["load"]) - acts["unload"] == replicas_of(new, node)
            assert acts["keep"] == before & replicas_of(new, node)

    @given(placements, st.sampled_from(NODES), st.integers(0, 9))
    def test_a_node_that_is_behind_ahead_or_half_done_is_named(self, wanted: Plan, node: str, generation: int) -> None:
        live = running(wanted, 5)
        agent = live.agents[node]
        for other in (
            replace(agent, generation=generation if generation != 5 else 4),
            replace(agent, placement_digest="sha256:other"),
            replace(agent, staged_generation=6),
            replace(agent, replicas=(*agent.replicas, _replica("x/9"))),
        ):
            assert any(
                line.startswith(f"{node}: ") for line in left_over(wanted, 5, with_agent(live, node, other), ADDRESSES)
            )


_ACTIONS = ("load", "keep", "unload")


def _replica(group: str, phase: Phase = Phase.SERVING, reason: str = "") -> ReplicaState:
    return ReplicaState(key=ReplicaKey(group=group, service="s", variant="v"), phase=phase, reason=reason)


class TestAssess:
    def test_a_first_plan_starts_at_generation_1(self) -> None:
        assert assess(plan({"a/0": ("s",)}), None, NOTHING, ADDRESSES) == Fresh(generation=1)
        assert live_prior(NOTHING) is None

    def test_a_plan_made_against_a_running_one_is_stale_on_an_empty_cluster(self) -> None:
        standing = assess(plan({"a/0": ("s",)}), Prior(generation=3, digest="sha256:old"), NOTHING, ADDRESSES)
        assert isinstance(standing, Stale)
        assert "nothing is live" in standing.problem

    def test_a_generation_that_was_only_staged_is_not_used_again(self) -> None:
        live = with_agent(NOTHING, "a", AgentState(node="a", version="", staged_generation=7))
        assert assess(plan({"a/0": ("s",)}), None, live, ADDRESSES) == Fresh(generation=8)

    def test_what_gateways_route_may_be_followed_when_an_apply_was_cut_short_before_the_flip(self) -> None:
        old, half, new = plan({"a/0": ("s",)}), plan({"b/0": ("s",)}), plan({"c/0": ("s",)})
        live = running(old, 4)
        live = with_agent(live, "b", replace(live.agents["b"], generation=5, placement_digest=half.placement_digest))
        assert assess(new, Prior(generation=4, digest=old.placement_digest), live, ADDRESSES) == Fresh(generation=6)
        assert assess(old, None, live, ADDRESSES) == Fresh(generation=6)  # back to what is routed
        again = assess(half, Prior(generation=4, digest=old.placement_digest), live, ADDRESSES)
        assert isinstance(again, InForce)
        assert len(again.left_over) >= 3

    def test_a_failed_replica_is_left_over_with_its_reason(self) -> None:
        wanted = plan({"a/0": ("s",)})
        live = running(wanted, 1)
        agent = replace(live.agents["a"], replicas=(_replica("a/0", Phase.FAILED, "out of memory"),))
        assert left_over(wanted, 1, with_agent(live, "a", agent), ADDRESSES) == (
            "a: s (v) on a/0 failed: out of memory",
        )
        assert [change.action for change in changes(wanted, with_agent(live, "a", agent))] == ["load"]

    def test_a_gateway_that_misses_targets_is_left_over(self) -> None:
        wanted = plan({"a/0": ("s",), "b/0": ("s",)})
        live = running(wanted, 1)
        partial = replace(live.gateways["g:1"], targets=live.gateways["g:1"].targets[:1])
        assert left_over(wanted, 1, Live(agents=live.agents, gateways={"g:1": partial}), ADDRESSES) == (
            "gateway g:1: routes 1 of 2 targets",
        )


class TestMoved:
    def test_who_sends_to_an_agent_that_has_moved_is_left_over(self) -> None:
        wanted = plan({"a/0": ("s",), "b/0": ("s",)})
        live = running(wanted, 1)
        handover = DesiredState(
            generation=1,
            placement_digest=wanted.placement_digest,
            node="b",
            handover=routing_table(wanted, ADDRESSES, 1),
        )
        live = with_agent(live, "b", replace(live.agents["b"], committed=handover))
        assert left_over(wanted, 1, live, ADDRESSES) == ()
        assert left_over(wanted, 1, live, {**ADDRESSES, "a": "h:2"}) == (
            "b: reaches a at h:1, not at h:2",
            "gateway g:1: reaches a at h:1, not at h:2",
        )

    def test_a_gateway_that_does_not_tell_addresses_is_believed(self) -> None:
        wanted = plan({"a/0": ("s",)})
        live = running(wanted, 1)
        (target,) = live.gateways["g:1"].targets
        older = replace(live.gateways["g:1"], targets=(replace(target, address=""),))
        assert left_over(wanted, 1, Live(agents=live.agents, gateways={"g:1": older}), {**ADDRESSES, "a": "h:2"}) == ()


class TestServing:
    def test_what_loads_and_what_a_gateway_does_not_reach_is_named(self) -> None:
        wanted = plan({"a/0": ("s",), "b/0": ("s",)})
        live = running(wanted, 1)
        assert not_serving(wanted, live) == ()
        loading = with_agent(live, "a", replace(live.agents["a"], replicas=(_replica("a/0", Phase.LOADING, "why"),)))
        assert not_serving(wanted, loading) == ("a: s (v) on a/0 is loading: why",)
        to_a, to_b = live.gateways["g:1"].targets
        door = replace(live.gateways["g:1"], targets=(to_a, replace(to_b, healthy=False, reason="gone")))
        unreached = Live(agents=live.agents, gateways={"g:1": door})
        assert not_serving(wanted, unreached) == ("gateway g:1 sends nothing of s to b/0: gone",)
        drained = with_agent(unreached, "b", replace(live.agents["b"], drained=True))
        assert not_serving(wanted, drained) == ()
        agent = replace(loading.agents["a"], drained=True)
        assert not_serving(wanted, with_agent(loading, "a", agent)) == ()

    @pytest.mark.parametrize("to", [{"b/0": ("s",)}, {"b/0": ("s",), "b/1": ("s",)}])
    def test_what_is_served_may_not_go_to_drained_nodes_alone(self, to: dict[str, tuple[str, ...]]) -> None:
        live = running(plan({"a/0": ("s",)}), 1)
        drained = with_agent(live, "b", replace(live.agents["b"], drained=True))
        check_rotation(plan(to), live)
        with pytest.raises(InvalidInput, match=r"routes.s.*foreplan undrain b"):
            check_rotation(plan(to), drained)
        check_rotation(plan({**to, "c/0": ("s",)}), drained)
        check_rotation(plan({"a/0": ("s",), "b/0": ("t",)}), drained)  # nobody serves t now


def test_a_plan_for_another_cluster_is_refused_with_every_fault() -> None:
    cluster = Cluster.model_validate(
        {
            "gpu_types": {"cpu": {"memory": "1GiB"}},
            "nodes": [{"name": "a", "address": "", "gpus": {"type": "cpu", "count": 1}}],
        }
    )
    with pytest.raises(InvalidInput) as caught:
        check_plan(plan({"a/1": ("s",), "b/0": ("t",)}), cluster)
    fields = [fault.field for fault in caught.value.faults]
    assert fields == ["groups[0].gpus", "groups[1].node", "nodes[0].address"]
