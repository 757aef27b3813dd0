"""Profile the runtime's models: each in a process of its own, so that one model's memory does not hide another's."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from executor.mps import mps_is_running
from executor.runtime.protocol import OutOfDeviceMemory
from foreplan import __version__
from foreplan.device import Device, processor_name
from foreplan.parallel_group import ParallelGroup
from plans.documents import parse_document
from plans.errors import InvalidInput, RemoteFailure
from profiles.document import Profile, ProfileMeta, Row
from profiles.group import Grid, LoadedGroup, SingleDevice
from profiles.power import nvml_driver, nvml_energy_j
from profiles.profiler import Progress, StopRule, profile_group

__all__ = ["Device", "measure", "processor_name", "runtime_on"]

_WARM_LOAD_UP_TO_S = 20.0
"""A model is loaded a second time, to time a warm load, only when the first took no longer."""


def measure(
    models: Sequence[str],
    device: Device,
    batches: Sequence[int] | Grid,
    stop: StopRule,
    *,
    progress: Callable[[Progress], None],
    known: Callable[[str], Sequence[Row]] = lambda model: (),
    on_row: Callable[[str, Row], None] = lambda model, row: None,
) -> Iterator[Profile]:
    """Yield the profile of each of ``models``, measured one after the other.

    Args:
        models: Names that the runtime knows.
        device: Where to run.
        batches: The batches, or the whole grid.
        stop: When a point is measured enough.
        progress: Called while a model is measured.
        known: Returns the rows of a model that an earlier run has measured already.
        on_row: Called with the model and each row, as soon as it was measured.

    Raises:
        InvalidInput: A model is unknown, or an argument is out of range.
        OutOfDeviceMemory: The device cannot hold a model even at the smallest batch.
        RemoteFailure: The measuring process died.
    """
    grid = batches if isinstance(batches, Grid) else Grid(batches=tuple(batches))
    context = multiprocessing.get_context("spawn")
    for model in models:
        ours, theirs = context.Pipe()
        arguments = (theirs, model, device, grid, stop, tuple(known(model)))
        child = context.Process(target=_child, args=arguments, daemon=True)
        child.start()
        theirs.close()
        try:
            yield _receive(ours, model, progress, on_row)
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


def _receive(
    connection: Connection, model: str, progress: Callable[[Progress], None], on_row: Callable[[str, Row], None]
) -> Profile:
    while True:
        message = connection.recv()
        if isinstance(message, Progress):
            progress(message)
        elif isinstance(message, Row):
            on_row(model, message)
        elif isinstance(message, str):
            return parse_document(message, Profile, where=f"profile of {model}")
        elif isinstance(message, OutOfDeviceMemory):
            raise message
        else:
            raise InvalidInput(message)


def _child(
    connection: Connection, model: str, device: Device, grid: Grid, stop: StopRule, known: tuple[Row, ...]
) -> None:
    """Measure one model and send progress and rows, then the profile as JSON, or what is wrong."""
    try:
        with runtime_on(device) as runtime:
            loaded, loads = _load(runtime, model, device, grid)
            profile = profile_group(
                _group(runtime, loaded, device),
                model=model,
                gpu_type=device.gpu_type,
                grid=grid,
                stop=stop,
                energy_j=_energy_j(device),
                progress=connection.send,
                meta=_meta(device, loaded),
                known=known,
                on_row=connection.send,
            )
        rows = tuple(row.model_copy(update=loads) for row in profile.rows)
        connection.send(profile.model_copy(update={"rows": rows}).model_dump_json(by_alias=True))
    except InvalidInput as error:
        connection.send(error.faults)
    except MemoryError as error:
        connection.send(OutOfDeviceMemory(*error.args))
    except (KeyboardInterrupt, BrokenPipeError):
        pass  # the parent says so, or is gone


@contextmanager
def runtime_on(device: Device) -> Iterator[Any]:
    """Yield the runtime of the device, or of all devices of the group."""
    from executor.runtime.torch_runtime import TorchRuntime

    shared = (device.dtype, device.threads, device.model_dir, device.seed)
    if len(device.devices) == 1:
        yield TorchRuntime(device.device, *shared, compiled=device.compiled, cuda_graphs=device.cuda_graphs)
        return
    if device.compiled or device.cuda_graphs:
        found = f"{len(device.devices)} devices"
        raise InvalidInput.of("one device", field="compile or cuda_graphs", found=found, remedy="leave them off")
    from executor.runtime.parallel import ParallelTorchRuntime

    runtime = ParallelTorchRuntime(device.devices, *shared)
    try:
        yield runtime
    finally:
        runtime.close()


def _group(runtime: Any, loaded: Any, device: Device) -> LoadedGroup:
    """Return what the profiler measures: the loaded model's own view of itself, or one device."""
    if hasattr(loaded, "as_group"):
        group: LoadedGroup = loaded.as_group()
        return group
    if device.cuda_graphs:
        loaded.forget_graphs()  # those of the largest batch, which would count for every other
        return SingleDevice(
            loaded=loaded, memory=lambda action: max(0, runtime.held_bytes(action) - loaded.weight_bytes)
        )
    if len(device.devices) == 1:
        return SingleDevice(loaded=loaded, memory=runtime.peak_growth_bytes)
    memory = runtime.torch_runtime.peak_growth_bytes
    return ParallelGroup(loaded=loaded, memory=memory, tp=device.tp, pp=device.pp)


def _energy_j(device: Device) -> Callable[[], float | None]:
    """Return what reads the energy of all GPUs of the group, or None where one of them does not count it."""
    index = device.index
    if index is None:
        return lambda: None
    from executor.runtime.devices import gpu_identity

    meters = [nvml_energy_j(gpu_identity(index + n).uuid) for n in range(len(device.devices))]

    def read() -> float | None:
        counted = [meter() for meter in meters]
        known = [energy_j for energy_j in counted if energy_j is not None]
        return sum(known) if len(known) == len(counted) else None

    return read


def _load(runtime: Any, model: str, device: Device, grid: Grid) -> tuple[Any, dict[str, float | None]]:
    """Load ``model`` for the largest batch that fits; with it the times of its loads, as fields of a row.

    A plan should count on the first load in a new process. Cold is a load of files that were dropped from the page
    cache: a model that is built has none. Warm is a load right after another.
    """
    dropped = _drop_from_page_cache(device.model_dir / model) if device.model_dir is not None else False
    shape = () if len(device.devices) == 1 else ((device.tp, device.pp),)
    loaded = _load_largest(runtime, model, max(grid.candidates), shape)
    loads = {
        "load_s": loaded.load_s,
        "first_inference_s": loaded.first_inference_s,
        "load_cold_s": loaded.load_s if dropped else None,
        "load_warm_s": None,
    }
    if loaded.load_s <= _WARM_LOAD_UP_TO_S:
        largest = loaded.max_batch
        if hasattr(loaded, "close"):
            loaded.close()
        del loaded  # two copies may not fit
        gc.collect()  # some modules hold themselves
        loaded = runtime.load(model, largest, *shape)
        loads["load_warm_s"] = loaded.load_s
    return loaded, loads


def _load_largest(runtime: Any, model: str, batch: int, shape: tuple[tuple[int, int], ...]) -> Any:
    while True:
        try:
            return runtime.load(model, batch, *shape)
        except MemoryError:
            if batch == 1:
                raise
        batch //= 2


def _drop_from_page_cache(folder: Path) -> bool:
    """Ask the kernel to forget the files of ``folder``; say whether there are any and it was asked."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths or not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _meta(device: Device, loaded: Any) -> ProfileMeta:
    from executor.runtime.devices import gpu_identity

    return ProfileMeta(
        device_name=processor_name() if device.index is None else gpu_identity(device.index).name,
        driver="" if device.index is None else nvml_driver(),
        torch=version("torch"),
        dtype=device.dtype,
        input=", ".join(f"{spec.datatype} {'x'.join(map(str, spec.shape))}" for spec in loaded.inputs),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        tool_version=__version__,
        options=_options(device),
    )


def _options(device: Device) -> dict[str, str]:
    """Return the choices that change speed, as a profile records them."""
    chosen = {
        "threads": str(device.threads) if device.device == "cpu" else "",
        "compile": "default" if device.compiled else "",
        "cuda_graphs": "on" if device.cuda_graphs else "",
        "mps": "on" if device.device != "cpu" and mps_is_running() else "",
    }
    return {name: value for name, value in chosen.items() if value}
