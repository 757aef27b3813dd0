from __future__ import annotations

import asyncio
import contextlib

import pytest

from executor.errors import WorkerGone, WorkerRefused
from executor.group_worker import GroupWorker, backoff_s
from executor.reconcile import ModelPhase, WorkerPhase
from executor.worker_link import WorkerSettings
from tests.executor.running_agent import eventually, worker_processes

SCRIPTED = "tests.executor.scripted_runtime:ScriptedRuntime"


@contextlib.asynccontextmanager
async def worker(folder, *, runtime=SCRIPTED, clock=lambda: 100.0, lost=None):
    settings = WorkerSettings(runtime=runtime, model_dir=folder)
    made = GroupWorker("n/0", (0,), settings, (lost if lost is not None else []).append, clock=clock)
    try:
        yield made
    finally:
        await made.stop(5.0)
        assert worker_processes() == []


def test_the_wait_after_failures_doubles_up_to_a_bound():
    assert [backoff_s(failures) for failures in (1, 2, 3)] == [0.2, 0.4, 0.8]
    assert backoff_s(1000) == 30.0


def test_a_model_goes_through_its_phases(tmp_path):
    async def scenario():
        async with worker(tmp_path) as made:
            assert made.view().worker is WorkerPhase.ENDED
            await made.start(None)
            assert made.view().worker is WorkerPhase.READY
            loading = asyncio.create_task(made.load("gated-load", 2, (5,)))
            await asyncio.sleep(0)
            assert made.view().model("gated-load").phase is ModelPhase.LOADING
            assert made.loaded("gated-load") is None
            (tmp_path / "load").touch()
            await loading
            model = made.view().model("gated-load")
            assert (model.phase, model.max_batch, model.memory_bytes) == (ModelPhase.LOADED, 2, (5,))
            await made.unload("gated-load")
            assert made.view().models == ()

    asyncio.run(scenario())


def test_a_failed_load_waits_longer_each_time_until_it_is_asked_for_anew(tmp_path):
    async def scenario():
        async with worker(tmp_path) as made:
            await made.start(None)
            for expected_s in (100.2, 100.4):
                with pytest.raises(WorkerRefused):
                    await made.load("no-memory", 1, (5,))
                assert made.view().model("no-memory").not_before_s == pytest.approx(expected_s)
            assert "does not fit" in made.load_problem("no-memory")
            made.retry_now("no-memory")
            assert made.view().models == ()

    asyncio.run(scenario())


def test_a_model_that_cannot_be_loaded_for_larger_batches_stays_as_it_is(tmp_path):
    async def scenario():
        async with worker(tmp_path) as made:
            await made.start(None)
            await made.load("twice", 2, (5,))
            with pytest.raises(WorkerRefused):
                await made.load("twice", 0, (9,))  # any load that fails
            model = made.view().model("twice")
            assert (model.phase, model.max_batch, model.memory_bytes) == (ModelPhase.LOADED, 2, (5,))
            assert made.load_problem("twice")
            made.retry_now("twice")
            assert made.load_problem("twice") == ""

    asyncio.run(scenario())


def test_a_lost_worker_takes_its_models_along_and_waits_longer_while_it_keeps_dying(tmp_path):
    async def scenario():
        lost = []
        now = [100.0]
        async with worker(tmp_path, lost=lost, clock=lambda: now[0]) as made:
            for count, expected_s in ((1, 100.2), (2, 100.4)):
                await made.start(None)
                await made.load("twice", 1, (5,))
                worker_processes()[0].kill()
                await eventually(lambda count=count: len(lost) == count)
                view = made.view()
                assert (view.worker, view.models) == (WorkerPhase.ENDED, ())
                assert view.not_before_s == pytest.approx(expected_s)
                assert "SIGKILL" in made.problem
                with pytest.raises(WorkerGone, match="SIGKILL"):
                    await made.load("twice", 1, (5,))
            await made.start(None)
            assert made.problem == ""
            now[0] += 60.0  # it lived long: the count starts again
            worker_processes()[0].kill()
            await eventually(lambda: len(lost) == 3)
            assert made.view().not_before_s == pytest.approx(160.2)

    asyncio.run(scenario())


def test_a_start_that_fails_is_noted(tmp_path):
    async def scenario():
        async with worker(tmp_path, runtime="no.such:Runtime") as made:
            with pytest.raises(WorkerRefused):
                await made.start(None)
            assert made.view().worker is WorkerPhase.ENDED
            assert "no.such" in made.problem

    asyncio.run(scenario())
