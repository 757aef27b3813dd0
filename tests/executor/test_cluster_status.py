from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import pytest

from executor.cluster_status import ClusterStatus, cluster_status, status
from executor.state import (
    AgentState,
    DesiredGroup,
    DesiredReplica,
    DesiredState,
    GatewayState,
    Phase,
    ReplicaKey,
    ReplicaState,
    TargetState,
)
from plans.cluster import Cluster
from plans.plan import Prior
from tests.executor.fake_agent import FakeAgent, FakeGateway

CLUSTER = Cluster.model_validate(
    {
        "gpu_types": {"cpu": {"memory": "1GiB"}},
        "nodes": [{"name": name, "address": f"{name}:1", "gpus": {"type": "cpu", "count": 2}} for name in ("a", "b")],
    }
)


def agent(node: str, *replicas: ReplicaState, generation: int = 2, ready: bool = True, **changed: Any) -> AgentState:
    """An agent that has committed all of ``replicas`` that do not drain, and are not named in ``beside``."""
    digest = f"d{generation}" if generation else ""
    beside = changed.pop("beside", ())
    kept = [one.key for one in replicas if one.phase is not Phase.DRAINING and one.key.group not in beside]
    committed = DesiredState(
        generation=generation, placement_digest=digest, node=node, groups=tuple(_group(key) for key in kept)
    )
    fields = {"generation": generation, "placement_digest": digest, "replicas": replicas, "ready": ready}
    return AgentState(
        **{"node": node, "version": "", "committed": committed if generation else None} | fields | changed
    )


def _group(key: ReplicaKey, *, rate_rps: float = 0.0) -> DesiredGroup:
    runs = DesiredReplica(
        service=key.service,
        variant=key.variant,
        max_batch=1,
        deadline_s=1,
        batch_latency_s=(1,),
        memory_bytes=(1,),
        rate_rps=rate_rps,
    )
    return DesiredGroup(id=key.group, gpus=(0,), replicas=(runs,))


def replica(group: str, phase: Phase = Phase.SERVING, reason: str = "") -> ReplicaState:
    return ReplicaState(key=ReplicaKey(group=group, service="chat", variant="v"), phase=phase, reason=reason)


def gateway(*groups: str, generation: int = 2, healthy: bool = True) -> GatewayState:
    targets = tuple(TargetState(service="chat", group=group, healthy=healthy) for group in groups)
    return GatewayState(
        version="", generation=generation, placement_digest=f"d{generation}", targets=targets, ready=True
    )


def seen(agents: list[AgentState], door: GatewayState | None, lost: dict[str, str] | None = None) -> ClusterStatus:
    doors = {"g:1": door} if door else {}
    return cluster_status(CLUSTER, ["g:1"], {state.node: state for state in agents}, doors, lost or {}, None)


def test_a_cluster_that_is_as_it_should_be_has_no_problem() -> None:
    found = seen([agent("a", replica("a/0")), agent("b")], gateway("a/0"))
    assert found.healthy
    assert found.live == Prior(generation=2, digest="d2")
    (only,) = found.replicas
    assert (only.desired, only.phase, only.routed_by, only.problem) == (True, Phase.SERVING, ("g:1",), "")


def test_an_untouched_cluster_is_healthy_and_runs_nothing() -> None:
    untouched = GatewayState(version="")
    found = seen([agent("a", generation=0, ready=False), agent("b", generation=0, ready=False)], untouched)
    assert found.healthy
    assert found.live is None


def test_each_difference_gives_its_reason() -> None:
    found = seen(
        [
            agent("a", replica("a/0", Phase.FAILED, "out of memory"), replica("a/1"), ready=False),
            agent(
                "b",
                replica("b/1", Phase.DRAINING),
                committed=DesiredState(
                    generation=2,
                    placement_digest="d2",
                    node="b",
                    groups=(_group(ReplicaKey(group="b/0", service="chat", variant="v")),),
                ),
            ),
        ],
        gateway("a/0", "b/0"),
    )
    problems = {entry.group: entry.problem for entry in found.replicas}
    assert problems == {
        "a/0": "it is failed: out of memory",
        "a/1": "",  # part of the placement, without a route: it stands by
        "b/0": "its agent does not run it; run `foreplan apply` again",
        "b/1": "it has left the plan and drains",
    }
    assert not found.healthy
    assert found.agents[0].problem == "is not ready: see its replicas"


def test_what_an_agent_of_another_placement_runs_is_not_part_of_the_plan() -> None:
    found = seen([agent("a", replica("a/0")), agent("b", replica("b/1"), generation=1)], gateway("a/0"))
    assert {entry.group: entry.problem for entry in found.replicas}["b/1"].startswith("it is not part of the plan")


def test_the_memory_that_agents_tell_of_is_shown_and_no_other() -> None:
    told = agent("a", replica("a/0"), resident_bytes=5, device_used_bytes=(7, 0))
    found = seen([told, agent("b", replica("b/0"))], None, {"g:1": "UNAVAILABLE: refused"}).to_json()
    memory = [(one["resident_bytes"], one["device_used_bytes"]) for one in (*found["agents"], *found["gateways"])]
    assert memory == [(5, [7, 0]), (0, []), (None, [])]


def test_without_a_gateway_what_agents_have_committed_is_the_plan() -> None:
    found = seen([agent("a", replica("a/0")), agent("b", replica("b/0"))], None, {"g:1": "UNAVAILABLE: refused"})
    assert [(entry.desired, entry.problem) for entry in found.replicas] == [(True, "")] * 2
    assert found.gateways[0].problem == "tells no state: UNAVAILABLE: refused"
    assert not found.healthy


@pytest.mark.parametrize(
    ("phase", "how"),
    [
        (Phase.STAGED, "it is loaded"),
        (Phase.LOADING, "it loads"),
        (Phase.FAILED, "it could not be loaded (no room)"),
    ],
)
def test_what_is_staged_only_is_not_desired_yet_and_says_what_it_waits_for(phase: Phase, how: str) -> None:
    reason = "no room" if phase is Phase.FAILED else ""
    staged = agent(
        "a", replica("a/0"), replica("a/1", phase, reason), beside={"a/1"}, staged_generation=3, leased_to="host:7"
    )
    found = seen([staged, agent("b")], gateway("a/0"))
    assert [entry.desired for entry in found.replicas] == [True, False]
    problem = f"{how} for generation 3, not committed yet; "
    assert found.replicas[1].problem == problem + "controller host:7 is at work"
    alone = seen([dataclasses.replace(staged, leased_to=""), agent("b")], gateway("a/0"))
    assert alone.replicas[1].problem == problem + "run `foreplan apply` again"


def test_a_variant_that_was_replaced_in_its_place_is_no_part_of_the_plan() -> None:
    old = ReplicaState(key=ReplicaKey(group="a/0", service="chat", variant="old"), phase=Phase.SERVING, left_over=True)
    one = agent("a", replica("a/0"))
    found = seen([dataclasses.replace(one, replicas=(*one.replicas, old)), agent("b")], gateway("a/0"))
    assert {entry.variant: entry.desired for entry in found.replicas} == {"v": True, "old": False}


def test_a_cluster_at_a_stop_between_two_plans_is_not_taken_for_done() -> None:
    found = seen([agent("a", replica("a/0"), underway=True), agent("b", underway=True)], gateway("a/0"))
    assert not found.healthy
    assert found.agents[0].problem == "is at a stop on the way to the plan; run `foreplan apply` again to go on"


def test_a_replica_that_a_gateway_leaves_out_says_why() -> None:
    target = TargetState(service="chat", group="a/0", healthy=False, reason="its agent did not answer in time")
    door = GatewayState(version="", generation=2, placement_digest="d2", targets=(target,))
    found = seen([agent("a", replica("a/0")), agent("b")], door)
    assert found.replicas[0].problem == "gateway g:1 sends it nothing: its agent did not answer in time"


def test_a_replica_that_had_to_wait_and_was_not_routed_to_before_the_controller_died_says_so() -> None:
    waited = replica("a/1")
    groups = (_group(replica("a/0").key, rate_rps=1.0), _group(waited.key, rate_rps=1.0))
    committed = DesiredState(generation=2, placement_digest="d2", node="a", groups=groups)
    one = agent("a", replica("a/0"), waited, committed=committed)
    found = seen([one, agent("b")], gateway("a/0"))
    problem = "gateway g:1 does not route to it; "
    assert {entry.group: entry.problem for entry in found.replicas} == {
        "a/0": "",
        "a/1": f"{problem}run `foreplan apply` again",
    }
    assert not found.healthy
    busy = seen([dataclasses.replace(one, leased_to="host:7"), agent("b")], gateway("a/0"))
    assert busy.replicas[1].problem == f"{problem}controller host:7 is at work"
    assert seen([one, agent("b")], gateway("a/0", "a/1")).healthy
    behind = seen([one, agent("b")], gateway("a/0", generation=1))
    assert [entry.problem for entry in behind.replicas] == ["", ""]  # that is said of the gateway


def test_peers_that_do_not_answer_are_named_and_their_replicas_are_still_listed() -> None:
    found = seen([agent("a", replica("a/0"))], gateway("a/0", "b/0", healthy=False), {"b": "UNAVAILABLE: refused"})
    assert found.agents[1].problem == "tells no state: UNAVAILABLE: refused"
    assert found.agents[1].generation is None
    lost = found.replicas[-1]
    assert (lost.group, lost.phase, lost.problem) == ("b/0", None, "its agent does not answer")
    assert found.replicas[0].routed_by == ()


def test_a_peer_of_another_generation_is_named() -> None:
    found = seen([agent("a", replica("a/0")), agent("b", generation=1)], gateway("a/0"))
    assert "generation 1" in found.agents[1].problem


def test_status_asks_every_peer_and_is_plain_json() -> None:
    async def scenario() -> ClusterStatus:
        one, two, door = await FakeAgent("a").start(), await FakeAgent("b").start(), await FakeGateway().start()
        await two.kill()
        nodes = [{"name": p.node, "address": p.address, "gpus": {"type": "cpu", "count": 1}} for p in (one, two)]
        cluster = Cluster.model_validate({"gpu_types": {"cpu": {"memory": "1GiB"}}, "nodes": nodes})
        try:
            return await status(cluster, [door.address, door.address])
        finally:
            await asyncio.gather(one.kill(), door.kill())

    found = asyncio.run(scenario())
    assert len(found.gateways) == 1
    assert found.agents[0].problem == ""
    assert "tells no state: UNAVAILABLE" in found.agents[1].problem
    assert json.loads(json.dumps(found.to_json()))["healthy"] is False
