from __future__ import annotations

import asyncio
import signal

import grpc
import pytest

from executor import wire
from executor.journal import Journal
from executor.proto import control_pb2
from executor.state import Phase
from tests.executor.running_agent import (
    WAIT_S,
    desired,
    eventually,
    refused,
    replica,
    running_agent,
    scripted,
    worker_processes,
)


async def serving(agent):
    return {
        (state.key.service, state.key.variant)
        for state in (await agent.state()).replicas
        if state.phase is Phase.SERVING
    }


# Placement.


def test_a_staged_state_does_not_serve_before_its_commit(tmp_path):
    async def scenario():
        async with scripted(tmp_path) as agent:
            await agent.stage(desired(1, g0=[replica("s", "twice")]))
            state = await agent.state()
            assert (state.generation, state.staged_generation, state.replicas[0].phase) == (0, 1, Phase.STAGED)
            with refused(grpc.StatusCode.UNAVAILABLE, "staged"):
                await agent.infer("s")
            await agent.commit(1)
            state = await agent.state()
            assert (state.generation, state.staged_generation, state.placement_digest) == (1, 0, "sha256:1")
            await agent.infer("s")

    asyncio.run(scenario())


def test_every_control_call_may_be_repeated(tmp_path):
    async def scenario():
        async with scripted(tmp_path) as agent:
            state = desired(1, g0=[replica("s", "twice")])
            for _ in range(2):
                assert await agent.stage(state) == ()
            for _ in range(2):
                await agent.commit(1)
            for _ in range(2):
                await agent.finish(1)
            assert await agent.stage(state) == ()
            assert await serving(agent) == {("s", "twice")}

    asyncio.run(scenario())


def test_a_change_of_variant_is_made_before_the_old_one_breaks(tmp_path):
    async def scenario():
        async with scripted(tmp_path) as agent:
            await agent.apply(desired(1, g0=[replica("s", "twice")]))
            assert await agent.stage(desired(2, g0=[replica("s", "twin")])) == ()
            assert await serving(agent) == {("s", "twice")}
            await agent.commit(2)
            assert await serving(agent) == {("s", "twice"), ("s", "twin")}
            answer = await agent.infer("s")
            assert answer.parameters["variant"].string_param == "twin"
            await agent.finish(2)
            assert [state.key.variant for state in (await agent.state()).replicas] == ["twin"]

    asyncio.run(scenario())


def test_what_does_not_fit_beside_the_old_is_deferred_and_loaded_at_the_end(tmp_path):
    async def scenario():
        async with scripted(tmp_path) as agent:
            await agent.apply(desired(1, g0=[replica("s", "twice", memory_bytes=(600,))]))
            deferred = await agent.stage(desired(2, g0=[replica("s", "twin", memory_bytes=(600,))]))
            assert [key.variant for key in deferred] == ["twin"]
            await agent.commit(2)
            waiting = next(state for state in (await agent.state()).replicas if state.key.variant == "twin")
            assert (waiting.phase, waiting.reason) == (Phase.LOADING, "waits for memory that others hold")
            assert (await agent.infer("s")).parameters["variant"].string_param == "twice"
            await agent.finish(2)
            assert await serving(agent) == {("s", "twin")}

    asyncio.run(scenario())


def test_an_abort_takes_everything_back(tmp_path):
    async def scenario():
        async with scripted(tmp_path) as agent:
            await agent.apply(desired(1, g0=[replica("s", "twice")]))
            before = (await agent.state()).replicas
            await agent.stage(desired(2, g0=[replica("s", "twice", max_batch=2)], g1=[replica("t", "twin")]))
            await agent.abort(2)
            await agent.abort(2)
            await eventually(lambda: len(worker_processes()) == 1)
            state = await agent.state()
            assert (state.generation, state.staged_generation, state.replicas) == (1, 0, before)
            await agent.apply(desired(3, g1=[replica("t", "twin")]))

    asyncio.run(scenario())


def test_an_abort_undoes_a_commit_that_is_not_finished(tmp_path):
    async def scenario():
        async with scripted(tmp_path) as agent:
            await agent.apply(desired(1, g0=[replica("s", "twice", max_batch=4)]))
            await agent.stage(desired(2, g0=[replica("s", "twice", max_batch=2)], g1=[replica("t", "twin")]))
            await agent.commit(2)
            await agent.abort(2)
            state = await agent.state()
            assert (state.generation, state.placement_digest) == (1, "sha256:1")
            assert await serving(agent) == {("s", "twice")}
            await agent.infer("s", [[0] * 4] * 4)
        async with scripted(tmp_path) as agent:
            assert (await agent.until_phase("s", Phase.SERVING)).max_batch == 4

    asyncio.run(scenario())


def test_an_abort_undoes_the_first_commit_of_all(tmp_path):
    async def scenario():
        async with scripted(tmp_path) as agent:
            await agent.stage(desired(1, g0=[replica("s", "twice")]))
            await agent.commit(1)
            await agent.abort(1)
            state = await agent.state()
            assert (state.generation, state.replicas) == (0, ())
        assert Journal(tmp_path / "state").read() is None

    asyncio.run(scenario())


def test_an_abort_ends_a_stage_that_still_loads(tmp_path):
    async def scenario():
        async with scripted(tmp_path) as agent:
            staging = asyncio.create_task(agent.stage(desired(1, g0=[replica("s", "gated-load")])))
            await agent.until_phase("s", Phase.LOADING)
            with refused(grpc.StatusCode.FAILED_PRECONDITION, "not loaded yet"):
                await agent.commit(1)
            await agent.abort(1)
            with refused(grpc.StatusCode.FAILED_PRECONDITION, "aborted or replaced"):
                await staging
            await eventually(lambda: worker_processes() == [])  # though the load never ends
            await agent.apply(desired(2, g0=[replica("t", "twice")]))

    asyncio.run(scenario())


def test_a_load_that_never_ends_keeps_nobody_from_other_devices(tmp_path):
    async def scenario():
        async with scripted(tmp_path) as agent:
            await agent.apply(desired(1, g0=[replica("s", "twice")]))
            staging = asyncio.create_task(
                agent.stage(desired(2, g0=[replica("s", "twice"), replica("x", "gated-load")]))
            )
            await agent.until_phase("x", Phase.LOADING)
            await agent.abort(2)
            with refused(grpc.StatusCode.FAILED_PRECONDITION, "aborted or replaced"):
                await staging
            await agent.apply(desired(3, g0=[replica("s", "twice")], g1=[replica("t", "twin")]))
            assert await serving(agent) == {("s", "twice"), ("t", "twin")}
            (tmp_path / "load").touch()

    asyncio.run(scenario())


def test_settings_change_at_the_commit_without_a_reload(tmp_path):
    async def scenario():
        async with scripted(tmp_path) as agent:
            await agent.apply(desired(1, g0=[replica("s", "twice", max_batch=4)]))
            worker = worker_processes()[0].pid
            await agent.apply(desired(2, g0=[replica("s", "twice", max_batch=2, deadline_s=5.0)]))
            assert (await agent.replica("s")).max_batch == 2
            with refused(grpc.StatusCode.INVALID_ARGUMENT, "a batch of 1 to 2"):
                await agent.infer("s", [[0] * 4] * 3)
            await agent.apply(desired(3, g0=[replica("s", "twice", max_batch=8)]))
            await agent.infer("s", [[0] * 4] * 8)
            assert [process.pid for process in worker_processes()] == [worker]

    asyncio.run(scenario())


def test_a_service_that_leaves_the_plan_finishes_what_it_has_taken(tmp_path):
    async def scenario():
        async with scripted(tmp_path) as agent:
            await agent.apply(desired(1, g0=[replica("s", "gated-run", max_batch=1)]))
            taken = [asyncio.ensure_future(agent.infer("s")) for _ in range(3)]
            await eventually(lambda: queued(agent, "s", 2))
            await agent.stage(desired(2))
            await agent.commit(2)
            finishing = asyncio.create_task(agent.finish(2))
            await agent.until_phase("s", Phase.DRAINING)
            with refused(grpc.StatusCode.UNAVAILABLE, "draining"):
                await agent.infer("s")
            (tmp_path / "run").touch()
            await asyncio.gather(*taken)
            await finishing
            assert (await agent.state()).replicas == ()
            assert worker_processes() == []

    asyncio.run(scenario())


def test_draining_ends_after_its_bound(tmp_path):
    async def scenario():
        async with scripted(tmp_path, drain_s=0.05) as agent:
            await agent.apply(desired(1, g0=[replica("s", "gated-run", max_batch=1)]))
            taken = [asyncio.ensure_future(agent.infer("s")) for _ in range(2)]
            await eventually(lambda: queued(agent, "s", 1))
            await agent.stage(desired(2))
            await agent.commit(2)
            finishing = asyncio.create_task(agent.finish(2))
            codes = []
            for call in asyncio.as_completed(taken):
                try:
                    await call
                except grpc.aio.AioRpcError as error:
                    codes.append(error.code())
                    (tmp_path / "run").touch()
            assert codes == [grpc.StatusCode.UNAVAILABLE]  # the one that waited; the other one ran to its end
            await finishing

    asyncio.run(scenario())


async def queued(agent, service, count):
    state = await agent.replica(service)
    return state is not None and state.queued == count and state.running == 1


# Generations.


def test_older_generations_are_refused(tmp_path):
    async def scenario():
        async with scripted(tmp_path) as agent:
            await agent.apply(desired(5, g0=[replica("s", "twice")]))
            for call in (agent.stage(desired(4)), agent.commit(4), agent.abort(4), agent.finish(4)):
                with refused(grpc.StatusCode.FAILED_PRECONDITION, "4"):
                    await call
            with refused(grpc.StatusCode.FAILED_PRECONDITION, "another content"):
                await agent.stage(desired(5))
            with refused(grpc.StatusCode.FAILED_PRECONDITION, "in use here"):
                await agent.abort(5)
            await agent.stage(desired(7))
            with refused(grpc.StatusCode.FAILED_PRECONDITION, "older than 7"):
                await agent.stage(desired(6))
            assert await serving(agent) == {("s", "twice")}

    asyncio.run(scenario())


def test_only_what_is_staged_can_be_committed_and_only_what_is_committed_finished(tmp_path):
    async def scenario():
        async with scripted(tmp_path) as agent:
            with refused(grpc.StatusCode.FAILED_PRECONDITION, "nothing is staged"):
                await agent.commit(1)
            with refused(grpc.StatusCode.FAILED_PRECONDITION, "0 is committed"):
                await agent.finish(1)
            await agent.stage(desired(1))
            with refused(grpc.StatusCode.FAILED_PRECONDITION, "generation 1 (sha256:1) is staged"):
                await agent.commit(2)

    asyncio.run(scenario())


def test_a_newer_stage_replaces_an_older_one(tmp_path):
    async def scenario():
        async with scripted(tmp_path) as agent:
            await agent.stage(desired(1, g0=[replica("s", "twice")]))
            await agent.stage(desired(2, g0=[replica("t", "twice")]))
            assert [state.key.service for state in (await agent.state()).replicas] == ["t"]

    asyncio.run(scenario())


# What cannot be run.


def test_a_state_that_the_node_cannot_run_is_refused_with_all_faults(tmp_path):
    async def scenario():
        async with scripted(tmp_path) as agent:
            bad = desired(1, g2=[replica("s", "unheard-of", memory_bytes=(1001,))])
            answer = await agent.control.Validate(wire.desired_state_to_proto(bad), timeout=WAIT_S)
            assert len(wire.faults_from_proto(answer)) == 3
            with refused(grpc.StatusCode.INVALID_ARGUMENT, "1001 bytes"):
                await agent.stage(bad)
            answer = await agent.control.Validate(control_pb2.DesiredState(), timeout=WAIT_S)
            assert {fault.field for fault in answer.faults} == {"generation", "node"}
            good = await agent.control.Validate(wire.desired_state_to_proto(desired(1)), timeout=WAIT_S)
            assert list(good.faults) == []
            assert (await agent.state()).staged_generation == 0

    asyncio.run(scenario())


def test_a_runtime_that_does_not_start_is_a_fault_of_every_state_that_needs_it(tmp_path):
    async def scenario():
        async with running_agent(tmp_path, runtime="no.such:Runtime") as agent:
            empty = await agent.control.Validate(wire.desired_state_to_proto(desired(1)), timeout=WAIT_S)
            assert not empty.faults
            state = desired(1, g0=[replica("s")])
            answer = await agent.control.Validate(wire.desired_state_to_proto(state), timeout=WAIT_S)
            assert [fault.field for fault in answer.faults] == ["runtime"]
            assert "no.such" in answer.faults[0].found

    asyncio.run(scenario())


@pytest.mark.parametrize(("variant", "says"), [("no-memory", "does not fit"), ("dies-at-load", "exit code 7")])
def test_a_stage_whose_load_fails_can_be_aborted_and_leaves_what_runs_alone(tmp_path, variant, says):
    async def scenario():
        async with scripted(tmp_path) as agent:
            await agent.apply(desired(1, g0=[replica("s", "twice")]))
            with refused(grpc.StatusCode.ABORTED, says):
                await agent.stage(desired(2, g0=[replica("s", "twice")], g1=[replica("t", variant)]))
            await agent.abort(2)
            assert await serving(agent) == {("s", "twice")}
            await agent.infer("s")
            await eventually(lambda: len(worker_processes()) == 1)

    asyncio.run(scenario())


# Crashes.


def test_a_killed_worker_fails_its_requests_at_once_and_comes_back_by_itself(tmp_path):
    async def scenario():
        async with scripted(tmp_path) as agent:
            await agent.apply(desired(1, g0=[replica("s", "gated-run", max_batch=1)]))
            (victim,) = worker_processes()
            await agent.apply(desired(2, g0=[replica("s", "gated-run", max_batch=1)], g1=[replica("t", "twice")]))
            calls = [asyncio.ensure_future(agent.infer("s")) for _ in range(3)]
            await eventually(lambda: queued(agent, "s", 2))
            victim.send_signal(signal.SIGKILL)
            for call in calls:
                with refused(grpc.StatusCode.UNAVAILABLE, "SIGKILL"):
                    await call
            await agent.infer("t")
            (tmp_path / "run").touch()
            state = await agent.until_phase("s", Phase.SERVING)
            assert (state.failed, state.reason) == (3, "")
            await agent.infer("s")
            assert (await agent.state()).ready

    asyncio.run(scenario())


def test_a_worker_that_dies_in_every_batch_shows_as_failed_with_its_reason(tmp_path):
    async def scenario():
        async with scripted(tmp_path) as agent:
            await agent.apply(desired(1, g0=[replica("s", "dies-at-run")]))
            with refused(grpc.StatusCode.UNAVAILABLE, "exit code 7"):
                await agent.infer("s")
            state = await agent.until_phase("s", Phase.FAILED)
            assert "exit code 7" in state.reason
            assert not (await agent.state()).ready
            with refused(grpc.StatusCode.UNAVAILABLE, "failed: the worker ended with exit code 7"):
                await agent.infer("s")
            await agent.until_phase("s", Phase.SERVING)

    asyncio.run(scenario())
