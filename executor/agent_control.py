"""The agent's control plane: a controller's calls, and the state of the node."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

import grpc
import grpc.aio
import psutil

from executor.control_client import LEASE_METADATA
from executor.device_memory import DeviceReading, DeviceWatch, device_readings
from executor.errors import details_of, status_of
from executor.lease import Lease
from executor.node import Node
from executor.proto import control_pb2 as pb
from executor.proto import control_pb2_grpc as pb_grpc
from executor.state import AgentState
from executor.wire import agent_state_to_proto, desired_state_from_proto, faults_to_proto, stage_response_to_proto
from plans.errors import ForeplanError, InvalidInput

__all__ = ["AgentServicer", "resident_bytes"]

Context = grpc.aio.ServicerContext[Any, Any]
_Answer = TypeVar("_Answer")

_LONGEST_LEASE_S = 600.0


class AgentServicer(pb_grpc.AgentServicer):
    """Answers controllers and gateways for one node.

    Args:
        node: The node.
        version: Of Foreplan.
        forward_port: Returns where gateways hand over requests; 0 for nowhere.
        clock: The time in seconds.
    """

    def __init__(
        self,
        node: Node,
        *,
        version: str,
        forward_port: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node = node
        self._version = version
        self._clock = clock
        self._forward_port = forward_port
        self._lease = Lease()
        settings = node.settings
        ask = functools.partial(device_readings, settings.worker.device, settings.device_count)
        self._devices = DeviceWatch(ask, clock=clock)

    async def GetState(self, request: pb.GetStateRequest, context: Context) -> pb.AgentState:  # noqa: N802
        """What the node runs now."""
        return agent_state_to_proto(await self.state(with_desired=request.with_desired))

    async def Validate(self, request: pb.DesiredState, context: Context) -> pb.ValidateResponse:  # noqa: N802
        """Every reason why the node cannot run the state; nothing is changed."""
        try:
            desired = desired_state_from_proto(request)
            faults = await self._node.faults_of(desired)
            return faults_to_proto(faults, () if faults else self._node.would_wait(desired))
        except InvalidInput as error:
            return faults_to_proto(error.faults)

    async def Stage(self, request: pb.DesiredState, context: Context) -> pb.StageResponse:  # noqa: N802
        """Load the state beside what runs."""

        async def stage() -> pb.StageResponse:
            return stage_response_to_proto(await self._node.stage(desired_state_from_proto(request)))

        return await self._changed(context, stage())

    async def Commit(self, request: pb.GenerationRequest, context: Context) -> pb.GenerationResponse:  # noqa: N802
        """Let what is staged serve."""
        return await self._changed(context, self._moved(self._node.commit, request))

    async def Finish(self, request: pb.GenerationRequest, context: Context) -> pb.GenerationResponse:  # noqa: N802
        """Drain and unload what left the plan, then load what had to wait."""
        return await self._changed(context, self._moved(self._node.finish, request))

    async def Abort(self, request: pb.GenerationRequest, context: Context) -> pb.GenerationResponse:  # noqa: N802
        """Drop what is staged."""
        return await self._changed(context, self._moved(self._node.abort, request))

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:  # noqa: N802
        """Take the node out of the rotation, or back into it."""

        async def drain() -> pb.DrainResponse:
            await self._node.drain(request.drained)
            return pb.DrainResponse(drained=request.drained)

        return await self._changed(context, drain())

    async def Lease(self, request: pb.LeaseRequest, context: Context) -> pb.LeaseResponse:  # noqa: N802
        """Let one controller change the node, for a while."""
        if not request.holder or not 0 <= request.ttl_s <= _LONGEST_LEASE_S:
            problem = f"a holder, and a time of 0 to {_LONGEST_LEASE_S:g} s"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
        now_s = self._clock()
        granted = self._lease.ask(request.holder, request.ttl_s, now_s)
        return pb.LeaseResponse(
            granted=granted, holder=self._lease.holder(now_s), remaining_s=self._lease.remaining_s(now_s)
        )

    async def _moved(
        self, move: Callable[[int, str], Awaitable[int]], request: pb.GenerationRequest
    ) -> pb.GenerationResponse:
        return pb.GenerationResponse(generation=await move(request.generation, request.placement_digest))

    async def _changed(self, context: Context, change: Coroutine[Any, Any, _Answer]) -> _Answer:
        """Make a change, for the holder of the lease only, and tell of errors by their status."""
        try:
            self._lease.check(_caller(context), self._clock())
        except ForeplanError as error:
            change.close()
            return await context.abort(status_of(error), details_of(error))
        try:
            return await change
        except ForeplanError as error:
            return await context.abort(status_of(error), details_of(error))

    async def state(self, *, with_desired: bool = False) -> AgentState:
        """Return the state of the node."""
        devices = await self._devices.readings()
        node = self._node
        workers = [group.process_id for group in node.upkeep.groups.values()]
        return AgentState(
            node=node.settings.node,
            version=self._version,
            generation=node.generation,
            placement_digest=node.committed.placement_digest if node.committed else "",
            staged_generation=node.staged.generation if node.staged else 0,
            replicas=node.states(),
            device=node.settings.worker.device,
            device_count=node.settings.device_count,
            resident_bytes=resident_bytes([os.getpid(), *(worker for worker in workers if worker is not None)]),
            ready=node.ready,
            drained=node.drained,
            leased_to=self._lease.holder(self._clock()),
            device_used_bytes=tuple(reading.used_bytes for reading in devices),
            forward_port=self._forward_port(),
            committed=node.committed if with_desired else None,
            staged=node.staged if with_desired else None,
            underway=node.committed.underway if node.committed else False,
        )

    async def devices(self) -> tuple[DeviceReading, ...]:
        """Return what the node's devices say."""
        return await self._devices.readings()


def resident_bytes(processes: Iterable[int]) -> int:
    """Return the resident memory of ``processes`` together; one that is gone counts nothing."""
    total = 0
    for process in processes:
        try:
            total += psutil.Process(process).memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def _caller(context: Context) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == LEASE_METADATA:
            return value if isinstance(value, str) else value.decode(errors="replace")
    return ""
