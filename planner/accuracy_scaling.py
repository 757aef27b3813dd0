"""Accuracy scaling: which variant and batch every GPU runs, and which clients it serves. This is Jellyfish's problem.

Every GPU runs one variant at one batch. A client with a frame rate may be served where twice the batch's latency is
within the time that its network leaves, and the frame rates of a GPU's clients stay below its throughput. The goal is
the accuracy that frames get, weighted by rate; a client that cannot be served is named and blocks nobody else.
docs/formulation.md, section 11.

A relaxation that lets clients be cut in pieces, with GPUs counted per (variant, batch), gives the bound; its counts,
and those of a local search, are filled with whole clients.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from planner.backend import Budget, NothingFound, Solution, Solver, solver
from planner.linear import Floats, Integers, LinearModel, ModelBuilder
from planner.objective import gap_of
from plans.errors import InvalidInput

__all__ = ["Client", "Mapping", "ScaledVariant", "assign_clients", "time_left_s"]

_BELOW_FPS = 1e-5
"""Rates must stay below a throughput by this much, which is more than a solver's tolerance."""

_CLOSED = 1e-3
"""Gap at which changing single GPUs ends."""

_RESERVE_S = 0.03
"""Time left at which no further assignment is begun."""

_MOST_MOVES = 1000
"""Changes of one GPU that are looked at."""

_RELAXATION_SHARE = 0.5
"""Share of the time that the relaxation may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledVariant:
    """One variant: its accuracy in [0, 1], and the latency of each batch that it may run at, seconds."""

    name: str
    accuracy: float
    latency_s: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One client: frames per second, and per variant the time that is left on the server; 0 where none is."""

    name: str
    fps: float
    left_s: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """What every GPU runs (variant, batch) or None, and whom it serves; certificate included.

    Attributes:
        gpus: Per GPU the variant's name and the batch, or None where it is idle.
        clients: Per GPU the names of its clients.
        dropped: Clients that are not served.
        accuracy: Accuracy summed over frames per second.
        bound: Proven: no mapping reaches more.
        wall_s: Seconds taken.
    """

    gpus: tuple[tuple[str, int] | None, ...]
    clients: tuple[tuple[str, ...], ...]
    dropped: tuple[str, ...]
    accuracy: float
    bound: float
    wall_s: float

    @property
    def gap(self) -> float:
        """Relative distance of the accuracy from its bound."""
        return gap_of(self.accuracy, self.bound)


def time_left_s(slo_s: float, payload_bytes: float, bandwidth: float, fps: float, overhead_s: float = 0.0) -> float:
    """Return what network and overhead leave of a frame's SLO; 0 when the network cannot carry the frame rate."""
    if bandwidth <= 0 or bandwidth / max(payload_bytes, 1e-12) < fps:
        return 0.0
    return max(0.0, slo_s - payload_bytes / bandwidth - overhead_s)


def assign_clients(
    clients: Sequence[Client],
    variants: Sequence[ScaledVariant],
    gpus: int,
    *,
    time_limit_s: float = 0.5,
    seed: int = 1,
    clock: Callable[[], float] = time.monotonic,
) -> Mapping:
    """Return the best mapping found within ``time_limit_s``, with its bound.

    Raises:
        InvalidInput: There is no GPU, or a client's times do not match the variants.
    """
    _check(clients, variants, gpus)
    search = _Search(clients, variants, gpus, solver("highs"), seed, clock, time_limit_s)
    return search.run()


def _check(clients: Sequence[Client], variants: Sequence[ScaledVariant], gpus: int) -> None:
    if gpus < 1:
        raise InvalidInput.of("at least 1 GPU", field="gpus", found=gpus)
    for client in clients:
        if len(client.left_s) != len(variants) or client.fps <= 0:
            expected = f"a positive frame rate and a time left for each of {len(variants)} variants"
            raise InvalidInput.of(expected, field=client.name, found=f"{client.fps} fps, {len(client.left_s)} times")


class _Search:
    """One run: the kinds (variant, batch), the relaxation, and the filling of GPUs with clients."""

    def __init__(
        self,
        clients: Sequence[Client],
        variants: Sequence[ScaledVariant],
        gpus: int,
        linear: Solver,
        seed: int,
        clock: Callable[[], float],
        time_limit_s: float,
    ) -> None:
        self._clients, self._variants, self._gpus = clients, variants, gpus
        self._solver, self._seed, self._clock = linear, seed, clock
        self._started_s = clock()
        self._ends_at_s = self._started_s + time_limit_s
        self._fps = np.array([client.fps for client in clients])
        kinds = [
            (index, batch, latency_s)
            for index, variant in enumerate(variants)
            for batch, latency_s in variant.latency_s
        ]
        left = np.array([client.left_s for client in clients]).reshape(len(clients), len(variants))
        eligible = [2 * latency_s <= left[:, index] for index, _, latency_s in kinds]
        # A kind that serves nobody, or no more than another of at least its accuracy and throughput, is of no use.
        self._kinds, self._eligible = _worthwhile(kinds, eligible, variants)
        self._accuracy = np.array([variants[index].accuracy for index, _, _ in self._kinds])
        self._throughput = np.array([batch / latency_s - _BELOW_FPS for _, batch, latency_s in self._kinds])

    def run(self) -> Mapping:
        servable = np.array([any(each[client] for each in self._eligible) for client in range(len(self._clients))])
        best_accuracy = np.zeros(len(self._clients))
        for accuracy, mine in zip(self._accuracy, self._eligible, strict=True):
            best_accuracy = np.maximum(best_accuracy, accuracy * mine)
        bound = float(self._fps @ best_accuracy)
        filled, value = self._climb([])
        if servable.any() and gap_of(value, bound) > 1e-9:
            counts, relaxed = self._relaxation()
            bound = min(bound, relaxed)
            if counts:
                other, other_value = self._climb(counts)
                filled, value = (other, other_value) if other_value > value else (filled, value)
            filled, value = self._exactly(filled, value)
            filled, value = self._perturbed(filled, value, bound)
        return self._mapping(filled, value, max(bound, value))

    def _left_s(self) -> float:
        return self._ends_at_s - self._clock()

    def _relaxation(self) -> tuple[list[int], float]:
        """Return the kinds of the relaxation's GPUs, and its bound: (11.1) to (11.4)."""
        builder = ModelBuilder()
        kinds = range(len(self._kinds))
        count = builder.add_variables(
            [f"gpus[{kind}]" for kind in kinds], upper=np.full(len(kinds), float(self._gpus)), integer=True
        )
        builder.add_row("gpus", count, np.ones(len(kinds)), upper=float(self._gpus))
        objective = [0.0] * len(kinds)
        rows: dict[int, list[int]] = {client: [] for client in range(len(self._clients))}
        for kind in kinds:
            mine = np.flatnonzero(self._eligible[kind])
            part = builder.add_variables(
                [f"part[{client},{kind}]" for client in mine], upper=np.ones(len(mine)), integer=False
            )
            objective.extend(self._fps[mine] * self._accuracy[kind])
            values = np.append(self._fps[mine], -self._throughput[kind])
            builder.add_row(f"rate[{kind}]", np.append(part, count[kind]), values, upper=0.0)
            for position, column in zip(mine.tolist(), part.tolist(), strict=True):
                rows[position].append(column)
        for client, columns in rows.items():
            if columns:
                builder.add_row(f"client[{client}]", columns, np.ones(len(columns)), upper=1.0)
        model = builder.build().with_objective(np.array(objective), maximise=True)
        budget = Budget(time_limit_s=max(0.02, _RELAXATION_SHARE * self._left_s()), gap=1e-3, seed=self._seed)
        answer = self._solver.solve(model, budget)
        if not isinstance(answer, Solution):
            known = answer.bound if isinstance(answer, NothingFound) else None
            return [], np.inf if known is None else known
        chosen = np.round(answer.values[count]).astype(int)
        return [kind for kind in kinds for _ in range(chosen[kind])], answer.bound

    def _climb(self, start: list[int]) -> tuple[list[tuple[int, list[int]]], float]:
        """Change one GPU's kind at a time while that gains and time lasts; from nothing, add the best kind per GPU."""
        chosen = list(start)
        filled, value = self._fill(chosen)
        for _ in range(self._gpus - len(chosen)):
            options = [(self._fill([*chosen, kind])[1], -kind) for kind in range(len(self._kinds))]
            if not options or self._left_s() <= 0:
                break
            chosen.append(-max(options)[1])
        filled, value = self._fill(chosen)
        improved = True
        while improved and self._left_s() > 0.4 * (self._ends_at_s - self._started_s):
            improved = False
            for position, kind in itertools.product(range(len(chosen)), range(len(self._kinds))):
                if self._left_s() <= 0.4 * (self._ends_at_s - self._started_s):
                    break
                trial = [*chosen[:position], kind, *chosen[position + 1 :]]
                other, other_value = self._fill(trial)
                if other_value > value + 1e-9:
                    chosen, filled, value, improved = trial, other, other_value, True
        return filled, value

    def _fill(self, chosen: list[int]) -> tuple[list[tuple[int, list[int]]], float]:
        """Give each GPU clients, the most accurate first: those that the fewest kinds could serve, then the largest."""
        free = np.ones(len(self._clients), dtype=bool)
        choice = np.sum([self._eligible[kind] for kind in chosen], axis=0) if chosen else np.zeros(len(self._clients))
        order = np.lexsort((-self._fps, choice))
        filled = []
        value = 0.0
        for kind in sorted(chosen, key=lambda kind: (-self._accuracy[kind], -self._throughput[kind])):
            room, mine = float(self._throughput[kind]), []
            for client in order[(free & self._eligible[kind])[order]]:
                if self._fps[client] <= room:
                    room -= float(self._fps[client])
                    mine.append(int(client))
            free[mine] = False
            value += float(self._accuracy[kind] * self._fps[mine].sum())
            filled.append((kind, mine))
        return filled, value

    def _exactly(self, filled: list[tuple[int, list[int]]], value: float) -> tuple[list[tuple[int, list[int]]], float]:
        """Assign whole clients to the chosen kinds as well as can be in the time left."""
        if self._left_s() <= 0.02 or not filled:
            return filled, value
        model, pairs = self._assignment([kind for kind, _ in filled])
        hint = np.array([float(client in filled[gpu][1]) for client, gpu in pairs])
        answer = self._solver.solve(model, Budget(time_limit_s=self._left_s(), gap=1e-4, seed=self._seed), hint)
        if not isinstance(answer, Solution) or answer.objective <= value:
            return filled, value
        better: list[tuple[int, list[int]]] = [(kind, []) for kind, _ in filled]
        for (client, gpu), taken in zip(pairs, answer.values, strict=True):
            if taken > 0.5:
                better[gpu][1].append(client)
        return better, answer.objective

    def _perturbed(
        self, filled: list[tuple[int, list[int]]], value: float, bound: float
    ) -> tuple[list[tuple[int, list[int]]], float]:
        """Give one GPU another kind and assign exactly, in random order, while the gap is open and time lasts."""
        generator = np.random.default_rng(self._seed)
        chosen = [kind for kind, _ in filled]
        moves = [(gpu, kind) for gpu in range(len(chosen)) for kind in range(len(self._kinds)) if kind != chosen[gpu]]
        # Fills are quick and tell which changes are worth an exact assignment.
        ranked = sorted(
            (-self._fill([*chosen[:gpu], kind, *chosen[gpu + 1 :]])[1], float(generator.random()), gpu, kind)
            for gpu, kind in moves[: _MOST_MOVES if self._left_s() > 0 else 0]
        )
        for _, _, gpu, kind in ranked:
            if gap_of(value, bound) <= _CLOSED or self._left_s() <= _RESERVE_S:
                break
            trial, _ = self._fill([*chosen[:gpu], kind, *chosen[gpu + 1 :]])
            other, other_value = self._exactly(trial, value)
            if other_value > value:
                filled, value = other, other_value
        return filled, value

    def _assignment(self, chosen: list[int]) -> tuple[LinearModel, list[tuple[int, int]]]:
        """Return (11.2) and (11.3) with whole clients and given kinds, and its (client, GPU) pairs."""
        pairs = [
            (client, gpu) for gpu, kind in enumerate(chosen) for client in np.flatnonzero(self._eligible[kind]).tolist()
        ]
        builder = ModelBuilder()
        columns: Integers = builder.add_variables(
            [f"serve[{client},{gpu}]" for client, gpu in pairs], upper=np.ones(len(pairs)), integer=True
        )
        clients, where = (np.array([pair[side] for pair in pairs], dtype=np.int64) for side in (0, 1))
        for gpu, kind in enumerate(chosen):
            mine = columns[where == gpu]
            builder.add_row(f"rate[{gpu}]", mine, self._fps[clients[where == gpu]], upper=float(self._throughput[kind]))
        for client in np.unique(clients):
            mine = columns[clients == client]
            builder.add_row(f"client[{client}]", mine, np.ones(len(mine)), upper=1.0)
        objective: Floats = self._fps[clients] * self._accuracy[np.array(chosen)[where]] if pairs else np.zeros(0)
        return builder.build().with_objective(objective, maximise=True), pairs

    def _mapping(self, filled: list[tuple[int, list[int]]], value: float, bound: float) -> Mapping:
        names = [client.name for client in self._clients]
        served = {client for _, mine in filled for client in mine}
        idle = self._gpus - len(filled)
        return Mapping(
            gpus=(
                *(
                    (self._variants[self._kinds[kind][0]].name, self._kinds[kind][1]) if mine else None
                    for kind, mine in filled
                ),
                *(None,) * idle,
            ),
            clients=(*(tuple(names[client] for client in mine) for _, mine in filled), *((),) * idle),
            dropped=tuple(name for index, name in enumerate(names) if index not in served),
            accuracy=value,
            bound=bound,
            wall_s=self._clock() - self._started_s,
        )


def _worthwhile(
    kinds: list[tuple[int, int, float]], eligible: list[np.ndarray], variants: Sequence[ScaledVariant]
) -> tuple[list[tuple[int, int, float]], list[np.ndarray]]:
    """Leave out kinds that serve nobody or that another kind equals or beats in accuracy, throughput and clients."""
    kept: list[int] = []
    order = sorted(
        range(len(kinds)), key=lambda kind: (-variants[kinds[kind][0]].accuracy, -kinds[kind][1] / kinds[kind][2])
    )
    for kind in order:
        index, batch, latency_s = kinds[kind]
        beaten = any(
            variants[kinds[other][0]].accuracy >= variants[index].accuracy
            and kinds[other][1] / kinds[other][2] >= batch / latency_s
            and bool((eligible[other] | ~eligible[kind]).all())
            for other in kept
        )
        if eligible[kind].any() and not beaten:
            kept.append(kind)
    return [kinds[kind] for kind in kept], [eligible[kind] for kind in kept]
