from __future__ import annotations

import asyncio
import json

from executor.cluster_status import ClusterStatus, cluster_status, status
from executor.state import AgentState, GatewayState, Phase, ReplicaKey, ReplicaState, TargetState
from plans.cluster import Cluster
from plans.plan import Prior
from tests.executor.fake_agent import FakeAgent, FakeGateway

CLUSTER = Cluster.model_validate(
    {
        "gpu_types": {"cpu": {"memory": "1GiB"}},
        "nodes": [{"name": name, "address": f"{name}:1", "gpus": {"type": "cpu", "count": 2}} for name in ("a", "b")],
    }
)


def agent(node: str, *replicas: ReplicaState, generation: int = 2, ready: bool = True) -> AgentState:
    digest = f"d{generation}" if generation else ""
    return AgentState(
        node=node, version="", generation=generation, placement_digest=digest, replicas=replicas, ready=ready
    )


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
            agent("b", replica("b/1", Phase.DRAINING)),
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


def test_peers_that_do_not_answer_are_named_and_their_replicas_are_still_listed() -> None:
    found = seen([agent("a", replica("a/0"))], gateway("a/0", "b/0", healthy=False), {"b": "UNAVAILABLE: refused"})
    assert found.agents[1].problem == "does not answer: UNAVAILABLE: refused"
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
    assert "does not answer" in found.agents[1].problem
    assert json.loads(json.dumps(found.to_json()))["healthy"] is False
