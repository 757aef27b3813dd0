from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from executor.gateway_peer import INFERENCE
from executor.infer_header import group_mark
from executor.proto import open_inference_pb2 as inference
from plans.errors import RemoteFailure
from tests.executor.front_door import Code, agents, door, request, run, table


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

    @pytest.mark.parametrize("larger_bytes", [0, 1])
    def test_an_answer_may_be_as_large_as_a_message(self, tmp_path: Path, larger_bytes: int) -> None:
        async def scenario() -> None:
            most_bytes = 10_000
            async with agents("a") as (a,), door(tmp_path, max_message_bytes=most_bytes) as front:
                await front.control.set_routes(table(a), timeout_s=5)
                beside_bytes = (await front.infer(data=bytes(9_000))).ByteSize() - 9_000
                assert a.forward is not None
                a.forward._max_message_bytes = most_bytes
                mark_bytes = len(group_mark("a/0"))
                data = bytes(most_bytes - beside_bytes + mark_bytes + larger_bytes)
                if larger_bytes:
                    assert (await front.code(front.infer(data=data)))[0] is Code.RESOURCE_EXHAUSTED
                    return
                answer = await front.infer(data=data)
                assert answer.ByteSize() == most_bytes
                assert "group" not in answer.parameters
                assert (await front.infer(data=data[mark_bytes:])).parameters["group"].string_param == "a/0"

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

    def test_routes_by_which_a_service_would_go_out_are_refused_and_the_old_ones_serve_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("executor.gateway_switchboard._PATIENCE_S", 0.1)

        async def scenario() -> None:
            async with agents("a", "b") as (a, b), door(tmp_path) as front:
                await front.control.set_routes(table(a), timeout_s=5)
                b.drained = True
                with pytest.raises(RemoteFailure, match=r"FAILED_PRECONDITION: .*b/0: its node is drained") as caught:
                    await front.control.set_routes(table(b, generation=2), timeout_s=60)
                assert not caught.value.retryable
                await b.kill()
                with pytest.raises(RemoteFailure, match=r"FAILED_PRECONDITION: .*b/0: its agent gives no state"):
                    await front.control.set_routes(table(b, generation=2), timeout_s=60)
                await front.infer()
                assert (len(a.served), (await front.state()).generation) == (1, 1)

        run(scenario())

    def test_routes_wait_for_an_agent_that_is_about_to_serve(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with agents("a", "b") as (a, b), door(tmp_path) as front:
                await front.control.set_routes(table(a), timeout_s=5)
                b.drained = True
                b.calls.clear()
                flip = asyncio.create_task(front.control.set_routes(table(b, generation=2), timeout_s=60))
                while "GetState" not in b.calls:
                    await asyncio.sleep(0)
                b.drained = False
                await flip
                await front.infer()
                assert (len(a.served), len(b.served)) == (0, 1)

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
