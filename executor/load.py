"""Replays a request trace against a live gateway, open loop.

Every request is sent at its time, whatever became of the earlier ones, and its latency counts from that time, so a slow
system cannot slow its own load down. Each request ends as exactly one of good, late, dropped and failed.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from executor.control_client import channel_options
from executor.gateway_peer import INFERENCE
from executor.infer_header import AnswerHeader, read_answer_header
from executor.load_requests import Arrays, build_requests
from plans.errors import Fault, InvalidInput
from plans.service import Services
from plans.units import format_seconds
from traces.outcomes import RunSummary, nearest_rank, summarise
from traces.table import RequestTrace

__all__ = ["LoadOptions", "LoadResult", "replay"]

_DROPPED = {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED}
_NOTHING = AnswerHeader(batch_size=None, run_s=None, variant=None, group=None)
_TICK_S = 0.2
_MAX_LAG_RATIO = 0.05
"""Send lag at the 99th percentile, as a share of the shortest deadline, above which a run warns about itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How to replay.

    Attributes:
        speed: Trace seconds per second; 2 doubles every rate. Deadlines stay as they are.
        connections: Connections to the gateway, taken in turn.
        payloads: Input arrays by service and tensor name, in place of seeded random ones.
        seed: Of the random inputs.
        gpus: GPUs that the system under test holds, for GPU-hours.
        max_message_bytes: Largest request and answer.
        on_progress: Told now and then how many requests have ended, and of how many.
    """

    speed: float = 1.0
    connections: int = 1
    payloads: Mapping[str, Arrays] = field(default_factory=dict)
    seed: int = 0
    gpus: int = 0
    max_message_bytes: int = 64 * 2**20
    on_progress: Callable[[int, int], None] = lambda _, __: None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """What became of the requests.

    Attributes:
        requests: One row per request, in the order of the trace: service, scheduled_s and sent_s (from the start of the
            run), latency_s (from ``scheduled_s``; NaN for what was neither good nor late), outcome, status (name of the
            gRPC status), batch_size, run_s (of the batch), variant, accuracy, group. It is an outcome frame as in
            `traces.outcomes`.
        summary: Counts and percentiles.
        send_lag_p99_s: 99th percentile of ``sent_s - scheduled_s``.
        warnings: What makes the figures less than they should be.
    """

    requests: pd.DataFrame
    summary: RunSummary
    send_lag_p99_s: float
    warnings: tuple[str, ...]


async def replay(
    trace: RequestTrace, gateway: str, services: Services, options: LoadOptions | None = None
) -> LoadResult:
    """Send the requests of ``trace`` to ``gateway`` at their times, and wait for all of them to end.

    A gateway that dies in the middle gives failed requests, and the run goes on.

    Args:
        trace: What to send.
        gateway: ``host:port``.
        services: Their deadlines and the accuracy of their variants.
        options: How to send it.

    Raises:
        InvalidInput: The trace names a service that ``services`` does not, it is empty, or an option is out of range.
        RemoteFailure: The gateway cannot be reached at the start.
    """
    how = options or LoadOptions()
    _check(trace, services, how)
    options_of_channel = channel_options(how.max_message_bytes)
    channels = [grpc.aio.insecure_channel(gateway, options=options_of_channel) for _ in range(how.connections)]
    try:
        requests = await build_requests(channels[0], gateway, trace.services, payloads=how.payloads, seed=how.seed)
        run = _Run(trace, _deadlines_s(trace, services), requests, channels, how)
        wall_s = await run.replay()
    finally:
        await asyncio.gather(*(channel.close(None) for channel in channels))
    return _result(run, wall_s, services, how)


class _Run:
    """One replay: what is to be sent, and what came back, by the position of the request in the trace."""

    def __init__(
        self,
        trace: RequestTrace,
        deadline_s: NDArray[np.float64],
        requests: Mapping[str, bytes],
        channels: list[grpc.aio.Channel],
        how: LoadOptions,
    ) -> None:
        count = len(trace)
        self.trace = trace
        self.scheduled_s = trace.arrival_s / how.speed
        self.deadline_s = deadline_s
        self.sent_s = np.full(count, math.nan)
        self.ended_s = np.full(count, math.nan)
        self.status: list[str] = [""] * count
        self.headers: list[AnswerHeader] = [_NOTHING] * count
        self._bodies = [requests[service] for service in trace.services]
        self._send = [channel.unary_unary(f"/{INFERENCE}/ModelInfer", bytes, bytes) for channel in channels]
        self._duration_s = trace.duration_s / how.speed
        self._on_progress = how.on_progress
        self._ended = 0
        self._start_s = 0.0
        self._clock = asyncio.get_running_loop().time

    async def replay(self) -> float:
        """Send everything, wait for every end, and return the length of the run in seconds."""
        self._start_s = self._clock()
        ticker = asyncio.create_task(self._tick())
        try:
            async with asyncio.TaskGroup() as group:
                for position, due_s in enumerate(self.scheduled_s):
                    wait_s = self._start_s + due_s - self._clock()
                    if wait_s > 0:
                        await asyncio.sleep(wait_s)
                    elif position % 64 == 0:
                        await asyncio.sleep(0)  # behind schedule: answers must still be read
                    group.create_task(self._one(position))
                await asyncio.sleep(self._start_s + self._duration_s - self._clock())
        finally:
            ticker.cancel()
        self._on_progress(self._ended, len(self.trace))
        return self._clock() - self._start_s

    async def _one(self, position: int) -> None:
        sent_s = self._clock() - self._start_s
        self.sent_s[position] = sent_s
        remaining_s = self.scheduled_s[position] + self.deadline_s[position] - sent_s
        send = self._send[position % len(self._send)]
        try:
            answer = await send(self._bodies[self.trace.codes[position]], timeout=max(0.0, remaining_s))
        except grpc.aio.AioRpcError as error:
            self.status[position] = error.code().name
        else:
            try:
                self.headers[position] = read_answer_header(answer)
                self.status[position] = "OK"
            except InvalidInput:
                self.status[position] = grpc.StatusCode.INTERNAL.name  # what a client makes of a broken answer
        self.ended_s[position] = self._clock() - self._start_s
        self._ended += 1

    async def _tick(self) -> None:
        while True:
            self._on_progress(self._ended, len(self.trace))
            await asyncio.sleep(_TICK_S)


def _check(trace: RequestTrace, services: Services, how: LoadOptions) -> None:
    known = {service.name for service in services.services}
    faults = [
        Fault(where="trace", field="service", found=repr(name), expected=f"one of {', '.join(sorted(known))}")
        for name in trace.services
        if name not in known
    ]
    if not len(trace):
        faults.append(Fault(where="trace", found="no requests", expected="at least one"))
    if not (math.isfinite(how.speed) and how.speed > 0):
        faults.append(Fault(where="--speed", found=str(how.speed), expected="a number above 0"))
    if how.connections < 1:
        faults.append(Fault(where="--connections", found=str(how.connections), expected="at least 1"))
    if faults:
        raise InvalidInput(faults)


def _deadlines_s(trace: RequestTrace, services: Services) -> NDArray[np.float64]:
    """Return the time that each request has from its arrival, shape (request,), seconds."""
    tokens = trace.numbers("output_tokens")
    by_code = [services.service(name) for name in trace.services]
    return np.array(
        [
            by_code[code].deadline_s(None if math.isnan(count) else count)
            for code, count in zip(trace.codes, tokens, strict=True)
        ]
    )


def _result(run: _Run, wall_s: float, services: Services, how: LoadOptions) -> LoadResult:
    frame = _frame(run, services)
    lag_s = np.sort(run.sent_s - run.scheduled_s)
    lag_p99_s = nearest_rank(lag_s, 99) or 0.0
    shortest_s = float(run.deadline_s.min())
    warnings: tuple[str, ...] = ()
    if lag_p99_s > _MAX_LAG_RATIO * shortest_s:
        warnings = (
            f"the load client itself fell behind: 1 % of the requests left more than {format_seconds(lag_p99_s)} late, "
            f"against a deadline of {format_seconds(shortest_s)}; lower the rate, or run it on another machine",
        )
    names = [service.name for service in services.services if service.name in run.trace.services]
    summary = summarise(
        frame, wall_s=wall_s, gpus=how.gpus, services=names, utilisation=_utilisation(frame, wall_s) or None
    )
    return LoadResult(requests=frame, summary=summary, send_lag_p99_s=lag_p99_s, warnings=warnings)


def _utilisation(frame: pd.DataFrame, wall_s: float) -> dict[str, float]:
    """Return the share of the run that each group spent on batches with an answer; each batch counts once."""
    served = frame.dropna(subset=["group", "run_s", "batch_size"])
    busy_s = (served["run_s"] / served["batch_size"]).groupby(served["group"]).sum()
    return {str(group): min(1.0, float(total) / wall_s) for group, total in busy_s.items()}


def _frame(run: _Run, services: Services) -> pd.DataFrame:
    status = np.array(run.status)
    answered = status == "OK"
    latency_s = run.ended_s - run.scheduled_s
    dropped = np.isin(status, [code.name for code in _DROPPED])
    names = [run.trace.services[code] for code in run.trace.codes]
    accuracy: dict[tuple[str, str | None], float] = {
        (service.name, variant.model): variant.accuracy for service in services.services for variant in service.variants
    }
    columns: dict[str, Any] = {
        "service": names,
        "scheduled_s": run.scheduled_s,
        "sent_s": run.sent_s,
        "latency_s": np.where(answered, latency_s, math.nan),
        "outcome": np.select(
            [answered & (latency_s <= run.deadline_s), answered, dropped], ["good", "late", "dropped"], "failed"
        ),
        "status": run.status,
        "batch_size": np.array([header.batch_size for header in run.headers], dtype=np.float64),
        "run_s": np.array([header.run_s for header in run.headers], dtype=np.float64),
        "variant": [header.variant for header in run.headers],
        "accuracy": [
            accuracy.get((name, header.variant), math.nan) for name, header in zip(names, run.headers, strict=True)
        ],
        "group": [header.group for header in run.headers],
    }
    return pd.DataFrame(columns)
