"""Streams through a gateway: what its clients are told, and how requests of theirs are counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import pytest

from executor.proto import open_inference_pb2 as inference
from executor.stream_inference import FINAL, error_response
from tests.executor.fake_agent import FakeAgent
from tests.executor.front_door import Door, agents, door, request, run, table
from tests.executor.running_agent import eventually
from tests.executor.test_metrics import scraped
from tests.free_port import free_port

Code = grpc.StatusCode
NO_MESSAGE = b"\xff"
Answers = Callable[[asyncio.Event], AsyncIterator[inference.ModelStreamInferResponse]]


def through(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    answers: Answers,
    client: Callable[[Door, asyncio.Event], Awaitable[None]],
) -> Coroutine[Any, Any, dict[str, float]]:
    """Have agents answer every stream with ``answers``, let ``client`` act, and return how requests were counted.

    Both are given an event, for the client to let the agents go on.
    """

    async def scenario() -> dict[str, float]:
        go_on = asyncio.Event()

        async def stream(_: FakeAgent, requests: Any, context: Any) -> AsyncIterator[bytes]:
            async for _ in requests:
                async for answer in answers(go_on):
                    yield answer.SerializeToString()

        monkeypatch.setattr(FakeAgent, "_stream", stream)
        metrics = f"127.0.0.1:{free_port()}"
        async with agents("a", "b") as (a, b), door(folder, metrics=metrics) as front:
            await front.control.set_routes(table(a, b), timeout_s=5)
            await client(front, go_on)

            async def ended() -> dict[str, float]:
                found = await scraped(metrics)
                name = "executor_gateway_requests_total"
                return {dict(labels)["code"]: count for (key, labels), count in found.items() if key == name}

            found: dict[str, float] = await eventually(ended)
            return found

    return scenario()


def token(*, is_last: bool = False) -> inference.ModelStreamInferResponse:
    answer = inference.ModelInferResponse(model_name="chat", id="7")
    answer.parameters[FINAL].bool_param = is_last
    return inference.ModelStreamInferResponse(infer_response=answer)


async def asked(front: Door, *_: object) -> list[inference.ModelStreamInferResponse]:
    call = front.inference.ModelStreamInfer(timeout=60)
    await call.write(request())
    await call.done_writing()
    return [answer async for answer in call]


def test_a_later_stage_that_is_unavailable_is_told_as_without_a_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    async def answers(_: asyncio.Event) -> AsyncIterator[inference.ModelStreamInferResponse]:
        tried.append(1)
        yield error_response("7", "chat", Code.ABORTED, "workflow 'chat': stage 'last': gone")

    async def client(front: Door, _: asyncio.Event) -> None:
        (answer,) = await asked(front)
        assert answer.error_message == "UNAVAILABLE: workflow 'chat': stage 'last': gone"
        assert answer.infer_response.parameters["status"].string_param == "UNAVAILABLE"
        assert answer.infer_response.parameters[FINAL].bool_param
        assert answer.infer_response.id == "7"

    async def scenario() -> None:
        assert await through(tmp_path, monkeypatch, answers, client) == {"UNAVAILABLE": 1}
        assert len(tried) == 1  # the first stage is not to blame

    run(scenario())


def test_a_client_that_leaves_in_the_middle_is_no_request_that_ended_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answers(go_on: asyncio.Event) -> AsyncIterator[inference.ModelStreamInferResponse]:
        yield token()
        await go_on.wait()

    async def client(front: Door, _: asyncio.Event) -> None:
        call = front.inference.ModelStreamInfer(timeout=60)
        await call.write(request())
        await call.read()
        call.cancel()

    async def scenario() -> None:
        assert await through(tmp_path, monkeypatch, answers, client) == {"CANCELLED": 1}

    run(scenario())


def test_one_that_leaves_after_the_last_answer_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def answers(go_on: asyncio.Event) -> AsyncIterator[inference.ModelStreamInferResponse]:
        yield token()
        yield token(is_last=True)
        await go_on.wait()

    async def client(front: Door, _: asyncio.Event) -> None:
        call = front.inference.ModelStreamInfer(timeout=60)
        await call.write(request())
        for _ in range(2):
            await call.read()
        call.cancel()

    async def scenario() -> None:
        assert await through(tmp_path, monkeypatch, answers, client) == {"OK": 1}

    run(scenario())


def test_an_agent_that_ends_its_stream_without_an_answer_leaves_no_request_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answers(_: asyncio.Event) -> AsyncIterator[inference.ModelStreamInferResponse]:
        return
        yield token()

    async def client(front: Door, _: asyncio.Event) -> None:
        (answer,) = await asked(front)
        assert answer.error_message.startswith("INTERNAL: ")
        assert "without an answer" in answer.error_message

    async def scenario() -> None:
        assert await through(tmp_path, monkeypatch, answers, client) == {"INTERNAL": 1}

    run(scenario())


def test_what_becomes_of_a_call_after_the_last_answer_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answers(_: asyncio.Event) -> AsyncIterator[inference.ModelStreamInferResponse]:
        yield token(is_last=True)
        raise ValueError("the agent fails after its answer")

    async def client(front: Door, _: asyncio.Event) -> None:
        (answer,) = await asked(front)
        assert not answer.error_message

    async def scenario() -> None:
        assert await through(tmp_path, monkeypatch, answers, client) == {"OK": 1}

    run(scenario())


def test_an_agent_whose_answer_cannot_be_read_fails_this_request_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stream(_: FakeAgent, requests: Any, context: Any) -> AsyncIterator[bytes]:
        async for asked in requests:
            is_bad = inference.ModelInferRequest.FromString(asked).raw_input_contents == [b"bad"]
            yield NO_MESSAGE if is_bad else token(is_last=True).SerializeToString()

    monkeypatch.setattr(FakeAgent, "_stream", stream)

    async def scenario() -> None:
        async with agents("a") as (a,), door(tmp_path) as front:
            await front.control.set_routes(table(a), timeout_s=5)
            call = front.inference.ModelStreamInfer(timeout=60)
            found = []
            for data in (b"bad", b"good"):
                await call.write(request(data=data))
                found.append(await call.read())
            await call.done_writing()
            assert [answer.error_message.split(":")[0] for answer in found] == ["INTERNAL", ""]
            assert found[0].infer_response.parameters[FINAL].bool_param
            assert found[0].infer_response.id == "7"
            assert await call.code() is Code.OK

    run(scenario())
