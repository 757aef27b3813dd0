"""Accuracy scaling: which variant and batch every GPU runs, and which clients it serves. This is Jellyfish's problem.

Every GPU runs one variant at one batch. A client with a frame rate may be served where twice the batch's latency is
within the time that its network leaves, and the frame rates of a GPU's clients stay below its throughput. The goal is
the accuracy that frames get, weighted by rate; a client that cannot be served is named and blocks nobody else.
docs/formulation.md, section 11.

Simulated annealing finds mappings. A program over patterns of whole clients per GPU bounds them, and its prices leave
few choices of what all GPUs run together. Each of those has a bound of its own, and the best are solved exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from planner.backend import Budget, NothingFound, Solution, Solver, solver
from planner.client_annealing import annealed, compile_walks
from planner.client_models import counts_model, places_model
from planner.client_patterns import Kinds, Pattern, PatternMaster
from planner.kind_choices import promising_choices
from planner.linear import Integers
from planner.objective import gap_of
from plans.errors import InvalidInput

__all__ = ["Client", "Mapping", "ScaledVariant", "assign_clients", "time_left_s"]

_BELOW_FPS = 1e-5
"""Rates must stay below a throughput by this much, which is more than a solver's tolerance."""

_CLOSED = 1e-3
"""Gap at which the search ends."""

_RESERVE_S = 0.01
"""Time left at which no further walk is begun."""

_FIRST_MOVES = 150_000
"""Moves of the first walks; later ones grow."""

_PATTERNS_SHARE = 0.65
"""Share of the time by whose end the program over patterns stops."""

_CHOICES_SHARE = 0.9
"""Share of the time by whose end no further choice of kinds is solved."""

_COUNTS_SHARE = 0.8
"""Share of the time by whose end the relaxation over counts stops."""

_LISTED_PER_S = 1_200_000
"""Kinds in the choices that are looked at, per second of the time left: about a third of that time."""

_LISTED = 8_000_000
"""Kinds in the choices that are looked at, at most; each takes 8 bytes."""


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

    It rests on compiled code; loading it, or compiling it once per installation, counts into ``wall_s`` and not into
    the time limit.

    Raises:
        InvalidInput: There is no GPU, or a client's times do not match the variants.
    """
    _check(clients, variants, gpus)
    started_s = clock()
    compile_walks()
    return _Search(clients, variants, gpus, solver("highs"), seed, clock).run(started_s, time_limit_s)


def _check(clients: Sequence[Client], variants: Sequence[ScaledVariant], gpus: int) -> None:
    if gpus < 1:
        raise InvalidInput.of("at least 1 GPU", field="gpus", found=gpus)
    for client in clients:
        if len(client.left_s) != len(variants) or client.fps <= 0:
            expected = f"a positive frame rate and a time left for each of {len(variants)} variants"
            raise InvalidInput.of(expected, field=client.name, found=f"{client.fps} fps, {len(client.left_s)} times")


class _Search:
    """One run: the kinds (variant, batch), walks for mappings, bounds, and choices of kinds that are solved exactly."""

    def __init__(
        self,
        clients: Sequence[Client],
        variants: Sequence[ScaledVariant],
        gpus: int,
        linear: Solver,
        seed: int,
        clock: Callable[[], float],
    ) -> None:
        self._clients, self._variants, self._gpus = clients, variants, gpus
        self._solver, self._seed, self._clock = linear, seed, clock
        kinds = [
            (index, batch, latency_s)
            for index, variant in enumerate(variants)
            for batch, latency_s in variant.latency_s
        ]
        left = np.array([client.left_s for client in clients]).reshape(len(clients), len(variants))
        eligible = [2 * latency_s <= left[:, index] for index, _, latency_s in kinds]
        # A kind that serves nobody, or no more than another of at least its accuracy and throughput, is of no use.
        self._labels, useful = _worthwhile(kinds, eligible, variants)
        self._kinds = Kinds(
            accuracy=np.array([variants[index].accuracy for index, _, _ in self._labels]),
            throughput=np.array([batch / latency_s - _BELOW_FPS for _, batch, latency_s in self._labels]),
            eligible=np.array(useful, dtype=bool).reshape(len(self._labels), len(clients)),
            fps=np.array([client.fps for client in clients]),
        )
        self._master = PatternMaster(self._kinds, gpus) if useful else None
        self._best: list[Pattern] = []
        self._value = 0.0
        self._bound = float(
            self._kinds.fps @ np.max(self._kinds.accuracy[:, None] * self._kinds.eligible, 0, initial=0)
        )
        self._worth_using = np.arange(len(self._labels))
        self._walks = 0
        self._counted = False
        self._listed_for = self._unlisted = 0.0
        self._solved: dict[tuple[int, ...], float] = {}

    def run(self, started_s: float, time_limit_s: float) -> Mapping:
        """Walk, bound, and walk on among what may still be better, until the gap is closed or time is over."""
        begins_s = self._clock()
        ends_at_s = begins_s + time_limit_s
        if self._master is not None:
            self._walk(_FIRST_MOVES)
            self._bound_by_patterns(self._master, begins_s + _PATTERNS_SHARE * time_limit_s)
            self._settle_choices(self._master, begins_s, time_limit_s)
            moves = _FIRST_MOVES
            while not self._closed(_CLOSED) and self._clock() < ends_at_s - _RESERVE_S:
                per_move_s = self._walk(moves)
                if min(self._value, self._unlisted) > self._listed_for:
                    self._settle_choices(self._master, begins_s, time_limit_s)
                moves = int(min(1.5 * moves, max(_FIRST_MOVES, (ends_at_s - _RESERVE_S - self._clock()) / per_move_s)))
        return self._mapping(self._clock() - started_s)

    def _closed(self, gap: float) -> bool:
        return gap_of(self._value, self._bound) <= gap

    def _adopt(self, found: list[Pattern], value: float) -> None:
        if value > self._value:
            self._best, self._value = found, value

    def _walk(self, moves: int, start: list[Pattern] | None = None) -> float:
        """Take the result of one more walk when it is the best; return the seconds that a move took."""
        begins_s = self._clock()
        self._walks += 1
        found, value = annealed(
            self._kinds,
            self._gpus,
            seed=self._seed * 1_000_003 + self._walks,
            moves=moves,
            allowed=self._worth_using,
            start=start,
        )
        self._adopt(found, value)
        return max(1e-9, (self._clock() - begins_s) / moves)

    def _bound_by_patterns(self, master: PatternMaster, ends_at_s: float) -> None:
        """Bound by (11.5) to (11.7), walk from its patterns, and leave out kinds that no better mapping can use."""
        if self._closed(_CLOSED):
            return
        for pattern in self._best:
            master.add(pattern)
        fractions = master.converge(self._clock, ends_at_s, gap=_CLOSED / 2, value=self._value)
        self._bound = min(self._bound, max(master.bound, self._value))
        start = master.rounded(fractions)
        if start and not self._closed(_CLOSED):
            self._walk(_FIRST_MOVES, start)
        self._worth_using = master.useful(self._value)

    def _settle_choices(self, master: PatternMaster, begins_s: float, time_limit_s: float) -> None:
        """Bound the choices of kinds by (11.9) and (11.10), and solve what is left for those that may be better."""
        ends_at_s = begins_s + _CHOICES_SHARE * time_limit_s
        limit_s = ends_at_s - self._clock()
        if self._closed(_CLOSED) or limit_s <= 0:
            return
        most = int(min(_LISTED, _LISTED_PER_S * limit_s)) // self._gpus
        choices = promising_choices(self._kinds, self._gpus, master.prices, self._value, most=most)
        self._listed_for, self._unlisted = self._value, choices.others
        if gap_of(self._value, choices.others) > _CLOSED and not self._counted:
            self._bound_by_counts(begins_s + _COUNTS_SHARE * time_limit_s)
        settled = choices.others
        for chosen, bound in zip(choices.kinds, choices.bound.tolist(), strict=True):
            self._bound = min(self._bound, max(settled, bound, self._value))
            limit_s = ends_at_s - self._clock()
            if self._closed(_CLOSED) or limit_s <= 0:
                break
            settled = max(settled, min(bound, self._solve(chosen, limit_s)))
        else:
            self._bound = min(self._bound, max(settled, self._value))
        if choices.others <= self._value and (choices.bound > self._value).any():
            self._worth_using = np.unique(choices.kinds[choices.bound > self._value])

    def _bound_by_counts(self, ends_at_s: float) -> None:
        """Bound by (11.1) to (11.4) over the kinds that are left: what any mapping that is better reaches at most."""
        self._counted = True
        limit_s = ends_at_s - self._clock()
        if not len(self._worth_using) or limit_s <= 0:
            return
        model = counts_model(self._kinds, self._gpus, self._worth_using)
        answer = self._solver.solve(model, Budget(time_limit_s=limit_s, gap=_CLOSED / 2, seed=self._seed))
        known = answer.bound if isinstance(answer, Solution | NothingFound) else None
        if known is not None:
            self._bound = min(self._bound, max(known, self._value))

    def _solve(self, chosen: Integers, limit_s: float) -> float:
        """Look for a better mapping with a GPU of each of the kinds ``chosen``; return a bound on all such."""
        known = self._solved.get(tuple(chosen.tolist()))
        if known is not None:
            return known
        model, gpu_of, client_of = places_model(self._kinds, chosen)
        answer = self._solver.solve(model, Budget(time_limit_s=limit_s, gap=_CLOSED / 2, seed=self._seed))
        bound = answer.bound if isinstance(answer, Solution | NothingFound) else None
        if isinstance(answer, Solution):
            served = [np.sort(client_of[(answer.values > 0.5) & (gpu_of == gpu)]) for gpu in range(self._gpus)]
            pairs = zip(chosen.tolist(), served, strict=True)
            found = [Pattern(kind, tuple(clients.tolist())) for kind, clients in pairs if len(clients)]
            self._adopt(found, sum(self._kinds.value(each.kind, each.clients) for each in found))
        self._solved[tuple(chosen.tolist())] = np.inf if bound is None else bound
        return np.inf if bound is None else bound

    def _mapping(self, wall_s: float) -> Mapping:
        names = [client.name for client in self._clients]
        served = {client for pattern in self._best for client in pattern.clients}
        idle = self._gpus - len(self._best)
        labels = [self._labels[pattern.kind] for pattern in self._best]
        return Mapping(
            gpus=(*((self._variants[index].name, batch) for index, batch, _ in labels), *(None,) * idle),
            clients=(*(tuple(names[each] for each in pattern.clients) for pattern in self._best), *((),) * idle),
            dropped=tuple(name for index, name in enumerate(names) if index not in served),
            accuracy=self._value,
            bound=max(self._bound, self._value),
            wall_s=wall_s,
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
