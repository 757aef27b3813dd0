"""Measure how much models slow each other down on one device: each in a process of its own, all busy at once."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from foreplan.device import Device
from plans.errors import InvalidInput, RemoteFailure
from profiles.document import LatencyStatistics, Neighbour
from profiles.sampling import nearest_rank, summarise

__all__ = ["Busy", "Slowdowns", "measure_slowdowns"]

_LEAST_SAMPLES = 5
_HEAD_START_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Slowdowns:
    """What co-location costs one model.

    Attributes:
        interference: Factor on the latency by number of copies in flight; never falls.
        neighbours: Factors beside other models.
        latency_s: Latency by number of copies, and how many batches were timed.
    """

    interference: Mapping[int, float]
    neighbours: tuple[Neighbour, ...]
    latency_s: Mapping[int, tuple[LatencyStatistics, int]]


def measure_slowdowns(
    batches: Mapping[str, int],
    device: Device,
    copies: Sequence[int],
    *,
    pairs: bool,
    window_s: float = 1.5,
    progress: Callable[[str], None],
) -> dict[str, Slowdowns]:
    """Measure each model of ``batches`` beside copies of itself and, if ``pairs``, beside every other one.

    All processes share the same processors, as many as ``device.threads``, or the same GPU.

    Args:
        batches: Items per batch, by model.
        device: Where to run.
        copies: Numbers of copies, each at least 2, such as (2, 4).
        pairs: Whether to measure every pair as well.
        window_s: Least time that a group is watched.
        progress: Called with what is being measured.

    Raises:
        InvalidInput: A model is unknown.
        RemoteFailure: A measuring process died.
    """
    alone: dict[str, float] = {}
    found: dict[str, Slowdowns] = {}
    for model, batch in batches.items():
        with _workers({model: batch}, max((1, *copies)), device) as workers:
            progress(f"{model} alone")
            alone[model] = _median(_watch(workers[:1], window_s)[0])
            found[model] = _beside_itself(model, workers, copies, alone[model], window_s, progress)
    names = list(batches) if pairs else []
    neighbours: dict[str, list[Neighbour]] = {model: [] for model in batches}
    for position, one in enumerate(names):
        for other in names[position + 1 :]:
            progress(f"{one} beside {other}")
            with _workers({one: batches[one], other: batches[other]}, 1, device) as workers:
                samples = _watch(workers, window_s)
            for (model, beside), taken_s in zip(((one, other), (other, one)), samples, strict=True):
                factor = max(1.0, _median(taken_s) / alone[model])
                batch, beside_batch = batches[model], batches[beside]
                neighbours[model].append(
                    Neighbour(model=beside, batch=batch, neighbour_batch=beside_batch, factor=factor)
                )
    return {model: replace(each, neighbours=tuple(neighbours[model])) for model, each in found.items()}


def _beside_itself(
    model: str,
    workers: list[_Worker],
    copies: Sequence[int],
    alone_s: float,
    window_s: float,
    progress: Callable[[str], None],
) -> Slowdowns:
    interference: dict[int, float] = {}
    latency_s: dict[int, tuple[LatencyStatistics, int]] = {}
    factor = 1.0
    for count in sorted(copies):
        progress(f"{count} copies of {model}")
        together = [taken_s for each in _watch(workers[:count], window_s) for taken_s in each]
        factor = max(factor, _median(together) / alone_s)
        interference[count] = factor
        latency_s[count] = (summarise(together), len(together))
    return Slowdowns(interference=interference, neighbours=(), latency_s=latency_s)


def _median(samples: Sequence[float]) -> float:
    return nearest_rank(sorted(samples), 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Worker:
    model: str
    batch: int
    connection: Connection


@dataclass(frozen=True, slots=True)
class Busy:
    """An order to a worker: run batches of this size back to back from ``start_s`` to ``end_s`` on the shared clock."""

    batch: int
    start_s: float
    end_s: float


@contextmanager
def _workers(batches: Mapping[str, int], copies: int, device: Device) -> Iterator[list[_Worker]]:
    """Start ``copies`` processes for each model of ``batches``, and yield them when all have loaded."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        workers = []
        for model, batch in [pair for pair in batches.items() for _ in range(copies)]:
            ours, theirs = context.Pipe()
            child = context.Process(target=_serve, args=(theirs, model, batch, device), daemon=True)
            child.start()
            theirs.close()
            stack.callback(_end, child, ours)
            workers.append(_Worker(model=model, batch=batch, connection=ours))
        for worker in workers:
            _answer(worker)  # loaded
        yield workers


def _end(child: Any, connection: Connection) -> None:
    connection.close()
    child.terminate()
    child.join()


def _watch(workers: Sequence[_Worker], window_s: float) -> list[list[float]]:
    """Keep all workers busy at once and return the seconds of each one's batches, in a longer window if need be."""
    while True:
        start_s = time.monotonic() + _HEAD_START_S
        for worker in workers:
            worker.connection.send(Busy(worker.batch, start_s, start_s + window_s))
        samples = [_answer(worker) for worker in workers]
        if all(len(each) >= _LEAST_SAMPLES for each in samples):
            return samples
        window_s *= 2


def _answer(worker: _Worker) -> list[float]:
    try:
        answer = worker.connection.recv()
    except EOFError:
        raise RemoteFailure(
            f"the process that runs {worker.model}", "died; it may have run out of memory", retryable=False
        ) from None
    if isinstance(answer, tuple):
        raise InvalidInput(answer)
    samples: list[float] = answer
    return samples


def _serve(connection: Connection, model: str, batch: int, device: Device) -> None:
    """Load a model, then obey `Busy` orders: send the seconds of each batch that began and ended in the window."""
    from executor.runtime.torch_runtime import TorchRuntime

    if device.device == "cpu" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: device.threads])
    try:
        runtime = TorchRuntime(
            device=device.device,
            dtype=device.dtype,
            threads=device.threads,
            model_dir=device.model_dir,
            seed=device.seed,
            compiled=device.compiled,
            cuda_graphs=device.cuda_graphs,
        )
        loaded = runtime.load(model, batch)
        connection.send([])
        while True:
            order: Busy = connection.recv()
            connection.send(_run(loaded, order))
    except InvalidInput as error:
        connection.send(error.faults)
    except (EOFError, KeyboardInterrupt):
        pass  # the parent is done


def _run(loaded: Any, order: Busy) -> list[float]:
    inputs = loaded.example(order.batch)
    samples: list[float] = []
    while True:
        began_s = time.monotonic()
        if began_s >= order.end_s:
            return samples
        loaded.run(inputs)
        ended_s = time.monotonic()
        if began_s >= order.start_s and ended_s <= order.end_s:
            samples.append(ended_s - began_s)
