"""Profile the runtime's models: each in a process of its own, so that one model's memory does not hide another's."""

from __future__ import annotations

import multiprocessing
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

from foreplan import __version__
from plans.documents import parse_document
from plans.errors import InvalidInput, RemoteFailure
from profiles.document import Profile, ProfileMeta
from profiles.profiler import Progress, StopRule, profile_callable

__all__ = ["Device", "measure", "processor_name"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Where and how models run while they are measured: the arguments of the runtime, and the name in cluster.yaml."""

    gpu_type: str
    device: str = "cpu"
    dtype: str = "fp32"
    threads: int = 1
    model_dir: Path | None = None
    seed: int = 0


def measure(
    models: Sequence[str],
    device: Device,
    batches: Sequence[int],
    stop: StopRule,
    *,
    progress: Callable[[Progress], None],
) -> Iterator[Profile]:
    """Yield the profile of each of ``models``, measured one after the other.

    Raises:
        InvalidInput: A model is unknown, or an argument is out of range.
        RemoteFailure: The measuring process died.
    """
    context = multiprocessing.get_context("spawn")
    for model in models:
        ours, theirs = context.Pipe()
        child = context.Process(target=_child, args=(theirs, model, device, tuple(batches), stop), daemon=True)
        child.start()
        theirs.close()
        try:
            yield _receive(ours, model, progress)
        except EOFError:
            child.join()
            raise RemoteFailure(
                f"the process that profiles {model}",
                f"died with exit code {child.exitcode}; it may have run out of memory",
                retryable=False,
            ) from None
        finally:
            ours.close()
            child.terminate()
            child.join()


def _receive(connection: Connection, model: str, progress: Callable[[Progress], None]) -> Profile:
    while True:
        message = connection.recv()
        if isinstance(message, Progress):
            progress(message)
        elif isinstance(message, str):
            return parse_document(message, Profile, where=f"profile of {model}")
        else:
            raise InvalidInput(message)


def _child(connection: Connection, model: str, device: Device, batches: tuple[int, ...], stop: StopRule) -> None:
    """Measure one model and send progress, then the profile as JSON or the faults as a tuple."""
    from executor.runtime.torch_runtime import TorchRuntime

    try:
        runtime = TorchRuntime(
            device=device.device,
            dtype=device.dtype,
            threads=device.threads,
            model_dir=device.model_dir,
            seed=device.seed,
        )
        largest = max(batches, default=1)
        loaded = runtime.load(model, largest)
        meta = ProfileMeta(
            device_name=processor_name() if device.device == "cpu" else device.device,
            torch=version("torch"),
            dtype=device.dtype,
            input=", ".join(f"{spec.datatype} {'x'.join(map(str, spec.shape))}" for spec in loaded.inputs),
            measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
            tool_version=__version__,
        )
        profile = profile_callable(
            lambda: loaded,
            model=model,
            gpu_type=device.gpu_type,
            batches=batches,
            stop=stop,
            memory=runtime.peak_growth_bytes,
            progress=connection.send,
            meta=meta,
        )
        connection.send(profile.model_dump_json(by_alias=True))
    except InvalidInput as error:
        connection.send(error.faults)
    except KeyboardInterrupt:
        pass  # the parent says so


def processor_name() -> str:
    """Return the processor's name as the operating system gives it, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
