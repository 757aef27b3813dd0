"""The worker process of one GPU group: ``python -m executor.worker``. It owns its device, and runs what its agent says.

This thread reads messages and runs batches: handing a batch to another thread would cost more than reading it. A second
one loads models, so a load holds up no batch longer than the two share the processor; it is taken up between batches. A
third waits for the end of the pipe: when the agent is gone, the process exits at once. So it does when a process of the
group's other devices ends, for which a fourth waits.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib
import inspect
import logging
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from numpy.typing import NDArray

from executor.cores import at_low_priority, pin_process
from executor.logs import configure_logging
from executor.runtime.protocol import (
    DevicesLost,
    GeneratesTokens,
    GroupRuntime,
    LoadedModel,
    PipelinedModel,
    UnknownVariant,
    check_outputs,
)
from executor.runtime.successive import SuccessiveSequences
from executor.segment import SharedSegment
from executor.worker_wire import (
    Done,
    Failed,
    FrameSplitter,
    Freed,
    FromWorker,
    Iterate,
    Iterated,
    Load,
    Loaded,
    Ready,
    Run,
    Stop,
    Unload,
    Unloaded,
    decode_to_worker,
    encode_from_worker,
)
from plans.errors import ForeplanError, InvalidInput

__all__ = ["Worker", "main", "make_runtime", "runtime_factory"]

_log = logging.getLogger("executor.worker")

_READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class _Held:
    """A loaded model, and the same as a pipeline where it is one: to ask it for each batch what it can takes long."""

    model: LoadedModel
    pipeline: PipelinedModel | None
    shape: tuple[int, int]


class Worker:
    """Answers the messages of one agent.

    Args:
        connection: The socket to the agent.
        segment: The memory shared with it.
        runtime: Loads the models.
        on_gone: Called, from a thread of its own, when the agent is gone, whatever runs then.
        on_lost: Called, from any thread, when devices of the group are lost: nothing can be run on it any more.
    """

    def __init__(
        self,
        connection: socket.socket,
        segment: SharedSegment,
        runtime: GroupRuntime,
        on_gone: Callable[[], None] = lambda: None,
        on_lost: Callable[[DevicesLost], None] = lambda error: None,
    ) -> None:
        self._connection = connection
        self._segment = segment
        self._runtime = runtime
        self._models: dict[str, _Held] = {}
        self._sequences: dict[str, SuccessiveSequences] = {}
        self._sending = threading.Lock()
        self._in_use = threading.Lock()  # held by a batch from the look for its model on, and while one is replaced
        self._loads: queue.SimpleQueue[Load] = queue.SimpleQueue()
        self._on_gone = on_gone
        self._on_lost = on_lost

    def serve(self) -> bool:
        """Answer until the agent says stop (True: what ran before is finished) or is gone (False)."""
        threading.Thread(target=self._load_all, name="load", daemon=True).start()
        threading.Thread(target=self._await_end, name="end", daemon=True).start()
        threading.Thread(target=self._await_loss, name="loss", daemon=True).start()
        self._send(Ready(process=os.getpid(), variants=tuple(self._runtime.names())))
        return self._read()

    def _await_end(self) -> None:
        """Wait until the agent hangs up; the reading thread may be in the middle of a long batch then."""
        pipe = select.poll()
        pipe.register(self._connection, select.POLLRDHUP)
        pipe.poll()
        self._on_gone()

    def _await_loss(self) -> None:
        await_loss = getattr(self._runtime, "await_loss", None)
        lost = await_loss() if await_loss is not None else None
        if lost is not None:
            self._on_lost(lost)

    def _read(self) -> bool:
        frames = FrameSplitter()
        while True:
            try:
                data = self._connection.recv(_READ_BYTES)
            except ConnectionError:
                return False
            if not data:
                return False
            messages = [decode_to_worker(body) for body in frames.feed(data)]
            for load in messages:
                if isinstance(load, Load):
                    self._loads.put(load)
            for message in messages:
                if isinstance(message, Stop):
                    return True
                if not isinstance(message, Load):
                    self._act(message)

    def _load_all(self) -> None:
        while True:
            message = self._loads.get()
            self._answer(message.call, functools.partial(self._load, message))

    def _act(self, message: Run | Iterate | Unload) -> None:
        if isinstance(message, Run):
            self._answer(message.call, functools.partial(self._run, message))
        elif isinstance(message, Iterate):
            self._answer(message.call, functools.partial(self._iterate, message))
        else:
            self._answer(message.call, functools.partial(self._unload, message))

    def _submit(self, message: Run, model: PipelinedModel, inputs: Mapping[str, NDArray[Any]]) -> None:
        """Start a batch in a pipeline; its `Done` follows when it is out."""
        start_s = time.perf_counter()
        outputs = model.submit(inputs)

        def out(future: Future[dict[str, NDArray[Any]]]) -> None:
            def done() -> Done:
                return self._done(message, model, future.result(), time.perf_counter() - start_s)

            self._answer(message.call, done)

        # The first stage is free: said before the end is, however soon that comes.
        self._send(Freed(call=message.call))
        outputs.add_done_callback(out)

    def _answer(self, call: int, act: Callable[[], FromWorker | None]) -> None:
        """Send what ``act`` returns, or why it could not. What a model raises ends its call, not the process.

        Only when devices of the group are lost does the process end: it is of no use without them.
        """
        answer: FromWorker | None
        try:
            answer = act()
        except InvalidInput as error:
            answer = Failed(call=call, problem=str(error), invalid_input=True)
        except DevicesLost as error:
            self._on_lost(error)
            answer = Failed(call=call, problem=str(error))
        except ForeplanError as error:
            answer = Failed(call=call, problem=str(error))
        except Exception as error:  # noqa: BLE001 - the edge between a model's code and this process
            _log.exception("event=call_failed call=%d", call)
            answer = Failed(call=call, problem=f"{type(error).__name__}: {error}")
        if answer is not None:
            self._send(answer)

    def _load(self, message: Load) -> Loaded:
        replaced = self._models.get(message.variant)
        sequences = self._sequences.get(message.variant)
        if replaced is not None and sequences is not None and replaced.shape == message.shape:
            if isinstance(replaced.model, GeneratesTokens):
                replaced.model.widen(message.max_batch)
            return self._loaded(message, replaced.model)  # how many of them run together is the agent's business
        load = functools.partial(self._runtime.load, message.variant, message.max_batch, message.shape)
        model = load() if self._models else at_low_priority(load)  # beside models of its own it would hold them up
        held = _Held(model, model if isinstance(model, PipelinedModel) else None, message.shape)
        runner = None
        if (message.kv_bytes or sequences) and isinstance(model, GeneratesTokens):
            try:
                runner = model.sequences(max(1, message.kv_bytes // model.generation.kv_bytes_per_token))
            except ForeplanError:
                _close(held)
                raise
        # A closed model must get no batch any more. One that is new here need not wait for the batches of others.
        with self._in_use if replaced is not None else contextlib.nullcontext():
            self._models[message.variant] = held
            if runner is not None and sequences is not None:
                sequences.succeed(runner, functools.partial(_close, replaced))
            else:
                if runner is not None:
                    self._sequences[message.variant] = SuccessiveSequences(runner)
                _close(replaced)
        _log.info("event=loaded variant=%s max_batch=%d load_s=%.3f", message.variant, message.max_batch, model.load_s)
        return self._loaded(message, model)

    def _loaded(self, message: Load, model: LoadedModel) -> Loaded:
        sequences = self._sequences.get(message.variant)
        return Loaded(
            call=message.call,
            weight_bytes=model.weight_bytes,
            load_s=model.load_s,
            first_inference_s=model.first_inference_s,
            inputs=tuple(model.inputs),
            outputs=tuple(model.outputs),
            generates=sequences.facts if sequences else None,
        )

    def _unload(self, message: Unload) -> Unloaded:
        sequences = self._sequences.pop(message.variant, None)
        if sequences is not None:
            sequences.close()
        _close(self._models.pop(message.variant, None))
        _log.info("event=unloaded variant=%s", message.variant)
        return Unloaded(call=message.call)

    def _run(self, message: Run) -> Done | None:
        """Run a batch, or start it where the model is a pipeline."""
        with self._in_use:
            return self._run_on_model(message)

    def _run_on_model(self, message: Run) -> Done | None:
        held = self._models.get(message.variant)
        if held is None:
            raise UnknownVariant.of("a loaded variant", field="variant", found=repr(message.variant))
        inputs = {place.name: self._segment.array(place) for place in message.inputs}
        if held.pipeline is not None:
            self._submit(message, held.pipeline, inputs)
            return None
        start_s = time.perf_counter()
        outputs = held.model.run(inputs)
        swap_s: float = getattr(held.model, "last_swap_s", 0.0)
        return self._done(message, held.model, outputs, time.perf_counter() - start_s - swap_s, swap_s)

    def _iterate(self, message: Iterate) -> Iterated:
        sequences = self._sequences.get(message.variant)
        if sequences is None:
            raise UnknownVariant.of("a loaded variant that generates", field="variant", found=repr(message.variant))
        start_s = time.perf_counter()
        sequences.free(message.freed)
        sequences.hold(message.kv_tokens)
        tokens = sequences.prefill(message.prefill) if message.prefill else sequences.decode(message.decode)
        return Iterated(call=message.call, tokens=tuple(tokens), run_s=time.perf_counter() - start_s)

    def _done(
        self, message: Run, model: LoadedModel, outputs: Mapping[str, NDArray[Any]], run_s: float, swap_s: float = 0.0
    ) -> Done:
        check_outputs(outputs, model.outputs, message.inputs[0].shape[0], message.variant)
        places = self._segment.write_outputs(outputs, message.output_offset_bytes, message.output_capacity_bytes)
        return Done(call=message.call, outputs=places, run_s=run_s, swap_s=swap_s)

    def _send(self, message: FromWorker) -> None:
        try:
            with self._sending:
                self._connection.sendall(encode_from_worker(message))
        except ConnectionError:
            _log.debug("event=agent_gone")  # the reading thread sees it as well, and ends the process


def _close(held: _Held | None) -> None:
    """Free what a model holds beyond this process."""
    close = getattr(held.model, "close", None) if held else None
    if close is not None:
        close()


def runtime_factory(path: str) -> Callable[..., GroupRuntime]:
    """Return the callable that ``path`` (``module:name``) names.

    Raises:
        InvalidInput: There is no such module, or no such callable in it.
    """
    module, _, name = path.partition(":")
    try:
        factory: Any = getattr(importlib.import_module(module), name) if module and name else None
    except (ImportError, AttributeError) as error:
        raise InvalidInput.of("module:factory of a runtime", field="runtime", found=f"{path!r} ({error})") from error
    if not callable(factory):
        raise InvalidInput.of("module:factory of a runtime", field="runtime", found=repr(path))
    made: Callable[..., GroupRuntime] = factory
    return made


def make_runtime(path: str, **options: Any) -> GroupRuntime:
    """Return what the factory ``path`` makes of ``options``.

    Raises:
        InvalidInput: There is no such factory, it does not take these options, or what it makes is no runtime.
    """
    # Importing torch takes a processor for seconds, which others need: nobody waits for this worker yet.
    factory = at_low_priority(lambda: runtime_factory(path))
    with contextlib.suppress(ValueError):  # not everything written in C says what it takes
        try:
            inspect.signature(factory).bind(**options)
        except TypeError as error:
            expected = f"a factory that takes {', '.join(options)}"
            raise InvalidInput.of(expected, field="runtime", found=f"{path!r} ({error})") from error
    runtime = factory(**options)
    if not all(callable(getattr(runtime, name, None)) for name in ("names", "load")):
        expected = "a factory of runtimes, which have names and load"
        raise InvalidInput.of(expected, field="runtime", found=f"{path!r}, which makes {type(runtime).__name__}")
    return runtime


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m executor.worker", description="Started by `foreplan agent`.")
    parser.add_argument("--socket", type=int, required=True, help="descriptor of the socket to the agent")
    parser.add_argument("--segment", type=int, required=True, help="descriptor of the shared memory")
    parser.add_argument("--runtime", required=True, help="module:factory")
    parser.add_argument("--devices", default="cpu", help="the group's devices, separated by commas")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model-dir", type=Path)
    parser.add_argument("--compile", action="store_true", help="run batches by torch.compile")
    parser.add_argument("--cuda-graphs", action="store_true", help="replay CUDA graphs")
    parser.add_argument("--host-cache", type=int, default=0, help="bytes of weights to keep in host memory")
    parser.add_argument("--device-memory", type=int, default=0, help="bytes of the device, to swap models within")
    parser.add_argument("--cores", default="", help="run on these processor cores only, separated by commas")
    parser.add_argument("--log-level", default="INFO")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a worker until its agent says stop or is gone; return the exit code."""
    options = _parser().parse_args(arguments)
    configure_logging(options.log_level)
    if options.cores:
        pin_process(tuple(map(int, options.cores.split(","))))  # before the runtime starts threads of its own
    # Ctrl-C is the agent's to answer. A group of processes for that, and no session: Linux shares processors among
    # sessions first, so what one does at low priority would take as much from the others.
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=options.socket) as connection:
        try:
            runtime = make_runtime(
                options.runtime,
                devices=tuple(options.devices.split(",")),
                dtype=options.dtype,
                threads=options.threads,
                model_dir=options.model_dir,
                # Runtimes that know no such options need not take them.
                **({"compiled": True} if options.compile else {}),
                **({"cuda_graphs": True} if options.cuda_graphs else {}),
                **({"host_cache_bytes": options.host_cache} if options.host_cache else {}),
                **({"device_bytes": options.device_memory} if options.device_memory else {}),
            )
        except ForeplanError as error:
            connection.sendall(encode_from_worker(Failed(call=0, problem=str(error), invalid_input=True)))
            return 1
        except Exception as error:  # the edge between a runtime's code and this process
            problem = f"{options.runtime} failed with {type(error).__name__}: {error}"
            connection.sendall(encode_from_worker(Failed(call=0, problem=problem)))
            raise
        gc.freeze()  # a round of the collector over torch and all else would hold up a batch for a tenth of a second
        if not Worker(connection, SharedSegment(options.segment), runtime, _exit, _exit_without_devices).serve():
            _exit()
    return 0


def _exit_without_devices(error: DevicesLost) -> NoReturn:
    _log.error("event=devices_lost problem=%r action=exit", str(error))
    logging.shutdown()
    os._exit(1)


def _exit() -> NoReturn:
    """End at once: a batch or a load may run for long yet, and nobody waits for its result."""
    _log.warning("event=agent_gone action=exit")
    logging.shutdown()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
