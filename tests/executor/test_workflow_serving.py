"""Workflows over real agents (workers of the fake runtime) and a real gateway on loopback."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np

from executor.agent import serve_agent
from executor.controller import ApplyTimeouts, apply
from executor.gateway import GatewayConfig, running_gateway
from executor.proto import open_inference_pb2 as pb
from executor.proto import open_inference_pb2_grpc
from executor.tensors import decode_outputs, encode_request
from plans.cluster import Cluster
from plans.plan import Plan
from plans.service import Workflow
from tests.executor.placements import placement
from tests.executor.running_agent import WAIT_S, agent_config, worker_processes

ROW = np.array([[1.0, 2.0, 3.0, 4.0]], dtype=np.float32)
DOUBLE = "fake-double"


def workflow(*edges: dict[str, Any], **changed: Any) -> Workflow:
    return Workflow.model_validate({"name": "flow", "slo": {"deadline": "10s"}, "edges": edges} | changed)


def handing_on(source: str, target: str, **changed: Any) -> dict[str, Any]:
    return {"from": source, "to": target, "inputs": {"x": "y"}} | changed


def plan(flow: Workflow, groups: Mapping[str, Mapping[str, str]], **changed: Any) -> Plan:
    return placement(groups, **changed).model_copy(update={"workflows": (flow,)})


@dataclass(frozen=True)
class Agent:
    """A running agent."""

    port: int
    stop: asyncio.Event
    served: asyncio.Task[None]


class Site:
    """Agents of nodes ``a`` and ``b`` and a gateway."""

    def __init__(self, agents: Mapping[str, Agent], gateway: str, channel: grpc.aio.Channel) -> None:
        self.cluster = Cluster.model_validate(
            {
                "gpu_types": {"cpu": {"memory": "1GiB"}},
                "nodes": [
                    {"name": node, "address": f"127.0.0.1:{agent.port}", "gpus": {"type": "cpu", "count": 4}}
                    for node, agent in agents.items()
                ],
            }
        )
        self.agents = agents
        self.gateway = gateway
        self.inference: Any = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)

    async def apply(self, wanted: Plan, **changed: Any) -> None:
        await apply(wanted, self.cluster, [self.gateway], timeouts=ApplyTimeouts(converge_s=20.0), **changed)

    async def ask(self, timeout_s: float = WAIT_S, outputs: Any = (), **tensors: Any) -> pb.ModelInferResponse:
        parameters = tensors.pop("parameters", {})
        arrays = {name.replace("__", "."): np.asarray(array, np.float32) for name, array in tensors.items()}
        request = encode_request("flow", arrays, parameters=parameters, outputs=outputs)
        return await self.inference.ModelInfer(request, timeout=timeout_s)

    async def outputs(self, **tensors: Any) -> dict[str, list[Any]]:
        answer = await self.ask(**tensors)
        return {name: array.tolist() for name, array in decode_outputs(answer).items()}


@contextlib.asynccontextmanager
async def serving(folder: Path, node: str) -> AsyncIterator[Agent]:
    """Run the agent of ``node`` inside the block, or until it is stopped before."""
    stop = asyncio.Event()
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    config = agent_config(folder, node=node, device_count=4, memory_bytes=2**30, spare_worker=False)
    served = asyncio.create_task(serve_agent(config, on_ready=port.set_result, stop=stop))
    try:
        await asyncio.wait({served, port}, timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
        yield Agent(port.result(), stop, served)
    finally:
        stop.set()
        await asyncio.wait_for(served, WAIT_S)


@contextlib.asynccontextmanager
async def running_site(folder: Path, nodes: str = "ab") -> AsyncIterator[Site]:
    async with contextlib.AsyncExitStack() as stack:
        agents = {node: await stack.enter_async_context(serving(folder / node, node)) for node in nodes}
        config = GatewayConfig(listen="127.0.0.1:0", state_dir=folder / "gateway")
        address = await stack.enter_async_context(running_gateway(config))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        yield Site(agents, address, channel)
    assert worker_processes() == []


def on_site(folder: Path, scenario: Callable[[Site], Awaitable[None]]) -> None:
    async def run() -> None:
        async with running_site(folder) as site:
            await scenario(site)

    asyncio.run(run())


def test_a_chain_runs_over_two_agents_and_answers_with_the_outputs_of_its_end(tmp_path: Path) -> None:
    flow = workflow(handing_on("first", "then"), handing_on("then", "last"))

    async def scenario(site: Site) -> None:
        await site.apply(plan(flow, {"a/0": {"first": DOUBLE, "last": DOUBLE}, "b/0": {"then": DOUBLE}}))
        assert await site.outputs(first__x=ROW) == {"last.y": (8 * ROW).tolist()}
        assert await site.outputs(x=2 * ROW) == {"last.y": (16 * ROW).tolist()}

    on_site(tmp_path, scenario)
