from __future__ import annotations

import asyncio
import contextlib

import pytest

from executor.journal import Journal
from executor.node import Node, NodeSettings
from executor.state import Phase
from executor.worker_link import WorkerSettings
from tests.executor.running_agent import WAIT_S, desired, replica, worker_processes

SCRIPTED = "tests.executor.scripted_runtime:ScriptedRuntime"


@contextlib.asynccontextmanager
async def node(folder, **changed):
    """A node with 1000 bytes on each of two devices."""
    worker = WorkerSettings(runtime=SCRIPTED, model_dir=folder, log_level="ERROR")
    settings = {"node": "node-a", "device_count": 2, "memory_bytes": 1000, "worker": worker, "drain_s": 5.0}
    made = Node(NodeSettings(**(settings | changed)), Journal(folder / "state"))
    await made.start()
    try:
        async with asyncio.timeout(WAIT_S):
            yield made
    finally:
        await made.stop()
    assert worker_processes() == []


async def applied(node, wanted):
    """Stage, commit and finish; return what had to wait."""
    waited = await node.stage(wanted)
    await node.commit(wanted.generation)
    await node.finish(wanted.generation)
    return [key.service for key in waited]


def models(node):
    return {
        model.variant: (model.max_batch, model.memory_bytes[0])
        for group in node.upkeep.groups.values()
        for model in group.worker.view().models
    }


# Memory.


def test_a_replica_that_shrinks_makes_room_for_another_once_the_generation_is_finished(tmp_path):
    async def scenario():
        async with node(tmp_path) as made:
            await applied(made, desired(1, g0=[replica("a", "twice", memory_bytes=(700,))]))
            small = replica("a", "twice", max_batch=1, memory_bytes=(300,))
            wanted = desired(2, g0=[small, replica("b", "twin", memory_bytes=(600,))])
            assert await made.faults_of(wanted) == ()
            assert [key.service for key in await made.stage(wanted)] == ["b"]
            await made.commit(2)
            assert set(models(made)) == {"twice"}  # the commit may still be taken back, and "a" needs its room then
            await made.finish(2)
            assert models(made) == {"twice": (4, 300), "twin": (4, 600)}

    asyncio.run(scenario())


@pytest.mark.parametrize("max_batch", [1, 4], ids=["more memory", "more memory and larger batches"])
def test_growth_that_was_aborted_is_not_charged(tmp_path, max_batch):
    async def scenario():
        async with node(tmp_path) as made:
            small = replica("a", "twice", max_batch=1, memory_bytes=(300,))
            await applied(made, desired(1, g0=[small]))
            await made.stage(desired(2, g0=[replica("a", "twice", max_batch=max_batch, memory_bytes=(900,))]))
            assert models(made) == {"twice": (max_batch, 900)}
            await made.abort(2)
            assert await applied(made, desired(3, g0=[small, replica("b", "twin", memory_bytes=(600,))])) == []

    asyncio.run(scenario())


def test_a_replica_that_cannot_grow_yet_goes_on_serving_within_its_old_limits(tmp_path):
    async def scenario():
        async with node(tmp_path) as made:
            small = replica("a", "twice", max_batch=1, memory_bytes=(300,))
            await applied(made, desired(1, g0=[small, replica("b", "twin", memory_bytes=(600,))]))
            assert await made.stage(desired(2, g0=[replica("a", "twice", memory_bytes=(900,))])) == ()  # it has a route
            await made.commit(2)
            assert models(made)["twice"] == (1, 300)
            chosen = made.choose("a", None)
            server = made.upkeep.groups[chosen.key.group]
            assert (chosen.phase, server.max_batch(chosen.key)) == (Phase.SERVING, 1)
            await made.finish(2)
            assert models(made) == {"twice": (4, 900)}
            assert server.max_batch(chosen.key) == 4

    asyncio.run(scenario())
