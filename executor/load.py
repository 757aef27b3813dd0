"""Replays a request trace against a live gateway, open loop.

Every request is sent at its time, whatever became of the earlier ones, and its latency counts from that time, so a slow
system cannot slow its own load down. Each request ends as exactly one of good, late, dropped and failed.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from executor.cluster_connection import check_gateway
from executor.control_client import channel_options
from executor.load_processes import LoadTarget, Replayed, replay_in_processes
from executor.load_requests import Arrays, build_requests
from executor.load_run import LoadProgress, LoadRun, Schedule
from executor.load_tokens import TokenLoad
from executor.tls import Credentials, Dialer, TlsFiles
from plans.errors import Fault, InvalidInput
from plans.service import FrequencyService, GenerationSlo, Services
from plans.units import format_seconds
from traces.outcomes import RunSummary, nearest_rank, summarise
from traces.table import RequestTrace

__all__ = ["LoadOptions", "LoadProgress", "LoadResult", "replay"]

_DROPPED = {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED}
_DEFAULT_TOKENS = 128
"""Tokens of prompts and answers where the trace does not tell; the evaluator takes the same."""

_MAX_LAG_RATIO = 0.05
"""Send lag at the 99th percentile, as a share of the shortest deadline, above which a run warns about itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How to replay.

    Attributes:
        speed: Trace seconds per second; 2 doubles every rate. Deadlines stay as they are.
        connections: Connections to the gateway of each process, taken in turn; a stream keeps to one.
        processes: Processes that send, taken in turn as well; 1 sends from this one.
        payloads: Input arrays by service and tensor name, in place of seeded random ones.
        seed: Of the random inputs.
        gpus: GPUs that the system under test holds, for GPU-hours.
        max_message_bytes: Largest request and answer.
        on_progress: Told now and then how far the run is.
        tls: Certificate, key and authorities; without them in the clear.
        stop: Ends the run when it is set: what is under way is given up, and nothing more is sent.
    """

    speed: float = 1.0
    connections: int = 1
    processes: int = 1
    payloads: Mapping[str, Arrays] = field(default_factory=dict)
    seed: int = 0
    gpus: int = 0
    max_message_bytes: int = 64 * 2**20
    on_progress: Callable[[LoadProgress], None] = lambda _: None
    tls: TlsFiles | None = None
    stop: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """What became of the requests.

    Attributes:
        requests: One row per request that was sent, in the order of the trace: service, scheduled_s and sent_s (from
            the start of the run), latency_s (from ``scheduled_s``, or from ``sent_s`` where that is a moment before;
            NaN for what was neither good nor late), outcome, status (name of the gRPC status), batch_size, run_s (of
            the batch), variant, accuracy, group, ttft_s (from there too) and tpot_s (both NaN where no tokens were
            streamed). It is an outcome frame as in `traces.outcomes`; only a run that was stopped has requests in
            flight, with an empty status.
        summary: Counts and percentiles.
        send_lag_p99_s: 99th percentile of ``sent_s - scheduled_s``.
        warnings: What makes the figures less than they should be.
        lost: What processes of the load client that ended early leave out; the run was stopped then.
    """

    requests: pd.DataFrame
    summary: RunSummary
    send_lag_p99_s: float
    warnings: tuple[str, ...]
    lost: tuple[str, ...]


async def replay(
    trace: RequestTrace, gateway: str, services: Services, options: LoadOptions | None = None
) -> LoadResult:
    """Send the requests of ``trace`` to ``gateway`` at their times, and wait for all of them to end.

    A gateway that dies in the middle gives failed requests, and the run goes on. Requests of a service of class
    frequency carry their stream as the parameter ``sequence_id``.

    Args:
        trace: What to send.
        gateway: ``host:port``.
        services: Their deadlines and the accuracy of their variants.
        options: How to send it.

    Raises:
        InvalidInput: The trace names what is neither service nor workflow of ``services``, it is empty, ``gateway`` is
            no address, an option is out of range, or a service generates and has no limits for tokens.
        RemoteFailure: The gateway cannot be reached at the start.
    """
    how = options or LoadOptions()
    check_gateway(gateway)
    _check(trace, services, how)
    schedule = Schedule(
        due_s=trace.arrival_s / how.speed,
        deadline_s=_deadlines_s(trace, services),
        body=trace.codes.astype(np.int64),
        duration_s=trace.duration_s / how.speed,
        position=_positions(trace, services),
        stream=_streams(trace, services),
    )
    schedule, ran = await _replayed(trace, services, schedule, gateway, how)
    return _result(trace, schedule, ran, services, how)


async def _replayed(
    trace: RequestTrace, services: Services, schedule: Schedule, gateway: str, how: LoadOptions
) -> tuple[Schedule, Replayed]:
    """Send everything; return what was asked for, and what was noted."""
    names = trace.services
    dialer = Dialer(Credentials(how.tls) if how.tls else None)
    options = channel_options(how.max_message_bytes)
    channels = [dialer.open(gateway, options) for _ in range(how.connections)]
    try:
        built = await build_requests(channels[0], gateway, names, payloads=how.payloads, seed=how.seed)
        bodies = [built.requests[name] for name in names]
        schedule = replace(schedule, tokens=_token_load(trace, services, built.generating))
        if how.processes == 1:
            run = LoadRun(schedule, bodies, channels, how.on_progress)
            stopping = asyncio.create_task(_stop_when_told(run, how.stop))
            try:
                wall_s = await run.replay()
            finally:
                stopping.cancel()
            return schedule, Replayed(frame=run.frame(), wall_s=wall_s)
    finally:
        await asyncio.gather(*(channel.close(None) for channel in channels))
    target = LoadTarget(
        gateway=gateway, connections=how.connections, max_message_bytes=how.max_message_bytes, tls=how.tls
    )
    ran = await asyncio.to_thread(
        replay_in_processes, schedule, bodies, target, how.processes, how.on_progress, how.stop.is_set
    )
    return schedule, ran


async def _stop_when_told(run: LoadRun, stop: asyncio.Event) -> None:
    await stop.wait()
    run.stop()


def _token_load(trace: RequestTrace, services: Services, generating: frozenset[str]) -> TokenLoad | None:
    """Return what the requests of services that generate ask for; None without such services.

    Raises:
        InvalidInput: A service generates, and has no limits for tokens.
    """
    remedy = "correct the class in services.yaml, or apply a plan by which it answers whole requests"
    faults = [
        Fault(where="services", field=name, found="a deadline", expected="ttft and tpot: it generates", remedy=remedy)
        for name in sorted(generating)
        if not isinstance(services.service(name).slo, GenerationSlo)
    ]
    if faults:
        raise InvalidInput(faults)
    slos = [services.service(name).slo if name in generating else None for name in trace.services]
    limits = [(slo.ttft_s, slo.tpot_s) if isinstance(slo, GenerationSlo) else (math.nan, math.nan) for slo in slos]
    if all(math.isnan(ttft_s) for ttft_s, _ in limits):
        return None
    ttft_s, tpot_s = np.array(limits, dtype=np.float64)[trace.codes].T

    def count(column: str) -> NDArray[np.int64]:
        stated = np.nan_to_num(trace.numbers(column), nan=_DEFAULT_TOKENS)
        return np.where(np.isnan(ttft_s), 0, np.maximum(1, stated)).astype(np.int64)

    return TokenLoad(
        input_tokens=count("input_tokens"), output_tokens=count("output_tokens"), ttft_s=ttft_s, tpot_s=tpot_s
    )


def _check(trace: RequestTrace, services: Services, how: LoadOptions) -> None:
    known = {one.name for one in (*services.services, *services.workflows)}
    faults = [
        Fault(where="trace", field="service", found=repr(name), expected=f"one of {', '.join(sorted(known))}")
        for name in trace.services
        if name not in known
    ]
    if not len(trace):
        faults.append(Fault(where="trace", found="no requests", expected="at least one"))
    if not (math.isfinite(how.speed) and how.speed > 0):
        faults.append(Fault(where="--speed", found=str(how.speed), expected="a number above 0"))
    for option, value in (("--connections", how.connections), ("--processes", how.processes)):
        if value < 1:
            faults.append(Fault(where=option, found=str(value), expected="at least 1"))
    if faults:
        raise InvalidInput(faults)


def _deadlines_s(trace: RequestTrace, services: Services) -> NDArray[np.float64]:
    """Return the time that each request has from its arrival, shape (request,), seconds."""
    tokens = trace.numbers("output_tokens")
    flows = {workflow.name: workflow.slo.deadline_s for workflow in services.workflows}
    by_code = [None if name in flows else services.service(name) for name in trace.services]
    limits_s = [flows.get(name, 0.0) for name in trace.services]
    return np.array(
        [
            limits_s[code] if (service := by_code[code]) is None else service.deadline_s(_known(count))
            for code, count in zip(trace.codes, tokens, strict=True)
        ]
    )


def _known(count: float) -> float | None:
    return None if math.isnan(count) else count


def _positions(trace: RequestTrace, services: Services) -> NDArray[np.int64] | None:
    """Return the places of requests for workflows in the trace, -1 for others; None without any."""
    flows = {workflow.name for workflow in services.workflows}
    of_workflow = np.array([name in flows for name in trace.services], dtype=np.bool_)
    if not of_workflow.any():
        return None
    return np.where(of_workflow[trace.codes], np.arange(len(trace)), -1)


def _streams(trace: RequestTrace, services: Services) -> NDArray[np.int64] | None:
    """Return numbers of the streams of services of class frequency, 0 for other requests; None without any.

    They begin with a random one, so that gateways do not take them for the streams of another run.
    """
    frequent = {one.name for one in services.services if isinstance(one, FrequencyService)}
    labels = trace.frame.get("stream")
    if labels is None or frequent.isdisjoint(trace.services):
        return None
    number, _ = pd.factorize(labels)
    framed = np.array([name in frequent for name in trace.services])[trace.codes] & (number >= 0)
    return np.where(framed, 1 + secrets.randbits(62) + number, 0)


def _result(trace: RequestTrace, schedule: Schedule, ran: Replayed, services: Services, how: LoadOptions) -> LoadResult:
    frame = _frame(trace, schedule, ran.frame, services)
    lag_s = np.sort((frame["sent_s"] - frame["scheduled_s"]).to_numpy())
    lag_p99_s = nearest_rank(lag_s, 99) or 0.0
    shortest_s = float(schedule.deadline_s.min())
    warnings: tuple[str, ...] = ()
    if lag_p99_s > _MAX_LAG_RATIO * shortest_s:
        warnings = (
            f"the load client itself fell behind: 1 % of the requests left more than {format_seconds(lag_p99_s)} late, "
            f"against a deadline of {format_seconds(shortest_s)}; lower the rate, add --processes, or run "
            "it on another machine",
        )
    names = [one.name for one in (*services.services, *services.workflows) if one.name in trace.services]
    summary = summarise(
        frame, wall_s=ran.wall_s, gpus=how.gpus, services=names, utilisation=_utilisation(frame, ran.wall_s) or None
    )
    return LoadResult(requests=frame, summary=summary, send_lag_p99_s=lag_p99_s, warnings=warnings, lost=ran.lost)


def _utilisation(frame: pd.DataFrame, wall_s: float) -> dict[str, float]:
    """Return the share of the run that each group spent on batches with an answer; each batch counts once.

    Nothing where answers do not tell of their batches, as those of workflows: groups would seem idler than they were.
    """
    served = frame[frame["outcome"].isin(["good", "late"])]
    if served[["group", "run_s", "batch_size"]].isna().any(axis=None):
        return {}
    busy_s = (served["run_s"] / served["batch_size"]).groupby(served["group"]).sum()
    return {str(group): min(1.0, float(total) / wall_s) for group, total in busy_s.items()}


def _frame(trace: RequestTrace, schedule: Schedule, notes: pd.DataFrame, services: Services) -> pd.DataFrame:
    status = notes["status"].to_numpy()
    answered = status == "OK"
    latency_s = notes["latency_s"].to_numpy()
    ttft_s, tpot_s, tokens = notes["ttft_s"].to_numpy(), notes["tpot_s"].to_numpy(), schedule.tokens
    in_time = latency_s <= schedule.deadline_s
    if tokens is not None:
        streamed = tokens.output_tokens > 0
        in_time = np.where(streamed, (ttft_s <= tokens.ttft_s) & (tpot_s <= tokens.tpot_s), in_time)
    dropped = np.isin(status, [code.name for code in _DROPPED])
    names = [trace.services[code] for code in trace.codes]
    accuracy: dict[tuple[str, str | None], float] = {
        (service.name, variant.model): variant.accuracy for service in services.services for variant in service.variants
    }
    variants = [None if pd.isna(variant) else str(variant) for variant in notes["variant"]]
    columns: dict[str, Any] = {
        "service": names,
        "scheduled_s": schedule.due_s,
        "sent_s": notes["sent_s"].to_numpy(),
        "latency_s": np.where(answered, latency_s, math.nan),
        "outcome": np.select(
            [answered & in_time, answered, dropped, status == ""], ["good", "late", "dropped", "in_flight"], "failed"
        ),
        "status": list(status),
        "batch_size": notes["batch_size"].to_numpy(),
        "run_s": notes["run_s"].to_numpy(),
        "variant": variants,
        "accuracy": [accuracy.get(pair, math.nan) for pair in zip(names, variants, strict=True)],
        "group": [None if pd.isna(group) else str(group) for group in notes["group"]],
        "ttft_s": ttft_s,
        "tpot_s": tpot_s,
    }
    frame = pd.DataFrame(columns)
    return frame[frame["sent_s"].notna()].reset_index(drop=True)
