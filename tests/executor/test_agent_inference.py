from __future__ import annotations

import asyncio
import contextlib

import grpc
import numpy as np

from executor import agent_inference
from executor.proto import open_inference_pb2 as pb
from executor.state import Phase
from executor.tensors import decode_outputs, encode_request
from tests.executor.running_agent import WAIT_S, desired, eventually, refused, replica, running_agent, scripted


@contextlib.asynccontextmanager
async def serving(folder, **groups):
    """An agent that serves these groups."""
    async with scripted(folder) as agent:
        await agent.apply(desired(1, **groups))
        yield agent


def status_of(result):
    return result.code() if isinstance(result, grpc.aio.AioRpcError) else grpc.StatusCode.OK


async def waits(agent, service, count):
    state = await agent.replica(service)
    return state is not None and state.running == 1 and state.queued == count


# Answers.


def test_an_answer_is_raw_and_says_how_it_came_about(tmp_path):
    async def scenario():
        async with serving(tmp_path, g0=[replica("s", "twice")]) as agent:
            answer = await agent.infer("s", [[1, 2, 3, 4], [5, 6, 7, 8]])
            assert (answer.model_name, answer.model_version) == ("s", "1")
            assert len(answer.raw_output_contents) == 1
            np.testing.assert_array_equal(decode_outputs(answer)["y"], [[2, 4, 6, 8], [10, 12, 14, 16]])
            assert answer.parameters["batch_size"].int64_param == 2
            assert answer.parameters["variant"].string_param == "twice"
            for name in ("queue_s", "run_s"):
                assert answer.parameters[name].double_param >= 0

    asyncio.run(scenario())


def test_requests_that_wait_together_run_together_and_get_their_own_rows(tmp_path):
    async def scenario():
        async with serving(tmp_path, g0=[replica("s", "gated-run", max_batch=4)]) as agent:
            first = asyncio.ensure_future(agent.infer("s", [0] * 4))
            await eventually(lambda: waits(agent, "s", 0))
            others = [asyncio.ensure_future(agent.infer("s", [number] * 4)) for number in range(1, 7)]
            await eventually(lambda: waits(agent, "s", 6))
            (tmp_path / "run").touch()
            answers = [await call for call in (first, *others)]
            for number, answer in enumerate(answers):
                np.testing.assert_array_equal(decode_outputs(answer)["y"], [[2 * number] * 4])
            sizes = sorted(answer.parameters["batch_size"].int64_param for answer in answers)
            assert sizes == [1, 2, 2, 4, 4, 4, 4]
            state = await agent.replica("s")
            assert (state.completed, state.batches, state.queued, state.running) == (7, 3, 0, 0)

    asyncio.run(scenario())


def test_requests_of_several_items_are_joined_whole(tmp_path):
    async def scenario():
        async with serving(tmp_path, g0=[replica("s", "gated-run", max_batch=4)]) as agent:
            first = asyncio.ensure_future(agent.infer("s", [0] * 4))
            await eventually(lambda: waits(agent, "s", 0))
            pair = asyncio.ensure_future(agent.infer("s", [[1] * 4] * 2, deadline_ms=20_000))
            more = asyncio.ensure_future(agent.infer("s", [[2] * 4] * 2, deadline_ms=20_001))
            await eventually(lambda: waits(agent, "s", 2))
            (tmp_path / "run").touch()
            await first
            for call, value in ((pair, 2), (more, 4)):
                answer = await call
                np.testing.assert_array_equal(decode_outputs(answer)["y"], [[value] * 4] * 2)
                assert answer.parameters["batch_size"].int64_param == 4

    asyncio.run(scenario())


def test_one_bad_request_in_a_batch_does_not_spoil_the_others(tmp_path):
    async def scenario():
        latency = {"batch_latency_s": (0.001,) * 4, "max_batch": 4}
        async with serving(tmp_path, g0=[replica("gate", "gated-run"), replica("s", "picky", **latency)]) as agent:
            gate = asyncio.ensure_future(agent.infer("gate"))
            await eventually(lambda: waits(agent, "gate", 0))
            calls = [asyncio.ensure_future(agent.infer("s", [value] * 4)) for value in (1, -1, 3)]

            async def all_wait():
                return (await agent.replica("s")).queued == 3

            await eventually(all_wait)
            (tmp_path / "run").touch()
            await gate
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert [status_of(result) for result in results] == [
                grpc.StatusCode.OK,
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.OK,
            ]
            np.testing.assert_array_equal(decode_outputs(results[2])["y"], [[6] * 4])

    asyncio.run(scenario())


def test_only_the_outputs_asked_for_are_sent(tmp_path):
    async def scenario():
        async with serving(tmp_path, g0=[replica("s", "twice")]) as agent:
            inputs = {"x": np.zeros((1, 4), np.float32)}
            answer = await agent.inference.ModelInfer(encode_request("s", inputs, request_id="7", outputs=["y"]))
            assert [output.name for output in answer.outputs] == ["y"]
            assert answer.id == "7"
            with refused(grpc.StatusCode.INVALID_ARGUMENT, "found z, expected some of y"):
                await agent.inference.ModelInfer(encode_request("s", inputs, outputs=["z"]))

    asyncio.run(scenario())


# Refusals.


def test_what_is_wrong_with_a_request_is_said_with_a_status(tmp_path):
    async def scenario():
        async with serving(tmp_path, g0=[replica("s", "twice", max_batch=2), replica("bad", "raises")]) as agent:
            with refused(grpc.StatusCode.NOT_FOUND, "'t'"):
                await agent.infer("t")
            with refused(grpc.StatusCode.UNAVAILABLE, "node-a/9"):
                await agent.infer("s", group="node-a/9")
            with refused(grpc.StatusCode.INVALID_ARGUMENT, "[batch, 4]"):
                await agent.infer("s", [1, 2, 3])
            with refused(grpc.StatusCode.INVALID_ARGUMENT, "a batch of 1 to 2"):
                await agent.infer("s", [[1, 2, 3, 4]] * 3)
            with refused(grpc.StatusCode.INVALID_ARGUMENT, "deadline_ms"):
                await agent.infer("s", deadline_ms=-1)
            with refused(grpc.StatusCode.INTERNAL, "raised on purpose"):
                await agent.infer("bad")
            with refused(grpc.StatusCode.NOT_FOUND, "version"):
                request = encode_request("s", {"x": np.zeros((1, 4), np.float32)})
                request.model_version = "2"
                await agent.inference.ModelInfer(request)
            assert (await agent.replica("bad")).failed == 1
            await agent.infer("s")

    asyncio.run(scenario())


def test_a_message_beyond_the_limit_is_refused(tmp_path):
    async def scenario():
        async with running_agent(tmp_path, max_message_bytes=10_000) as agent:
            await agent.apply(desired(1, g0=[replica("s")]))
            with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
                await agent.infer("s", np.zeros((1000, 4)))
            await agent.infer("s")

    asyncio.run(scenario())


def test_a_request_that_cannot_be_met_is_dropped_as_late(tmp_path):
    async def scenario():
        slow = replica("s", "twice", max_batch=1, batch_latency_s=(5.0,))
        async with serving(tmp_path, g0=[slow]) as agent:
            with refused(grpc.StatusCode.DEADLINE_EXCEEDED, "cannot be met"):
                await agent.infer("s", deadline_ms=4000)
            assert (await agent.replica("s")).dropped == 1

    asyncio.run(scenario())


def test_a_head_that_stands_in_the_way_of_a_full_batch_is_displaced(tmp_path):
    async def scenario():
        tight = replica("s", "gated-run", max_batch=2, batch_latency_s=(0.001, 60.0))
        async with serving(tmp_path, g0=[tight]) as agent:
            gate = asyncio.ensure_future(agent.infer("s", timeout_s=None, deadline_ms=1e6))
            await eventually(lambda: waits(agent, "s", 0))
            head = asyncio.ensure_future(agent.infer("s", timeout_s=None, deadline_ms=40_000))
            rest = [asyncio.ensure_future(agent.infer("s", timeout_s=None, deadline_ms=1e6)) for _ in range(2)]
            await eventually(lambda: waits(agent, "s", 3))
            (tmp_path / "run").touch()
            with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "gave way"):
                await head
            answers = await asyncio.gather(gate, *rest)
            assert [answer.parameters["batch_size"].int64_param for answer in answers] == [1, 2, 2]

    asyncio.run(scenario())


def test_a_client_that_gives_up_leaves_the_queue(tmp_path):
    async def scenario():
        async with serving(tmp_path, g0=[replica("s", "gated-run", max_batch=1)]) as agent:
            running = asyncio.ensure_future(agent.infer("s"))
            await eventually(lambda: waits(agent, "s", 0))
            queued = agent.infer("s")
            await eventually(lambda: waits(agent, "s", 1))
            queued.cancel()
            await eventually(lambda: waits(agent, "s", 0))
            (tmp_path / "run").touch()
            await running
            state = await agent.replica("s")
            assert (state.completed, state.dropped, state.batches) == (1, 1, 1)

    asyncio.run(scenario())


# Groups.


def test_the_named_group_serves_and_without_a_name_the_least_loaded_does(tmp_path):
    async def scenario():
        gated = replica("s", "gated-run", max_batch=1, batch_latency_s=(5.0,))
        async with serving(tmp_path, g0=[gated], g1=[replica("s", "twice")]) as agent:
            held = asyncio.ensure_future(agent.infer("s", group="node-a/0"))

            async def busy():
                return (await agent.replica("s", "node-a/0")).running == 1

            await eventually(busy)
            assert (await agent.replica("s", "node-a/0")).expected_wait_s > 0
            for _ in range(3):
                assert (await agent.infer("s")).parameters["variant"].string_param == "twice"
            (tmp_path / "run").touch()
            assert (await held).parameters["variant"].string_param == "gated-run"

    asyncio.run(scenario())


# The rest of the protocol.


def test_metadata_names_inputs_and_outputs_with_the_batch_first(tmp_path):
    async def scenario():
        async with serving(tmp_path, g0=[replica("s", "twice")]) as agent:
            server = await agent.inference.ServerMetadata(pb.ServerMetadataRequest())
            assert (server.name, server.version) == ("foreplan-agent", (await agent.state()).version)
            model = await agent.inference.ModelMetadata(pb.ModelMetadataRequest(name="s"))
            assert [(one.name, one.datatype, list(one.shape)) for one in model.inputs] == [("x", "FP32", [-1, 4])]
            assert [(one.name, one.datatype, list(one.shape)) for one in model.outputs] == [("y", "FP32", [-1, 4])]
            with refused(grpc.StatusCode.NOT_FOUND):
                await agent.inference.ModelMetadata(pb.ModelMetadataRequest(name="t"))

    asyncio.run(scenario())


def test_the_repository_is_what_the_plan_says(tmp_path):
    async def scenario():
        async with serving(tmp_path, g0=[replica("s", "twice")]) as agent:
            staging = asyncio.ensure_future(
                agent.stage(desired(2, g0=[replica("s", "twice")], g1=[replica("t", "gated-load")]))
            )
            await agent.until_phase("t", Phase.LOADING)
            index = await agent.inference.RepositoryIndex(pb.RepositoryIndexRequest())
            assert {(model.name, model.state) for model in index.models} == {("s", "READY"), ("t", "LOADING")}
            ready = await agent.inference.RepositoryIndex(pb.RepositoryIndexRequest(ready=True))
            assert [model.name for model in ready.models] == ["s"]

            async def is_ready(name):
                return (await agent.inference.ModelReady(pb.ModelReadyRequest(name=name))).ready

            assert [await is_ready(name) for name in "stu"] == [True, False, False]
            await agent.inference.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="s"))
            for name in "tu":
                with refused(grpc.StatusCode.FAILED_PRECONDITION, "foreplan apply"):
                    await agent.inference.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=name))
            with refused(grpc.StatusCode.FAILED_PRECONDITION, "foreplan apply"):
                await agent.inference.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="s"))
            assert (await agent.inference.ServerReady(pb.ServerReadyRequest())).ready
            (tmp_path / "load").touch()
            await staging

    asyncio.run(scenario())


def test_a_batch_that_fails_does_not_count_as_run(tmp_path):
    async def scenario():
        async with serving(tmp_path, g0=[replica("s", "twice"), replica("bad", "raises")]) as agent:
            for service in ("s", "bad"):
                await asyncio.gather(agent.infer(service), return_exceptions=True)
            found = await agent.inference.ModelStatistics(pb.ModelStatisticsRequest())
            runs = {
                one.name: (one.execution_count, one.inference_stats.compute_infer.count) for one in found.model_stats
            }
            assert runs == {"s": (1, 1), "bad": (0, 0)}
            assert {one.name: one.inference_stats.fail.count for one in found.model_stats} == {"s": 0, "bad": 1}

    asyncio.run(scenario())


def test_the_time_of_a_call_goes_before_the_services_deadline_in_streams_too(tmp_path):
    async def scenario():
        slow = replica("s", "twice", max_batch=1, deadline_s=1.0, batch_latency_s=(2.0,))
        async with serving(tmp_path, g0=[slow]) as agent:
            request = encode_request("s", {"x": np.ones((1, 4), np.float32)})
            for timeout_s, error in ((WAIT_S, ""), (None, "DEADLINE_EXCEEDED")):
                call = agent.inference.ModelStreamInfer(iter([request]), timeout=timeout_s)
                (answer,) = [one async for one in call]
                assert answer.error_message.split(":")[0] == error

    asyncio.run(scenario())


def test_the_server_is_not_ready_while_something_committed_does_not_serve(tmp_path):
    async def scenario():
        async with serving(tmp_path, g0=[replica("s", "dies-at-run")]) as agent:
            with refused(grpc.StatusCode.UNAVAILABLE):
                await agent.infer("s")
            assert not (await agent.inference.ServerReady(pb.ServerReadyRequest())).ready
            assert (await agent.inference.ServerLive(pb.ServerLiveRequest())).live

    asyncio.run(scenario())


def test_contents_that_cannot_be_run_are_not_decoded(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the contents were decoded")

    async def scenario():
        async with serving(tmp_path, g0=[replica("s", "twice")]) as agent:
            monkeypatch.setattr(agent_inference, "decode_inputs", refuse)
            for shape in ([5, 4], [1, 5]):
                request = pb.ModelInferRequest(model_name="s")
                tensor = request.inputs.add(name="x", datatype="FP32", shape=shape)
                tensor.contents.fp32_contents.extend([1.0] * (shape[0] * shape[1]))
                with refused(grpc.StatusCode.INVALID_ARGUMENT, "found"):
                    await agent.inference.ModelInfer(request, timeout=WAIT_S)

    asyncio.run(scenario())


def test_a_request_for_very_many_outputs_is_refused(tmp_path):
    async def scenario():
        async with serving(tmp_path, g0=[replica("s", "twice")]) as agent:
            request = encode_request("s", {"x": np.ones((1, 4), np.float32)}, outputs=["y"] * 65)
            with refused(grpc.StatusCode.INVALID_ARGUMENT, "at most 64"):
                await agent.inference.ModelInfer(request, timeout=WAIT_S)

    asyncio.run(scenario())
