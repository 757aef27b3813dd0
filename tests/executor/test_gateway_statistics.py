from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from executor.proto import open_inference_pb2 as inference
from tests.executor.front_door import Door, agents, door, run, table
from tests.free_port import free_port

Code = grpc.StatusCode


async def counted(front: Door, **asked: Any) -> dict[str, int]:
    answer = await front.inference.ModelStatistics(inference.ModelStatisticsRequest(**asked), timeout=10)
    return {one.name: one.inference_count for one in answer.model_stats}


def test_statistics_are_those_of_the_agents_that_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with agents("a", "b") as (a, b), door(tmp_path, poll_interval_s=0.01) as front:
            await front.control.set_routes(table(a, b), timeout_s=5)
            for _ in range(4):
                await front.infer()
            assert await counted(front, name="chat") == {"chat": 4}
            await a.kill()
            await front.until(lambda state: not state.targets[0].healthy)
            assert await counted(front) == {"chat": 2}
            await b.kill()
            code, _ = await front.code(counted(front))
            assert code is Code.UNAVAILABLE

    run(scenario())


def test_what_was_counted_where_a_plan_has_left_a_node_still_counts_while_its_agent_lives(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with agents("a", "b") as (a, b), door(tmp_path, poll_interval_s=0.01) as front:
            await front.control.set_routes(table(a, b), timeout_s=5)
            for _ in range(4):
                await front.infer()
            for generation, named in enumerate(((b,), (a,), (b,)), start=2):
                await front.control.set_routes(table(*named, generation=generation), timeout_s=5)
                assert await counted(front, name="chat") == {"chat": 4}
                assert await counted(front) == {"chat": 4}
            await front.infer()
            assert await counted(front) == {"chat": 5}
            await a.kill()
            asked = len(a.calls)
            assert await counted(front) == {"chat": 3}
            assert await counted(front) == {"chat": 3}
            assert len(a.calls) == asked, "an agent that is gone is asked no more"

    run(scenario())


def test_an_agent_that_never_had_the_service_fails_no_statistics(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with agents("a", "b") as (a, b), door(tmp_path, poll_interval_s=0.01) as front:
            both = table(a, b)
            only_a = replace(both.services[0], targets=both.services[0].targets[:1])
            await front.control.set_routes(replace(both, services=(only_a,)), timeout_s=5)
            await front.infer()
            b.fail("ModelStatistics", Code.NOT_FOUND)
            assert await counted(front, name="chat") == {"chat": 1}
            a.fail("ModelStatistics", Code.UNAVAILABLE)
            code, _ = await front.code(counted(front, name="chat"))
            assert code is Code.UNAVAILABLE, "what only others say of the service is not all"

    run(scenario())


def test_an_agent_that_hangs_holds_up_no_statistics(tmp_path: Path) -> None:
    async def scenario() -> None:
        options = {"poll_interval_s": 0.01, "poll_timeout_s": 0.05}
        async with agents("a", "b") as (a, b), door(tmp_path, **options) as front:
            await front.control.set_routes(table(a, b), timeout_s=5)
            await asyncio.gather(front.infer(), front.infer())
            for method in ("GetState", "ModelStatistics"):
                a.hold(method)
            await front.until(lambda state: not state.targets[0].healthy)
            assert await counted(front) == {"chat": 1}
            assert "ModelStatistics" not in a.calls
            for event in a.held.values():
                event.set()

    run(scenario())


def test_an_agent_whose_loss_is_not_noticed_yet_is_left_out(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with agents("a", "b") as (a, b), door(tmp_path) as front:
            await front.control.set_routes(table(a, b), timeout_s=5)
            await asyncio.gather(front.infer(), front.infer())
            a.fail("ModelStatistics", Code.UNAVAILABLE)
            assert await counted(front) == {"chat": 1}
            assert await counted(front) == {"chat": 2}

    run(scenario())


def test_no_version_but_the_one_is_ready_or_has_statistics(tmp_path: Path) -> None:
    async def scenario() -> None:
        http = f"127.0.0.1:{free_port()}"
        async with agents("a") as (a,), door(tmp_path, http=http) as front, aiohttp.ClientSession() as session:
            await front.control.set_routes(table(a), timeout_s=5)

            async def found(path: str) -> int:
                async with session.get(f"http://{http}/v2/models/chat{path}") as answer:
                    return answer.status

            ready = front.inference.ModelReady
            for version, is_known in (("", True), ("1", True), ("7", False)):
                asked = inference.ModelReadyRequest(name="chat", version=version)
                assert (await ready(asked, timeout=10)).ready is is_known
            assert await counted(front, name="chat", version="1") == {"chat": 0}
            code, details = await front.code(counted(front, name="chat", version="7"))
            assert (code, "'7'" in details) == (Code.NOT_FOUND, True)
            assert [await found(path) for path in ("/ready", "/versions/1/ready", "/versions/7/ready")] == [
                200,
                200,
                503,
            ]
            assert [await found(path) for path in ("/stats", "/versions/1/stats", "/versions/7/stats")] == [
                200,
                200,
                404,
            ]

    run(scenario())


@pytest.mark.parametrize("limit", [1, 3])
def test_requests_above_what_one_process_may_hold_are_refused_and_counted(tmp_path: Path, limit: int) -> None:
    async def scenario() -> None:
        metrics = f"127.0.0.1:{free_port()}"
        async with agents("a") as (a,), door(tmp_path, max_in_flight=limit, metrics=metrics) as front:
            await front.control.set_routes(table(a), timeout_s=5)
            a.infer_waits_for = asyncio.Event()
            held = [asyncio.ensure_future(front.infer(timeout=100)) for _ in range(limit)]
            while len(a.served) < limit:
                await asyncio.sleep(0)
            code, details = await front.code(front.infer(timeout=100))
            assert code is Code.RESOURCE_EXHAUSTED
            assert f"{limit} requests are in flight at this gateway, its limit" in details
            a.infer_waits_for.set()
            await asyncio.gather(*held)
            await front.infer()
            async with aiohttp.ClientSession() as session, session.get(f"http://{metrics}/metrics") as answer:
                text = await answer.text()
            assert 'executor_gateway_requests_total{code="RESOURCE_EXHAUSTED",service="chat"} 1.0' in text

    run(scenario())
