"""Replicas that generate, on a real agent with workers of the fake runtime (which counts on from the last token)."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pandas as pd
import pytest

from executor.control_client import GatewayClient
from executor.errors import ReplicaUnavailable
from executor.gateway import GatewayConfig, running_gateway
from executor.load import LoadOptions, replay
from executor.proto import open_inference_pb2 as pb
from executor.proto import open_inference_pb2_grpc
from executor.state import Backend, GenerationRules, Phase, RoutingTable, ServiceRoutes, Target
from executor.tensors import decode_outputs, encode_request, parameter
from executor.token_inference import streamed_tokens
from plans.errors import InvalidInput
from plans.service import GenerationSlo, Services
from tests.executor.running_agent import (
    WAIT_S,
    AgentClient,
    desired,
    eventually,
    replica,
    running_agent,
    worker_processes,
)
from traces.table import RequestTrace


def run(test: Callable[..., Any]) -> Callable[..., None]:
    @functools.wraps(test)
    def run_test(*arguments: Any, **named: Any) -> None:
        asyncio.run(test(*arguments, **named))

    return run_test


def chat(**changed: Any) -> Any:
    """A replica with memory for 50 tokens (10 bytes each) and two sequences at a time."""
    rules = {"ttft_s": 20.0, "tpot_s": 1.0, "kv_bytes": 500} | changed
    return replica("chat", "fake-count", max_batch=2, generation=GenerationRules(**rules))


def asked(prompt: list[int] | None = None, request_id: str = "", **parameters: Any) -> pb.ModelInferRequest:
    inputs = {} if prompt is None else {"input_ids": np.array([prompt], dtype=np.int64)}
    return encode_request("chat", inputs, request_id=request_id, parameters=parameters)


def tokens_of(answer: pb.ModelInferResponse) -> list[int]:
    return decode_outputs(answer)["output_ids"].ravel().tolist()


async def whole(agent: AgentClient, prompt: list[int] | None = None, **parameters: Any) -> pb.ModelInferResponse:
    return await agent.inference.ModelInfer(asked(prompt, **parameters), timeout=WAIT_S)


@run
async def test_many_sequences_at_once_each_get_their_own_tokens(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as agent:
        await agent.apply(desired(1, g0=[chat()]))
        answers = await asyncio.gather(*(whole(agent, [start] * 5, max_tokens=10) for start in range(20)))
        assert [tokens_of(answer) for answer in answers] == [list(range(s + 1, s + 11)) for s in range(20)]
        state = await agent.replica("chat")
        assert state is not None
        assert (state.completed, state.failed, state.dropped, state.queued, state.running) == (20, 0, 0, 0, 0)
        assert state.batches < 200  # iterations were shared


@run
async def test_memory_that_runs_out_preempts_and_every_answer_is_whole(tmp_path: Path) -> None:
    """Two prompts of 20 fit into 50 tokens; with 15 more each they do not, so the later one is computed again."""
    async with running_agent(tmp_path) as agent:
        await agent.apply(desired(1, g0=[chat()]))
        answers = await asyncio.gather(*(whole(agent, [start] * 20, max_tokens=15) for start in (1, 2)))
        assert [tokens_of(answer) for answer in answers] == [list(range(2, 17)), list(range(3, 18))]


@run
async def test_an_answer_tells_its_times_and_ends_at_a_stop_token(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as agent:
        await agent.apply(desired(1, g0=[chat()]))
        stopped = await whole(agent, [96], max_tokens=10)
        on = await whole(agent, [96], max_tokens=10, ignore_eos=True)
        counted = await whole(agent, input_tokens=4, max_tokens=2)
    assert tokens_of(stopped) == [97, 98, 99]
    assert tokens_of(on) == [97, 98, 99, *range(7)]
    assert len(tokens_of(counted)) == 2
    told = {name: parameter(stopped.parameters, name) for name in stopped.parameters}
    assert (told["finish_reason"], told["input_tokens"], told["output_tokens"]) == ("stop", 1, 3)
    assert 0 <= told["queue_s"] <= told["ttft_s"]
    assert told["tpot_s"] > 0
    assert parameter(on.parameters, "finish_reason") == "length"


WRONG = (
    (asked(), "input_ids"),
    (asked([100]), "tokens from 0 to 99"),
    (asked([1], max_tokens=0), "max_tokens"),
    (asked([1], max_tokens=True), "max_tokens"),
    (asked([1], ignore_eos="yes"), "ignore_eos"),
    (asked([1], ignore_eos=1), "ignore_eos"),
    (asked([1] * 30, max_tokens=21), "at most 50"),
    (asked([1] * 60, max_tokens=5), "at most 64"),
    (asked(input_tokens=2**40), "at most 64"),
    (encode_request("chat", {"input_ids": np.zeros((2, 3), np.int64)}), "[1, tokens]"),
    (encode_request("chat", {"input_ids": np.zeros(3, np.float32)}), "integers"),
    (encode_request("chat", {"x": np.zeros(3, np.int64)}), "input_ids"),
)


@run
async def test_what_the_model_does_not_take_is_refused(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as agent:
        await agent.apply(desired(1, g0=[chat()]))
        for request, said in WRONG:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await agent.inference.ModelInfer(request, timeout=WAIT_S)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert said in (refused.value.details() or "")


@run
async def test_a_first_token_that_cannot_come_in_time_is_dropped(tmp_path: Path) -> None:
    """By the plan a prefill of 10 tokens takes 100 s, of a single one 1 s, and the first token may take 20 s."""
    async with running_agent(tmp_path) as agent:
        await agent.apply(desired(1, g0=[chat(prefill_tokens=(1.0, 10.0), prefill_s=(1.0, 100.0))]))
        assert tokens_of(await whole(agent, [1], max_tokens=1)) == [2]
        with pytest.raises(grpc.aio.AioRpcError) as dropped:
            await whole(agent, [1] * 10, max_tokens=1)
        assert dropped.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        state = await agent.replica("chat")
        assert state is not None
        assert (state.completed, state.dropped) == (1, 1)


@run
async def test_sequences_and_batches_share_a_group(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as agent:
        await agent.apply(desired(1, g0=[chat(), replica("double")]))
        found = await asyncio.gather(
            *(whole(agent, [start], max_tokens=20) for start in range(4)), *(agent.infer("double") for _ in range(20))
        )
        assert [tokens_of(answer) for answer in found[:4]] == [list(range(s + 1, s + 21)) for s in range(4)]
        assert all(len(answer.raw_output_contents[0]) == 16 for answer in found[4:])


@run
async def test_a_stream_gives_token_by_token_and_errors_by_request(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as agent:
        await agent.apply(desired(1, g0=[chat(), replica("double")]))
        answered = [await agent.inference.ModelConfig(pb.ModelConfigRequest(name=name)) for name in ("chat", "double")]
        told = [(one.config.max_batch_size, one.config.model_transaction_policy.decoupled) for one in answered]
        assert told == [(0, True), (4, False)]
        double = encode_request("double", {"x": np.ones((1, 4), np.float32)}, request_id="d")
        call = agent.inference.ModelStreamInfer(timeout=WAIT_S)
        for one in (asked([5], "a", max_tokens=3), asked([50], "b", max_tokens=2), asked([100], "c"), double):
            await call.write(one)
        await call.done_writing()
        answers = [answer async for answer in call]
    found = {name: [one for one in answers if one.infer_response.id == name] for name in "abcd"}
    assert [tokens_of(one.infer_response) for one in found["a"]] == [[6], [7], [8]]
    assert [tokens_of(one.infer_response) for one in found["b"]] == [[51], [52]]
    assert [len(found["c"]), len(found["d"])] == [1, 1]
    assert "INVALID_ARGUMENT" in found["c"][0].error_message
    for mine in found.values():
        finals = [parameter(one.infer_response.parameters, "triton_final_response") for one in mine]
        assert finals == [False] * (len(mine) - 1) + [True]
    assert parameter(found["a"][-1].infer_response.parameters, "output_tokens") == 3


@run
async def test_a_client_that_leaves_frees_its_sequence(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as agent:
        await agent.apply(desired(1, g0=[chat(), replica("slow", "fake-slow-20")]))
        call = agent.inference.ModelStreamInfer(timeout=WAIT_S)
        await call.write(asked([1], max_tokens=60 - 20))
        slow = [asyncio.ensure_future(agent.infer("slow")) for _ in range(3)]  # so that it does not end at once
        call.cancel()
        await asyncio.gather(*slow)

        async def is_idle() -> bool:
            state = await agent.replica("chat")
            return state is not None and state.queued == state.running == 0

        await eventually(is_idle)
        assert tokens_of(await whole(agent, [1] * 40, max_tokens=10)) == list(range(2, 12))  # all of the memory


@run
async def test_a_lost_worker_fails_its_sequences_and_the_next_one_serves(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as agent:
        await agent.apply(desired(1, g0=[chat()]))
        assert tokens_of(await whole(agent, [1], max_tokens=2)) == [2, 3]
        going = [asyncio.ensure_future(whole(agent, [start], max_tokens=49)) for start in range(9)]
        await eventually(lambda: _batches(agent, 2))
        for process in worker_processes():
            process.kill()
        ended = await asyncio.gather(*going, return_exceptions=True)
        lost = [error for error in ended if isinstance(error, grpc.aio.AioRpcError)]
        assert lost
        assert {error.code() for error in lost} == {grpc.StatusCode.UNAVAILABLE}
        await agent.until_phase("chat", Phase.SERVING)
        assert tokens_of(await whole(agent, [1], max_tokens=2)) == [2, 3]


async def _batches(agent: AgentClient, least: int) -> bool:
    state = await agent.replica("chat")
    return state is not None and state.batches > least


@run
async def test_new_limits_hold_for_what_waits_and_runs(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as agent:
        await agent.apply(desired(1, g0=[chat(kv_bytes=200)]))
        with pytest.raises(grpc.aio.AioRpcError):
            await whole(agent, [1] * 30, max_tokens=10)
        going = [asyncio.ensure_future(whole(agent, [start], max_tokens=15)) for start in range(10)]
        await agent.apply(desired(2, g0=[chat(kv_bytes=600)]))
        assert tokens_of(await whole(agent, [1] * 40, max_tokens=10)) == list(range(2, 12))
        assert [tokens_of(one) for one in await asyncio.gather(*going)] == [
            list(range(s + 1, s + 16)) for s in range(10)
        ]


SERVICES = Services.model_validate(
    {
        "services": [
            {
                "name": "chat",
                "class": "generation",
                "slo": {"ttft": "20s", "tpot": "5s"},
                "variants": [{"model": "fake-count"}],
            },
            {"name": "double", "slo": {"deadline": "20s"}, "variants": [{"model": "fake-double"}]},
        ]
    }
)


@contextlib.asynccontextmanager
async def through_a_gateway(folder: Path, agent: AgentClient, groups: tuple[str, ...] = ("node-a/0",)) -> Any:
    """Yield the address of a gateway that routes both services to these groups of the agent."""
    async with running_gateway(GatewayConfig(listen="127.0.0.1:0", state_dir=folder, grace_s=0.0)) as address:
        targets = tuple(
            Target(group=group, node="node-a", weight=1 / len(groups), variant="fake-count") for group in groups
        )
        double = Target(group="node-a/0", node="node-a", weight=1.0, variant="fake-double")
        table = RoutingTable(
            generation=1,
            placement_digest="d",
            backends=(Backend(node="node-a", address=f"127.0.0.1:{agent.port}"),),
            services=(
                ServiceRoutes(service="chat", deadline_s=0.001, targets=targets, first_token_s=20.0),
                ServiceRoutes(service="double", deadline_s=20.0, targets=(double,)),
            ),
        )
        async with grpc.aio.insecure_channel(address) as channel:
            await GatewayClient(channel, address).set_routes(table, timeout_s=5)
            stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)

            async def is_ready() -> bool:
                return bool((await stub.ModelReady(pb.ModelReadyRequest(name="chat"))).ready)

            await eventually(is_ready)
            yield address, stub


@run
async def test_a_replay_asks_for_the_tokens_of_its_trace_and_judges_by_ttft_and_tpot(tmp_path: Path) -> None:
    """The deadline of the whole answer, here 1 ms, cuts no answer short and judges none."""
    rows = pd.DataFrame(
        {
            "arrival_s": np.arange(12) * 0.005,
            "service": ["chat", "chat", "double"] * 4,
            "input_tokens": [10, 45, np.nan] * 4,
            "output_tokens": [30, 40, np.nan] * 4,
        }
    )
    async with running_agent(tmp_path / "a") as agent:
        await agent.apply(desired(1, g0=[chat(), replica("double")]))
        async with through_a_gateway(tmp_path / "g", agent) as (address, _):
            for processes in (1, 2):
                result = await replay(RequestTrace(rows), address, SERVICES, LoadOptions(processes=processes))
                frame = result.requests
                assert list(frame["outcome"]) == ["good", "failed", "good"] * 4  # 85 tokens never fit
                assert list(frame["status"]) == ["OK", "INVALID_ARGUMENT", "OK"] * 4
                served = frame[frame["outcome"] == "good"]
                assert (served["ttft_s"].notna() == (served["service"] == "chat")).all()
                chats = served[served["service"] == "chat"]
                assert (chats["ttft_s"] + 29 * chats["tpot_s"] <= chats["latency_s"] + 0.001).all()
                assert set(chats["group"]) == {"node-a/0"}
    strict = SERVICES.model_copy(
        update={
            "services": (
                SERVICES.services[0].model_copy(update={"slo": GenerationSlo(ttft_s=20.0, tpot_s=1e-9)}),
                SERVICES.services[1],
            )
        }
    )
    async with running_agent(tmp_path / "b") as agent:
        await agent.apply(desired(1, g0=[chat(), replica("double")]))
        async with through_a_gateway(tmp_path / "h", agent) as (address, _):
            result = await replay(RequestTrace(rows), address, strict)
            assert list(result.requests["outcome"]) == ["late", "failed", "good"] * 4
            whole = Services.model_validate(
                {
                    "services": [
                        {"name": "chat", "slo": {"deadline": "1s"}, "variants": [{"model": "fake-count"}]},
                        {"name": "double", "slo": {"deadline": "1s"}, "variants": [{"model": "fake-double"}]},
                    ]
                }
            )
            with pytest.raises(InvalidInput, match="chat: found a deadline, expected ttft and tpot: it generates"):
                await replay(RequestTrace(rows), address, whole)


@run
async def test_a_stream_without_an_answer_yet_goes_to_a_second_replica(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    async def unavailable_once(server: Any, key: Any, *rest: Any) -> Any:
        tried.append(key.group)
        if len(tried) == 1:
            raise ReplicaUnavailable("for this once")
        async for answer in streamed_tokens(server, key, *rest):
            yield answer

    monkeypatch.setattr("executor.agent_inference.streamed_tokens", unavailable_once)
    groups = ("node-a/0", "node-a/1")
    async with running_agent(tmp_path / "a") as agent:
        await agent.apply(desired(1, g0=[chat()], g1=[chat()]))
        async with through_a_gateway(tmp_path / "g", agent, groups) as (_, stub):
            call = stub.ModelStreamInfer(timeout=WAIT_S)
            await call.write(asked([1], max_tokens=3))
            await call.done_writing()
            answers = [answer.infer_response async for answer in call]
    assert [tokens_of(answer) for answer in answers] == [[2], [3], [4]]
    assert sorted(tried) == list(groups)
    assert {parameter(answer.parameters, "group") for answer in answers} == {tried[1]}


@run
async def test_a_stream_tells_of_services_that_are_not_here_and_goes_on(tmp_path: Path) -> None:
    async with running_agent(tmp_path / "a") as agent:
        await agent.apply(desired(1, g0=[chat()]))
        async with through_a_gateway(tmp_path / "g", agent) as (_, stub):
            call = stub.ModelStreamInfer(timeout=WAIT_S)
            await call.write(encode_request("nobody", {}, request_id="n"))
            first = await call.read()
            await call.write(asked([1], "c", max_tokens=1))
            second = await call.read()
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
    assert "NOT_FOUND" in first.error_message
    assert (first.infer_response.id, second.infer_response.id) == ("n", "c")
    assert tokens_of(second.infer_response) == [2]
