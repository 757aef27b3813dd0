from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from executor.first_tries import FirstTries, GivenUp
from tests.executor.fake_agent import FakeAgent
from tests.executor.front_door import Door, agents, door, request, run, table

QUICK = {"poll_interval_s": 0.01, "poll_timeout_s": 0.05}


async def waiting(tries: FirstTries, node: str, service: str) -> str:
    with tries.at(node, service):
        await asyncio.Event().wait()
    return "ended"


def test_only_what_is_on_the_lost_node_and_served_elsewhere_is_given_up() -> None:
    async def scenario() -> None:
        tries = FirstTries()
        places = [("a", "chat"), ("a", "only here"), ("b", "chat")]
        tasks = [asyncio.create_task(waiting(tries, *place)) for place in places]
        await asyncio.sleep(0)
        tries.give_up("a", lambda service: service == "chat")
        with pytest.raises(GivenUp, match="'a' does not answer") as caught:
            await tasks[0]
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert not any(task.done() for task in tasks[1:])
        for task in tasks[1:]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert [task.cancelled() for task in tasks] == [False, True, True]

    run(scenario())


def test_a_client_that_leaves_at_the_same_moment_is_gone_and_not_given_up() -> None:
    async def scenario() -> None:
        tries = FirstTries()
        task = asyncio.create_task(waiting(tries, "a", "chat"))
        await asyncio.sleep(0)
        task.cancel()
        tries.give_up("a", lambda _: True)
        with pytest.raises(asyncio.CancelledError):
            await task

    run(scenario())


def test_what_has_an_answer_is_kept_and_a_task_goes_on_after_it_gave_up() -> None:
    async def scenario() -> None:
        tries, going_on = FirstTries(), asyncio.Event()

        async def one() -> str:
            with contextlib.suppress(GivenUp), tries.at("a", "chat"):
                await asyncio.Event().wait()
            with tries.at("b", "chat") as second:
                second.keep()
                await going_on.wait()
            return "answered"

        task = asyncio.create_task(one())
        await asyncio.sleep(0)
        for node in "ab":
            tries.give_up(node, lambda _: True)
            await asyncio.sleep(0)
        going_on.set()
        assert await task == "answered"

    run(scenario())


@contextlib.asynccontextmanager
async def one_of_two_hangs(tmp_path: Path) -> AsyncIterator[tuple[Door, FakeAgent, FakeAgent]]:
    """A gateway before two agents, the first of which takes requests and answers nothing."""
    async with agents("a", "b") as (a, b), door(tmp_path, **QUICK) as front:
        await front.control.set_routes(table(a, b, shares=(1.0, 1e-9), deadline_s=600.0), timeout_s=5)
        a.infer_waits_for = asyncio.Event()
        yield front, a, b
        a.infer_waits_for.set()


async def reached(agent: FakeAgent) -> None:
    while not agent.served:
        await asyncio.sleep(0)


@pytest.mark.parametrize("size_bytes", [4, 2 << 20], ids=["as a frame", "as a call of its own"])
def test_a_request_at_an_agent_that_hangs_goes_to_the_other_replica(tmp_path: Path, size_bytes: int) -> None:
    async def scenario() -> None:
        async with one_of_two_hangs(tmp_path) as (front, a, b):
            call: Any = asyncio.ensure_future(front.infer(data=bytes(size_bytes), timeout=600))
            await reached(a)
            a.hold("GetState")
            assert (await call).parameters["variant"].string_param == "b"
            assert (len(a.served), len(b.served)) == (1, 1)
            a.held["GetState"].set()

    run(scenario())


def test_the_only_replica_may_still_answer_when_it_is_slow(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with agents("a") as (a,), door(tmp_path, **QUICK) as front:
            await front.control.set_routes(table(a), timeout_s=5)
            a.infer_waits_for = asyncio.Event()
            call = asyncio.ensure_future(front.infer(timeout=600))
            await reached(a)
            a.hold("GetState")
            await front.until(lambda state: not state.ready)
            a.infer_waits_for.set()
            assert (await call).parameters["variant"].string_param == "a"
            a.held["GetState"].set()

    run(scenario())


def test_a_request_of_a_stream_without_an_answer_goes_to_the_other_replica(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with one_of_two_hangs(tmp_path) as (front, a, b):
            call = front.inference.ModelStreamInfer()
            await call.write(request())
            await reached(a)
            a.hold("GetState")
            answer = await call.read()
            assert answer.infer_response.parameters["variant"].string_param == "b"
            assert (len(a.served), len(b.served)) == (1, 1)
            call.cancel()
            a.held["GetState"].set()

    run(scenario())
