from __future__ import annotations

import asyncio
import errno
import json
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from executor.control_client import GatewayClient
from executor.gateway import GatewayConfig, running_gateway
from executor.gateway_peer import INFERENCE
from executor.proto import open_inference_pb2 as inference
from executor.proto import open_inference_pb2_grpc as inference_grpc
from executor.state import Backend, GatewayState, ReplicaKey, RoutingTable, ServiceRoutes, Target
from plans.errors import BadStoredData, InvalidInput, RemoteFailure
from tests.executor.fake_agent import FakeAgent
from tests.executor.peer_process import PeerProcess, processes

Code = grpc.StatusCode


class Door(NamedTuple):
    """A running gateway with stubs for all that it serves."""

    address: str
    channel: grpc.aio.Channel
    control: GatewayClient
    inference: inference_grpc.GRPCInferenceServiceStub

    @classmethod
    def to(cls, address: str) -> Door:
        channel = grpc.aio.insecure_channel(address)
        stub = inference_grpc.GRPCInferenceServiceStub(channel)
        return cls(address, channel, GatewayClient(channel, address), stub)

    async def state(self) -> GatewayState:
        return await self.control.state(timeout_s=5)

    async def until(self, holds: Callable[[GatewayState], bool]) -> GatewayState:
        """Ask for the state until ``holds`` is true of it."""
        async with asyncio.timeout(120):
            while not holds(state := await self.state()):
                await asyncio.sleep(0.01)
        return state

    async def infer(self, service: str = "chat", data: bytes = b"abcd", **options: Any) -> inference.ModelInferResponse:
        return await self.inference.ModelInfer(request(service, data), **({"timeout": 5} | options))

    async def code(self, call: Awaitable[Any]) -> tuple[Code, str]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        return caught.value.code(), caught.value.details() or ""


def request(
    service: str = "chat", data: bytes = b"abcd", deadline_ms: int | None = None
) -> inference.ModelInferRequest:
    message = inference.ModelInferRequest(model_name=service, id="7", raw_input_contents=[data])
    if deadline_ms is not None:
        message.parameters["deadline_ms"].int64_param = deadline_ms
    return message


@asynccontextmanager
async def door(tmp_path: Path, **options: Any) -> AsyncIterator[Door]:
    patient = {"poll_timeout_s": 30.0}  # a busy machine is no lost agent
    config = GatewayConfig(listen="127.0.0.1:0", state_dir=tmp_path, **(patient | options))
    async with running_gateway(config) as address:
        front = Door.to(address)
        async with front.channel:
            yield front


@asynccontextmanager
async def agents(*names: str, service: str = "chat") -> AsyncIterator[list[FakeAgent]]:
    """Agents that serve ``service`` as variant "v" on their GPU 0."""
    started = [await FakeAgent(name).start() for name in names]
    for agent in started:
        agent.serve(ReplicaKey(group=f"{agent.node}/0", service=service, variant="v"))
    try:
        yield started
    finally:
        await asyncio.gather(*(agent.kill() for agent in started))


def table(
    *nodes: FakeAgent, shares: tuple[float, ...] = (), generation: int = 1, deadline_s: float = 5.0
) -> RoutingTable:
    weights = shares or tuple(1 / len(nodes) for _ in nodes)
    return RoutingTable(
        generation=generation,
        placement_digest=f"digest-{generation}",
        backends=tuple(Backend(node=agent.node, address=agent.address) for agent in nodes),
        services=(
            ServiceRoutes(
                service="chat",
                deadline_s=deadline_s,
                targets=tuple(
                    Target(group=f"{agent.node}/0", node=agent.node, weight=weight, variant="v")
                    for agent, weight in zip(nodes, weights, strict=True)
                ),
            ),
        ),
    )


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(120):
            await scenario

    asyncio.run(limited())


class TestForwarding:
    def test_requests_reach_the_named_groups_by_weight_and_answers_come_back_unchanged(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with agents("a", "b") as (a, b), door(tmp_path) as front:
                await front.control.set_routes(table(a, b, shares=(0.75, 0.25)), timeout_s=5)
                answers = [await front.infer(data=bytes([number])) for number in range(8)]
                assert [answer.raw_output_contents[0] for answer in answers] == [bytes([n]) for n in range(8)]
                assert Counter(group for agent in (a, b) for group, _ in agent.served) == {"a/0": 6, "b/0": 2}
                assert a.served[0][1] == request(data=b"\0").SerializeToString()
                assert {answer.parameters["group"].string_param for answer in answers} == {"a/0", "b/0"}
                assert {answer.parameters["variant"].string_param for answer in answers} == {"a", "b"}

        run(scenario())

    def test_an_unavailable_replica_costs_a_retry_elsewhere_and_its_place_in_the_rotation(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with agents("a", "b") as (a, b), door(tmp_path, poll_interval_s=60) as front:
                await front.control.set_routes(table(a, b), timeout_s=5)
                a.infer_status = Code.UNAVAILABLE
                for _ in range(4):
                    await front.infer()
                assert (len(a.served), len(b.served)) == (1, 4)
                unwell = [target for target in (await front.state()).targets if not target.healthy]
                assert [(target.group, target.failed) for target in unwell] == [("a/0", 1)]
                assert "UNAVAILABLE" in unwell[0].reason

        run(scenario())

    def test_its_agents_answer_to_an_earlier_question_does_not_bring_it_back(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            timing = {"poll_interval_s": 0.01, "poll_timeout_s": 60}
            async with agents("a", "b") as (a, b), door(tmp_path, **timing) as front:
                await front.control.set_routes(table(a, b), timeout_s=5)

                async def asked() -> None:
                    before = len(a.calls)
                    while len(a.calls) == before:
                        await asyncio.sleep(0)

                async def well() -> bool:
                    return all(target.healthy for target in (await front.state()).targets)

                before = a.hold("GetState")
                await asked()
                a.infer_status = Code.UNAVAILABLE
                for _ in range(2):
                    await front.infer()
                after = a.held["GetState"] = asyncio.Event()
                before.set()
                await asked()
                assert not await well()
                after.set()
                while not await well():
                    await asyncio.sleep(0)

        run(scenario())

    def test_it_is_retried_once_and_no_more(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with agents("a", "b", "c") as three, door(tmp_path, poll_interval_s=60) as front:
                await front.control.set_routes(table(*three), timeout_s=5)
                for agent in three:
                    agent.infer_status = Code.UNAVAILABLE
                code, details = await front.code(front.infer())
                assert code is Code.UNAVAILABLE
                assert "answers so on purpose" in details
                assert sum(len(agent.served) for agent in three) == 2

        run(scenario())

    @pytest.mark.parametrize("name", ["x" * 20_000, "é" * 5000])
    def test_a_name_that_is_longer_than_a_message_can_be_is_told_of_with_the_right_status(
        self, tmp_path: Path, name: str
    ) -> None:
        async def scenario() -> None:
            async with agents("a") as (a,), door(tmp_path) as front:
                await front.control.set_routes(table(a), timeout_s=5)
                for call in (
                    front.infer(name),
                    front.inference.ModelMetadata(inference.ModelMetadataRequest(name=name), timeout=5),
                    front.inference.ModelStatistics(inference.ModelStatisticsRequest(name=name), timeout=5),
                ):
                    code, details = await front.code(call)
                    assert code is Code.NOT_FOUND
                    assert details.startswith("no service ")
                load = inference.RepositoryModelLoadRequest(model_name=name)
                assert (await front.code(front.inference.RepositoryModelLoad(load, timeout=5)))[0] is (
                    Code.FAILED_PRECONDITION
                )

        run(scenario())

    @pytest.mark.parametrize("status", [Code.INVALID_ARGUMENT, Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED])
    def test_any_other_status_is_the_agents_answer_and_passed_on(self, tmp_path: Path, status: Code) -> None:
        async def scenario() -> None:
            async with agents("a", "b") as (a, b), door(tmp_path) as front:
                await front.control.set_routes(table(a, b), timeout_s=5)
                a.infer_status = b.infer_status = status
                assert await front.code(front.infer()) == (status, "a answers so on purpose")
                assert (len(a.served), len(b.served)) == (1, 0)

        run(scenario())

    def test_metadata_comes_from_a_replica(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with agents("a") as (a,), door(tmp_path) as front:
                await front.control.set_routes(table(a), timeout_s=5)
                answer = await front.inference.ModelMetadata(inference.ModelMetadataRequest(name="chat"))
                assert (answer.platform, answer.inputs[0].name) == ("fake", "x")
                code, _ = await front.code(front.inference.ModelMetadata(inference.ModelMetadataRequest(name="nobody")))
                assert code is Code.NOT_FOUND

        run(scenario())


class TestRefusals:
    def test_a_service_that_the_plan_does_not_have_is_not_found(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with agents("a") as (a,), door(tmp_path) as front:
                assert "no plan is applied yet" in (await front.code(front.infer()))[1]
                await front.control.set_routes(table(a), timeout_s=5)
                code, details = await front.code(front.infer("nobody"))
                assert code is Code.NOT_FOUND
                assert "chat" in details

        run(scenario())

    def test_bytes_that_are_no_request_are_invalid(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with door(tmp_path) as front:
                send = front.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer", bytes, bytes)
                assert (await front.code(send(b"\xff\xff")))[0] is Code.INVALID_ARGUMENT

        run(scenario())

    def test_bytes_that_are_no_question_for_metadata_are_invalid(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with door(tmp_path) as front:
                call = front.channel.unary_unary(f"/{INFERENCE}/ModelMetadata", bytes, bytes)
                code, details = await front.code(call(b"\xff\xff", timeout=5))
                assert code is Code.INVALID_ARGUMENT
                assert "ModelMetadataRequest" in details

        run(scenario())

    def test_a_request_above_the_size_limit_is_refused(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with agents("a") as (a,), door(tmp_path, max_message_bytes=10_000) as front:
                await front.control.set_routes(table(a), timeout_s=5)
                assert (await front.code(front.infer(data=bytes(20_000))))[0] is Code.RESOURCE_EXHAUSTED
                await front.infer(data=bytes(5_000))

        run(scenario())

    def test_loading_through_the_gateway_needs_a_plan_that_has_the_service(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with agents("a") as (a,), door(tmp_path) as front:
                await front.control.set_routes(table(a), timeout_s=5)
                load = front.inference.RepositoryModelLoad
                await load(inference.RepositoryModelLoadRequest(model_name="chat"))
                code, details = await front.code(load(inference.RepositoryModelLoadRequest(model_name="nobody")))
                assert code is Code.FAILED_PRECONDITION
                assert "foreplan apply" in details
                unload = front.inference.RepositoryModelUnload(
                    inference.RepositoryModelUnloadRequest(model_name="chat")
                )
                assert (await front.code(unload))[0] is Code.FAILED_PRECONDITION

        run(scenario())


class TestDeadlines:
    def test_what_is_left_of_the_callers_time_travels_on(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with agents("a") as (a,), door(tmp_path) as front:
                await front.control.set_routes(table(a, deadline_s=300.0), timeout_s=5)
                await front.infer(timeout=50)
                await front.inference.ModelInfer(request(deadline_ms=20_000), timeout=50)
                await front.infer(timeout=None)
                assert [round(left or 0, -1) for left in a.remaining_s] == [50, 20, 300]

        run(scenario())

    def test_a_request_without_time_is_sent_to_nobody_and_counted_for_nobody(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with agents("a") as (a,), door(tmp_path) as front:
                await front.control.set_routes(table(a), timeout_s=5)
                late = request()
                late.parameters["deadline_ms"].double_param = 1e-9
                code, details = await front.code(front.inference.ModelInfer(late, timeout=50))
                assert (code, details) == (Code.DEADLINE_EXCEEDED, "no time left for 'chat' when it arrived")
                assert [target.sent for target in (await front.state()).targets] == [0]
                assert not a.served

        run(scenario())

    def test_a_replica_that_hangs_costs_the_deadline_and_no_more(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with agents("a") as (a,), door(tmp_path) as front:
                a.infer_waits_for = asyncio.Event()
                await front.control.set_routes(table(a, deadline_s=0.1), timeout_s=5)
                assert (await front.code(front.infer(timeout=None)))[0] is Code.DEADLINE_EXCEEDED
                late = front.inference.ModelInfer(request(deadline_ms=1))
                assert (await front.code(late))[0] is Code.DEADLINE_EXCEEDED

        run(scenario())

    @pytest.mark.parametrize("deadline_ms", [10**15, 2**62])
    def test_a_deadline_that_is_far_away_is_no_deadline_that_has_passed(self, tmp_path: Path, deadline_ms: int) -> None:
        async def scenario() -> None:
            async with agents("a") as (a,), door(tmp_path) as front:
                await front.control.set_routes(table(a), timeout_s=5)
                await front.inference.ModelInfer(request(deadline_ms=deadline_ms))
                (remaining_s,) = a.remaining_s
                assert remaining_s == pytest.approx(86_400.0, rel=0.01)

        run(scenario())


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


class TestRoutes:
    def test_an_older_table_is_refused_and_the_one_in_force_stays(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with agents("a", "b") as (a, b), door(tmp_path) as front:
                await front.control.set_routes(table(a, generation=3), timeout_s=5)
                with pytest.raises(RemoteFailure, match=r"FAILED_PRECONDITION: .*generation 3 is in force") as caught:
                    await front.control.set_routes(table(b, generation=2), timeout_s=5)
                assert not caught.value.retryable
                await front.infer()
                assert len(a.served) == 1

        run(scenario())

    def test_a_flip_moves_every_later_request_and_breaks_none_in_flight(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with agents("a", "b") as (a, b), door(tmp_path) as front:
                await front.control.set_routes(table(a), timeout_s=5)
                a.infer_waits_for = asyncio.Event()
                early = asyncio.ensure_future(front.infer())
                while not a.served:
                    await asyncio.sleep(0)
                await front.control.set_routes(table(b, generation=2), timeout_s=5)
                await front.infer()
                assert (len(a.served), len(b.served)) == (1, 1)
                a.infer_waits_for.set()
                assert (await early).parameters["variant"].string_param == "a"

        run(scenario())

    def test_an_agent_that_moved_is_followed_to_its_new_address(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with agents("a") as (old,), agents("a") as (new,), door(tmp_path) as front:
                await front.control.set_routes(table(old), timeout_s=5)
                await front.control.set_routes(table(new, generation=2), timeout_s=5)
                await front.infer()
                assert (len(old.served), len(new.served)) == (0, 1)

        run(scenario())

    def test_a_table_that_contradicts_itself_is_refused_with_every_fault(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with door(tmp_path) as front, agents("a") as (a,):
                wrong = table(a, generation=0, shares=(-1.0,))
                with pytest.raises(RemoteFailure, match="INVALID_ARGUMENT") as caught:
                    await front.control.set_routes(wrong, timeout_s=5)
                assert "generation" in caught.value.problem
                assert "weight" in caught.value.problem
                assert (await front.state()).generation == 0

        run(scenario())


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
