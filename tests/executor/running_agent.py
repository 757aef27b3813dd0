"""An agent in this process with workers of the fake runtime, and the calls that tests make on it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import psutil
import pytest

from executor import wire
from executor.agent import AgentConfig, serve_agent
from executor.proto import control_pb2, control_pb2_grpc, open_inference_pb2_grpc
from executor.state import AgentState, DesiredGroup, DesiredReplica, DesiredState, Phase, ReplicaState
from executor.tensors import encode_request

FAKE = "tests.executor.fake_runtime:FakeRuntime"
SCRIPTED = "tests.executor.scripted_runtime:ScriptedRuntime"
WAIT_S = 120.0
"""How long anything may take before a test fails."""


def agent_config(state_dir: Path, **changed: Any) -> AgentConfig:
    settings: dict[str, Any] = {
        "node": "node-a",
        "address": "127.0.0.1:0",
        "device_count": 2,
        "memory_bytes": 1000,
        "state_dir": state_dir,
        "runtime": FAKE,
        "drain_s": 5.0,
    }
    return AgentConfig(**(settings | changed))


def replica(service: str, variant: str = "fake-double", *, max_batch: int = 4, **changed: Any) -> DesiredReplica:
    settings: dict[str, Any] = {
        "service": service,
        "variant": variant,
        "max_batch": max_batch,
        "deadline_s": 10.0,
        "batch_latency_s": (0.001,) * max_batch,
        "memory_bytes": (100,),
    }
    return DesiredReplica(**(settings | changed))


def desired(generation: int, **groups: list[DesiredReplica]) -> DesiredState:
    """``desired(1, g0=[...])`` runs replicas on device 0 of node-a."""
    return DesiredState(
        generation=generation,
        placement_digest=f"sha256:{generation}",
        node="node-a",
        groups=tuple(
            DesiredGroup(id=f"node-a/{name[1:]}", gpus=(int(name[1:]),), replicas=tuple(replicas))
            for name, replicas in groups.items()
        ),
    )


def named(generation: int) -> control_pb2.GenerationRequest:
    """What `desired` makes of ``generation``."""
    return control_pb2.GenerationRequest(generation=generation, placement_digest=f"sha256:{generation}")


class AgentClient:
    """Calls on an agent."""

    def __init__(self, port: int, channel: grpc.aio.Channel) -> None:
        self.port = port
        self.channel = channel
        self.control: Any = control_pb2_grpc.AgentStub(channel)
        self.inference: Any = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)

    async def state(self) -> AgentState:
        return wire.agent_state_from_proto(await self.control.GetState(control_pb2.GetStateRequest(), timeout=WAIT_S))

    async def replica(self, service: str, group: str | None = None) -> ReplicaState | None:
        for state in (await self.state()).replicas:
            if state.key.service == service and group in (None, state.key.group):
                return state
        return None

    async def stage(self, state: DesiredState) -> Any:
        return wire.stage_response_from_proto(
            await self.control.Stage(wire.desired_state_to_proto(state), timeout=WAIT_S)
        )

    async def commit(self, generation: int) -> None:
        await self.control.Commit(named(generation), timeout=WAIT_S)

    async def finish(self, generation: int) -> None:
        await self.control.Finish(named(generation), timeout=WAIT_S)

    async def abort(self, generation: int) -> None:
        await self.control.Abort(named(generation), timeout=WAIT_S)

    async def apply(self, state: DesiredState) -> None:
        await self.stage(state)
        await self.commit(state.generation)
        await self.finish(state.generation)

    def infer(
        self,
        service: str,
        values: Any = (1.0, 2.0, 3.0, 4.0),
        *,
        group: str | None = None,
        timeout_s: float | None = WAIT_S,
        **parameters: Any,
    ) -> Any:
        array = np.atleast_2d(np.asarray(values, dtype=np.float32))
        request = encode_request(service, {"x": array}, parameters=parameters)
        metadata = (("foreplan-group", group),) if group else ()
        return self.inference.ModelInfer(request, timeout=timeout_s, metadata=metadata)

    async def until_phase(self, service: str, phase: Phase, group: str | None = None) -> ReplicaState:
        async def reached() -> ReplicaState | None:
            state = await self.replica(service, group)
            return state if state is not None and state.phase is phase else None

        return await eventually(reached)


@contextlib.asynccontextmanager
async def running_agent(state_dir: Path, **changed: Any) -> AsyncIterator[AgentClient]:
    """Run an agent in this process; at the end it has stopped and left no process behind."""
    stop = asyncio.Event()
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    served = asyncio.create_task(serve_agent(agent_config(state_dir, **changed), on_ready=port.set_result, stop=stop))
    try:
        await asyncio.wait({served, port}, timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
        if served.done():
            served.result()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port.result()}") as channel:
            yield AgentClient(port.result(), channel)
    finally:
        stop.set()
        await asyncio.wait_for(served, WAIT_S)
    assert worker_processes() == []


def worker_processes(of: int | None = None) -> list[psutil.Process]:
    """Return the worker processes that ``of`` (default: this process) has started and that still run."""
    found = []
    for child in psutil.Process(of).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE and "executor.worker" in child.cmdline():
                found.append(child)
    return found


async def eventually(condition: Callable[[], Any]) -> Any:
    """Ask ``condition`` again and again until its answer is true, and return that; fail after `WAIT_S`."""
    end_s = time.monotonic() + WAIT_S
    while time.monotonic() < end_s:
        answer = condition()
        if asyncio.iscoroutine(answer):
            answer = await answer
        if answer:
            return answer
        await asyncio.sleep(0.005)
    raise AssertionError(f"did not come about within {WAIT_S} s")


def scripted(folder: Path, **changed: Any) -> contextlib.AbstractAsyncContextManager[AgentClient]:
    """An agent whose models are those of the scripted runtime; it obeys files in ``folder``."""
    return running_agent(folder / "state", runtime=SCRIPTED, model_dir=folder, **changed)


@contextlib.contextmanager
def refused(code: grpc.StatusCode, says: str = "") -> Iterator[None]:
    """Expect a call that ends with ``code`` and details that hold ``says``."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield
    details = caught.value.details() or ""
    assert caught.value.code() is code, details
    assert says in details
