from __future__ import annotations

import asyncio
import contextlib
import errno
import time

import numpy as np
import pytest

from executor.errors import Hopeless, QueueFull, ReplicaUnavailable
from executor.group_server import GroupServer
from executor.lane import TokenRequest
from executor.segment import SharedSegment
from executor.state import GenerationRules, ReplicaKey
from executor.worker_link import WorkerSettings
from tests.executor.running_agent import FAKE, WAIT_S, eventually, replica, worker_processes

SCRIPTED = "tests.executor.scripted_runtime:ScriptedRuntime"


def key(variant):
    return ReplicaKey(group="n/0", service=variant, variant=variant)


@contextlib.asynccontextmanager
async def server(folder, *variants, gpus=(0,), **changed):
    """A group whose worker has loaded ``variants``, each for a service of its name, and the reasons of its losses."""
    settings = WorkerSettings(**{"runtime": SCRIPTED, "model_dir": folder, "log_level": "CRITICAL", **changed})
    lost = []
    made = GroupServer("n/0", gpus, settings, lost.append)
    try:
        await made.start_worker(None)
        for variant in variants:
            made.configure(key(variant), replica(variant, variant))
            await made.worker.load(variant, 4, (5,))
        yield made, lost
    finally:
        await made.stop_worker()
        assert worker_processes() == []


async def ask(made, variant, items=1):
    inputs = {"x": np.ones((items, 4), np.float32)}
    loop_s = made._clock()
    return await asyncio.wait_for(made.submit(key(variant), inputs, items, loop_s + 60.0).answer, WAIT_S)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space left"), ValueError("beyond the segment")])
def test_a_batch_that_cannot_be_sent_fails_and_the_group_goes_on(tmp_path, monkeypatch, error):
    async def scenario():
        async with server(tmp_path, "twice") as (made, _):
            with monkeypatch.context() as patch:

                def refuse(self, size_bytes):
                    raise error

                patch.setattr(SharedSegment, "grow", refuse)
                calls = [asyncio.create_task(ask(made, "twice")) for _ in range(3)]
                for call in calls:
                    with pytest.raises(ReplicaUnavailable, match="cannot be given the batch"):
                        await call
            assert (await ask(made, "twice")).batch_items == 1
            assert made.counters[key("twice")].failed == 3

    asyncio.run(scenario())


def test_the_time_that_inputs_take_is_not_counted_as_inference_too(tmp_path, monkeypatch):
    async def scenario():
        async with server(tmp_path, "twice") as (made, _):
            late_s = 0.0
            made._clock = lambda: time.monotonic() + late_s
            grow = SharedSegment.grow

            def slowly(self, size_bytes):
                nonlocal late_s
                late_s += 1000.0
                return grow(self, size_bytes)

            with monkeypatch.context() as patch:
                patch.setattr(SharedSegment, "grow", slowly)
                answer = made.submit(key("twice"), {"x": np.ones((1, 4), np.float32)}, 1, made._clock() + 1e6).answer
                await asyncio.wait_for(answer, WAIT_S)
            counters = made.counters[key("twice")]
            assert counters.input_s > 999.0
            assert counters.run_s < 999.0
            assert counters.queue_s + counters.input_s + counters.run_s + counters.output_s < counters.request_s + 1.0

    asyncio.run(scenario())


def test_a_model_that_is_gone_holds_up_no_other_service(tmp_path):
    async def scenario():
        async with server(tmp_path, "gated-run", "twice", "twin") as (made, _):
            first = asyncio.create_task(ask(made, "gated-run"))
            await asyncio.sleep(0)
            gone, other = [asyncio.create_task(ask(made, variant)) for variant in ("twin", "twice")]
            await asyncio.sleep(0)
            made.worker._models.pop("twin")
            (tmp_path / "run").touch()
            with pytest.raises(ReplicaUnavailable, match="not loaded"):
                await gone
            await other
            await first

    asyncio.run(scenario())


def test_requests_whose_answer_cannot_be_read_are_told_so(tmp_path, monkeypatch):
    async def scenario():
        async with server(tmp_path, "gated-run", "twice") as (made, _):
            call = asyncio.create_task(ask(made, "gated-run"))
            await asyncio.sleep(0)

            def refuse(self, place):
                raise ValueError("a tensor that ends beyond the segment")

            with monkeypatch.context() as patch:
                patch.setattr(SharedSegment, "array", refuse)
                (tmp_path / "run").touch()
                with pytest.raises(ReplicaUnavailable, match="cannot be read"):
                    await call
            await ask(made, "twice")

    asyncio.run(scenario())


def test_batches_that_pile_up_between_the_stages_of_a_pipeline_keep_their_own_answers(tmp_path):
    async def scenario():
        async with server(tmp_path, "pipeline", gpus=(0, 1)) as (made, _):
            made.configure(key("pipeline"), replica("pipeline", "pipeline", max_batch=1, shape=(1, 2)))
            arrays = [np.full((1, 4), number, np.float32) for number in range(9)]
            end_s = made._clock() + 60.0
            waiting = [made.submit(key("pipeline"), {"x": array}, 1, end_s).answer for array in arrays]
            await eventually(lambda: len(made._further) >= 2)  # both devices have one; the others wait outside
            (tmp_path / "run").touch()
            time.sleep(0.1)  # the event loop is held up: answers lie where they are while the worker goes on
            answers = await asyncio.wait_for(asyncio.gather(*waiting), WAIT_S)
            assert [answer.outputs["y"].tolist() for answer in answers] == [(2 * array).tolist() for array in arrays]

    asyncio.run(scenario())


def test_a_batch_that_cannot_be_sent_takes_no_place_from_answers_that_are_not_taken_out_yet(tmp_path, monkeypatch):
    async def scenario():
        async with server(tmp_path, "twice") as (made, _):
            made.configure(key("twice"), replica("twice", "twice", max_batch=8))
            await made.worker.load("twice", 8, (5,))
            for _ in range(2):
                await ask(made, "twice", 8)  # from now on both places are large enough for what follows
            write = SharedSegment.write

            def refuse_twos(self, parts, places):
                if parts["x"][0][0, 0] == 2:
                    raise OSError(errno.ENOSPC, "no space left")
                write(self, parts, places)

            monkeypatch.setattr(SharedSegment, "write", refuse_twos)
            arrays = [np.full((items, 4), number, np.float32) for number, items in ((1, 1), (2, 8), (3, 8))]
            end_s = made._clock() + 60.0
            waiting = [made.submit(key("twice"), {"x": array}, len(array), end_s).answer for array in arrays]
            first, refused, last = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), WAIT_S)
            assert isinstance(refused, ReplicaUnavailable)
            assert (first.outputs["y"] == 2).all()
            assert (last.outputs["y"] == 6).all()

    asyncio.run(scenario())


def test_requests_that_are_dropped_hold_up_no_sequence_that_is_due_later(tmp_path):
    async def scenario():
        async with server(tmp_path, "fake-slow-20", "fake-double", runtime=FAKE) as (made, _):
            chat, rules = key("fake-count"), GenerationRules(ttft_s=WAIT_S, tpot_s=WAIT_S, kv_bytes=500)
            made.configure(chat, replica("fake-count", "fake-count", generation=rules))
            await made.worker.load("fake-count", 4, (5,), kv_bytes=500)
            busy = asyncio.create_task(ask(made, "fake-slow-20"))
            await asyncio.sleep(0)
            hopeless = made.submit(key("fake-double"), {"x": np.ones((1, 4), np.float32)}, 1, made._clock() + 0.002)
            sequence = made.generate(chat, TokenRequest(prompt=(1,), new_tokens=3))
            with pytest.raises(Hopeless):
                await hopeless.answer
            assert (await asyncio.wait_for(sequence.answer, WAIT_S)).tokens == (2, 3, 4)
            await busy

    asyncio.run(scenario())


def test_a_worker_that_hangs_in_a_batch_is_ended_and_counts_as_lost(tmp_path):
    async def scenario():
        async with server(tmp_path, "gated-run", run_limit_s=0.05) as (made, lost):
            with pytest.raises(ReplicaUnavailable, match=r"a batch took over 0\.05 s.*SIGKILL"):
                await ask(made, "gated-run")
            assert len(lost) == 1

    asyncio.run(scenario())


def test_the_later_a_batch_is_the_longer_a_request_is_expected_to_wait(tmp_path):
    async def scenario():
        async with server(tmp_path, "gated-run") as (made, _):
            call = asyncio.create_task(ask(made, "gated-run"))
            await eventually(lambda: made._running is not None)
            planned_s = made._running.expected_free_s
            for late_s in (-1.0, 2.0, 4.0):
                made._running.expected_free_s = made._clock() - late_s
                assert made.expected_wait_s() == pytest.approx(abs(late_s), abs=0.9)
            made._running.expected_free_s = planned_s
            (tmp_path / "run").touch()
            await call
            assert made.expected_wait_s() == 0.0

    asyncio.run(scenario())


def test_a_batch_may_take_ten_times_its_planned_latency(tmp_path):
    async def scenario():
        async with server(tmp_path, "fake-slow-20", run_limit_s=0.0) as (made, lost):
            slow = replica("fake-slow-20", "fake-slow-20", max_batch=1, batch_latency_s=(30.0,))
            made.configure(key("fake-slow-20"), slow)
            await ask(made, "fake-slow-20")
            assert lost == []

    asyncio.run(scenario())


def test_batches_that_take_longer_than_planned_are_noted_and_allowed_for(tmp_path):
    async def scenario():
        async with server(tmp_path, "twice") as (made, _):
            made.configure(key("twice"), replica("twice", "twice", max_batch=1, batch_latency_s=(1e-5,)))
            await ask(made, "twice")
            assert made._requests.overrun.expected_s > 0  # no process answers within 10 us
            made.configure(key("twice"), replica("twice", "twice", max_batch=1, batch_latency_s=(5.0,)))
            for _ in range(50):
                made._requests.overrun.note(1.0, most_s=1.0)
            expected_s = made._requests.overrun.expected_s
            pending = made.submit(key("twice"), {"x": np.ones((1, 4), np.float32)}, 1, made._clock() + 5.5)
            with pytest.raises(Hopeless):
                await pending.answer
            assert made._requests.overrun.expected_s < expected_s  # or a group that drops everything would never learn

    asyncio.run(scenario())


def test_only_a_request_before_which_twice_its_time_of_work_waits_is_refused_on_arrival(tmp_path):
    async def scenario():
        async with server(tmp_path, "gated-run") as (made, _):
            gated = replica("gated-run", "gated-run", max_batch=1, batch_latency_s=(45.0,))
            made.configure(key("gated-run"), gated)
            calls = [asyncio.create_task(ask(made, "gated-run")) for _ in range(4)]  # with 60 s each
            await asyncio.sleep(0)
            assert made.queued(key("gated-run")) == 3
            assert 134.0 < made.expected_wait_s() <= 180.0
            with pytest.raises(QueueFull, match=r"135\.000 s of work wait before it"):
                await ask(made, "gated-run")
            (tmp_path / "run").touch()
            await asyncio.gather(*calls)

    asyncio.run(scenario())
