"""The agent's end of one worker process: starting it, calling it, noticing its end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from executor.cores import cores_of
from executor.errors import WorkerGone, WorkerRefused
from executor.segment import SharedSegment
from executor.worker_wire import (
    Failed,
    FrameError,
    FrameSplitter,
    Freed,
    FromWorker,
    Iterate,
    Load,
    Loaded,
    Ready,
    Run,
    Stop,
    TensorPlace,
    Unload,
    Unloaded,
    decode_from_worker,
    encode_to_worker,
)

__all__ = ["WorkerLink", "WorkerSettings"]

_log = logging.getLogger("executor.agent")

_LAST_WORDS_S = 2.0
"""How long a worker may live on after its pipe ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """How workers are started.

    Attributes:
        runtime: ``module:factory`` of the runtime.
        device: ``cpu``, or ``cuda`` for the CUDA device of the group's index.
        dtype: Element type of weights and activations.
        threads: Threads of one operation on the CPU.
        model_dir: Folder of local models.
        compiled: Run batches by torch.compile.
        cuda_graphs: Replay CUDA graphs.
        host_cache_bytes: Weights that a worker of one device keeps in host memory, to load models again quickly.
        swap_bytes: Memory of a device: models of a worker that need more together are swapped between batches, from the
            host cache. 0 for no swapping.
        cores: Processor cores of the node; each device's worker runs on ``threads`` of them. Empty leaves it to the
            operating system.
        log_level: Of the worker's own log.
        run_limit_s: Seconds that any batch may take before the worker counts as hung; slow ones get more.
        load_limit_s: Likewise for a start and a load.
        unload_limit_s: Likewise for an unload, which waits for the batches before it.
    """

    runtime: str = "executor.runtime.group_runtime:TorchGroupRuntime"
    device: str = "cpu"
    dtype: str = "fp32"
    threads: int = 1
    model_dir: Path | None = None
    compiled: bool = False
    cuda_graphs: bool = False
    host_cache_bytes: int = 0
    swap_bytes: int = 0
    cores: tuple[int, ...] = ()
    log_level: str = "INFO"
    run_limit_s: float = 10.0
    load_limit_s: float = 600.0
    unload_limit_s: float = 60.0

    def devices_of(self, gpus: tuple[int, ...]) -> tuple[str, ...]:
        """Return the runtime's names of the devices with the indices ``gpus``."""
        return tuple(f"cuda:{gpu}" if self.device == "cuda" else self.device for gpu in gpus)


class WorkerLink(asyncio.Protocol):
    """A running worker. Made by `start`; every call fails with `WorkerGone` once the process has ended.

    Attributes:
        segment: The memory shared with it.
        on_end: Called with the reason when the process ends by itself after its start.
    """

    def __init__(self, segment: SharedSegment, settings: WorkerSettings, on_end: Callable[[str], None]) -> None:
        self.segment = segment
        self.on_end = on_end
        self._settings = settings
        self._given_up = ""
        self._process: asyncio.subprocess.Process | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._frames = FrameSplitter()
        self._calls: dict[int, asyncio.Future[FromWorker]] = {}
        self._freed: dict[int, Callable[[], None]] = {}
        self._numbers = itertools.count(1)
        self._ready: asyncio.Future[FromWorker] = asyncio.get_running_loop().create_future()
        self._ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())  # seen, if nobody waits
        self._calls[0] = self._ready
        self._closed = asyncio.Event()
        self._stopping = False

    @classmethod
    async def start(cls, settings: WorkerSettings, gpus: tuple[int, ...], on_end: Callable[[str], None]) -> WorkerLink:
        """Start a worker for the devices ``gpus`` and wait until its runtime is up.

        Args:
            settings: How to start it.
            gpus: Indices of its devices.
            on_end: Called once with the reason when the process ends without having been stopped, after start-up.

        Raises:
            WorkerRefused: The runtime could not be made; says why.
            WorkerGone: The process ended during its start, or could not be started at all.
        """
        try:
            return await cls._start(settings, gpus, on_end)
        except OSError as error:
            raise WorkerGone(f"cannot start a worker: {error.strerror or error}") from error

    @classmethod
    async def _start(cls, settings: WorkerSettings, gpus: tuple[int, ...], on_end: Callable[[str], None]) -> WorkerLink:
        ours, theirs = socket.socketpair()
        try:
            link = cls(SharedSegment.create(), settings, on_end)
        except OSError:
            ours.close()
            theirs.close()
            raise
        try:
            with theirs:
                link._process = await asyncio.create_subprocess_exec(
                    *_command(settings, gpus, theirs.fileno(), link.segment.descriptor),
                    pass_fds=(theirs.fileno(), link.segment.descriptor),
                    stdin=asyncio.subprocess.DEVNULL,
                    env=_environment(),
                )
            ours.setblocking(False)
            await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=ours)
            await link._within(settings.load_limit_s, asyncio.shield(link._ready), "start")
        except BaseException:
            if link._transport is None:
                ours.close()
            await link.kill()
            raise
        return link

    @property
    def process_id(self) -> int:
        """The worker's process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def is_closed(self) -> bool:
        """Whether the process has ended, or is about to."""
        return self._transport is None or self._transport.is_closing() or self._closed.is_set()

    @property
    def variants(self) -> tuple[str, ...]:
        """Variants that the worker's runtime knows."""
        ready = self._ready.result()
        return ready.variants if isinstance(ready, Ready) else ()

    async def load(self, variant: str, max_batch: int, shape: tuple[int, int] = (1, 1), *, kv_bytes: int = 0) -> Loaded:
        """Load a variant, in place of an older load of it; ``shape`` is tensor and pipeline parallelism.

        With ``kv_bytes`` a model that can generate gets so much key-value memory.

        Raises:
            WorkerRefused: It could not be loaded.
            WorkerGone: The process ended.
        """
        number = next(self._numbers)
        call = self._call(Load(call=number, variant=variant, max_batch=max_batch, shape=shape, kv_bytes=kv_bytes))
        answer = await self._within(self._settings.load_limit_s, call, f"load of {variant}")
        assert isinstance(answer, Loaded)
        return answer

    async def unload(self, variant: str) -> None:
        """Forget a variant, after the batches sent before.

        Raises:
            WorkerGone: The process ended.
        """
        call = self._call(Unload(call=next(self._numbers), variant=variant))
        answer = await self._within(self._settings.unload_limit_s, call, f"unload of {variant}")
        assert isinstance(answer, Unloaded)

    def run(
        self,
        variant: str,
        inputs: tuple[TensorPlace, ...],
        output_offset_bytes: int,
        output_capacity_bytes: int,
        freed: Callable[[], None] = lambda: None,
    ) -> asyncio.Future[FromWorker]:
        """Send one batch at once; the future holds `Done`. In a pipeline ``freed`` is called when the next may come.

        It fails with `WorkerRefused` when the inputs do not fit the model or the model failed, and with `WorkerGone`.
        """
        number = next(self._numbers)
        self._freed[number] = freed
        return self._call(
            Run(
                call=number,
                variant=variant,
                inputs=inputs,
                output_offset_bytes=output_offset_bytes,
                output_capacity_bytes=output_capacity_bytes,
            )
        )

    def iterate(
        self,
        variant: str,
        kv_tokens: int,
        *,
        freed: tuple[int, ...],
        prefill: tuple[tuple[int, tuple[int, ...]], ...] = (),
        decode: tuple[int, ...] = (),
    ) -> asyncio.Future[FromWorker]:
        """Send one iteration at once; the future holds `Iterated`, and fails as that of `run`. See `Iterate`."""
        return self._call(
            Iterate(
                call=next(self._numbers),
                variant=variant,
                kv_tokens=kv_tokens,
                freed=freed,
                prefill=prefill,
                decode=decode,
            )
        )

    def give_up(self, problem: str) -> None:
        """End a worker that hangs by force; what waits for it then fails with `WorkerGone`, which says ``problem``."""
        if self._process is not None and self._process.returncode is None and not self._closed.is_set():
            _log.error("event=worker_hangs worker=%d problem=%r", self.process_id, problem)
            self._given_up = f"{problem}, so "
            self._process.kill()

    async def stop(self, grace_s: float = 5.0) -> None:
        """Let the worker finish what runs, then end it; after ``grace_s`` seconds by force."""
        self._stopping = True
        try:
            if self._transport is not None and not self._transport.is_closing():
                self._transport.write(encode_to_worker(Stop()))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(grace_s):
                        await self._closed.wait()
        finally:
            await self.kill()

    async def kill(self) -> None:
        """End the process by force, if it runs, and wait until it is gone."""
        self._stopping = True
        if self._process is not None:
            if self._process.returncode is None and not self._closed.is_set():
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
            await self._process.wait()
        if self._transport is not None:
            self._transport.close()
        self._end("the worker was stopped")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note the way to send; called by the event loop."""
        self._transport = cast(asyncio.WriteTransport, transport)  # not every event loop's transports say so

    def data_received(self, data: bytes) -> None:
        """Give answers to those who wait for them; called by the event loop."""
        try:
            messages = [decode_from_worker(body) for body in self._frames.feed(data)]
        except FrameError as error:
            _log.error("event=bad_frame worker=%d problem=%r", self.process_id, str(error))
            if self._process is not None and self._process.returncode is None:
                self._process.kill()
            return
        for message in messages:
            self._answered(message)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail everything that waits; called by the event loop when the process is gone."""
        if self._transport is not None:
            self._transport.close()
        watch = asyncio.get_running_loop().create_task(self._reap())
        self._reaping = watch  # a task needs somebody who holds it

    async def _reap(self) -> None:
        assert self._process is not None
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                code = await self._process.wait()
        except TimeoutError:  # it closed its pipe and lives on: of no use to anybody
            self._process.kill()
            code = await self._process.wait()
        self._end(self._given_up + _reason(code))

    def _end(self, reason: str) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        started = self._ready.done() and self._ready.exception() is None
        calls, self._calls = self._calls, {}
        self._freed.clear()
        for call in calls.values():
            if not call.done():
                call.set_exception(WorkerGone(reason))
        self.segment.close()
        if started and not self._stopping:
            self.on_end(reason)

    async def _within(self, limit_s: float, call: Awaitable[FromWorker], what: str) -> FromWorker:
        """Await ``call``, and end the worker when it does not answer in time."""
        timer = asyncio.get_running_loop().call_later(limit_s, self.give_up, f"the {what} took over {limit_s:g} s")
        try:
            return await call
        finally:
            timer.cancel()

    def _call(self, message: Load | Unload | Run | Iterate) -> asyncio.Future[FromWorker]:
        answer: asyncio.Future[FromWorker] = asyncio.get_running_loop().create_future()
        if self._transport is None or self.is_closed:
            answer.set_exception(WorkerGone("the worker is gone"))
        else:
            self._calls[message.call] = answer
            self._transport.write(encode_to_worker(message))
        return answer

    def _answered(self, message: FromWorker) -> None:
        number = 0 if isinstance(message, Ready) else message.call
        freed = self._freed.pop(number, None)
        if isinstance(message, Freed):
            if freed is not None:
                freed()
            return
        call = self._calls.pop(number, None)
        if call is None or call.done():
            return
        if isinstance(message, Failed):
            call.set_exception(WorkerRefused(message.problem, invalid_input=message.invalid_input))
        else:
            call.set_result(message)


def _command(settings: WorkerSettings, gpus: tuple[int, ...], connection: int, segment: int) -> list[str]:
    command = [sys.executable, "-P", "-m", "executor.worker", f"--socket={connection}", f"--segment={segment}"]
    command += [
        f"--runtime={settings.runtime}",
        f"--devices={','.join(settings.devices_of(gpus))}",
        f"--dtype={settings.dtype}",
    ]
    command += [f"--threads={settings.threads}", f"--log-level={settings.log_level}"]
    command += ["--compile"] if settings.compiled else []
    command += ["--cuda-graphs"] if settings.cuda_graphs else []
    command += [f"--host-cache={settings.host_cache_bytes}"] if settings.host_cache_bytes else []
    command += [f"--device-memory={settings.swap_bytes}"] if settings.swap_bytes and len(gpus) == 1 else []
    if settings.cores:
        command.append(f"--cores={','.join(map(str, cores_of(gpus, settings.threads, settings.cores)))}")
    return command + ([f"--model-dir={settings.model_dir}"] if settings.model_dir else [])


def _environment() -> dict[str, str]:
    """Return the agent's environment, with its module path: a worker finds what the agent does.

    Nothing else is found: without ``-P`` a file such as ``h2.py`` in the folder where the agent was started would stand
    in for the library of that name.
    """
    return {**os.environ, "PYTHONPATH": os.pathsep.join(place for place in sys.path if place)}


def _reason(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"the worker was ended by {signal.Signals(-code).name}"
    return f"the worker ended with exit code {code}"
