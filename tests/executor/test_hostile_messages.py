"""Bytes that are no message, to every method of servers that run: each has a clear status, and does no harm."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from google.protobuf.descriptor import ServiceDescriptor
from grpc._cython import cygrpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from executor.proto import control_pb2, open_inference_pb2
from tests.executor.front_door import agents, door, request, table
from tests.executor.logged import errors_logged
from tests.executor.running_agent import desired, replica, running_agent

Code = grpc.StatusCode
INFERENCE = open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
AGENT = control_pb2.DESCRIPTOR.services_by_name["Agent"]
GATEWAY = control_pb2.DESCRIPTOR.services_by_name["Gateway"]
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
REFLECTION = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
NO_MESSAGE = b"\xff" * 10


def methods(*services: ServiceDescriptor) -> list[Any]:
    return [method for service in services for method in service.methods]


def hostile(seed: int, count: int) -> Iterator[bytes]:
    """Bytes of every kind: none, no message, and ever longer ones that now and then are one."""
    generator = np.random.default_rng(seed)
    yield from (NO_MESSAGE, b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\xff\xfe", b"")
    for _ in range(count):
        yield generator.integers(0, 256, size=int(generator.integers(1, 40)), dtype=np.uint8).tobytes()


async def ended(channel: grpc.aio.Channel, method: Any, data: bytes) -> Code:
    """Send ``data`` to ``method``; return how the call ended. A stream of answers without end is left after one."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    made = (
        (channel.stream_stream if method.client_streaming else channel.unary_stream)
        if method.server_streaming
        else channel.unary_unary
    )
    call = made(path, None, None)(*(() if method.client_streaming else (data,)), timeout=30)
    try:
        if method.client_streaming:
            await call.write(data)
            await call.done_writing()
        if not method.server_streaming:
            await call
            return Code.OK
        async for _ in call:
            if method.name == "Watch":
                call.cancel()
                return Code.OK
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass
    return await call.code()


async def assert_unharmed_by(channel: grpc.aio.Channel, found: list[Any]) -> None:
    for method in found:
        assert await ended(channel, method, NO_MESSAGE) is Code.INVALID_ARGUMENT, method.full_name
    for seed, method in enumerate(found):
        for data in hostile(seed, 25):
            code = await ended(channel, method, data)
            assert code not in (Code.UNKNOWN, Code.DEADLINE_EXCEEDED), (method.full_name, data, code)


def test_an_agent_answers_whatever_bytes_it_gets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with running_agent(tmp_path) as agent:
            await agent.apply(desired(1, g0=[replica("s")]))
            await assert_unharmed_by(agent.channel, methods(INFERENCE, AGENT, HEALTH, REFLECTION))
            assert (await agent.infer("s")).model_name == "s"

    asyncio.run(asyncio.wait_for(scenario(), 120))
    assert not errors_logged(caplog)


def test_a_gateway_answers_whatever_bytes_it_gets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with agents("a") as (a,), door(tmp_path) as front:
            await front.control.set_routes(table(a), timeout_s=5)
            found = [one for one in methods(INFERENCE, GATEWAY, HEALTH, REFLECTION) if one.name != "ModelStreamInfer"]
            await assert_unharmed_by(front.channel, found)
            await front.infer()

    asyncio.run(asyncio.wait_for(scenario(), 120))
    assert not errors_logged(caplog)


def test_requests_of_a_stream_before_bytes_that_are_none_get_their_answers(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_agent(tmp_path) as agent:
            await agent.apply(desired(1, g0=[replica("s")]))
            call = agent.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer", None, None)()
            await call.write(open_inference_pb2.ModelInferRequest(model_name="nobody").SerializeToString())
            await call.write(NO_MESSAGE)
            answer = open_inference_pb2.ModelStreamInferResponse.FromString(await call.read())
            assert answer.error_message.startswith("NOT_FOUND")
            assert await call.code() is Code.INVALID_ARGUMENT

    asyncio.run(asyncio.wait_for(scenario(), 120))


def test_in_a_stream_through_the_gateway_only_the_bytes_that_are_no_request_fail(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with door(tmp_path) as front:
            call = front.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer", None, None)()
            found = []
            for data in (NO_MESSAGE, request("nobody").SerializeToString()):
                await call.write(data)
                found.append(open_inference_pb2.ModelStreamInferResponse.FromString(await call.read()).error_message)
            await call.done_writing()
            assert [message.split(":")[0] for message in found] == ["INVALID_ARGUMENT", "NOT_FOUND"]
            assert await call.code() is Code.OK

    asyncio.run(asyncio.wait_for(scenario(), 120))


def test_an_answer_that_cannot_be_sent_since_its_client_is_gone_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("grpc._cython.cygrpc")
    for error in (cygrpc.ExecuteBatchError("Failed"), grpc.aio.InternalError("a bug"), ValueError("a bug")):
        try:
            raise error
        except (grpc.aio.InternalError, ValueError):
            log.exception("raised in core by servicer method")
    assert ["a bug" in (record.exc_text or "") for record in caplog.records if record.name == log.name] == [True, True]
