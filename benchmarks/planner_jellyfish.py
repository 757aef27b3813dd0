"""Jellyfish's problem: a variant and a batch per GPU, and clients behind networks; gap <= 1 %, 4 x 32 within 500 ms.

16 variants, each at six batches; clients with 5 to 30 frames per second. Their times left are structured (an SLO of
75 to 150 ms and a bandwidth each, so larger variants leave less) or not (uniform per client and variant, up to 0.15,
0.3 or 0.6 s), or unstructured with rates that share no divisor. Cases: 2 x 8, 4 x 16, 4 x 32 and 8 x 64 GPUs x
clients; once within 500 ms, and those that keep a gap beyond 1 % again within ten seconds. The worst over the seeds is
printed and held to the target. Importing the solver and compiling, once per process or installation, is stated apart.

    python benchmarks/planner_jellyfish.py [--seeds 4] [--cases 4x32 ...]
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import platform
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from planner.accuracy_scaling import Client, Mapping, ScaledVariant, assign_clients, time_left_s

CASES = ((2, 8), (4, 16), (4, 32), (8, 64))
LONGEST_LEFT_S = (0.15, 0.3, 0.6)
QUICK_S = 0.45
PATIENT_S = 10.0
MOST_GAP = 0.01
MOST_S = 0.5


def variants() -> list[ScaledVariant]:
    """Return 16 variants whose latency grows by a fifth from each to the next, with falling gains in accuracy."""
    return [
        ScaledVariant(
            name=f"variant-{index}",
            accuracy=float(0.45 + 0.28 * (1 - np.exp(-index / 6))),
            latency_s=tuple(
                (batch, 0.006 * 1.18**index + 0.0015 * 1.22**index * batch) for batch in (1, 2, 4, 8, 12, 16)
            ),
        )
        for index in range(16)
    ]


def clients(count: int, seed: int) -> list[Client]:
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        fps, slo_s = float(rng.choice([5, 10, 15, 25, 30])), float(rng.choice([0.075, 0.1, 0.15]))
        bandwidth = float(rng.uniform(2.5e6, 15e6))
        left_s = tuple(time_left_s(slo_s, 20_000 + 6_000 * kind, bandwidth, fps, 0.01) for kind in range(16))
        found.append(Client(name=f"client-{index}", fps=fps, left_s=left_s))
    return found


def unstructured(count: int, seed: int, longest_s: float, *, even: bool = True) -> list[Client]:
    """Return clients whose times left follow no pattern; their rates are whole multiples of 5 when ``even``."""
    rng = np.random.default_rng(1000 + seed)
    times = np.ones(count) if even else rng.uniform(0.8, 1.2, count)
    return [
        Client(
            name=f"client-{index}",
            fps=float(rng.choice([5, 10, 15, 25, 30]) * times[index]),
            left_s=tuple(rng.uniform(0.02, longest_s, 16).tolist()),
        )
        for index in range(count)
    ]


FAMILIES: dict[str, Callable[[int, int], list[Client]]] = {
    "structured": clients,
    **{f"to {longest_s:g} s": partial(unstructured, longest_s=longest_s) for longest_s in LONGEST_LEFT_S},
    "to 0.3 s, odd rates": partial(unstructured, longest_s=0.3, even=False),
}


def assert_sound(found: Mapping, wanted: list[Client], models: list[ScaledVariant]) -> None:
    by_name = {client.name: client for client in wanted}
    for kind, served in zip(found.gpus, found.clients, strict=True):
        if kind is not None:
            index = next(i for i, model in enumerate(models) if model.name == kind[0])
            latency_s = dict(models[index].latency_s)[kind[1]]
            assert sum(by_name[name].fps for name in served) < kind[1] / latency_s
            assert all(2 * latency_s <= by_name[name].left_s[index] for name in served)
    assert len(found.dropped) + sum(map(len, found.clients)) == len(wanted)


def measured(gpus: int, wanted: list[Client], models: list[ScaledVariant]) -> tuple[float, float, float]:
    """Return gap and seconds of a quick search, and the gap after a patient one where that was needed."""
    started_s = time.perf_counter()
    found = assign_clients(wanted, models, gpus, time_limit_s=QUICK_S)
    wall_s = time.perf_counter() - started_s
    assert_sound(found, wanted, models)
    gap = found.gap
    if gap > MOST_GAP:
        patient = assign_clients(wanted, models, gpus, time_limit_s=PATIENT_S)
        assert_sound(patient, wanted, models)
        gap = min(gap, patient.gap)
    return found.gap, wall_s, gap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, help="seeds of every family")
    parser.add_argument("--cases", nargs="*", default=[f"{gpus}x{count}" for gpus, count in CASES])
    arguments = parser.parse_args()
    models = variants()
    started_s = time.perf_counter()
    importlib.import_module("planner.mathopt_backend")
    assign_clients(clients(2, 0), models, 1, time_limit_s=0.05)
    ready_s = time.perf_counter() - started_s
    date = datetime.datetime.now(datetime.UTC).date()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {date}; importing and compiling took {ready_s:.2f} s")
    missed = []
    for gpus, count in CASES:
        if f"{gpus}x{count}" not in arguments.cases:
            continue
        for family, make in FAMILIES.items():
            rows = [measured(gpus, make(count, seed), models) for seed in range(arguments.seeds)]
            quick, wall_s, patient = (max(row[index] for row in rows) for index in range(3))
            late = sum(row[0] > MOST_GAP for row in rows)
            line = f"{gpus} x {count}, {family}: worst gap {quick:.2%}, mean {np.mean([row[0] for row in rows]):.2%}"
            line += f", longest {wall_s * 1000:.0f} ms"
            if late:
                line += f"; {late} of {len(rows)} beyond {MOST_GAP:.0%}, {patient:.2%} at worst within {PATIENT_S:g} s"
            print(line, flush=True)
            if patient > MOST_GAP or ((gpus, count) == (4, 32) and (wall_s > MOST_S or late)):
                missed.append(line)
    assert not missed, "missed: " + " | ".join(missed)


if __name__ == "__main__":
    main()
