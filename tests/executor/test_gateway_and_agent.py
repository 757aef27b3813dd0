"""What clients are promised, through a gateway and an agent with workers of the scripted runtime."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from executor.proto import open_inference_pb2 as pb
from executor.state import Backend, DesiredReplica, RoutingTable, ServiceRoutes, Target
from executor.tensors import encode_request
from tests.executor.front_door import Door, door
from tests.executor.running_agent import WAIT_S, AgentClient, desired, eventually, replica, running_agent

SCRIPTED = "tests.executor.scripted_runtime:ScriptedRuntime"
Code = grpc.StatusCode


class Site:
    """A gateway in front of an agent that serves "s" on some of its devices."""

    def __init__(self, folder: Path, agent: AgentClient, front: Door) -> None:
        self.folder = folder
        self.agent = agent
        self.front = front

    async def infer(self, *, timeout_s: float = WAIT_S, **parameters: Any) -> pb.ModelInferResponse:
        request = encode_request("s", {"x": np.ones((1, 4), np.float32)}, parameters=parameters)
        return await self.front.inference.ModelInfer(request, timeout=timeout_s)

    def begin(self, **asked: Any) -> asyncio.Task[pb.ModelInferResponse]:
        return asyncio.create_task(self.infer(**asked))

    async def until_waiting(self, queued: int, running: int = 1) -> None:
        async def reached() -> bool:
            states = [one for one in (await self.agent.state()).replicas if one.key.service == "s"]
            return (sum(one.queued for one in states), sum(one.running for one in states)) == (queued, running)

        await eventually(reached)

    def open_gate(self) -> None:
        (self.folder / "run").touch()


@asynccontextmanager
async def site(folder: Path, *groups: DesiredReplica) -> AsyncIterator[Site]:
    """Serve a replica on each device."""
    async with (
        running_agent(folder / "agent", runtime=SCRIPTED, model_dir=folder) as agent,
        door(folder / "gateway") as front,
    ):
        await agent.apply(desired(1, **{f"g{number}": [one] for number, one in enumerate(groups)}))
        targets = tuple(
            Target(
                group=f"node-a/{number}",
                node="node-a",
                weight=1 / len(groups),
                variant=one.variant,
                share_s=one.batch_latency_s[-1] / one.max_batch,
            )
            for number, one in enumerate(groups)
        )
        table = RoutingTable(
            generation=1,
            placement_digest="sha256:1",
            backends=(Backend(node="node-a", address=f"127.0.0.1:{agent.port}"),),
            services=(ServiceRoutes(service="s", deadline_s=groups[0].deadline_s, targets=targets),),
        )
        await front.control.set_routes(table, timeout_s=WAIT_S)
        yield Site(folder, agent, front)


def one_by_one(**changed: Any) -> DesiredReplica:
    """A replica that runs a request at a time, once its gate is open, and is planned to take a second for each."""
    settings: dict[str, Any] = {"max_batch": 1, "batch_latency_s": (1.0,), "deadline_s": 100.0}
    return replica("s", "gated-run", **(settings | changed))


def test_priority_goes_before_deadlines(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with site(tmp_path, one_by_one()) as found:
            order: list[str] = []
            first = found.begin()
            await found.until_waiting(0)
            calls = []
            asked = {
                "last": {"priority": 9, "deadline_ms": 50_000},
                "late": {"deadline_ms": 90_000},
                "soon": {"priority": 5, "deadline_ms": 60_000},
                "first": {"priority": 1, "deadline_ms": 99_000},
            }
            for name, parameters in asked.items():
                call = found.begin(**parameters)
                call.add_done_callback(lambda _, name=name: order.append(name))
                calls.append(call)
            await found.until_waiting(4)
            found.open_gate()
            await asyncio.gather(first, *calls)
            assert order == ["first", "soon", "late", "last"]

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


def test_a_long_queue_refuses_only_those_that_it_goes_before(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with site(tmp_path, one_by_one(deadline_s=1000.0)) as found:
            order: list[str] = []

            def begin(name: str, **asked: Any) -> asyncio.Task[pb.ModelInferResponse]:
                call = found.begin(**asked)
                call.add_done_callback(lambda _: order.append(name))
                return call

            calls = [begin("running")]
            await found.until_waiting(0)
            calls += [begin("flood", deadline_ms=900_000) for _ in range(80)]
            await found.until_waiting(80)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await found.infer(priority=9, deadline_ms=30_000)
            assert refused.value.code() is Code.RESOURCE_EXHAUSTED
            assert "80.000 s of work wait before it" in (refused.value.details() or "")
            calls += [begin("soon", deadline_ms=30_000), begin("urgent", priority=1, deadline_ms=30_001)]
            await found.until_waiting(82)
            found.open_gate()
            await asyncio.gather(*calls)
            assert order[:4] == ["running", "urgent", "soon", "flood"]

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


def test_frames_of_a_stream_stay_on_one_replica_and_run_as_one_bundle(tmp_path: Path) -> None:
    async def scenario() -> None:
        bundling = replica("s", "twice", max_batch=4, multi_frame=4, deadline_s=1000.0)
        async with site(tmp_path, bundling, bundling) as found:
            places: dict[str, set[str]] = {"x": set(), "y": set()}
            for _ in range(3):
                calls = [(name, found.begin(sequence_id=name)) for name in "xxyyxyxy"]
                for name, call in calls:
                    answer = await call
                    assert answer.parameters["batch_size"].int64_param == 4
                    places[name].add(answer.parameters["group"].string_param)
            assert {len(groups) for groups in places.values()} == {1}
            assert set.union(*places.values()) == {"node-a/0", "node-a/1"}
            assert sum(one.batches for one in (await found.agent.state()).replicas) == 6

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


def test_a_bundle_that_is_not_full_runs_in_time_for_its_first_frame(tmp_path: Path) -> None:
    async def scenario() -> None:
        latency_s = (0.001, 0.001, 0.001, 10.0)
        bundling = replica("s", "twice", max_batch=4, multi_frame=4, batch_latency_s=latency_s)
        async with site(tmp_path, bundling) as found:
            calls = [found.begin(sequence_id="x", deadline_ms=10_500) for _ in range(2)]
            answers = await asyncio.gather(*calls)
            assert [answer.parameters["batch_size"].int64_param for answer in answers] == [2, 2]

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


def test_a_frame_whose_client_goes_away_gathers_no_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        bundling = replica("s", "twice", max_batch=4, multi_frame=2, deadline_s=1000.0)
        async with site(tmp_path, bundling) as found:
            gone = found.begin(sequence_id="x")
            await found.until_waiting(1, running=0)
            gone.cancel()
            await found.until_waiting(0, running=0)
            staying = found.begin(sequence_id="x")
            await found.until_waiting(1, running=0)
            answers = [await found.infer(sequence_id="x"), await staying]
            assert [answer.parameters["batch_size"].int64_param for answer in answers] == [2, 2]
            (state,) = (await found.agent.state()).replicas
            assert (state.completed, state.dropped, state.batches) == (2, 1, 1)

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))
