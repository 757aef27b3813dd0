"""A replay by several processes: each sends its share, all from one start, and their notes are put together.

One Python process sends some thousand requests per second; beyond that the load client would measure itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import multiprocessing
import multiprocessing.connection
import signal
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import grpc.aio
import numpy as np
import pandas as pd

from executor.control_client import channel_options
from executor.latency_histogram import LatencyHistogram
from executor.load_run import SHORTEST_S, LoadProgress, LoadRun, Schedule
from executor.tls import Credentials, Dialer, TlsFiles
from plans.errors import ForeplanError, RemoteFailure
from plans.interrupts import interrupts_held

__all__ = ["LoadTarget", "Replayed", "replay_in_processes"]

_READY, _PROGRESS, _RESULT, _FAILED = b"A", b"P", b"R", b"F"
_COUNTS = struct.Struct("<QQ")
_STOP = b"S"
_START_S = 60.0
_CONNECT_S = 10.0
"""How long a process tries to reach the gateway, which answered a moment ago."""
_WAIT_S = 0.2
_LEAD_S = 0.2
"""How long after the last process is ready the run starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTarget:
    """Where to send: the gateway's ``host:port``, connections of each process, and how they are made."""

    gateway: str
    connections: int = 1
    max_message_bytes: int = 64 * 2**20
    tls: TlsFiles | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What a replay noted.

    Attributes:
        frame: What `LoadRun.frame` says of all requests.
        wall_s: Length of the run.
        lost: What processes that ended early leave out of ``frame``, where their requests are as if never sent.
    """

    frame: pd.DataFrame
    wall_s: float
    lost: tuple[str, ...] = ()


def replay_in_processes(
    schedule: Schedule,
    bodies: Sequence[bytes],
    target: LoadTarget,
    processes: int,
    on_progress: Callable[[LoadProgress], None] = lambda _: None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Replayed:
    """Send ``schedule`` from ``processes`` processes. When one is lost, the others stop, and keep what they have.

    ``is_stopped`` is asked now and then whether to end the run early. A Ctrl-C or SIGTERM goes to this process only.

    Raises:
        RemoteFailure: A process of the load client could not start, or none is left; says how.
    """
    context = multiprocessing.get_context("spawn")
    children = []
    turns = schedule.turns(processes)
    shares = [np.flatnonzero(turns == index) for index in range(processes)]
    for rows in shares:
        ours, theirs = context.Pipe()
        child = context.Process(target=_child, args=(schedule.part(rows), list(bodies), target, theirs), daemon=True)
        with interrupts_held(signal.SIGTERM):  # a supervisor may tell the whole group
            child.start()
        theirs.close()
        children.append((child, ours))
    try:
        start_s = _started([ours for _, ours in children])
        parts, failures = _collected([ours for _, ours in children], len(schedule), on_progress, is_stopped)
        wall_s = max(SHORTEST_S, time.monotonic() - start_s)
    finally:
        for child, ours in children:
            ours.close()
            child.join(timeout=2.0)
            if child.is_alive():
                child.kill()
                child.join()
    found = pd.concat([part.set_axis(shares[index]) for index, part in parts.items()])
    return Replayed(
        frame=found.reindex(np.arange(len(schedule))).fillna({"status": ""}),
        wall_s=wall_s,
        lost=tuple(
            f"{failure}; the run was stopped, and the {len(shares[index])} requests of it are missing: run it again"
            for index, failure in failures.items()
        ),
    )


def _started(connections: Sequence[Connection]) -> float:
    """Wait until every process is ready, tell all when to start, and return that."""
    for index, connection in enumerate(connections):
        if not connection.poll(_START_S):
            raise RemoteFailure(f"load process {index}", f"is not ready after {_START_S:g} s", retryable=True)
        _received(connection, index)
    start_s = time.monotonic() + _LEAD_S
    for connection in connections:
        with contextlib.suppress(BrokenPipeError):  # it has just ended, which is seen when it is read from
            connection.send_bytes(struct.pack("<d", start_s))
    return start_s


def _collected(
    connections: Sequence[Connection],
    total: int,
    on_progress: Callable[[LoadProgress], None],
    is_stopped: Callable[[], bool],
) -> tuple[dict[int, pd.DataFrame], dict[int, RemoteFailure]]:
    """Pass progress on until every process has sent its result, or has failed; return both.

    Raises:
        RemoteFailure: All have failed.
    """
    told = False
    found: dict[int, pd.DataFrame] = {}
    failures: dict[int, RemoteFailure] = {}
    latest: dict[int, tuple[int, int, LatencyHistogram]] = {}
    index_of = {id(connection): index for index, connection in enumerate(connections)}
    waiting = list(connections)
    while waiting:
        if (failures or is_stopped()) and not told:
            told = True
            for connection in waiting:
                with contextlib.suppress(OSError):  # it has just ended, well or not
                    connection.send_bytes(_STOP)
        for ready in multiprocessing.connection.wait(waiting, _WAIT_S):
            assert isinstance(ready, Connection)
            index = index_of[id(ready)]
            try:
                kind, body = _received(ready, index)
            except RemoteFailure as failure:
                failures[index] = failure
                waiting.remove(ready)
                continue
            if kind == _RESULT:
                found[index] = pd.read_parquet(io.BytesIO(body))
                waiting.remove(ready)
                continue
            done, good = _COUNTS.unpack_from(body)
            counts = np.frombuffer(body, dtype=np.int64, offset=_COUNTS.size).copy()
            latest[index] = (done, good, LatencyHistogram(counts))
        if latest:
            on_progress(_sum(latest, total))
    if not found:
        raise next(iter(failures.values()))
    return found, failures


def _sum(latest: dict[int, tuple[int, int, LatencyHistogram]], total: int) -> LoadProgress:
    latency = LatencyHistogram()
    for _, _, histogram in latest.values():
        latency.merge(histogram)
    done, good = (sum(ended) for ended in zip(*((done, good) for done, good, _ in latest.values()), strict=True))
    return LoadProgress(done=done, total=total, good=good, latency=latency)


def _received(connection: Connection, index: int) -> tuple[bytes, bytes]:
    try:
        message = connection.recv_bytes()
    except (EOFError, OSError) as error:  # the latter within a message
        raise RemoteFailure(f"load process {index}", "ended before its work was done", retryable=False) from error
    if message[:1] == _FAILED:
        raise RemoteFailure(f"load process {index}", message[1:].decode(), retryable=False)
    return message[:1], message[1:]


def _child(schedule: Schedule, bodies: list[bytes], target: LoadTarget, parent: Connection) -> None:
    import uvloop

    try:
        uvloop.run(_replay(schedule, bodies, target, parent))
    except ForeplanError as error:
        parent.send_bytes(_FAILED + str(error).encode())
    except (BrokenPipeError, ConnectionResetError, EOFError):
        return  # the parent is gone: there is nobody to tell


async def _replay(schedule: Schedule, bodies: list[bytes], target: LoadTarget, parent: Connection) -> None:
    def tell(progress: LoadProgress) -> None:
        parent.send_bytes(_PROGRESS + _COUNTS.pack(progress.done, progress.good) + progress.latency.counts.tobytes())

    dialer = Dialer(Credentials(target.tls) if target.tls else None)
    options = channel_options(target.max_message_bytes)
    channels = [dialer.open(target.gateway, options) for _ in range(target.connections)]
    try:
        await _connected(target.gateway, channels)
        parent.send_bytes(_READY)
        (start_s,) = struct.unpack("<d", await asyncio.to_thread(parent.recv_bytes))
        run = LoadRun(schedule, bodies, channels, tell)
        asyncio.get_running_loop().add_reader(parent.fileno(), run.stop)  # told so, or the parent is gone
        await run.replay(start_s)
        asyncio.get_running_loop().remove_reader(parent.fileno())
    finally:
        await asyncio.gather(*(channel.close(None) for channel in channels))
    stream = io.BytesIO()
    run.frame().to_parquet(stream, index=False)
    parent.send_bytes(_RESULT + stream.getvalue())


async def _connected(gateway: str, channels: Sequence[grpc.aio.Channel]) -> None:
    try:
        async with asyncio.timeout(_CONNECT_S):
            await asyncio.gather(*(channel.channel_ready() for channel in channels))
    except TimeoutError as error:
        raise RemoteFailure(gateway, f"cannot be reached any more, after {_CONNECT_S:g} s", retryable=True) from error
