from __future__ import annotations

import asyncio
import contextlib

import pytest

from executor import spare_worker
from executor.errors import WorkerRefused
from executor.spare_worker import SpareWorker
from executor.worker_link import WorkerSettings
from tests.executor.running_agent import FAKE, eventually, worker_processes


@contextlib.asynccontextmanager
async def spare(runtime=FAKE):
    made = SpareWorker(WorkerSettings(runtime=runtime))
    try:
        yield made
    finally:
        await made.close()
        assert worker_processes() == []


def test_the_first_group_of_the_device_takes_it_and_the_second_does_not():
    async def scenario():
        async with spare() as made:
            made.start()
            assert await made.take(1) is None
            first, second = await asyncio.gather(made.take((0,)), made.take((0,)))
            assert second is None
            assert first is not None
            assert [process.pid for process in worker_processes()] == [first.process_id]
            assert "fake-double" in await made.variants()  # known still, without another process
            assert await made.take((0,)) is None
            await first.stop()

    asyncio.run(scenario())


def test_the_variants_are_asked_for_only_when_nobody_has_told():
    async def scenario():
        async with spare() as made:
            made.learn(("told",))
            assert await made.variants() == ("told",)
            assert worker_processes() == []

    asyncio.run(scenario())


def test_one_that_died_meanwhile_is_not_handed_out():
    async def scenario():
        async with spare() as made:
            await made.start()
            worker_processes()[0].kill()
            await eventually(lambda: worker_processes() == [])
            link = made.start().result()
            await eventually(lambda: link.is_closed)
            assert await made.take((0,)) is None

    asyncio.run(scenario())


def test_a_start_that_failed_is_tried_again_at_the_next_question():
    async def scenario():
        async with spare(runtime="no.such:Runtime") as made:
            for _ in range(2):
                with pytest.raises(WorkerRefused, match=r"no\.such"):
                    await made.variants()
            assert await made.take((0,)) is None

    asyncio.run(scenario())


def test_an_unused_one_is_ended_after_a_while(monkeypatch):
    monkeypatch.setattr(spare_worker, "_IDLE_S", 0.0)

    async def scenario():
        async with spare() as made:
            await made.start()
            await eventually(lambda: worker_processes() == [])

    asyncio.run(scenario())


def test_closing_ends_one_that_is_still_being_started():
    async def scenario():
        async with spare() as made:
            made.start()

    asyncio.run(scenario())
