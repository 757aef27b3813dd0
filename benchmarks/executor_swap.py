"""Swapping models in a worker: a variant that it never loaded, against one whose weights are still in host memory.

Real workers of the torch runtime, with ``--host-cache`` of 1 GiB. Each variant is loaded, and loaded again after it was
unloaded in between: the times are those that an agent waits, the first inference included, which no cache saves. The
answers before and after must be the same. Without a cache both loads cost about the same.

Then the first two variants take turns on a device that holds the larger one only (``--swap``): the time that a batch
waits for its model, and the rate of batches in turn against that on a device which holds both.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time

import numpy as np
from executor_site import about

from executor.errors import WorkerGone
from executor.segment import aligned, place_all
from executor.worker_link import WorkerLink, WorkerSettings
from executor.worker_wire import Done, Loaded

VARIANTS = sys.argv[1].split(",") if len(sys.argv) > 1 else ["resnet-50", "bert-base", "vit-base"]
ROUNDS = 3
_TURNS = 10


def main() -> None:
    """Measure and print."""
    print(about())
    for variant in VARIANTS:
        kept = [asyncio.run(swap(variant, host_cache_bytes=2**30)) for _ in range(ROUNDS)]
        none = asyncio.run(swap(variant, host_cache_bytes=0))
        cold_s, again_s, first_s = (statistics.median(times) for times in zip(*kept, strict=True))
        print(
            f"{variant}: first load {cold_s:.3f} s, swapped in again {again_s:.3f} s "
            f"(of which the first inference {first_s:.3f} s), "
            f"{cold_s / again_s:.1f} times as fast; without a cache again {none[1]:.3f} s"
        )

    for swaps in (False, True):
        rate, wait_s = asyncio.run(in_turn(VARIANTS[0], VARIANTS[1], swaps=swaps))
        name = f"swapped, each batch waited {wait_s:.3f} s" if swaps else "both there"
        print(f"{VARIANTS[0]} and {VARIANTS[1]} in turn: {name}, {rate:.1f} batches per second")


async def in_turn(one: str, other: str, *, swaps: bool) -> tuple[float, float]:
    """Return the batches per second of two variants in turn, and the median wait of one for its model, seconds."""

    def lost(reason: str) -> None:
        raise WorkerGone(reason)

    settings = WorkerSettings(host_cache_bytes=2**30, swap_bytes=0, log_level="ERROR")
    link = await WorkerLink.start(settings, (0,), lost)
    try:
        if swaps:
            sizes = [(await link.load(variant, 1)).weight_bytes for variant in (one, other)]
            await link.stop()
            settings = WorkerSettings(host_cache_bytes=2**30, swap_bytes=max(sizes), log_level="ERROR")
            link = await WorkerLink.start(settings, (0,), lost)
        loaded = {variant: await link.load(variant, 1) for variant in (one, other)}
        start_s = time.perf_counter()
        waits_s = [(await ran(link, variant, loaded[variant])).swap_s for variant in (one, other) * _TURNS]
        rate = len(waits_s) / (time.perf_counter() - start_s)
    finally:
        await link.stop()
    assert (min(waits_s[1:]) > 0) == swaps
    return rate, statistics.median(waits_s)


async def swap(variant: str, host_cache_bytes: int) -> tuple[float, float, float]:
    """Return the seconds of the first load in a fresh worker, of the load after an unload, and of its inference."""

    def lost(reason: str) -> None:
        raise WorkerGone(reason)

    link = await WorkerLink.start(WorkerSettings(host_cache_bytes=host_cache_bytes, log_level="ERROR"), (0,), lost)
    try:
        await link.load("bert-tiny-16", 1)  # torch's own first time is no part of a swap
        times, answers = [], []
        for _ in range(2):
            start_s = time.perf_counter()
            loaded = await link.load(variant, 1)
            times.append(time.perf_counter() - start_s)
            answers.append(await run(link, variant, loaded))
            await link.unload(variant)
        assert all(np.array_equal(first, again) for first, again in zip(*answers, strict=True))
    finally:
        await link.stop()
    return times[0], times[1], loaded.first_inference_s


async def run(link: WorkerLink, variant: str, loaded: Loaded) -> list[np.ndarray]:
    """Return the outputs for one item of ones."""
    done = await ran(link, variant, loaded)
    return [link.segment.array(place).copy() for place in done.outputs]


async def ran(link: WorkerLink, variant: str, loaded: Loaded) -> Done:
    """Run one item of ones."""
    places = place_all({spec.name: (spec.datatype, (1, *spec.shape)) for spec in loaded.inputs}, 0)
    end_bytes = aligned(places[-1].offset_bytes + places[-1].size_bytes)
    room_bytes = sum(aligned(spec.item_bytes) for spec in loaded.outputs)
    link.segment.grow(end_bytes + room_bytes)
    for place in places:
        link.segment.array(place)[:] = 1
    done = await link.run(variant, places, end_bytes, room_bytes)
    assert isinstance(done, Done)
    return done


if __name__ == "__main__":
    main()
