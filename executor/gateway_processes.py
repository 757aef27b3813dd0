"""Several gateway processes on one port, and the process that keeps them running: ``foreplan gateway --processes N``.

The parent reserves the ports, holds the state folder, starts the processes, and starts each again when it dies. It
carries no requests. When the parent is gone, the others end too.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import faulthandler
import gc
import logging
import multiprocessing
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from executor.cores import core_of_process, pin_process
from executor.gateway import GatewayConfig, serve_gateway
from executor.gateway_family import Member
from executor.grpc_server import check_free, stop_signals
from executor.logs import configure_logging
from executor.state_folder import locked_folder
from plans.errors import ForeplanError, InvalidInput, RemoteFailure
from plans.interrupts import interrupts_held

__all__ = ["run_gateway", "serve_gateways"]

_log = logging.getLogger("executor.gateway")

_START_S = 60.0
_END_S = 5.0
"""What a process that was told to stop may take beyond the grace of its requests."""
_FREE_S = 1.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_STEADY_S = 10.0


def run_gateway(
    config: GatewayConfig,
    on_ready: Callable[[str], None] = lambda _: None,
    *,
    processes: int = 1,
    log_level: str = "INFO",
) -> None:
    """Run a gateway of one or more processes until SIGTERM or SIGINT.

    Raises:
        InvalidInput: As for `executor.gateway.serve_gateway`; or ``processes`` is below 1, or more than there are cores
            to pin them to.
        BadStoredData: As for it.
    """
    if processes < 1:
        raise InvalidInput.of("at least 1", where="--processes", found=processes)
    if config.pin_cores:
        core_of_process(0, processes)  # said before anything is started
    if processes == 1:
        _pin(config)
        _run(_serve_until_told(config, on_ready, asyncio.Event()))
    else:
        asyncio.run(serve_gateways(config, processes, on_ready, log_level=log_level))


def _pin(config: GatewayConfig, index: int = 0, count: int = 1) -> None:
    """Keep this process to its core, if it shall: before it starts threads."""
    if config.pin_cores:
        pin_process((core_of_process(index, count),))


def _run(serving: object) -> None:
    import uvloop

    uvloop.run(serving)  # type: ignore[arg-type]


async def serve_gateways(
    config: GatewayConfig, processes: int, on_ready: Callable[[str], None], *, log_level: str = "INFO"
) -> None:
    """Keep ``processes`` gateway processes running until SIGTERM or SIGINT.

    Args:
        config: How to run each of them.
        processes: How many.
        on_ready: Called with the ``host:port`` once all of them listen.
        log_level: Of the processes.

    Raises:
        InvalidInput: An address cannot be listened on, or the state folder cannot be used or is in use.
        RemoteFailure: A process could not be started.
    """
    stopping = asyncio.Event()
    with (
        locked_folder(config.state_dir, "gateway"),
        tempfile.TemporaryDirectory(prefix="foreplan-gateway-") as sockets,
        _reserved(config.listen, "--listen") as listen,
        _reserved(config.http, "--http") as http,
        stop_signals(stopping),
    ):
        shared = dataclasses.replace(config, listen=listen, http=http)
        members = [Member(index=index, count=processes, sockets=Path(sockets)) for index in range(processes)]
        keepers = [_Keeper(shared, member, log_level) for member in members]
        try:
            await asyncio.gather(*(keeper.start() for keeper in keepers))
            on_ready(listen)
            keeping = [asyncio.create_task(keeper.keep()) for keeper in keepers]
            await stopping.wait()
            for task in keeping:
                task.cancel()
            await asyncio.gather(*keeping, return_exceptions=True)
        finally:
            await asyncio.gather(*(keeper.stop(config.grace_s + 2 * _END_S) for keeper in keepers))


class _Keeper:
    """Starts one process, and starts it again when it dies."""

    def __init__(self, config: GatewayConfig, member: Member, log_level: str) -> None:
        self._config = config
        self._member = member
        self._log_level = log_level
        self._process: SpawnProcess | None = None

    async def start(self) -> None:
        """Start the process and wait until it listens.

        Raises:
            RemoteFailure: It ended before that, and its log says why; or the system has no room for it.
        """
        name = f"gateway process {self._member.index}"
        try:
            ours = self._started()
        except OSError as error:
            problem = f"cannot be started: {error.strerror or error}"
            raise RemoteFailure(name, problem, retryable=True) from error
        with ours:
            problem = await asyncio.to_thread(_heard, ours)
        if problem:
            raise RemoteFailure(name, problem, retryable=True)
        assert self._process is not None
        _log.info("event=gateway_process index=%d process=%d", self._member.index, self._process.pid)

    def _started(self) -> Connection:
        """Start the process; return the end of a pipe on which it says when it listens.

        Raises:
            OSError: That is not possible now.
        """
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        with theirs:
            process = context.Process(
                target=_child,
                args=(self._config, self._member, self._log_level, theirs),
                name=f"gateway-{self._member.index}",
            )
            try:
                with interrupts_held():  # Ctrl-C is the parent's to answer, also while the process starts
                    process.start()
            except OSError:
                ours.close()
                raise
        self._process = process
        return ours

    async def keep(self) -> None:
        """Start the process again whenever it dies, after a pause that grows while it dies soon."""
        clock = asyncio.get_running_loop().time
        pause_s = _FIRST_PAUSE_S
        while True:
            assert self._process is not None
            since_s = clock()
            await _ended(self._process)
            code = self._process.exitcode
            _log.error("event=gateway_process_lost index=%d exit=%s", self._member.index, code)
            pause_s = _FIRST_PAUSE_S if clock() - since_s > _STEADY_S else min(_LONGEST_PAUSE_S, 2 * pause_s)
            await asyncio.sleep(pause_s)
            try:
                await self.start()
            except RemoteFailure as failure:
                _log.error("event=gateway_process_not_started index=%d problem=%r", self._member.index, str(failure))

    async def stop(self, grace_s: float) -> None:
        """End the process: kindly first."""
        process = self._process
        if process is None or process.pid is None:
            return
        process.terminate()
        await asyncio.to_thread(process.join, grace_s)
        if process.is_alive():
            process.kill()
            await asyncio.to_thread(process.join)


def _heard(ours: Connection) -> str:
    """Wait until a process says that it listens; return why it does not."""
    if not ours.poll(_START_S):
        return f"it does not listen after {_START_S:g} s"
    try:
        return ours.recv_bytes().decode()
    except EOFError:
        return "it ended before it listened; see its log"


async def _ended(process: SpawnProcess) -> None:
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(process.sentinel, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(process.sentinel)
    process.join()


def _child(config: GatewayConfig, member: Member, log_level: str, ready: Connection) -> None:
    configure_logging(log_level)
    try:
        _pin(config, member.index, member.count)
        _run(_serve_below_parent(config, member, ready))
    except ForeplanError as error:
        with contextlib.suppress(OSError):
            ready.send_bytes(str(error).encode())


async def _serve_below_parent(config: GatewayConfig, member: Member, ready: Connection) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def orphaned() -> None:
        loop.remove_reader(parent.sentinel)
        stop.set()

    loop.add_reader(parent.sentinel, orphaned)

    def listening(_: str) -> None:
        ready.send_bytes(b"")
        ready.close()

    try:
        await _serve_until_told(config, listening, stop, member)
    finally:
        if not parent.is_alive():  # who made the folder will not remove it
            shutil.rmtree(member.sockets, ignore_errors=True)


async def _serve_until_told(
    config: GatewayConfig, on_ready: Callable[[str], None], stop: asyncio.Event, member: Member | None = None
) -> None:
    """Serve until SIGTERM, SIGINT or ``stop``, and see to it that this process then ends: it must not keep the port."""
    watch = asyncio.create_task(_end_in_time(stop, config.grace_s + _END_S))

    def ready(address: str) -> None:
        gc.freeze()  # a round of the collector over all modules holds up requests for some 50 ms
        on_ready(address)

    try:
        await serve_gateway(config, ready, member=member, stop=stop)
    finally:
        watch.cancel()


async def _end_in_time(stop: asyncio.Event, limit_s: float) -> None:
    """End this process by force ``limit_s`` after ``stop``, with what its threads do then on stderr."""
    await stop.wait()
    faulthandler.dump_traceback_later(limit_s, exit=True)


@contextlib.contextmanager
def _reserved(address: str, where: str) -> Iterator[str]:
    """Hold the port of ``address`` for several processes, without listening; yield the address with its number.

    Raises:
        InvalidInput: It is no address, or in use.
    """
    if not address:
        yield address
        return
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit() and int(port) < 65536):
        raise InvalidInput.of("host:port, such as 127.0.0.1:8001", where=where, found=repr(address))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    place = (host.strip("[]"), int(port))
    with socket.socket(family, socket.SOCK_STREAM) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            _wait_until_free(*place)
            held.bind(place)
        except (OSError, UnicodeError) as error:
            remedy = "stop what listens there, or choose another address"
            expected = "an address of this machine with a free port"
            raise InvalidInput.of(expected, where=where, found=address, remedy=remedy) from error
        yield f"{host}:{held.getsockname()[1]}"


def _wait_until_free(host: str, port: int) -> None:
    """See to it that nobody listens there: another gateway would get half of the requests.

    Processes of a gateway whose parent was killed may listen for a moment yet.

    Raises:
        OSError: The port is taken.
    """
    end_s = time.monotonic() + _FREE_S
    while True:
        try:
            check_free(host, port)
        except OSError:
            if time.monotonic() >= end_s:
                raise
        else:
            return
        time.sleep(_FIRST_PAUSE_S)
