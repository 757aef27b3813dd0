"""Sending the requests of one process at their times, and noting what came back."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from executor.gateway_peer import INFERENCE
from executor.infer_header import STREAM_PARAMETER, AnswerHeader, read_answer_header
from executor.latency_histogram import LatencyHistogram
from executor.load_requests import parameter_field
from executor.load_tokens import TokenLoad, stream_answer, token_fields
from executor.workflow import POSITION_PARAMETER
from plans.errors import InvalidInput

__all__ = ["SHORTEST_S", "LoadProgress", "LoadRun", "Schedule"]

_NOTHING = AnswerHeader(batch_size=None, run_s=None, variant=None, group=None)
_TICK_S = 0.2
_SPIN_S = 0.0005
SHORTEST_S = 0.001
"""The length of a run that was stopped before it began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What to send when.

    Attributes:
        due_s: Shape (request,): when each is due, seconds from the start of the run, not falling.
        deadline_s: Shape (request,): the time that each has from then.
        body: Shape (request,): which of the bodies each sends.
        duration_s: Length of the run, at least.
        tokens: What requests ask of services that generate; None without any.
        position: Shape (request,): numbers requests for workflows, so that agents draw what the evaluator draws; -1 on
            all others. None without any.
        stream: Shape (request,): numbers the stream of which each is a frame; 0 on all others. None without any.
    """

    due_s: NDArray[np.float64]
    deadline_s: NDArray[np.float64]
    body: NDArray[np.int64]
    duration_s: float
    tokens: TokenLoad | None = None
    position: NDArray[np.int64] | None = None
    stream: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.due_s)

    def turns(self, count: int) -> NDArray[np.int64]:
        """Return which of ``count`` senders sends each request: they take turns, and one sends all of a stream."""
        turn = np.arange(len(self)) % count
        if self.stream is None:
            return turn
        _, rank = np.unique(self.stream, return_inverse=True)
        return np.where(self.stream != 0, rank % count, turn)

    def part(self, rows: NDArray[np.int64]) -> Schedule:
        """Return the requests ``rows`` alone."""
        return Schedule(
            due_s=self.due_s[rows],
            deadline_s=self.deadline_s[rows],
            body=self.body[rows],
            duration_s=self.duration_s,
            tokens=self.tokens.part(rows) if self.tokens else None,
            position=None if self.position is None else self.position[rows],
            stream=None if self.stream is None else self.stream[rows],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """How far a run is: requests ended, of how many, how many of them in time, and the latencies of those answered."""

    done: int
    total: int
    good: int
    latency: LatencyHistogram


class LoadRun:
    """One process's part of a replay.

    Args:
        schedule: What to send when.
        bodies: Serialised requests; those for tokens without any.
        channels: To the gateway, taken in turn; a stream keeps to one.
        on_progress: Told now and then how far it is.
    """

    def __init__(
        self,
        schedule: Schedule,
        bodies: Sequence[bytes],
        channels: Sequence[grpc.aio.Channel],
        on_progress: Callable[[LoadProgress], None] = lambda _: None,
    ) -> None:
        count = len(schedule)
        self._schedule = schedule
        self._bodies = bodies
        self._turns = schedule.turns(len(channels)).tolist()
        self._send = [channel.unary_unary(f"/{INFERENCE}/ModelInfer", None, None) for channel in channels]
        self._stream = [channel.unary_stream(f"/{INFERENCE}/ModelStreamInfer", None, None) for channel in channels]
        self._on_progress = on_progress
        self._ttft_s = np.full(count, math.nan)
        self._tpot_s = np.full(count, math.nan)
        self._sent_s = np.full(count, math.nan)
        self._from_s = np.full(count, math.nan)
        self._ended_s = np.full(count, math.nan)
        self._status: list[str] = [""] * count
        self._headers: list[AnswerHeader] = [_NOTHING] * count
        self._latency = LatencyHistogram()
        self._done = self._good = 0
        self._start_s = 0.0
        self._sending: asyncio.Task[None] | None = None
        self._is_stopped = False

    async def replay(self, start_s: float | None = None) -> float:
        """Send everything, wait for every end or for `stop`, and return the length of the run in seconds.

        Args:
            start_s: When the run starts, on the clock of ``time.monotonic``; now when left out.
        """
        self._start_s = time.monotonic() if start_s is None else start_s
        ticker = asyncio.create_task(self._tick())
        self._sending = asyncio.create_task(self._send_all())
        try:
            await self._sending
        except asyncio.CancelledError:
            if not self._is_stopped:
                raise
        finally:
            ticker.cancel()
        self._on_progress(self._progress())
        return max(SHORTEST_S, time.monotonic() - self._start_s)

    def stop(self) -> None:
        """End the run: nothing more is sent, and what is under way is given up and keeps no end."""
        if self._sending is not None:
            self._is_stopped = True
            self._sending.cancel()

    async def _send_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for position, due_s in enumerate(self._schedule.due_s.tolist()):
                wait_s = self._start_s + due_s - time.monotonic()
                if wait_s > _SPIN_S:
                    await asyncio.sleep(wait_s)
                elif position % 64 == 0:
                    await asyncio.sleep(0)  # behind schedule: answers must still be read
                group.create_task(self._one(position))
            await asyncio.sleep(self._start_s + self._schedule.duration_s - time.monotonic())

    def frame(self) -> pd.DataFrame:
        """Return what became of each request, in their order.

        Columns: sent_s and ended_s (seconds from the start; of a run that was stopped, NaN for what was not sent and
        had no end), latency_s (from when it was due, or was sent if that was a moment before), status (name of the
        gRPC status, empty without an end), batch_size, run_s, variant and group (of the answer, missing without one),
        ttft_s (from the same moment) and tpot_s (NaN where no tokens were streamed).
        """
        return pd.DataFrame(
            {
                "sent_s": self._sent_s,
                "ended_s": self._ended_s,
                "latency_s": self._ended_s - self._from_s,
                "status": self._status,
                "batch_size": np.array([header.batch_size for header in self._headers], dtype=np.float64),
                "run_s": np.array([header.run_s for header in self._headers], dtype=np.float64),
                "variant": pd.Series([header.variant for header in self._headers], dtype="str"),
                "group": pd.Series([header.group for header in self._headers], dtype="str"),
                "ttft_s": self._ttft_s,
                "tpot_s": self._tpot_s,
            }
        )

    async def _one(self, position: int) -> None:
        schedule = self._schedule
        due_s, deadline_s = schedule.due_s[position], schedule.deadline_s[position]
        sent_s = time.monotonic() - self._start_s
        self._sent_s[position] = sent_s
        self._from_s[position] = min(due_s, sent_s)  # timers may ring a moment early
        tokens = schedule.tokens
        streams = tokens is not None and tokens.output_tokens[position] > 0
        if streams:
            await self._generate(position)
        else:
            await self._infer(position, max(0.0, due_s + deadline_s - sent_s))
        ended_s = time.monotonic() - self._start_s
        self._ended_s[position] = ended_s
        self._done += 1
        if self._status[position] == "OK":
            latency_s = float(ended_s - self._from_s[position])
            self._latency.add(latency_s)
            self._good += self._tokens_in_time(position) if streams else latency_s <= deadline_s

    async def _infer(self, position: int, timeout_s: float) -> None:
        """Send one request and note its answer."""
        try:
            send = self._send[self._turns[position]]
            answer = await send(self._body(position), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            self._status[position] = error.code().name
        else:
            try:
                self._headers[position] = read_answer_header(answer)
                self._status[position] = "OK"
            except InvalidInput:
                self._status[position] = grpc.StatusCode.INTERNAL.name  # what a client makes of a broken answer

    def _body(self, position: int) -> bytes:
        schedule = self._schedule
        body: bytes = self._bodies[schedule.body[position]]
        if schedule.position is not None and schedule.position[position] >= 0:
            body += parameter_field(POSITION_PARAMETER, int(schedule.position[position]))
        if schedule.stream is not None and schedule.stream[position]:
            body += parameter_field(STREAM_PARAMETER, int(schedule.stream[position]))
        return body

    async def _generate(self, position: int) -> None:
        """Send one request for tokens and note when they came."""
        schedule, tokens = self._schedule, self._schedule.tokens
        assert tokens is not None
        fields = token_fields(int(tokens.input_tokens[position]), int(tokens.output_tokens[position]), position)
        send = self._stream[self._turns[position]]
        body = self._bodies[schedule.body[position]] + fields
        answer = await stream_answer(send, body, float(schedule.deadline_s[position]))
        self._status[position] = answer.status
        self._headers[position] = answer.header or _NOTHING
        if answer.header is not None:
            self._ttft_s[position] = answer.first_s - self._start_s - self._from_s[position]
            self._tpot_s[position] = answer.tpot_s

    def _tokens_in_time(self, position: int) -> bool:
        tokens = self._schedule.tokens
        assert tokens is not None
        first = self._ttft_s[position] <= tokens.ttft_s[position]
        return bool(first and self._tpot_s[position] <= tokens.tpot_s[position])

    def _progress(self) -> LoadProgress:
        return LoadProgress(done=self._done, total=len(self._schedule), good=self._good, latency=self._latency)

    async def _tick(self) -> None:
        while True:
            self._on_progress(self._progress())
            await asyncio.sleep(_TICK_S)
