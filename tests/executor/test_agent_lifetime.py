from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from executor.journal import Journal
from executor.proto import open_inference_pb2 as pb
from executor.state import Phase
from plans.errors import BadStoredData, InvalidInput
from tests.executor.running_agent import (
    WAIT_S,
    agent_config,
    desired,
    eventually,
    refused,
    replica,
    running_agent,
    scripted,
    worker_processes,
)

# The journal.


def test_a_killed_agent_takes_up_what_was_committed(tmp_path):
    async def scenario():
        Journal(tmp_path / "state").write(desired(4, g0=[replica("s", "twice")]))
        async with scripted(tmp_path) as agent:
            state = await agent.until_phase("s", Phase.SERVING)
            assert state.key.variant == "twice"
            state = await agent.state()
            assert (state.generation, state.placement_digest, state.ready) == (4, "sha256:4", True)
            await agent.infer("s")
            with refused(grpc.StatusCode.FAILED_PRECONDITION, "older"):
                await agent.stage(desired(3))

    asyncio.run(scenario())


def test_what_was_only_staged_is_forgotten_after_a_restart(tmp_path):
    async def scenario():
        async with scripted(tmp_path) as agent:
            await agent.apply(desired(1, g0=[replica("s", "twice")]))
            await agent.stage(desired(2, g0=[replica("t", "twice")]))
        async with scripted(tmp_path) as agent:
            await agent.until_phase("s", Phase.SERVING)
            assert (await agent.replica("t")) is None

    asyncio.run(scenario())


def test_a_damaged_journal_stops_the_agent(tmp_path):
    Journal(tmp_path).path.write_bytes(b"rubbish")

    async def scenario():
        async with running_agent(tmp_path):
            pass

    with pytest.raises(BadStoredData, match="foreplan apply"):
        asyncio.run(scenario())


# The process.


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "no-such-host.invalid:1", "a..b:1", "nonsense"])
def test_an_address_that_cannot_be_listened_on_is_named_once(tmp_path, address, capfd):
    async def scenario(text):
        async with running_agent(tmp_path, address=text):
            pass

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        text = address.format(port=taken.getsockname()[1])
        with pytest.raises(InvalidInput) as caught:
            asyncio.run(scenario(text))
    assert text in str(caught.value)
    assert "bind" not in capfd.readouterr().err  # as gRPC says it


def test_two_agents_cannot_share_a_port(tmp_path):
    async def scenario():
        async with running_agent(tmp_path / "one") as agent:
            with pytest.raises(InvalidInput, match="free port"):
                async with running_agent(tmp_path / "two", address=f"127.0.0.1:{agent.port}"):
                    pass

    asyncio.run(scenario())


def test_a_state_folder_has_one_agent(tmp_path):
    async def scenario():
        async with running_agent(tmp_path):
            with pytest.raises(InvalidInput, match="no other agent uses"):
                async with running_agent(tmp_path):
                    pass

    asyncio.run(scenario())


def test_an_impossible_configuration_is_refused_with_all_faults(tmp_path):
    with pytest.raises(InvalidInput) as caught:
        agent_config(tmp_path, node="", device_count=0, memory_bytes=-1, drain_s=-1.0)
    assert {fault.field for fault in caught.value.faults} == {"node", "device_count", "memory_bytes", "drain_s"}


_AGENT = """
import asyncio, sys
from pathlib import Path
from executor.agent import AgentConfig, serve_agent
config = AgentConfig(node="node-a", address="127.0.0.1:0", device_count=1, memory_bytes=1000,
                     state_dir=Path(sys.argv[1]), runtime="tests.executor.fake_runtime:FakeRuntime")
asyncio.run(serve_agent(config, on_ready=lambda port: print(port, flush=True)))
"""


@contextlib.contextmanager
def agent_process(state_dir):
    process = subprocess.Popen([sys.executable, "-c", _AGENT, str(state_dir)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_agent_and_its_workers_in_good_order(tmp_path, number):
    Journal(tmp_path).write(desired(1, g0=[replica("s")]))
    with agent_process(tmp_path) as (process, _):
        workers = asyncio.run(eventually(lambda: worker_processes(process.pid)))
        process.send_signal(number)
        assert process.wait(WAIT_S) == 0
        assert not any(worker.is_running() for worker in workers)


def test_workers_of_a_killed_agent_are_gone_and_a_new_agent_serves_again(tmp_path):
    Journal(tmp_path).write(desired(1, g0=[replica("s")]))
    with agent_process(tmp_path) as (process, _):
        workers = asyncio.run(eventually(lambda: worker_processes(process.pid)))
        process.kill()
        process.wait(WAIT_S)
        asyncio.run(eventually(lambda: not any(alive(worker) for worker in workers)))

    async def scenario():
        async with running_agent(tmp_path) as agent:
            await agent.until_phase("s", Phase.SERVING)

    asyncio.run(scenario())


def alive(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def test_the_state_counts_the_memory_of_the_agent_and_its_workers(tmp_path):
    async def scenario():
        async with scripted(tmp_path) as agent:
            await agent.apply(desired(1, g0=[replica("s", "twice")]))
            (worker,) = worker_processes()
            assert (await agent.state()).resident_bytes > worker.memory_info().rss

    asyncio.run(scenario())


# Health and reflection.


def test_health_tells_living_from_ready(tmp_path):
    async def scenario():
        async with scripted(tmp_path) as agent:
            checks = health_pb2_grpc.HealthStub(agent.channel)

            async def status(service):
                try:
                    answer = await checks.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S)
                except grpc.aio.AioRpcError as error:
                    return error.code()
                return answer.status

            await agent.apply(desired(1, g0=[replica("a", "twice")]))
            Status = health_pb2.HealthCheckResponse  # noqa: N806
            staging = asyncio.create_task(agent.stage(desired(2, g0=[replica("b", "gated-load")])))
            await agent.until_phase("b", Phase.LOADING)
            assert await status("") == Status.SERVING
            assert (await agent.inference.ServerLive(pb.ServerLiveRequest())).live
            assert await status("a") == Status.SERVING
            assert await status("b") == Status.NOT_SERVING
            assert await status("c") is grpc.StatusCode.NOT_FOUND
            (tmp_path / "load").touch()
            await staging
            await agent.commit(2)
            await agent.finish(2)
            assert await status("b") == Status.SERVING
            assert await status("a") == Status.SERVICE_UNKNOWN

    asyncio.run(scenario())


def test_health_has_an_entry_for_each_of_its_own_services(tmp_path):
    async def scenario():
        async with scripted(tmp_path) as agent:
            checks = health_pb2_grpc.HealthStub(agent.channel)

            async def status(service):
                answer = await checks.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S)
                return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

            assert await status("foreplan.control.v1.Agent") == "SERVING"
            assert await status("inference.GRPCInferenceService") == "SERVING"
            await agent.apply(desired(1, g0=[replica("a", "dies-at-run")]))
            with refused(grpc.StatusCode.UNAVAILABLE, "a (dies-at-run)"):
                await agent.infer("a")

            async def is_not_ready():
                return await status("inference.GRPCInferenceService") == "NOT_SERVING"

            await eventually(is_not_ready)
            assert await status("foreplan.control.v1.Agent") == "SERVING"

    asyncio.run(scenario())


def test_reflection_names_every_service(tmp_path):
    async def scenario():
        async with running_agent(tmp_path) as agent:
            stub = reflection_pb2_grpc.ServerReflectionStub(agent.channel)
            requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            async for answer in stub.ServerReflectionInfo(requests):
                names = {service.name for service in answer.list_services_response.service}
            assert {
                "foreplan.control.v1.Agent",
                "inference.GRPCInferenceService",
                "grpc.health.v1.Health",
            } <= names

    asyncio.run(scenario())
