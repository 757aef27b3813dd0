"""Simulated annealing over what GPUs run and whom they serve: Jellyfish's problem from the side of good mappings.

Compiled. The state is a kind per GPU and a GPU, or none, per client; it never breaks a throughput or a client's time.
docs/formulation.md, section 11.
"""

from __future__ import annotations

import numba
import numpy as np

from planner.client_patterns import Kinds, Pattern, best_patterns
from planner.kind_choices import promising_choices
from planner.linear import Integers

__all__ = ["annealed", "compile_walks"]

_HOTTEST = 0.25
"""First temperature, in units of the value of an average client."""

_COLDEST = 0.003
"""Last temperature, in the same units."""

_KIND_CHANGES = 0.02
"""Share of the moves that give a GPU another kind."""


def annealed(
    kinds: Kinds, gpus: int, *, seed: int, moves: int, allowed: Integers, start: list[Pattern] | None = None
) -> tuple[list[Pattern], float]:
    """Return the best patterns that a walk of ``moves`` moves meets, one per GPU in use, and their value.

    Args:
        kinds: What may run.
        gpus: How many GPUs there are.
        seed: Of the walk.
        moves: Length of the walk; its cost grows with it, and with GPUs times clients only where kinds change.
        allowed: Kinds that GPUs may be given.
        start: Where the walk begins; random kinds without clients when there is none.
    """
    generator = np.random.default_rng(seed)
    kind = generator.choice(allowed, size=gpus).astype(np.int64)
    gpu_of = np.full(len(kinds.fps), -1, dtype=np.int64)
    for gpu, pattern in enumerate(start or ()):
        kind[gpu] = pattern.kind
        gpu_of[list(pattern.clients)] = gpu
    unit = float(kinds.fps.mean() * kinds.accuracy[allowed].mean())
    found_kind, found_gpu_of, _ = _walk(
        kinds.accuracy,
        kinds.throughput,
        kinds.eligible,
        kinds.fps,
        allowed,
        kind,
        gpu_of,
        moves,
        (unit * (_HOTTEST if start is None else _HOTTEST / 4), unit * _COLDEST),
        int(generator.integers(2**31)),
    )
    patterns = [
        Pattern(int(found_kind[gpu]), tuple(np.flatnonzero(found_gpu_of == gpu).tolist())) for gpu in range(gpus)
    ]
    filled = [pattern for pattern in patterns if pattern.clients]
    return filled, sum(kinds.value(each.kind, each.clients) for each in filled)


def compile_walks() -> None:
    """Compile what Jellyfish's problem is solved with, or load it where that was done before."""
    one = np.ones(1)
    kinds = Kinds(accuracy=one, throughput=one, eligible=np.ones((1, 1), dtype=bool), fps=one)
    best_patterns(kinds, np.zeros(1))
    promising_choices(kinds, 1, np.zeros(1), 0.0, most=1)
    annealed(kinds, 1, seed=1, moves=2, allowed=np.zeros(1, dtype=np.int64))


@numba.njit(cache=True)
def _walk(  # type: ignore[no-untyped-def]
    accuracy, throughput, eligible, fps, allowed, kind, gpu_of, moves, temperatures, seed
):
    """Walk; return the best kinds, the best GPUs of clients, and their value."""
    np.random.seed(seed)
    gpus, clients = len(kind), len(fps)
    load = np.zeros(gpus)
    value = 0.0
    for client in range(clients):
        if gpu_of[client] >= 0:
            load[gpu_of[client]] += fps[client]
            value += fps[client] * accuracy[kind[gpu_of[client]]]
    best, best_kind, best_gpu_of = value, kind.copy(), gpu_of.copy()
    trial = gpu_of.copy()
    trial_load = load.copy()
    cooling = (temperatures[1] / temperatures[0]) ** (1.0 / moves)
    temperature = temperatures[0]
    for _ in range(moves):
        temperature *= cooling
        if np.random.random() < _KIND_CHANGES:
            gpu = np.random.randint(gpus)
            other = allowed[np.random.randint(len(allowed))]
            if other == kind[gpu]:
                continue
            trial[:] = gpu_of
            trial_load[:] = load
            gain = _refilled(accuracy, throughput, eligible, fps, kind, trial, trial_load, gpu, other)
            if gain >= 0 or np.random.random() < np.exp(gain / temperature):
                kind[gpu] = other
                gpu_of[:] = trial
                load[:] = trial_load
                value += gain
        else:
            value += _moved(accuracy, throughput, eligible, fps, kind, gpu_of, load, temperature)
        if value > best + 1e-9:
            best = value
            best_kind[:] = kind
            best_gpu_of[:] = gpu_of
    return best_kind, best_gpu_of, best


@numba.njit(cache=True)
def _moved(accuracy, throughput, eligible, fps, kind, gpu_of, load, temperature):  # type: ignore[no-untyped-def]
    """Offer a random client to a random GPU, where others make room for it if they must; return what was gained."""
    client, gpu = np.random.randint(len(fps)), np.random.randint(len(kind))
    before = gpu_of[client]
    if before == gpu or not eligible[kind[gpu], client] or fps[client] > throughput[kind[gpu]]:
        return 0.0
    gain = fps[client] * accuracy[kind[gpu]]
    if before >= 0:
        gain -= fps[client] * accuracy[kind[before]]
    evicted, target = -1, -1
    if load[gpu] + fps[client] > throughput[kind[gpu]]:
        # The first from a random one on whose place suffices.
        first = np.random.randint(len(fps))
        for step in range(len(fps)):
            other = (first + step) % len(fps)
            if gpu_of[other] == gpu and load[gpu] - fps[other] + fps[client] <= throughput[kind[gpu]]:
                evicted = other
                break
        if evicted < 0:
            return 0.0
        gain -= fps[evicted] * accuracy[kind[gpu]]
        target = _home(accuracy, throughput, eligible, fps, kind, load, evicted, gpu, before, client)
        if target >= 0:
            gain += fps[evicted] * accuracy[kind[target]]
    if gain < 0 and np.random.random() >= np.exp(gain / temperature):
        return 0.0
    if before >= 0:
        load[before] -= fps[client]
    gpu_of[client] = gpu
    load[gpu] += fps[client]
    if evicted >= 0:
        load[gpu] -= fps[evicted]
        gpu_of[evicted] = target
        if target >= 0:
            load[target] += fps[evicted]
    return gain


@numba.njit(cache=True)
def _home(accuracy, throughput, eligible, fps, kind, load, evicted, barred, left, client):  # type: ignore[no-untyped-def]
    """Return the most accurate GPU with room for ``evicted``, where ``client`` has left the GPU ``left``; or -1."""
    target = -1
    for gpu in range(len(kind)):
        if gpu == barred or not eligible[kind[gpu], evicted]:
            continue
        there = load[gpu] - (fps[client] if gpu == left else 0.0)
        better = target < 0 or accuracy[kind[gpu]] > accuracy[kind[target]]
        if better and there + fps[evicted] <= throughput[kind[gpu]]:
            target = gpu
    return target


@numba.njit(cache=True)
def _refilled(accuracy, throughput, eligible, fps, kind, gpu_of, load, gpu, other):  # type: ignore[no-untyped-def]
    """Give ``gpu`` the kind ``other``: those who cannot stay look for a place, others are won; return the gain."""
    clients = len(fps)
    gain = 0.0
    before = accuracy[kind[gpu]]
    load[gpu] = 0.0
    first = np.random.randint(clients)
    for step in range(clients):
        client = (first + step) % clients
        if gpu_of[client] != gpu:
            continue
        gain -= fps[client] * before
        if eligible[other, client] and load[gpu] + fps[client] <= throughput[other]:
            load[gpu] += fps[client]
            gain += fps[client] * accuracy[other]
            continue
        gpu_of[client] = _home(accuracy, throughput, eligible, fps, kind, load, client, gpu, -1, client)
        if gpu_of[client] >= 0:
            load[gpu_of[client]] += fps[client]
            gain += fps[client] * accuracy[kind[gpu_of[client]]]
    for step in range(clients):
        client = (first + step) % clients
        held = gpu_of[client]
        if held == gpu or not eligible[other, client] or load[gpu] + fps[client] > throughput[other]:
            continue
        more = accuracy[other] - (accuracy[kind[held]] if held >= 0 else 0.0)
        if more > 0:
            if held >= 0:
                load[held] -= fps[client]
            gpu_of[client] = gpu
            load[gpu] += fps[client]
            gain += more * fps[client]
    return gain
