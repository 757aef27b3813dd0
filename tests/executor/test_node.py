from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import threading

import pytest

from executor.errors import StageFailed, StateNotStored, WrongGeneration
from executor.journal import Journal
from executor.node import Node, NodeSettings
from executor.state import Phase
from executor.worker_link import WorkerSettings
from plans.errors import BadStoredData
from tests.executor.running_agent import WAIT_S, desired, eventually, replica, worker_processes

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


def g(generation):
    """Number and digest of ``desired(generation)``."""
    return generation, f"sha256:{generation}"


async def applied(node, wanted):
    """Stage, commit and finish; return what had to wait."""
    waited = await node.stage(wanted)
    await node.commit(*g(wanted.generation))
    await node.finish(*g(wanted.generation))
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
            await made.commit(*g(2))
            assert set(models(made)) == {"twice"}  # the commit may still be taken back, and "a" needs its room then
            await made.finish(*g(2))
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
            await made.abort(*g(2))
            assert await applied(made, desired(3, g0=[small, replica("b", "twin", memory_bytes=(600,))])) == []

    asyncio.run(scenario())


def test_a_replica_that_cannot_grow_yet_goes_on_serving_within_its_old_limits(tmp_path):
    async def scenario():
        async with node(tmp_path) as made:
            small = replica("a", "twice", max_batch=1, memory_bytes=(300,))
            await applied(made, desired(1, g0=[small, replica("b", "twin", memory_bytes=(600,))]))
            assert await made.stage(desired(2, g0=[replica("a", "twice", memory_bytes=(900,))])) == ()  # it has a route
            await made.commit(*g(2))
            assert models(made)["twice"] == (1, 300)
            chosen = made.choose("a", None)
            server = made.upkeep.groups[chosen.key.group]
            assert (chosen.phase, server.max_batch(chosen.key)) == (Phase.SERVING, 1)
            await made.finish(*g(2))
            assert models(made) == {"twice": (4, 900)}
            assert server.max_batch(chosen.key) == 4

    asyncio.run(scenario())


def test_what_an_abandoned_stage_left_behind_is_not_in_the_way_of_the_next(tmp_path):
    async def scenario():
        async with node(tmp_path) as made:
            keep = replica("a", "twice", memory_bytes=(300,))
            await applied(made, desired(1, g0=[keep]))
            await made.stage(desired(2, g0=[keep, replica("b", "twin", memory_bytes=(600,))]))
            wanted = desired(3, g0=[keep, replica("c", "fake-double", memory_bytes=(600,))])
            assert await made.stage(wanted) == ()

    asyncio.run(scenario())


# Generations.


class HeldJournal(Journal):
    """Every write waits until it is let go."""

    def __init__(self, state_dir):
        super().__init__(state_dir)
        self.writing = threading.Event()
        self.go_on = threading.Event()

    def write(self, state):
        self.hold()
        super().write(state)

    def write_drained(self, drained):
        self.hold()
        super().write_drained(drained)

    def hold(self):
        self.writing.set()
        assert self.go_on.wait(WAIT_S)


@pytest.mark.parametrize("move", ["commit", "abort"])
def test_a_caller_that_goes_away_does_not_part_the_journal_from_the_node(tmp_path, move):
    async def scenario():
        async with node(tmp_path) as made:
            await applied(made, desired(1, g0=[replica("a", "twice")]))
            await made.stage(desired(2, g0=[replica("a", "twin")]))
            if move == "abort":
                await made.commit(*g(2))
            held = made._journal = HeldJournal(tmp_path / "state")
            calling = asyncio.create_task(getattr(made, move)(*g(2)))
            await asyncio.to_thread(held.writing.wait, WAIT_S)
            calling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await calling
            following = asyncio.create_task(made.stage(desired(3)))  # waits for its turn
            held.go_on.set()
            await following
            stored = Journal(tmp_path / "state").read()
            assert made.generation == stored.generation == {"commit": 2, "abort": 1}[move]

    asyncio.run(scenario())


def test_a_drain_whose_caller_goes_away_is_made_and_stored_before_the_next_change(tmp_path):
    async def scenario():
        async with node(tmp_path, spare_worker=False) as made:
            held = made._journal = HeldJournal(tmp_path / "state")
            calling = asyncio.create_task(made.drain(True))
            await asyncio.to_thread(held.writing.wait, WAIT_S)
            calling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await calling
            following = asyncio.create_task(made.stage(desired(1)))  # waits for its turn
            held.go_on.set()
            await following
            await made.commit(*g(1))
            stored = Journal(tmp_path / "state")
            assert (made.drained, made.generation) == (stored.read_drained(), stored.read().generation) == (True, 1)

    asyncio.run(scenario())


def test_a_generation_of_another_apply_is_neither_replaced_nor_committed_nor_taken_back(tmp_path):
    async def scenario():
        async with node(tmp_path) as made:
            mine = desired(1, g0=[replica("a", "twice")])
            await made.stage(mine)
            other = dataclasses.replace(desired(1, g0=[replica("z", "twin")]), placement_digest="sha256:other")
            with pytest.raises(WrongGeneration, match="another content"):
                await made.stage(other)
            with pytest.raises(WrongGeneration, match=r"sha256:other.*sha256:1.* is staged"):
                await made.commit(1, "sha256:other")
            await made.abort(1, "sha256:other")
            assert made.staged == mine
            await made.commit(*g(1))
            with pytest.raises(WrongGeneration, match="cannot be committed"):
                await made.commit(1, "sha256:other")
            with pytest.raises(WrongGeneration, match="cannot be finished"):
                await made.finish(1, "sha256:other")
            await made.abort(1, "sha256:other")
            assert made.committed == mine

    asyncio.run(scenario())


def test_what_was_lost_after_it_was_staged_is_not_committed(tmp_path):
    async def scenario():
        async with node(tmp_path) as made:
            await made.stage(desired(1, g0=[replica("a", "twice")]))
            worker_processes()[0].kill()
            await eventually(lambda: made.upkeep.states()[0].phase is not Phase.STAGED)
            with pytest.raises(StageFailed):
                await made.commit(*g(1))
            assert made.generation == 0
            assert Journal(tmp_path / "state").read() is None

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("changed", "says"),
    [({"node": "node-b"}, "'node-a', and this agent is 'node-b'"), ({"device_count": 1}, "device 1 is in use there")],
)
def test_the_state_of_another_node_is_not_taken_up(tmp_path, changed, says):
    Journal(tmp_path / "state").write(desired(1, g1=[replica("a", "twice")]))

    async def scenario():
        async with node(tmp_path, **changed):
            pass

    with pytest.raises(BadStoredData, match=says):
        asyncio.run(scenario())


def test_a_commit_that_cannot_be_stored_changes_nothing(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    async def scenario():
        async with node(tmp_path) as made:
            await made.stage(desired(1, g0=[replica("a", "twice")]))
            with monkeypatch.context() as patch:
                patch.setattr("os.fsync", refuse)
                with pytest.raises(StateNotStored):
                    await made.commit(*g(1))
            assert made.committed is None
            await made.commit(*g(1))

    asyncio.run(scenario())
