"""One agent as the gateway sees it: a channel, the raw calls that are forwarded, and a watch over its health."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

from executor.control_client import AgentClient, channel_options
from executor.infer_header import GROUP_METADATA, group_mark
from executor.logs import log_failure
from executor.routing import NodeView, view_of
from executor.state import Backend
from plans.errors import RemoteFailure

__all__ = ["INFERENCE", "Peer", "PeerTiming"]

INFERENCE = "inference.GRPCInferenceService"
_UP = grpc.ChannelConnectivity.READY


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerTiming:
    """How closely an agent is watched: asked for its state every ``poll_interval_s``, awaited ``poll_timeout_s``.

    A process that dies is noticed at once, by its connection; a machine that hangs, after the sum of the two.
    """

    poll_interval_s: float = 0.25
    poll_timeout_s: float = 0.7


class Peer:
    """A channel to one agent. `start` begins the watch, which reports every answer and every loss to ``on_view``."""

    def __init__(
        self,
        backend: Backend,
        *,
        timing: PeerTiming,
        max_message_bytes: int,
        on_view: Callable[[Backend, NodeView], None],
    ) -> None:
        self.backend = backend
        self._timing = timing
        self._on_view = on_view
        self._channel = grpc.aio.insecure_channel(backend.address, options=channel_options(max_message_bytes))
        self._agent = AgentClient(self._channel, backend.address)
        self._infer = self._channel.unary_unary(f"/{INFERENCE}/ModelInfer", bytes, bytes)
        self._metadata = self._channel.unary_unary(f"/{INFERENCE}/ModelMetadata", bytes, bytes)
        self._wake = asyncio.Event()
        self._polls = 0
        self._answered = 0
        self._tasks: Sequence[asyncio.Task[None]] = ()

    def start(self) -> None:
        """Begin to watch."""
        self._tasks = (
            asyncio.create_task(self._watch_connection(), name=f"connection of {self.backend.node}"),
            asyncio.create_task(self._poll_for_ever(), name=f"state of {self.backend.node}"),
        )
        for task in self._tasks:
            task.add_done_callback(log_failure)

    async def close(self, grace_s: float) -> None:
        """Stop watching; calls in flight get ``grace_s`` seconds to end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close(grace_s)

    async def infer(self, request: bytes, group: str, timeout_s: float) -> bytes:
        """Send a serialised ``ModelInferRequest`` to ``group``; return the answer, with the group added.

        Raises:
            grpc.aio.AioRpcError: The call ended with a status other than OK.
        """
        answer: bytes = await self._infer(request, timeout=timeout_s, metadata=((GROUP_METADATA, group),))
        return answer + group_mark(group)

    async def metadata(self, request: bytes, group: str, timeout_s: float) -> bytes:
        """Send a serialised ``ModelMetadataRequest``, as `infer` does."""
        answer: bytes = await self._metadata(request, timeout=timeout_s, metadata=((GROUP_METADATA, group),))
        return answer

    async def poll(self) -> None:
        """Ask for the agent's state once, and report what came of it, unless a later question was answered first."""
        self._polls += 1
        turn = self._polls
        try:
            state = await self._agent.state(timeout_s=self._timing.poll_timeout_s)
            view = view_of(self.backend.node, state)
        except RemoteFailure as error:
            view = NodeView(problem=f"its agent gives no state: {error}", doubtful=_is_slow(error))
        if turn > self._answered:
            self._answered = turn
            self._on_view(self.backend, view)

    async def _poll_for_ever(self) -> None:
        while True:
            self._wake.clear()
            await self.poll()
            try:
                await asyncio.wait_for(self._wake.wait(), self._timing.poll_interval_s)
            except TimeoutError:
                continue

    async def _watch_connection(self) -> None:
        state = self._channel.get_state(try_to_connect=True)
        while True:
            was_up = state is _UP
            await self._channel.wait_for_state_change(state)
            state = self._channel.get_state(try_to_connect=True)
            if was_up and state is not _UP:
                self._on_view(self.backend, NodeView(problem=f"the connection to {self.backend.address} broke"))
            if state is _UP:
                self._wake.set()


def _is_slow(error: RemoteFailure) -> bool:
    cause = error.__cause__
    return isinstance(cause, grpc.aio.AioRpcError) and cause.code() is grpc.StatusCode.DEADLINE_EXCEEDED
