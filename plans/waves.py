"""Which replicas come and go together on the way between two plans, so that services keep as much capacity as can be.

First comes what fits beside everything that runs. Then, wave by wave, some of what leaves makes room for some of what
waits. A replica leaves when its service can spare it; where no service that stands in the way can, the one that is hurt
least gives way, together with all those whose fall no other load could spare them.

Exact orders are those of a scheduling problem with memory, NP-hard already for one GPU; the rule here is greedy, and
`order` never returns a worse one than the order in one wave: what fits, then everything that leaves, then the rest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from plans.diff import EntryChange
from plans.plan import Group, LoadoutEntry

__all__ = ["Gpu", "Interval", "Move", "Moves", "Wave", "intervals", "order"]

Gpu = tuple[str, int]

_TOLERANCE = 1e-9

_LEAST_FALL = 1 / 8
"""A service that must fall may fall by this share at least: a hundred replicas do not take a hundred waves."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Move:
    """One replica that comes, goes or stays, as told apart by identity.

    Attributes:
        change: Which; None where it stays.
        service: Its service.
        gpus: Its devices.
        memory_bytes: Bytes on each of them.
        rate_rps: Rate that its plan routes to it, requests per second.
        busy: Share of its group's time which that takes (as `plans.checker` counts it).
    """

    change: EntryChange | None
    service: str
    gpus: tuple[Gpu, ...]
    memory_bytes: tuple[int, ...]
    rate_rps: float
    busy: float

    @classmethod
    def of(cls, group: Group, entry: LoadoutEntry, change: EntryChange | None = None) -> Move:
        """Return the move of ``entry`` on ``group``."""
        return cls(
            change=change,
            service=entry.service,
            gpus=tuple((group.node, gpu) for gpu in group.gpus),
            memory_bytes=entry.memory_bytes,
            rate_rps=entry.rate_rps,
            busy=entry.rate_rps / entry.max_batch * max(entry.stage_latency_s[-1]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """All replicas of both plans.

    Attributes:
        stays: With what the target plans for them.
        loads: What comes, with what the target plans for it.
        leaves: What goes, with what the running plan plans for it.
        free_bytes: Memory of each GPU that nothing holds now, less what replicas that stay will need more.
        shrinks_bytes: Memory of each GPU that replicas that stay give up when routes flip first.
        base_rps: Per service, the lesser of what both plans plan for it: less is a fall.
        most_busy: Per GPU, the larger share of its time that one of the plans uses, at least 1.
    """

    stays: tuple[Move, ...]
    loads: tuple[Move, ...]
    leaves: tuple[Move, ...]
    free_bytes: Mapping[Gpu, int]
    shrinks_bytes: Mapping[Gpu, int]
    base_rps: Mapping[str, float]
    most_busy: Mapping[Gpu, float]

    def capacity_rps(self, serving: Iterable[Move]) -> dict[str, float]:
        """Return the rate of each service; replicas whose GPUs are planned for more than their time are slowed alike.

        That happens where replicas of both plans share a GPU on the way.
        """
        serving = tuple(serving)
        return dict(_sums(serving, self.rates_of(serving)))

    def rates_of(self, serving: Iterable[Move]) -> Callable[[Move], float]:
        """Return what tells the rate of each replica among ``serving``."""
        busy: dict[Gpu, float] = defaultdict(float)
        for move in serving:
            for gpu in move.gpus:
                busy[gpu] += move.busy

        def rate(move: Move) -> float:
            slower = max(busy[gpu] / self.most_busy.get(gpu, 1.0) for gpu in move.gpus)
            return move.rate_rps / slower if slower > 1 + _TOLERANCE else move.rate_rps

        return rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """``leaves`` go, all at the same time; when they are gone, ``loads`` come."""

    leaves: tuple[Move, ...]
    loads: tuple[Move, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """From one flip of the routes to the next: how long it takes, and the rate of each service meanwhile."""

    wave: Wave
    for_s: float
    rates_rps: Mapping[str, float]


def order(moves: Moves) -> tuple[Wave, ...]:
    """Return the waves. The first has no leaves: its loads fit beside what runs.

    Several orders are tried; the one whose services fall least is taken, comparing the service that falls most first,
    then the next; of equals the one that is sooner done. Cost: waves times loads.
    """
    by_need = _Rolling(moves).by_need
    orders: list[tuple[Wave, ...]] = []
    for key in (by_need, lambda load: (-sum(load.memory_bytes), *_name(load))):
        rolling = _Rolling(moves)
        first = rolling.fitting(key)
        if len(first) == len(moves.loads):
            return (Wave(leaves=(), loads=first), *([Wave(leaves=moves.leaves, loads=())] if moves.leaves else []))
        rest = tuple(load for load in moves.loads if load not in set(first))
        orders.append((Wave(leaves=(), loads=first), *rolling.waves()))
        orders.append((Wave(leaves=(), loads=first), Wave(leaves=moves.leaves, loads=rest)))
    return max(orders, key=lambda waves: _worth(moves, waves))


def intervals(moves: Moves, waves: Sequence[Wave]) -> tuple[Interval, ...]:
    """Return what happens between the flips of the routes, one entry for each wave after the first.

    A wave takes its longest drain (a request may be in flight until its deadline), and then the loads of each node one
    after the other. All GPUs work side by side.
    """
    loaded = [*moves.stays, *waves[0].loads]
    old = dict.fromkeys(moves.leaves)
    found = []
    for wave in waves[1:]:
        for move in wave.leaves:
            del old[move]
        found.append(Interval(wave=wave, for_s=_duration_s(wave), rates_rps=moves.capacity_rps([*loaded, *old])))
        loaded += wave.loads
    return tuple(found)


def _duration_s(wave: Wave) -> float:
    on_node: dict[str, float] = defaultdict(float)
    for load in wave.loads:
        if load.change is not None and load.change.after is not None:
            on_node[load.gpus[0][0]] += load.change.after.load_s
    drains = (move.change.before.deadline_s for move in wave.leaves if move.change and move.change.before)
    return max(drains, default=0.0) + max(on_node.values(), default=0.0)


def _worth(moves: Moves, waves: tuple[Wave, ...]) -> tuple[tuple[float, ...], float]:
    """Return what orders are compared by: the least shares that services keep, ascending; then the time."""
    lowest = dict.fromkeys(moves.base_rps, 1.0)
    found = intervals(moves, waves)
    for interval in found:
        for service, base_rps in moves.base_rps.items():
            share = interval.rates_rps.get(service, 0.0) / base_rps
            lowest[service] = min(lowest[service], round(share, 9))
    return tuple(sorted(lowest.values())), -sum(interval.for_s for interval in found)


def _sums(moves: Iterable[Move], rate: Callable[[Move], float]) -> defaultdict[str, float]:
    sums: defaultdict[str, float] = defaultdict(float)
    for move in moves:
        sums[move.service] += rate(move)
    return sums


def _name(move: Move) -> tuple[str, int, str]:
    return *move.gpus[0], move.service


@dataclass(frozen=True, slots=True, kw_only=True)
class _Exchange:
    """A load and what has to leave for it: the share that the service hurt most keeps, and who falls too low."""

    load: Move
    leaves: tuple[Move, ...]
    share: float
    falling: Mapping[str, float]


class _Rolling:
    """Where a transition stands, and the next wave from there."""

    def __init__(self, moves: Moves) -> None:
        self._moves = moves
        self._free = defaultdict(int, moves.free_bytes)
        self._loaded = list(moves.stays)
        self._pending: dict[Move, None] = dict.fromkeys(moves.loads)
        self._old: dict[Move, None] = dict.fromkeys(moves.leaves)
        self._on_gpu: dict[Gpu, list[Move]] = defaultdict(list)
        for move in moves.leaves:
            for gpu in move.gpus:
                self._on_gpu[gpu].append(move)
        self._floor = dict.fromkeys(moves.base_rps, 1.0)
        self._rates = _sums(self._loaded, lambda move: move.rate_rps)
        self._rate_of: Callable[[Move], float] = lambda move: move.rate_rps

    def by_need(self, load: Move) -> tuple[float, int, str, int, str]:
        """Sort key: the service with the least of what it needs first, of that the largest replica."""
        return self._share(load.service, 0.0), -sum(load.memory_bytes), *_name(load)

    def fitting(self, key: Callable[[Move], object]) -> tuple[Move, ...]:
        """Load what fits beside everything that is there, and return it."""
        found = []
        for load in sorted(self._pending, key=key):  # type: ignore[arg-type]  # tuples of one shape
            if all(self._free[gpu] >= size for gpu, size in zip(load.gpus, load.memory_bytes, strict=True)):
                self._take(load)
                found.append(load)
        self._loaded += found
        return tuple(found)

    def waves(self) -> tuple[Wave, ...]:
        """Return the waves after the first, to the end."""
        for gpu, size in self._moves.shrinks_bytes.items():
            self._free[gpu] += size
        found = []
        while self._pending or self._old:
            wave = self._next()
            self._loaded += wave.loads
            found.append(wave)
        return tuple(found)

    def _next(self) -> Wave:
        if not self._pending:
            wave = Wave(leaves=tuple(self._old), loads=())
            self._old.clear()
            return wave
        serving = [*self._loaded, *self._old]
        self._rate_of = self._moves.rates_of(serving)
        self._rates = _sums(serving, self._rate_of)
        leaves: list[Move] = []
        loads: list[Move] = []
        self._exchange(sorted(self._pending, key=self.by_need), leaves, loads)
        if not loads:
            first = self._give_way()
            self._exchange([*first, *(load for load in self._pending if load not in set(first))], leaves, loads)
        if not loads:  # a target that no GPU holds: it is told as it is
            leaves, loads = list(self._old), list(self._pending)
            self._old.clear()
            self._pending.clear()
        for move in tuple(self._old):
            slowed = self._rate_of(move) < move.rate_rps  # it shares a GPU with what was loaded, and slows that too
            if (slowed or not self._pending) and not self._falling([move]):
                self._leave(move, leaves)
        return Wave(leaves=tuple(leaves), loads=tuple(loads))

    def _exchange(self, candidates: Iterable[Move], leaves: list[Move], loads: list[Move]) -> None:
        """Load what has room once something has left that its service can spare."""
        for load in candidates:
            blockers = self._blockers(load)
            if blockers is None or self._falling(blockers):
                continue
            for move in blockers:
                self._leave(move, leaves)
            self._take(load)
            loads.append(load)

    def _leave(self, move: Move, leaves: list[Move]) -> None:
        self._rates[move.service] -= self._rate_of(move)
        for gpu, size in zip(move.gpus, move.memory_bytes, strict=True):
            self._free[gpu] += size
        del self._old[move]
        leaves.append(move)

    def _take(self, load: Move) -> None:
        for gpu, size in zip(load.gpus, load.memory_bytes, strict=True):
            self._free[gpu] -= size
        del self._pending[load]

    def _share(self, service: str, less_rps: float) -> float:
        """Return the share of its base that ``service`` has with ``less_rps`` less."""
        base_rps = self._moves.base_rps.get(service)
        return 1.0 if base_rps is None else max(0.0, (self._rates[service] - less_rps) / base_rps)

    def _falling(self, leaves: Iterable[Move]) -> dict[str, float]:
        """Return the services that would fall below their floor without ``leaves``, with the share they would keep."""
        found = {}
        for service, rate_rps in _sums(leaves, self._rate_of).items():
            share = self._share(service, rate_rps)
            if rate_rps > 0 and share < self._floor.get(service, 0.0) * (1 - _TOLERANCE):
                found[service] = share
        return found

    def _blockers(self, load: Move) -> tuple[Move, ...] | None:
        """Return what has to leave for ``load``, as little hurt as can be told one by one; None where nothing helps."""
        short = {
            gpu: size - self._free[gpu]
            for gpu, size in zip(load.gpus, load.memory_bytes, strict=True)
            if size > self._free[gpu]
        }
        if not short:
            return ()
        there = dict.fromkeys(move for gpu in short for move in self._on_gpu[gpu] if move in self._old)
        chosen: list[Move] = []
        for move in sorted(there, key=lambda move: (-self._share(move.service, self._rate_of(move)), *_name(move))):
            if any(short.get(gpu, 0) > 0 for gpu in move.gpus):
                chosen.append(move)
                _add(short, move, -1)
        if any(size > 0 for size in short.values()):
            return None
        for move in chosen[:]:
            _add(short, move, 1)
            if any(size > 0 for size in short.values()):
                _add(short, move, -1)
            else:
                chosen.remove(move)
        return tuple(chosen)

    def _give_way(self) -> list[Move]:
        """Lower the floors of the services that have to fall, and return the loads for which they do."""
        found: list[_Exchange] = []
        for load in self._pending:
            blockers = self._blockers(load)
            if blockers:
                falling = self._falling(blockers)
                found.append(_Exchange(load=load, leaves=blockers, share=min(falling.values()), falling=falling))
        found.sort(key=lambda each: (-each.share, len(each.falling), *_name(each.load)))
        chosen: list[_Exchange] = []
        helped: set[str] = set()
        waiting = found
        for each in found:
            if helped.isdisjoint(each.falling):
                chosen.append(each)
                helped.add(each.load.service)
                waiting = _help(helped, waiting)
        for each in chosen:
            for service, share in each.falling.items():
                self._floor[service] = min(self._floor[service], share, 1 - _LEAST_FALL)
        return [each.load for each in chosen]


def _help(helped: set[str], waiting: list[_Exchange]) -> list[_Exchange]:
    """Add to ``helped`` who may get a replica before they have to fall, once those in it get one; return the rest."""
    while further := [each for each in waiting if helped.issuperset(each.falling)]:
        helped.update(each.load.service for each in further)
        gone = set(map(id, further))
        waiting = [each for each in waiting if id(each) not in gone]
    return waiting


def _add(short: dict[Gpu, int], move: Move, sign: int) -> None:
    for gpu, size in zip(move.gpus, move.memory_bytes, strict=True):
        if gpu in short:
            short[gpu] += sign * size
