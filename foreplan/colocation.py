"""Measure how much models slow each other down on one device: each in a process of its own, all busy at once."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from executor.cores import pin_process
from executor.runtime.protocol import OutOfDeviceMemory
from foreplan.device import Device
from foreplan.measure import runtime_on
from plans.errors import InvalidInput, RemoteFailure
from profiles.document import LatencyStatistics, Neighbour, Profile, Row
from profiles.sampling import summarise

__all__ = ["Busy", "Slowdowns", "measure_slowdowns", "middle_batch", "slow_down", "with_slowdowns"]

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

    All processes share the same processors, as many as a pinned worker of the device has, or the same GPUs.

    Args:
        batches: Items per batch, by model.
        device: Where to run.
        copies: Numbers of copies, each at least 2, such as (2, 4).
        pairs: Whether to measure every pair as well.
        window_s: Least time that a group is watched.
        progress: Called with what is being measured.

    What does not fit on the device together is not in the result.

    Raises:
        InvalidInput: A model is unknown.
        OutOfDeviceMemory: The device cannot hold a model even alone.
        RemoteFailure: A measuring process died.
    """
    alone: dict[str, list[float]] = {}
    found: dict[str, Slowdowns] = {}
    for model, batch in batches.items():
        with _workers({model: batch}, max((1, *copies)), device) as workers:
            progress(f"{model} alone")
            alone[model] = _watch(workers[:1], window_s)[0]
            found[model] = _beside_itself(model, workers, copies, alone[model], window_s, progress)
    names = list(batches) if pairs else []
    neighbours: dict[str, list[Neighbour]] = {model: [] for model in batches}
    for position, one in enumerate(names):
        for other in names[position + 1 :]:
            progress(f"{one} beside {other}")
            with _workers({one: batches[one], other: batches[other]}, 1, device) as workers:
                samples = _watch(workers, window_s) if len(workers) == 2 else []
            for (model, beside), taken_s in zip(((one, other), (other, one)), samples, strict=False):
                factor = slow_down(taken_s, alone[model])
                batch, beside_batch = batches[model], batches[beside]
                neighbours[model].append(
                    Neighbour(model=beside, batch=batch, neighbour_batch=beside_batch, factor=factor)
                )
    return {model: replace(each, neighbours=tuple(neighbours[model])) for model, each in found.items()}


def _beside_itself(
    model: str,
    workers: list[_Worker],
    copies: Sequence[int],
    alone_s: Sequence[float],
    window_s: float,
    progress: Callable[[str], None],
) -> Slowdowns:
    interference: dict[int, float] = {}
    latency_s: dict[int, tuple[LatencyStatistics, int]] = {}
    factor = 1.0
    for count in (count for count in sorted(copies) if count <= len(workers)):
        progress(f"{count} copies of {model}")
        together = [taken_s for each in _watch(workers[:count], window_s) for taken_s in each]
        factor = max(factor, slow_down(together, alone_s))
        interference[count] = factor
        latency_s[count] = (summarise(together), len(together))
    return Slowdowns(interference=interference, neighbours=(), latency_s=latency_s)


def slow_down(together_s: Sequence[float], alone_s: Sequence[float]) -> float:
    """Return by how much batches are slower together than alone, on average; at least 1.

    The mean and not the median: what shares a processor or a GPU by time slices lets a batch shorter than a slice run
    undisturbed, and one in many wait for the slices of all others.
    """
    return max(1.0, math.fsum(together_s) / len(together_s) * len(alone_s) / math.fsum(alone_s))


def middle_batch(profile: Profile, device: Device) -> int:
    """Return the median batch of whole requests on ``device``, or of the phases where only these were measured."""
    rows = [row for row in profile.rows if (row.tp, row.pp, row.concurrency) == (device.tp, device.pp, 1)]
    whole = {row.batch for row in rows if row.phase == "whole"}
    batches = sorted(whole or {row.batch for row in rows})
    return batches[len(batches) // 2]


def with_slowdowns(profile: Profile, found: Slowdowns, batch: int, device: Device) -> Profile:
    """Return ``profile`` with rows of the copies, where it has rows of whole requests, and with the factors.

    What is found goes before what the profile knew, copies and each neighbour for themselves. The factors of a profile
    are those of one device: copies of a larger group give rows only.
    """
    alone = [row for row in profile.rows if row.key == ("whole", device.tp, device.pp, 0, 0, 1, batch)]
    together = [_together(alone[0], count, found) for count in found.latency_s] if alone else []
    measured = {row.key for row in together}
    rows = (*(row for row in profile.rows if row.key not in measured), *together)
    if len(device.devices) > 1:
        return profile.model_copy(update={"rows": rows})
    beside = {each.model for each in found.neighbours}
    fields = {
        "interference": found.interference or profile.interference,
        "neighbours": (*(each for each in profile.neighbours if each.model not in beside), *found.neighbours),
    }
    return profile.model_copy(update={"rows": rows, **fields})


def _together(alone: Row, count: int, found: Slowdowns) -> Row:
    """Return the row of ``count`` copies at once: each holds its own weights and activations."""
    latency_s, samples = found.latency_s[count]
    share = latency_s.mean / alone.latency_s.mean
    fields = {
        "concurrency": count,
        "latency_s": latency_s,
        "stage_latency_s": tuple(share * stage_s for stage_s in alone.stage_latency_s),
        "weight_bytes": tuple(count * weight for weight in alone.weight_bytes),
        "peak_bytes": tuple(count * peak for peak in alone.peak_bytes),
        "samples": samples,
        "power_w": None,
    }
    return alone.model_copy(update=fields)


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
    """Start ``copies`` processes for each model of ``batches``, and yield those that fit, when all have loaded.

    Raises:
        OutOfDeviceMemory: Not even the first fits.
    """
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
        fitting = []
        for worker in workers:
            try:
                _answer(worker)  # loaded
            except OutOfDeviceMemory:
                if worker is workers[0]:
                    raise
            else:
                fitting.append(worker)
        yield fitting


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
    if isinstance(answer, OutOfDeviceMemory):
        raise answer
    samples: list[float] = answer
    return samples


def _serve(connection: Connection, model: str, batch: int, device: Device) -> None:
    """Load a model, then obey `Busy` orders: send the seconds of each batch that began and ended in the window."""
    shape = () if len(device.devices) == 1 else ((device.tp, device.pp),)
    try:
        if device.device == "cpu" and hasattr(os, "sched_setaffinity"):
            pin_process(tuple(sorted(os.sched_getaffinity(0))[: device.threads * len(device.devices)]))
        with runtime_on(device) as runtime:
            loaded = runtime.load(model, batch, *shape)
            connection.send([])
            while True:
                order: Busy = connection.recv()
                connection.send(_run(loaded, order))
    except InvalidInput as error:
        connection.send(error.faults)
    except MemoryError as error:
        connection.send(OutOfDeviceMemory(*error.args))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
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
