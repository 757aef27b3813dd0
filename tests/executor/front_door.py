"""A gateway that runs in the test, agents for it, and the stubs to call it: for tests of the front door."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio
import pytest

from executor.control_client import GatewayClient
from executor.gateway import GatewayConfig, running_gateway
from executor.proto import open_inference_pb2 as inference
from executor.proto import open_inference_pb2_grpc as inference_grpc
from executor.state import Backend, GatewayState, ReplicaKey, RoutingTable, ServiceRoutes, Target
from tests.executor.fake_agent import FakeAgent

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
