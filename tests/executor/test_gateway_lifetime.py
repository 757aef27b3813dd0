from __future__ import annotations

import asyncio
import errno
import json
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from executor.gateway import GatewayConfig, running_gateway
from executor.proto import open_inference_pb2 as inference
from plans.errors import BadStoredData, InvalidInput, RemoteFailure
from tests.executor.front_door import Code, Door, agents, door, run, table
from tests.executor.peer_process import PeerProcess, processes


class TestHealth:
    def test_a_killed_agent_leaves_the_rotation_and_comes_back(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with agents("a", "b") as (a, b), door(tmp_path) as front:
                await front.control.set_routes(table(a, b), timeout_s=5)
                assert (await front.state()).ready
                await a.kill()
                down = await front.until(lambda state: not state.targets[0].healthy)
                assert down.targets[1].healthy
                for _ in range(3):
                    await front.infer()
                assert not a.served
                await a.start()
                await front.until(lambda state: state.targets[0].healthy)
                await asyncio.gather(front.infer(), front.infer())
                assert a.served

        run(scenario())

    def test_a_replica_that_its_agent_reports_as_gone_leaves_the_rotation(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with agents("a") as (a,), door(tmp_path, poll_interval_s=0.01) as front:
                await front.control.set_routes(table(a), timeout_s=5)
                a.phases.clear()
                state = await front.until(lambda state: not state.ready)
                assert "does not run" in state.targets[0].reason
                code, details = await front.code(front.infer())
                assert code is Code.UNAVAILABLE
                assert "a/0: the agent does not run this replica" in details

        run(scenario())

    def test_a_watch_that_ends_by_a_bug_is_logged(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def scenario() -> None:
            async with agents("a") as (a,), door(tmp_path, poll_interval_s=0.01) as front:
                await front.control.set_routes(table(a), timeout_s=5)

                def broken(*_: Any) -> None:
                    raise LookupError("a bug in the watch")

                monkeypatch.setattr("executor.gateway_peer.view_of", broken)
                async with asyncio.timeout(120):
                    while "a bug in the watch" not in caplog.text:
                        await asyncio.sleep(0.01)

        run(scenario())
        assert "state of a" in caplog.text

    def test_an_agent_that_does_not_answer_in_time_counts_as_lost(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with agents("a") as (a,), door(tmp_path, poll_interval_s=0.01, poll_timeout_s=0.05) as front:
                await front.control.set_routes(table(a), timeout_s=5)
                answers_again = a.hold("GetState")
                state = await front.until(lambda state: not state.ready)
                assert "DEADLINE_EXCEEDED" in state.targets[0].reason
                answers_again.set()
                await front.until(lambda state: state.ready)

        run(scenario())

    def test_the_standard_health_protocol_follows_services_and_process(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with agents("a") as (a,), door(tmp_path, poll_interval_s=0.01) as front:
                check = health_pb2_grpc.HealthStub(front.channel).Check

                async def status(service: str) -> str:
                    answer = await check(health_pb2.HealthCheckRequest(service=service))
                    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

                assert await status("") == "SERVING"
                assert (await front.code(status("chat")))[0] is Code.NOT_FOUND
                await front.control.set_routes(table(a), timeout_s=5)
                watch = health_pb2_grpc.HealthStub(front.channel).Watch(health_pb2.HealthCheckRequest(service="chat"))
                seen = [answer.status async for answer in _until(watch, health_pb2.HealthCheckResponse.SERVING)]
                assert seen
                assert await status("inference.GRPCInferenceService") == "SERVING"
                watch = health_pb2_grpc.HealthStub(front.channel).Watch(health_pb2.HealthCheckRequest(service="chat"))
                await a.kill()
                assert [answer async for answer in _until(watch, health_pb2.HealthCheckResponse.NOT_SERVING)]
                assert await status("") == "SERVING"

        run(scenario())

    def test_reflection_lists_what_is_served(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with door(tmp_path) as front:
                call = reflection_pb2_grpc.ServerReflectionStub(front.channel).ServerReflectionInfo()
                await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
                answer = await call.read()
                names = {service.name for service in answer.list_services_response.service}
                assert {
                    "inference.GRPCInferenceService",
                    "foreplan.control.v1.Gateway",
                    "grpc.health.v1.Health",
                } <= names
                call.cancel()

        run(scenario())

    def test_the_index_lists_services_with_the_reason_for_what_is_not_ready(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with agents("a") as (a,), door(tmp_path, poll_interval_s=0.01) as front:
                await front.control.set_routes(table(a), timeout_s=5)
                ready = inference.ModelReadyRequest(name="chat")
                assert (await front.inference.ModelReady(ready)).ready
                a.phases.clear()
                await front.until(lambda state: not state.ready)
                assert not (await front.inference.ModelReady(ready)).ready
                assert not (await front.inference.ServerReady(inference.ServerReadyRequest())).ready
                assert (await front.inference.ServerLive(inference.ServerLiveRequest())).live
                index = await front.inference.RepositoryIndex(inference.RepositoryIndexRequest())
                assert [(model.name, model.state) for model in index.models] == [("chat", "UNAVAILABLE")]
                assert "a/0" in index.models[0].reason
                only = await front.inference.RepositoryIndex(inference.RepositoryIndexRequest(ready=True))
                assert not only.models

        run(scenario())


async def _until(watch: Any, status: int) -> AsyncIterator[health_pb2.HealthCheckResponse]:
    async for answer in watch:
        if answer.status == status:
            yield answer
            watch.cancel()
            return


class TestJournal:
    def test_a_restarted_gateway_goes_on_with_the_routes_it_had(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with agents("a") as (a,):
                async with door(tmp_path) as front:
                    await front.control.set_routes(table(a, generation=4), timeout_s=5)
                async with door(tmp_path) as front:
                    state = await front.until(lambda state: state.ready)
                    assert (state.generation, state.placement_digest) == (4, "digest-4")
                    await front.infer()

        run(scenario())

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: text[: len(text) // 2],
            lambda text: text.replace('"weight": 1.0', '"weight": 0.5'),
            lambda text: text.replace('"table"', '"tables"'),
            lambda text: "",
            lambda text: json.dumps({**json.loads(text), "format_version": "9.0"}),
        ],
        ids=["cut short", "changed", "unknown field", "empty", "another major version"],
    )
    def test_a_damaged_journal_is_named_with_the_remedy(self, tmp_path: Path, damage: Callable[[str], str]) -> None:
        async def scenario() -> None:
            async with agents("a") as (a,), door(tmp_path) as front:
                await front.control.set_routes(table(a), timeout_s=5)

        run(scenario())
        path = tmp_path / "routes.json"
        path.write_text(damage(path.read_text()))

        async def again() -> None:
            with pytest.raises(BadStoredData, match=r"routes\.json.*foreplan apply") as caught:
                async with door(tmp_path):
                    pass
            assert str(caught.value).count("routes.json") == 1
            assert "found found" not in str(caught.value)

        run(again())

    def test_routes_that_cannot_be_stored_are_refused_by_name_and_not_put_in_force(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        async def scenario() -> None:
            async with agents("a") as (a,), door(tmp_path) as front:
                with monkeypatch.context() as patch:
                    patch.setattr("os.fsync", refuse)
                    with pytest.raises(RemoteFailure, match=r"INTERNAL: .*routes\.json cannot be written: No space"):
                        await front.control.set_routes(table(a), timeout_s=5)
                assert (await front.state()).generation == 0

        run(scenario())


class TestListening:
    def test_a_port_in_use_is_a_named_error(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with door(tmp_path / "one") as front:
                config = GatewayConfig(listen=front.address, state_dir=tmp_path / "two")
                with pytest.raises(InvalidInput, match=r"--listen.*free"):
                    async with running_gateway(config):
                        pass

        run(scenario())

    @pytest.mark.parametrize("listen", ["8001", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:99999"])
    def test_an_address_that_is_none_is_refused(self, tmp_path: Path, listen: str) -> None:
        async def scenario() -> None:
            with pytest.raises(InvalidInput, match="host:port"):
                async with running_gateway(GatewayConfig(listen=listen, state_dir=tmp_path)):
                    pass

        run(scenario())

    def test_a_state_folder_that_cannot_be_made_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")

        async def scenario() -> None:
            with pytest.raises(InvalidInput, match="--state-dir"):
                async with running_gateway(GatewayConfig(listen="127.0.0.1:0", state_dir=tmp_path / "file" / "x")):
                    pass

        run(scenario())

    def test_a_state_folder_has_one_gateway(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with door(tmp_path):
                with pytest.raises(InvalidInput, match="no other gateway uses"):
                    async with door(tmp_path):
                        pass

        run(scenario())


class TestStopping:
    def test_requests_in_flight_are_answered_before_it_ends(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with agents("a") as (a,):
                a.infer_waits_for = asyncio.Event()
                serving = running_gateway(GatewayConfig(listen="127.0.0.1:0", state_dir=tmp_path))
                front = Door.to(await serving.__aenter__())
                await front.control.set_routes(table(a), timeout_s=5)
                early = asyncio.ensure_future(front.infer())
                while not a.served:
                    await asyncio.sleep(0)
                ending = asyncio.create_task(serving.__aexit__(None, None, None))
                async with asyncio.timeout(5):
                    while True:
                        try:
                            await front.inference.ServerLive(inference.ServerLiveRequest(), timeout=1)
                        except grpc.aio.AioRpcError:
                            break
                a.infer_waits_for.set()
                assert (await early).id == "7"
                await ending
                await front.channel.close()

        run(scenario())

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_ends_the_process_with_status_0(self, tmp_path: Path, number: signal.Signals) -> None:
        gateway = PeerProcess("gateway", tmp_path)
        with processes(gateway):
            gateway.process.send_signal(number)
            assert gateway.process.wait(20) == 0
