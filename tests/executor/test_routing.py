from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.routing import NodeView, Router, Routing, view_of
from executor.state import (
    AgentState,
    Backend,
    Phase,
    ReplicaKey,
    ReplicaState,
    RoutingTable,
    ServiceRoutes,
    Target,
)
from plans import dispatch
from plans.errors import StalePlan

weights = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5)


def table(*shares: float, generation: int = 1, service: str = "chat", digest: str = "d") -> RoutingTable:
    """One service with a target on each of len(shares) nodes."""
    return RoutingTable(
        generation=generation,
        placement_digest=digest,
        backends=tuple(Backend(node=f"n{i}", address=f"h:{i}") for i in range(len(shares))),
        services=(
            ServiceRoutes(
                service=service,
                deadline_s=1.0,
                targets=tuple(
                    Target(group=f"n{i}/0", node=f"n{i}", weight=share, variant="v") for i, share in enumerate(shares)
                ),
            ),
        ),
    )


def serving(node: int, service: str = "chat") -> NodeView:
    return NodeView(replicas={ReplicaKey(group=f"n{node}/0", service=service, variant="v"): ""})


def router_of(shares: list[float], healthy: set[int]) -> Router:
    router = Router()
    router.install(table(*shares))
    for node in range(len(shares)):
        router.observe(Backend(node=f"n{node}", address=f"h:{node}"), serving(node) if node in healthy else NodeView())
    return router


class TestRotation:
    @given(weights, st.integers(1, 300))
    def test_every_share_is_within_one_request_per_target_of_its_weight(self, shares: list[float], count: int) -> None:
        router = router_of(shares, set(range(len(shares))))
        chosen = Counter(target.group for _ in range(count) if (target := router.choose("chat")))
        assert chosen.total() == count
        for node, share in enumerate(shares):
            assert abs(chosen[f"n{node}/0"] - count * share / sum(shares)) <= len(shares)

    @given(weights, st.sets(st.integers(0, 4)), st.integers(1, 100))
    def test_only_healthy_targets_are_chosen_and_they_share_by_weight(
        self, shares: list[float], healthy: set[int], count: int
    ) -> None:
        healthy = {node for node in healthy if node < len(shares)}
        router = router_of(shares, healthy)
        chosen = [router.choose("chat") for _ in range(count)]
        if not healthy:
            assert set(chosen) == {None}
            assert router.problem("chat")
            return
        counts = Counter(target.group for target in chosen if target)
        assert set(counts) <= {f"n{node}/0" for node in healthy}
        total = sum(shares[node] for node in healthy)
        for node in healthy:
            assert abs(counts[f"n{node}/0"] - count * shares[node] / total) <= len(shares)

    @given(weights.filter(lambda shares: len(shares) > 1), st.integers(0, 4))
    def test_the_group_passed_over_is_never_chosen(self, shares: list[float], without: int) -> None:
        router = router_of(shares, set(range(len(shares))))
        group = f"n{without % len(shares)}/0"
        assert all((target := router.choose("chat", without=group)) and target.group != group for _ in range(20))

    def test_a_lone_target_has_no_other(self) -> None:
        assert router_of([1.0], {0}).choose("chat", without="n0/0") is None

    def test_counters_tell_what_was_sent_and_what_failed(self) -> None:
        router = router_of([0.5, 0.5], {0, 1})
        for _ in range(4):
            router.choose("chat")
        router.suspect("chat", "n1/0", "it broke")
        first, second = router.health()
        assert (first.sent, first.failed, first.healthy, first.reason) == (2, 0, True, "")
        assert (second.sent, second.failed, second.healthy, second.reason) == (2, 1, False, "it broke")

    @given(st.lists(st.tuples(st.sets(st.integers(0, 3)), st.integers(0, 5), st.booleans()), max_size=6))
    def test_law_what_is_counted_of_a_target_never_falls_whatever_tables_come(
        self, steps: list[tuple[set[int], int, bool]]
    ) -> None:
        router, chosen, suspected = Router(), Counter[str](), Counter[str]()
        for generation, (nodes, requests, fails) in enumerate(steps, start=1):
            whole = table(*([1.0] * 4), generation=generation)
            targets = tuple(target for node, target in enumerate(whole.services[0].targets) if node in nodes)
            router.install(replace(whole, services=(replace(whole.services[0], targets=targets),)))
            for node in range(4):
                router.observe(Backend(node=f"n{node}", address=f"h:{node}"), serving(node))
            chosen.update(target.group for _ in range(requests) if (target := router.choose("chat")))
            if fails and nodes:
                router.suspect("chat", f"n{min(nodes)}/0", "it broke")
                suspected[f"n{min(nodes)}/0"] += 1
            for group, (sent, failed) in router.counted()["chat"].items():
                assert (sent, failed) == (chosen[group], suspected[group])
            assert set(chosen) | set(suspected) <= router.counted()["chat"].keys()


def timed_router(
    routing: Routing, shares: list[float], *, share_s: float = 0.01, alone_s: tuple[float, ...] = ()
) -> Router:
    """A router on a clock that stands still, over healthy targets of these weights and costs."""
    whole = table(*shares)
    targets = tuple(
        replace(target, share_s=share_s, alone_s=alone_s[position] if alone_s else 0.02)
        for position, target in enumerate(whole.services[0].targets)
    )
    router = Router(routing, clock=lambda: 0.0)
    router.install(replace(whole, services=(replace(whole.services[0], targets=targets),)))
    for node in range(len(shares)):
        router.observe(Backend(node=f"n{node}", address=f"h:{node}"), serving(node))
    return router


def sent(router: Router, count: int, **options: str) -> Counter[str]:
    return Counter(target.group for _ in range(count) if (target := router.choose("chat", **options)))


class TestRules:
    def test_by_default_a_target_with_half_a_deadline_of_work_gets_half_its_share(self) -> None:
        router = timed_router("corrected", [0.5, 0.5], share_s=0.0)
        router.note_wait("n0/0", 0.5)  # of a deadline of 1 s
        assert sent(router, 300) == {"n0/0": 100, "n1/0": 200}

    def test_by_default_a_target_whose_work_takes_the_whole_deadline_keeps_a_twentieth(self) -> None:
        router = timed_router("corrected", [0.5, 0.5], share_s=0.0)
        router.note_wait("n0/0", 99.0)
        assert sent(router, 210) == {"n0/0": 10, "n1/0": 200}

    def test_weights_alone_do_not_look_at_waits(self) -> None:
        router = timed_router("weighted", [0.75, 0.25])
        router.note_wait("n0/0", 99.0)
        assert sent(router, 40) == {"n0/0": 30, "n1/0": 10}

    def test_least_finish_fills_the_shortest_queue_first_then_all_alike_whatever_the_weights(self) -> None:
        router = timed_router("least-finish", [0.9, 0.1], share_s=0.01)
        router.note_wait("n0/0", 0.1)
        assert sent(router, 10) == {"n1/0": 10}
        assert sent(router, 20) == {"n0/0": 10, "n1/0": 10}

    def test_least_finish_counts_what_the_request_itself_takes(self) -> None:
        router = timed_router("least-finish", [0.5, 0.5], share_s=0.0, alone_s=(0.05, 0.02))
        assert sent(router, 5) == {"n1/0": 5}
        router.note_wait("n1/0", 0.04)
        assert sent(router, 5) == {"n0/0": 5}

    @pytest.mark.parametrize("routing", ["corrected", "least-finish", "weighted"])
    def test_no_rule_chooses_what_is_passed_over_or_unhealthy(self, routing: Routing) -> None:
        router = timed_router(routing, [0.4, 0.3, 0.3])
        router.suspect("chat", "n1/0", "it broke")
        assert sent(router, 20, without="n0/0") == {"n2/0": 20}

    @given(
        st.sampled_from(["corrected", "least-finish"]),
        st.lists(st.floats(0, 2), min_size=2, max_size=4),
        st.lists(st.floats(0.001, 0.1), min_size=4, max_size=4),
    )
    def test_law_the_gateway_chooses_what_the_rule_shared_with_the_evaluator_does(
        self, routing: Routing, waits_s: list[float], alone_s: list[float]
    ) -> None:
        shares = [1 / len(waits_s)] * len(waits_s)
        router = timed_router(routing, shares, alone_s=tuple(alone_s[: len(waits_s)]))
        for node, wait_s in enumerate(waits_s):
            router.note_wait(f"n{node}/0", wait_s)
        if routing == "least-finish":
            values = [wait_s + own_s for wait_s, own_s in zip(waits_s, alone_s, strict=False)]
            expected = dispatch.least(shares, values)
        else:
            weights_now = [dispatch.corrected_weight(shares[0], wait_s, 1.0) for wait_s in waits_s]
            expected = dispatch.next_replica(weights_now, [0.0] * len(waits_s))
        chosen = router.choose("chat")
        assert chosen is not None
        assert chosen.group == f"n{expected}/0"


class TestHealth:
    def test_a_suspect_is_out_until_its_node_is_observed_again(self) -> None:
        router = router_of([0.5, 0.5], {0, 1})
        router.suspect("chat", "n0/0", "it broke")
        assert {target.group for _ in range(6) if (target := router.choose("chat"))} == {"n1/0"}
        router.observe(Backend(node="n0", address="h:0"), serving(0))
        assert {target.group for _ in range(6) if (target := router.choose("chat"))} == {"n0/0", "n1/0"}

    def test_a_slow_agent_gets_requests_only_when_nothing_better_is_there(self) -> None:
        router = router_of([0.5, 0.5], {0, 1})
        slow = NodeView(problem="did not answer in time", doubtful=True)
        router.observe(Backend(node="n0", address="h:0"), slow)
        assert {target.group for _ in range(4) if (target := router.choose("chat"))} == {"n1/0"}
        assert not next(router.health()).healthy
        router.observe(Backend(node="n1", address="h:1"), NodeView(problem="the connection broke"))
        assert {target.group for _ in range(4) if (target := router.choose("chat"))} == {"n0/0"}
        router.observe(Backend(node="n0", address="h:0"), slow)
        assert router.choose("chat") is not None
        router.observe(Backend(node="n0", address="h:0"), NodeView(problem="the connection broke"))
        router.observe(Backend(node="n0", address="h:0"), slow)
        assert router.choose("chat") is None

    def test_no_target_is_used_before_its_agent_has_answered(self) -> None:
        router = Router()
        router.install(table(1.0))
        assert router.choose("chat") is None
        assert "not reached yet" in router.problem("chat")
        assert not router.ready

    def test_what_an_agent_at_another_address_says_does_not_count(self) -> None:
        router = Router()
        router.install(table(1.0))
        router.observe(Backend(node="n0", address="elsewhere:9"), serving(0))
        assert router.choose("chat") is None

    def test_a_backend_observed_ahead_of_its_table_is_used_from_the_first_request(self) -> None:
        router = Router()
        router.observe(Backend(node="n0", address="h:0"), serving(0))
        router.install(table(1.0))
        assert router.choose("chat") is not None

    @pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.SERVING])
    def test_a_replica_that_is_not_serving_says_why(self, phase: Phase) -> None:
        key = ReplicaKey(group="n0/0", service="chat", variant="v")
        state = AgentState(node="n0", version="", replicas=(ReplicaState(key=key, phase=phase, reason="because"),))
        target = table(1.0).services[0].targets[0]
        assert "because" in view_of("n0", state).problem_of("chat", target)
        assert "does not run" in view_of("n0", state).problem_of("chat", replace(target, variant="other"))

    def test_an_agent_of_another_node_is_not_believed(self) -> None:
        assert "n7" in view_of("n0", AgentState(node="n7", version="")).problem


class TestInstall:
    def test_ready_means_that_every_service_has_a_healthy_target(self) -> None:
        router = Router()
        assert not router.ready
        two = table(1.0)
        two = replace(two, services=(*two.services, replace(two.services[0], service="detect")))
        router.install(two)
        backend = two.backends[0]
        router.observe(backend, serving(0))
        assert not router.ready
        router.observe(backend, NodeView(replicas={**serving(0).replicas, **serving(0, "detect").replicas}))
        assert router.ready

    def test_health_of_a_node_survives_a_flip_and_the_old_routes_do_not(self) -> None:
        router = router_of([0.5, 0.5], {0, 1})
        router.install(table(1.0, generation=2))
        assert {target.group for _ in range(4) if (target := router.choose("chat"))} == {"n0/0"}
        assert router.routes("chat") == table(1.0).services[0]

    def test_an_older_generation_is_refused_and_changes_nothing(self) -> None:
        router = Router()
        router.install(table(1.0, generation=5))
        with pytest.raises(StalePlan, match="generation 5 is in force"):
            router.install(table(0.5, 0.5, generation=4))
        assert router.table == table(1.0, generation=5)

    def test_the_same_generation_may_gain_targets_but_not_become_another_plan(self) -> None:
        router = Router()
        router.install(table(1.0, generation=5))
        router.install(table(0.5, 0.5, generation=5))
        with pytest.raises(StalePlan, match="two controllers"):
            router.install(table(1.0, generation=5, digest="other"))
        assert router.table == table(0.5, 0.5, generation=5)

    def test_what_new_routes_would_lose_is_told_with_why(self) -> None:
        router = router_of([1.0], {0})
        assert router.losses(table(0.5, 0.5, generation=2)) == ()  # one of two is enough
        moved = table(1.0, generation=2)
        moved = replace(moved, backends=(Backend(node="n0", address="elsewhere:1"),))
        assert router.losses(moved) == ("'chat' would have nobody to serve it (n0/0: not reached yet)",)
        router.observe(moved.backends[0], NodeView(problem="its node is drained"))
        assert router.losses(moved) == ("'chat' would have nobody to serve it (n0/0: its node is drained)",)
        router.observe(moved.backends[0], serving(0))
        assert router.losses(moved) == ()

    def test_what_nobody_serves_now_or_what_waits_for_its_replicas_is_no_loss(self) -> None:
        later = replace(table(1.0, generation=2), backends=(Backend(node="n0", address="elsewhere:1"),))
        assert Router().losses(later) == ()
        assert router_of([1.0], set()).losses(later) == ()
        assert router_of([1.0], {0}).losses(table(generation=2)) == ()

    def test_a_service_whose_replicas_are_all_to_be_loaded_is_known_but_not_served(self) -> None:
        router = Router()
        full = table(1.0)
        router.install(replace(full, services=(replace(full.services[0], targets=()),)))
        assert router.routes("chat") is not None
        assert router.problem("chat") == "no replica is loaded yet"
        assert router.routes("nobody") is None
