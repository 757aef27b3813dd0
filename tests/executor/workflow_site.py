"""Agents (workers of the fake runtime) and a gateway in this process, for tests of workflows."""

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
from executor.control_client import channel_options
from executor.controller import ApplyTimeouts, apply, status
from executor.gateway import GatewayConfig, running_gateway
from executor.proto import open_inference_pb2 as pb
from executor.proto import open_inference_pb2_grpc
from executor.roles import Role
from executor.tensors import decode_outputs, encode_request
from executor.tls import Dialer
from plans.cluster import Cluster
from plans.plan import Plan
from plans.service import Workflow
from tests.executor.authority import Authority
from tests.executor.placements import placement
from tests.executor.running_agent import WAIT_S, agent_config, worker_processes

DOUBLE = "fake-double"
ROW = np.array([[1.0, 2.0, 3.0, 4.0]], dtype=np.float32)


def workflow(*edges: Mapping[str, Any], **changed: Any) -> Workflow:
    return Workflow.model_validate({"name": "flow", "slo": {"deadline": "60s"}, "edges": edges} | changed)


def handing_on(source: str, target: str, **changed: Any) -> dict[str, Any]:
    """An edge that hands the fake models' output on as their input."""
    return {"from": source, "to": target, "inputs": {"x": "y"}} | changed


CHAIN_EDGES = (handing_on("first", "then"), handing_on("then", "last"))


def plan(flow: Workflow, groups: Mapping[str, Mapping[str, str]], **changed: Any) -> Plan:
    return placement(groups, deadline_s=60.0, **changed).model_copy(update={"workflows": (flow,)})


@dataclass(frozen=True)
class Agent:
    """A running agent."""

    port: int
    stop: asyncio.Event
    served: asyncio.Task[None]

    async def end(self) -> None:
        self.stop.set()
        await asyncio.wait_for(asyncio.shield(self.served), WAIT_S)


class Site:
    """Agents of some nodes and a gateway."""

    def __init__(self, agents: Mapping[str, Agent], gateway: str, channel: grpc.aio.Channel, operator: Dialer) -> None:
        self._addresses = {node: f"127.0.0.1:{agent.port}" for node, agent in agents.items()}
        self.agents = agents
        self.gateway = gateway
        self.inference: Any = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        self._operator = operator

    @property
    def cluster(self) -> Cluster:
        """All agents, with those that have joined."""
        return Cluster.model_validate(
            {
                "gpu_types": {"cpu": {"memory": "1GiB"}},
                "nodes": [
                    {"name": node, "address": address, "gpus": {"type": "cpu", "count": 4}}
                    for node, address in self._addresses.items()
                ],
            }
        )

    def join(self, **addresses: str) -> None:
        """Let agents join, of nodes, that listen elsewhere."""
        self._addresses |= addresses

    async def apply(self, wanted: Plan) -> None:
        """Apply a plan, whatever was there before."""
        there = {"cluster": self.cluster, "gateways": [self.gateway], "dialer": self._operator}
        found = await status(**there)
        await apply(wanted, **there, prior=found.live, timeouts=ApplyTimeouts(converge_s=20.0))

    async def ask(
        self,
        timeout_s: float = WAIT_S,
        outputs: tuple[str, ...] = (),
        parameters: Mapping[str, Any] | None = None,
        name: str = "flow",
        **tensors: Any,
    ) -> pb.ModelInferResponse:
        """Ask for the workflow; ``first__x`` is the input ``x`` of ``first``."""
        arrays = {key.replace("__", "."): np.asarray(array, np.float32) for key, array in tensors.items()}
        request = encode_request(name, arrays, parameters=parameters, outputs=outputs)
        return await self.inference.ModelInfer(request, timeout=timeout_s)

    async def outputs(self, **asked: Any) -> dict[str, list[Any]]:
        return {name: array.tolist() for name, array in decode_outputs(await self.ask(**asked)).items()}

    async def failure(self, **asked: Any) -> tuple[str, str]:
        """Return status and details of a request that fails."""
        try:
            await self.ask(**asked)
        except grpc.aio.AioRpcError as error:
            return error.code().name, error.details() or ""
        raise AssertionError("it was answered")


@contextlib.asynccontextmanager
async def _serving(folder: Path, node: str, tls: Any) -> AsyncIterator[Agent]:
    stop = asyncio.Event()
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    config = agent_config(folder, node=node, device_count=4, memory_bytes=2**30, spare_worker=False, tls=tls)
    served = asyncio.create_task(serve_agent(config, on_ready=port.set_result, stop=stop))
    try:
        await asyncio.wait({served, port}, timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
        yield Agent(port.result(), stop, served)
    finally:
        stop.set()
        await asyncio.wait_for(served, WAIT_S)


def on_site(
    folder: Path,
    scenario: Callable[[Site], Awaitable[None]],
    *,
    nodes: str = "ab",
    certificates: bool = False,
) -> None:
    """Run ``scenario`` on agents of ``nodes``, with certificates or in the clear."""
    authority = Authority.made(folder / "ca") if certificates else None

    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            agents = {}
            for node in nodes:
                tls = authority.issue(Role.AGENT, node) if authority else None
                agents[node] = await stack.enter_async_context(_serving(folder / node, node, tls))
            config = GatewayConfig(
                listen="127.0.0.1:0",
                state_dir=folder / "gateway",
                tls=authority.issue(Role.GATEWAY) if authority else None,
            )
            address = await stack.enter_async_context(running_gateway(config))
            operator = authority.dialer(Role.OPERATOR) if authority else Dialer()
            channel = await stack.enter_async_context(operator.open(address, channel_options(2**26)))
            await scenario(Site(agents, address, channel, operator))

    asyncio.run(asyncio.wait_for(run(), WAIT_S))
    assert worker_processes() == []
