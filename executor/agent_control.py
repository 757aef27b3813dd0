"""The agent's control plane: a controller's calls, and the state of the node."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import grpc.aio
import psutil

from executor.errors import details_of, status_of
from executor.node import Node
from executor.proto import control_pb2 as pb
from executor.proto import control_pb2_grpc as pb_grpc
from executor.state import AgentState
from executor.wire import agent_state_to_proto, desired_state_from_proto, faults_to_proto, stage_response_to_proto
from plans.errors import ForeplanError, InvalidInput

__all__ = ["AgentServicer", "resident_bytes"]

Context = grpc.aio.ServicerContext[Any, Any]


class AgentServicer(pb_grpc.AgentServicer):
    """Answers controllers and gateways for one node.

    Args:
        node: The node.
        version: Of Foreplan.
    """

    def __init__(self, node: Node, *, version: str) -> None:
        self._node = node
        self._version = version

    async def GetState(self, request: pb.GetStateRequest, context: Context) -> pb.AgentState:  # noqa: N802
        """What the node runs now."""
        return agent_state_to_proto(self.state())

    async def Validate(self, request: pb.DesiredState, context: Context) -> pb.ValidateResponse:  # noqa: N802
        """Every reason why the node cannot run the state; nothing is changed."""
        try:
            return faults_to_proto(await self._node.faults_of(desired_state_from_proto(request)))
        except InvalidInput as error:
            return faults_to_proto(error.faults)

    async def Stage(self, request: pb.DesiredState, context: Context) -> pb.StageResponse:  # noqa: N802
        """Load the state beside what runs."""
        try:
            return stage_response_to_proto(await self._node.stage(desired_state_from_proto(request)))
        except ForeplanError as error:
            return await context.abort(status_of(error), details_of(error))

    async def Commit(self, request: pb.GenerationRequest, context: Context) -> pb.GenerationResponse:  # noqa: N802
        """Let what is staged serve."""
        try:
            return pb.GenerationResponse(
                generation=await self._node.commit(request.generation, request.placement_digest)
            )
        except ForeplanError as error:
            return await context.abort(status_of(error), details_of(error))

    async def Finish(self, request: pb.GenerationRequest, context: Context) -> pb.GenerationResponse:  # noqa: N802
        """Drain and unload what left the plan, then load what had to wait."""
        try:
            return pb.GenerationResponse(
                generation=await self._node.finish(request.generation, request.placement_digest)
            )
        except ForeplanError as error:
            return await context.abort(status_of(error), details_of(error))

    async def Abort(self, request: pb.GenerationRequest, context: Context) -> pb.GenerationResponse:  # noqa: N802
        """Drop what is staged."""
        try:
            return pb.GenerationResponse(
                generation=await self._node.abort(request.generation, request.placement_digest)
            )
        except ForeplanError as error:
            return await context.abort(status_of(error), details_of(error))

    def state(self) -> AgentState:
        """Return the state of the node."""
        node = self._node
        workers = [group.process_id for group in node.upkeep.groups.values()]
        return AgentState(
            node=node.settings.node,
            version=self._version,
            generation=node.generation,
            placement_digest=node.committed.placement_digest if node.committed else "",
            staged_generation=node.staged.generation if node.staged else 0,
            replicas=node.upkeep.states(),
            device=node.settings.worker.device,
            device_count=node.settings.device_count,
            resident_bytes=resident_bytes([os.getpid(), *(worker for worker in workers if worker is not None)]),
            ready=node.ready,
        )


def resident_bytes(processes: Iterable[int]) -> int:
    """Return the resident memory of ``processes`` together; one that is gone counts nothing."""
    total = 0
    for process in processes:
        try:
            total += psutil.Process(process).memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total
