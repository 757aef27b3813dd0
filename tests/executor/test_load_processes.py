from __future__ import annotations

import asyncio
import multiprocessing
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest

from executor import load_processes
from executor.load import LoadOptions, LoadProgress, LoadResult, replay
from executor.load_run import Schedule
from plans.errors import InvalidInput, RemoteFailure
from plans.service import Services
from tests.executor.fake_agent import FakeAgent
from tests.executor.front_door import agents, door, run, table
from tests.executor.running_agent import eventually
from traces.table import RequestTrace

SERVICES = Services.model_validate(
    {"services": [{"name": "chat", "slo": {"deadline": "10s"}, "variants": [{"model": "v"}]}]}
)


def requests(count: int, gap_s: float = 0.01) -> RequestTrace:
    return RequestTrace(pd.DataFrame({"arrival_s": np.arange(count) * gap_s, "service": "chat"}))


class Endless:
    """A replay by two processes that would take long, and has begun."""

    def __init__(self, agent: FakeAgent, address: str) -> None:
        self.agent = agent
        self.how = LoadOptions(processes=2)
        self.result = asyncio.create_task(replay(requests(100_000), address, SERVICES, self.how))

    async def processes(self) -> list[psutil.Process]:
        while len(self.agent.served) < 10:
            await asyncio.sleep(0)
        return [one for one in psutil.Process().children() if "spawn_main" in str(one.cmdline())]


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[tuple[FakeAgent, str]]:
    """A gateway in front of one fake agent that serves "chat"."""
    async with agents("a") as (agent,), door(folder, grace_s=0.0) as front:
        await front.control.set_routes(table(agent, deadline_s=10.0), timeout_s=5)
        yield agent, front.address


def check_half_is_there(result: LoadResult) -> None:
    assert len(result.lost) == 1
    assert (
        "ended before its work was done; the run was stopped, and the 50000 requests of it are missing"
        in (result.lost[0])
    )
    assert 1 <= len(result.requests) < 50_000
    assert result.summary.requests == len(result.requests)
    assert set(result.requests["outcome"]) <= {"good", "in_flight"}
    number = np.round(result.requests["scheduled_s"] / 0.01).astype(int)
    assert len(set(number % 2)) == 1


@pytest.mark.parametrize("told_before", [False, True])
def test_a_process_that_is_killed_ends_the_run_and_what_the_other_has_is_kept(
    tmp_path: Path, told_before: bool
) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as (agent, address):
            endless = Endless(agent, address)
            first, second = await endless.processes()
            if told_before:
                first.suspend()
                endless.how.stop.set()
                await eventually(lambda: second.status() == psutil.STATUS_ZOMBIE)  # so both were told to stop
            first.kill()
            check_half_is_there(await endless.result)

    run(scenario())


def test_when_no_process_is_left_the_run_fails(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as (agent, address):
            endless = Endless(agent, address)
            both = await endless.processes()
            for one in both:
                one.suspend()
            for one in both:
                one.kill()
            with pytest.raises(RemoteFailure, match=r"load process [01]: ended before its work was done"):
                await endless.result

    run(scenario())


def test_a_process_that_ends_within_a_message_has_ended() -> None:
    ours, theirs = multiprocessing.Pipe()
    os.write(theirs.fileno(), struct.pack("!i", 100) + b"R")
    theirs.close()
    with pytest.raises(RemoteFailure, match="load process 3: ended before its work was done"):
        load_processes._received(ours, 3)


def test_a_process_that_cannot_reach_the_gateway_any_more_ends_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_processes, "_CONNECT_S", 0.05)
    ours, theirs = multiprocessing.Pipe()
    nothing = np.zeros(0)
    schedule = Schedule(due_s=nothing, deadline_s=nothing, body=np.zeros(0, np.int64), duration_s=0.0)
    load_processes._child(schedule, [], load_processes.LoadTarget(gateway="127.0.0.1:1"), theirs)
    assert ours.recv_bytes() == b"F127.0.0.1:1: cannot be reached any more, after 0.05 s"


def test_no_process_is_refused() -> None:
    with pytest.raises(InvalidInput, match="--processes"):
        run(replay(requests(1), "127.0.0.1:1", SERVICES, LoadOptions(processes=0)))


def test_a_gateway_that_dies_gives_every_request_an_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with agents("a") as (agent,):
            async with door(tmp_path, grace_s=0.0) as front:
                await front.control.set_routes(table(agent, deadline_s=10.0), timeout_s=5)
                how = LoadOptions(processes=2)
                task = asyncio.create_task(replay(requests(200, gap_s=0.005), front.address, SERVICES, how))
                while len(agent.served) < 20:
                    await asyncio.sleep(0.001)
            outcomes = (await task).requests["outcome"].value_counts()
            assert outcomes.sum() == 200
            assert outcomes["failed"] > 0

    run(scenario())


def test_several_processes_send_what_one_would(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as (agent, address):
            seen: list[LoadProgress] = []
            options = LoadOptions(processes=2, on_progress=seen.append)
            result = await replay(requests(60, gap_s=0.005), address, SERVICES, options)
            assert list(result.requests["outcome"]) == ["good"] * 60
            assert np.allclose(result.requests["scheduled_s"], np.arange(60) * 0.005)
            assert set(result.requests["group"]) == {"a/0"}
            assert len(agent.served) == 60
            assert (seen[-1].done, seen[-1].good, seen[-1].latency.count) == (60, 60, 60)
            assert result.lost == ()

    run(scenario())
