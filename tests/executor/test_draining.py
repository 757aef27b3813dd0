from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest

from executor.controller import apply
from executor.draining import set_drained, sole_services
from executor.gateway import GatewayConfig, running_gateway
from executor.state import AgentState, GatewayState, Phase, ReplicaKey, ReplicaState, TargetState
from plans.cluster import Cluster
from plans.errors import InvalidInput, RemoteFailure
from tests.executor.fake_agent import FakeAgent
from tests.executor.front_door import Door
from tests.executor.placements import placement

PLAN = placement({"a/0": {"chat": "v", "alone": "v"}, "b/0": {"chat": "v"}})


def test_a_drained_node_gets_no_requests_until_it_is_taken_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        a, b = [await FakeAgent(name).start() for name in "ab"]
        nodes = [
            {"name": agent.node, "address": agent.address, "gpus": {"type": "cpu", "count": 1}} for agent in (a, b)
        ]
        cluster = Cluster.model_validate({"gpu_types": {"cpu": {"memory": "1GiB"}}, "nodes": nodes})
        config = GatewayConfig(listen="127.0.0.1:0", state_dir=tmp_path, poll_interval_s=0.01)
        async with running_gateway(config) as address:
            await apply(PLAN, cluster, [address])
            door = Door.to(address)
            with pytest.raises(InvalidInput, match=r"only serving replica of 'alone'.*--force"):
                await set_drained(cluster, [address], "a", True)
            with pytest.raises(InvalidInput, match="one of a, b"):
                await set_drained(cluster, [address], "c", True)
            assert not a.drained
            done = await set_drained(cluster, [address], "a", True, force=True)
            assert done.services == ("alone", "chat")
            for _ in range(4):
                await door.infer()
            assert {group for group, _ in b.served} == {"b/0"}
            assert not a.served
            state = await door.state()
            assert all("undrain" in target.reason for target in state.targets if target.group == "a/0")
            await set_drained(cluster, [address], "a", False)
            for _ in range(4):
                await door.infer()
            assert a.served
            await door.channel.close()
        await asyncio.gather(a.kill(), b.kill())

    asyncio.run(asyncio.wait_for(scenario(), 120))


def test_what_only_a_drained_node_serves_elsewhere_does_not_count() -> None:
    def agent(node: str, *services: str, drained: bool = False, phase: Phase = Phase.SERVING) -> AgentState:
        replicas = tuple(
            ReplicaState(key=ReplicaKey(group=f"{node}/0", service=service, variant="v"), phase=phase)
            for service in services
        )
        return AgentState(node=node, version="", replicas=replicas, drained=drained)

    def door(**unreached: str) -> dict[str, GatewayState]:
        targets = tuple(
            TargetState(service=service, group=f"{node}/0", healthy=unreached.get(node) != service)
            for node, services in {"a": "xy", "b": "x", "c": "y"}.items()
            for service in services
        )
        return {"g:1": GatewayState(version="", targets=targets)}

    agents = {"a": agent("a", "x", "y"), "b": agent("b", "x", drained=True), "c": agent("c", "y")}
    assert sole_services("a", agents, door()) == ("x",)
    assert sole_services("c", agents, door()) == ()
    assert sole_services("a", agents, door(c="y")) == ("x", "y")  # a gateway does not reach it
    assert sole_services("a", agents, door() | {"g:2": GatewayState(version="")}) == ("x", "y")  # one routes nothing
    halves = {f"g:{at}": dataclasses.replace(door(**{at: "y"})["g:1"]) for at in "cd"}
    both = agents | {"d": agent("d", "y")}
    targets = (*halves["g:c"].targets, TargetState(service="y", group="d/0", healthy=True))
    halves["g:c"] = dataclasses.replace(halves["g:c"], targets=targets)
    assert sole_services("a", both, halves) == ("x",)  # one gateway sends to c, the other to d
    left = tuple(dataclasses.replace(one, left_over=True) for one in agents["c"].replicas)
    assert sole_services("a", agents | {"c": dataclasses.replace(agents["c"], replicas=left)}, door()) == ("x", "y")
    loading = agents | {"a": agent("a", "x", "y", phase=Phase.LOADING)}
    assert sole_services("a", loading, door()) == ("x",)  # it would load, and nobody would send to it
    assert sole_services("c", loading, door()) == ("y",)


def test_a_dead_node_keeps_nobody_from_draining_another_and_a_dead_gateway_is_told_before_anything_changes(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        a, b, c = [await FakeAgent(name).start() for name in "abc"]
        nodes = [{"name": one.node, "address": one.address, "gpus": {"type": "cpu", "count": 1}} for one in (a, b, c)]
        cluster = Cluster.model_validate({"gpu_types": {"cpu": {"memory": "1GiB"}}, "nodes": nodes})
        config = GatewayConfig(listen="127.0.0.1:0", state_dir=tmp_path, poll_interval_s=0.01)
        async with running_gateway(config) as address:
            await apply(placement({"a/0": {"chat": "v"}, "b/0": {"chat": "v"}}), cluster, [address])
            await c.kill()
            assert (await set_drained(cluster, [address], "a", True)).services == ("chat",)
            assert not (await set_drained(cluster, [address], "a", False)).drained
            with pytest.raises(RemoteFailure, match=r"agent of c at .*nothing was changed"):
                await set_drained(cluster, [address], "c", True)
        with pytest.raises(RemoteFailure, match=r"gateway at .*nothing was changed"):
            await set_drained(cluster, [address], "a", True)
        assert not a.drained
        await asyncio.gather(a.kill(), b.kill())

    asyncio.run(asyncio.wait_for(scenario(), 120))
