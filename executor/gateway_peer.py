"""One agent as the gateway sees it: a channel, the raw calls that are forwarded, and a watch over its health."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import cast

import grpc
import grpc.aio

from executor.control_client import AgentClient, channel_options
from executor.forwarding import CallFailed, ForwardLink, shared_bytes
from executor.infer_header import GROUP_METADATA, group_mark
from executor.logs import log_failure
from executor.routing import NodeView, view_of
from executor.state import AgentState, Backend
from executor.tls import Dialer
from executor.tracing import current_traceparent
from plans.errors import RemoteFailure

__all__ = ["INFERENCE", "Peer", "PeerTiming"]

INFERENCE = "inference.GRPCInferenceService"
_UP = grpc.ChannelConnectivity.READY
_LEAVE_S = 60.0
"""How long calls may go on over a channel that newer certificates have replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerTiming:
    """How closely an agent is watched: asked for its state every ``poll_interval_s``, awaited ``poll_timeout_s``.

    A process that dies is noticed at once, by its connection; a machine that hangs, after the sum of the two.
    """

    poll_interval_s: float = 0.25
    poll_timeout_s: float = 0.7


class _Line:
    """A channel and what is done over it."""

    def __init__(self, channel: grpc.aio.Channel, name: str, version: int, link: ForwardLink) -> None:
        self.channel = channel
        self.version = version
        self.agent = AgentClient(channel, name)
        self.link = link
        self.calls = {
            name: channel.unary_unary(f"/{INFERENCE}/{name}", None, None)
            for name in ("ModelInfer", "ModelMetadata", "ModelConfig", "ModelStatistics")
        }
        # A stream of one request: sent with its end at once, it cannot find the call over in between.
        self.stream = channel.unary_stream(f"/{INFERENCE}/ModelStreamInfer", None, None)

    async def close(self, grace_s: float) -> None:
        """Close the channel; calls in flight get ``grace_s`` seconds to end."""
        await self.link.close(grace_s)
        await self.channel.close(grace_s)


class Peer:
    """A channel to one agent. `start` begins the watch.

    Args:
        backend: The agent.
        timing: How closely it is watched.
        max_message_bytes: Largest message to and from it.
        dialer: Opens the channel, and again when certificates have changed.
        on_view: Told every answer to the watch, and every loss.
        on_wait: Told the expected wait of a group, seconds, with every answer.

    Attributes:
        backend: The agent.
        answers: Whether it answered when it was last asked for its state.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        timing: PeerTiming,
        max_message_bytes: int,
        dialer: Dialer,
        on_view: Callable[[Backend, NodeView], None],
        on_wait: Callable[[str, float], None],
    ) -> None:
        self.backend = backend
        self.answers = False
        self._timing = timing
        self._max_message_bytes = max_message_bytes
        self._shared_bytes = shared_bytes(max_message_bytes)
        self._dialer = dialer
        self._on_view = on_view
        self._on_wait = on_wait
        self._line = self._open()
        self._marks: dict[str, bytes] = {}
        self._wake = asyncio.Event()
        self._polls = 0
        self._answered = 0
        self._tasks: Sequence[asyncio.Task[None]] = ()
        self._leaving: set[asyncio.Task[None]] = set()

    def _open(self) -> _Line:
        version = self._dialer.version
        channel = self._dialer.open(self.backend.address, channel_options(self._max_message_bytes))
        link = ForwardLink(
            self.backend.address.rpartition(":")[0].strip("[]"),
            self._dialer.credentials,
            self._on_wait,
            max_message_bytes=self._max_message_bytes,
        )
        return _Line(channel, self.backend.address, version, link)

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
        await asyncio.gather(self._line.close(grace_s), *self._leaving)

    async def infer(self, request: bytes, group: str, timeout_s: float) -> bytes:
        """Send a serialised ``ModelInferRequest`` to ``group``; return the answer, with the group added.

        An answer that would be too large with it for a message goes without.

        Raises:
            CallFailed: The call ended with a status other than OK.
        """
        link = self._line.link
        if link.port and len(request) <= self._shared_bytes:
            answer = await link.send(request, group, timeout_s)
        else:
            answer = await self.call("ModelInfer", request, group, timeout_s)
        mark = self._marks.get(group)
        if mark is None:
            mark = self._marks[group] = group_mark(group)
        marked = answer + mark
        return marked if len(marked) <= self._max_message_bytes else answer

    async def stream(self, request: bytes, group: str, timeout_s: float) -> AsyncGenerator[bytes, None]:
        """Send a serialised ``ModelInferRequest`` to ``group``; yield each ``ModelStreamInferResponse`` to it.

        Raises:
            CallFailed: The call ended with a status other than OK.
        """
        call = self._line.stream(request, timeout=timeout_s, metadata=_metadata(group))
        try:
            answers = cast("AsyncGenerator[bytes, None]", aiter(call))
            async with contextlib.aclosing(answers):  # left open, it holds its last answer until a garbage collection
                async for answer in answers:
                    yield answer
        except grpc.aio.AioRpcError as error:
            raise CallFailed(error.code(), error.details() or "") from error
        finally:
            call.cancel()

    async def metadata(self, request: bytes, group: str, timeout_s: float) -> bytes:
        """Send a serialised ``ModelMetadataRequest``, as `infer` does."""
        return await self.call("ModelMetadata", request, group, timeout_s)

    async def config(self, request: bytes, group: str, timeout_s: float) -> bytes:
        """Send a serialised ``ModelConfigRequest``, as `infer` does."""
        return await self.call("ModelConfig", request, group, timeout_s)

    async def call(self, method: str, request: bytes, group: str, timeout_s: float) -> bytes:
        """Make a call of its own.

        Raises:
            CallFailed: It ended with a status other than OK.
        """
        try:
            answer: bytes = await self._line.calls[method](request, timeout=timeout_s, metadata=_metadata(group))
        except grpc.aio.AioRpcError as error:
            raise CallFailed(error.code(), error.details() or "") from error
        return answer

    async def poll(self) -> None:
        """Ask for the agent's state once, and report what came of it, unless a later question was answered first."""
        self._polls += 1
        turn = self._polls
        found: AgentState | None = None
        try:
            found = await self._line.agent.state(timeout_s=self._timing.poll_timeout_s)
            view = view_of(self.backend.node, found)
            self._line.link.port = found.forward_port
        except RemoteFailure as error:
            view = NodeView(problem=f"its agent gives no state: {error}", doubtful=_is_slow(error))
        if turn > self._answered:
            self._answered = turn
            self.answers = found is not None
            self._on_view(self.backend, view)

    def outdate(self) -> None:
        """Pass over the answers to questions that are under way: something newer is known of the agent."""
        self._answered = self._polls

    async def _poll_for_ever(self) -> None:
        while True:
            self._wake.clear()
            if self._line.version != self._dialer.version:
                self._replace_line()
            await self.poll()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timing.poll_interval_s):  # wait_for may lose a cancellation (3.11)
                    await self._wake.wait()

    def _replace_line(self) -> None:
        """Go on over a new channel, with the certificates of now; what is in flight ends on the old one."""
        old, self._line = self._line, self._open()
        task = asyncio.create_task(old.close(_LEAVE_S))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        task.add_done_callback(log_failure)

    async def _watch_connection(self) -> None:
        line = self._line
        state = line.channel.get_state(try_to_connect=True)
        while True:
            was_up = state is _UP
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await line.channel.wait_for_state_change(state)
            if line is not self._line:
                line = self._line
                state = line.channel.get_state(try_to_connect=True)
                continue
            state = line.channel.get_state(try_to_connect=True)
            if was_up and state is not _UP:
                self._on_view(self.backend, NodeView(problem=f"the connection to {self.backend.address} broke"))
            if state is _UP and not was_up:
                self._wake.set()


def _metadata(group: str) -> tuple[tuple[str, str], ...]:
    """Return what goes with a call: the group that shall serve it, and the span that it is made from, if any."""
    traceparent = current_traceparent()
    return ((GROUP_METADATA, group), ("traceparent", traceparent)) if traceparent else ((GROUP_METADATA, group),)


_LOOK_S = 5.0
"""How often the watch over a connection looks whether there is a newer channel."""


def _is_slow(error: RemoteFailure) -> bool:
    cause = error.__cause__
    return isinstance(cause, grpc.aio.AioRpcError) and cause.code() is grpc.StatusCode.DEADLINE_EXCEEDED
