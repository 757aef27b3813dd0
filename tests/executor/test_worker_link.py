from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from executor.errors import WorkerGone, WorkerRefused
from executor.segment import place_all
from executor.worker_link import WorkerLink, WorkerSettings, _command
from executor.worker_wire import Done
from tests.executor.running_agent import WAIT_S, eventually, worker_processes

SCRIPTED = "tests.executor.scripted_runtime:ScriptedRuntime"


@contextlib.asynccontextmanager
async def started(folder, *, runtime=SCRIPTED, ends=None, **changed):
    settings = WorkerSettings(runtime=runtime, model_dir=folder, **changed)
    link = await WorkerLink.start(settings, (0,), (ends if ends is not None else []).append)
    try:
        yield link
    finally:
        await link.stop()
        assert worker_processes() == []


async def run_once(link, variant, values):
    array = np.asarray(values, np.float32)
    places = place_all({"x": ("FP32", array.shape)}, 0)
    link.segment.grow(1 << 16)
    link.segment.write({"x": [array]}, places)
    done = await link.run(variant, places, 4096, 4096)
    assert isinstance(done, Done)
    return link.segment.array(done.outputs[0]).copy()


def test_a_pinned_worker_runs_on_its_own_cores_only(tmp_path):
    async def scenario():
        last = max(os.sched_getaffinity(0))
        async with started(tmp_path, cores=(last,)) as link:
            assert psutil.Process(link.process_id).cpu_affinity() == [last]

    asyncio.run(scenario())


def test_a_worker_loads_runs_and_unloads_several_models(tmp_path):
    async def scenario():
        async with started(tmp_path) as link:
            assert "twice" in link.variants
            loaded = await link.load("twice", 4)
            assert [spec.name for spec in loaded.inputs + loaded.outputs] == ["x", "y"]
            await link.load("twin", 4)
            np.testing.assert_array_equal(await run_once(link, "twice", [[1, 2, 3, 4]]), [[2, 4, 6, 8]])
            await link.unload("twice")
            with pytest.raises(WorkerRefused, match="expected a loaded variant"):
                await run_once(link, "twice", [[1, 2, 3, 4]])
            np.testing.assert_array_equal(await run_once(link, "twin", [[1, 1, 1, 1]]), [[2, 2, 2, 2]])

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("variant", "invalid", "says"),
    [("no-memory", False, "does not fit"), ("unheard-of", True, "unheard-of")],
)
def test_a_load_that_fails_says_why_and_leaves_the_worker_alive(tmp_path, variant, invalid, says):
    async def scenario():
        async with started(tmp_path) as link:
            with pytest.raises(WorkerRefused, match=says) as caught:
                await link.load(variant, 1)
            assert caught.value.invalid_input is invalid
            await link.load("twice", 1)

    asyncio.run(scenario())


def test_an_error_in_the_model_ends_the_call_and_not_the_worker(tmp_path):
    async def scenario():
        async with started(tmp_path) as link:
            await link.load("raises", 1)
            for _ in range(2):
                with pytest.raises(WorkerRefused, match="RuntimeError: raised on purpose"):
                    await run_once(link, "raises", [[1, 2, 3, 4]])

    asyncio.run(scenario())


def test_a_batch_runs_while_another_model_loads(tmp_path):
    async def scenario():
        async with started(tmp_path) as link:
            await link.load("twice", 1)
            loading = asyncio.create_task(link.load("gated-load", 1))
            await run_once(link, "twice", [[1, 2, 3, 4]])
            assert not loading.done()
            (tmp_path / "load").touch()
            await loading

    asyncio.run(scenario())


def test_everything_that_waits_fails_when_the_process_is_killed(tmp_path):
    async def scenario():
        ends = []
        async with started(tmp_path, ends=ends) as link:
            await link.load("gated-run", 1)
            waiting = asyncio.create_task(run_once(link, "gated-run", [[1, 2, 3, 4]]))
            await asyncio.sleep(0)
            psutil.Process(link.process_id).send_signal(signal.SIGKILL)
            with pytest.raises(WorkerGone, match="SIGKILL"):
                await asyncio.wait_for(waiting, WAIT_S)
            assert ends == ["the worker was ended by SIGKILL"]
            with pytest.raises(WorkerGone):
                await link.load("twice", 1)

    asyncio.run(scenario())


def test_a_stop_lets_the_batch_that_runs_finish_and_reports_no_loss(tmp_path):
    async def scenario():
        ends = []
        async with started(tmp_path, ends=ends) as link:
            await link.load("gated-run", 1)
            running = asyncio.create_task(run_once(link, "gated-run", [[1, 2, 3, 4]]))
            await asyncio.sleep(0)
            stopping = asyncio.create_task(link.stop(grace_s=WAIT_S))
            (tmp_path / "run").touch()
            await stopping
            with contextlib.suppress(OSError):  # the memory may be gone by the time the answer is looked at
                await running
            assert ends == []

    asyncio.run(scenario())


def test_a_worker_that_does_not_stop_is_ended_by_force(tmp_path):
    async def scenario():
        async with started(tmp_path) as link:
            await link.load("gated-run", 1)
            running = asyncio.create_task(run_once(link, "gated-run", [[1, 2, 3, 4]]))
            await asyncio.sleep(0)
            await link.stop(grace_s=0.01)
            with pytest.raises(WorkerGone):
                await running

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("runtime", "says"),
    [
        ("no.such.module:Runtime", "no.such.module"),
        ("tests.executor.scripted_runtime:Nothing", "Nothing"),
        ("tests.executor.scripted_runtime", "module:factory"),
    ],
)
def test_a_runtime_that_cannot_be_made_is_named(tmp_path, runtime, says):
    async def scenario():
        with pytest.raises(WorkerRefused, match=says):
            async with started(tmp_path, runtime=runtime):
                pass

    asyncio.run(scenario())


def test_a_worker_that_dies_during_its_start_is_noticed(tmp_path):
    async def scenario():
        with pytest.raises(WorkerGone, match="exit code 3"):
            async with started(tmp_path, runtime="tests.executor.scripted_runtime:exit_at_once"):
                pass

    asyncio.run(scenario())


@pytest.mark.parametrize("what", ["socket.socketpair", "os.memfd_create", "asyncio.create_subprocess_exec"])
def test_a_worker_that_cannot_be_started_is_a_worker_gone(tmp_path, monkeypatch, what):
    def refuse(*_args, **_keywords):
        raise OSError(errno.EMFILE, "Too many open files")

    async def scenario():
        before = psutil.Process().num_fds()
        with monkeypatch.context() as patch:
            patch.setattr(what, refuse)
            with pytest.raises(WorkerGone, match="cannot start a worker: Too many open files"):
                await WorkerLink.start(WorkerSettings(runtime=SCRIPTED), (0,), lambda reason: None)
        assert psutil.Process().num_fds() == before

    asyncio.run(scenario())


@pytest.mark.parametrize("call", ["start", "load", "unload"])
def test_a_worker_that_hangs_in_a_call_is_ended_by_force(tmp_path, call):
    async def scenario():
        ends = []
        if call == "start":
            with pytest.raises(WorkerGone, match=r"the start took over 0 s, so the worker was ended by SIGKILL"):
                async with started(tmp_path, load_limit_s=0.0):
                    pass
            return
        async with started(tmp_path, ends=ends, unload_limit_s=0.05) as link:
            await link.load("twice", 1)
            worker = psutil.Process(link.process_id)
            if call == "load":
                link._settings = dataclasses.replace(link._settings, load_limit_s=0.05)
            worker.suspend()
            with pytest.raises(WorkerGone, match=rf"the {call} of twice took over"):
                await (link.load("twice", 2) if call == "load" else link.unload("twice"))
            assert len(ends) == 1

    asyncio.run(scenario())


def test_a_signal_of_the_terminal_does_not_reach_a_worker(tmp_path):
    async def scenario():
        async with started(tmp_path) as link:
            assert os.getpgid(link.process_id) != os.getpgid(0)
            assert os.getsid(link.process_id) == os.getsid(0)  # or niceness would mean nothing between workers

    asyncio.run(scenario())


_PARENT = """
import asyncio, sys
from pathlib import Path
from executor.worker_link import WorkerLink, WorkerSettings

async def main():
    settings = WorkerSettings(runtime=sys.argv[1], model_dir=Path(sys.argv[2]))
    link = await WorkerLink.start(settings, (0,), print)
    await link.load("gated-run", 1)
    link.run("gated-run", (), 0, 0)
    print(link.process_id, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_a_worker_ends_by_itself_when_its_agent_is_killed(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, SCRIPTED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        parent.wait(WAIT_S)
        asyncio.run(eventually(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE))
    finally:
        parent.kill()
        parent.communicate()


def test_a_worker_takes_no_module_from_the_folder_that_the_agent_was_started_in(tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise RuntimeError('a stray file was imported')")
    monkeypatch.chdir(tmp_path)

    async def scenario():
        async with started(tmp_path) as link:
            assert "twice" in link.variants

    asyncio.run(scenario())


def test_a_worker_is_told_what_it_may_keep_in_host_memory_only_where_it_may():
    assert "--host-cache=5" in _command(WorkerSettings(host_cache_bytes=5), (0,), 3, 4)
    assert not any("host-cache" in word for word in _command(WorkerSettings(), (0,), 3, 4))
