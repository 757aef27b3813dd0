"""What a node must do next, as a computation: replicas, what the groups hold, and the time go in, actions come out.

Nothing here waits, sends or keeps state. The shell (`executor.node`) performs the actions, notes what came of them, and
asks again; with nothing left to do the answer is empty.

Memory: a model is loaded, or grows, only where the bytes that all models on its GPUs are charged, itself included,
stay within a GPU's capacity. A loaded model is charged what its replicas need, so one that shrinks makes room at once.
What is committed goes first, so a staged replica never takes the place of one that must be loaded again after a crash.
"""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from executor.replica import Replica
from executor.state import Phase, ReplicaKey

__all__ = [
    "Action",
    "Adopt",
    "Charge",
    "GroupView",
    "LoadModel",
    "ModelPhase",
    "ModelView",
    "Release",
    "StartWorker",
    "StopWorker",
    "UnloadModel",
    "WorkerPhase",
    "deferred",
    "has_room",
    "next_time_s",
    "reconcile",
]


class WorkerPhase(enum.Enum):
    """Where a group's worker process is in its life. ENDED: it runs no more, or could not be started."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    ENDED = "ended"


class ModelPhase(enum.Enum):
    """Where a model in a worker is in its life."""

    LOADING = "loading"
    LOADED = "loaded"
    UNLOADING = "unloading"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelView:
    """A model in a worker.

    Attributes:
        variant: Which model.
        phase: Where it is in its life. A model that is loaded again for larger batches is LOADING, and runs meanwhile.
        max_batch: Largest batch that it is loaded, or being loaded, for.
        memory_bytes: Bytes on each GPU of the group that it is charged.
        shape: Tensor and pipeline parallelism that it is loaded, or being loaded, with.
        not_before_s: A load that failed is not tried again before this time.
    """

    variant: str
    phase: ModelPhase
    max_batch: int
    memory_bytes: tuple[int, ...]
    shape: tuple[int, int] = (1, 1)
    not_before_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupView:
    """A group that has, or had, a worker. After ``not_before_s`` a worker that ended may be started again."""

    id: str
    gpus: tuple[int, ...]
    worker: WorkerPhase
    not_before_s: float = 0.0
    models: tuple[ModelView, ...] = ()

    def model(self, variant: str) -> ModelView | None:
        """Return the model ``variant``, or None."""
        return next((model for model in self.models if model.variant == variant), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartWorker:
    """Start the worker of a group."""

    group: str
    gpus: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StopWorker:
    """Stop the worker of a group, if it runs, and forget the group."""

    group: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadModel:
    """Load a model into the worker of a group."""

    group: str
    variant: str
    max_batch: int
    memory_bytes: tuple[int, ...]
    shape: tuple[int, int] = (1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadModel:
    """Take a model out of the worker of a group."""

    group: str
    variant: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """The replicas of a loaded model need other memory than it is charged, and there is room: charge it that."""

    group: str
    variant: str
    memory_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopt:
    """A replica's model is loaded already, for another service of its group, and as it needs it."""

    key: ReplicaKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A replica is drained, or out of time for it: refuse what still waits and forget it."""

    key: ReplicaKey


Action = StartWorker | StopWorker | LoadModel | UnloadModel | Charge | Adopt | Release

_HOLDS_MEMORY = (ModelPhase.LOADING, ModelPhase.LOADED, ModelPhase.UNLOADING)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Need:
    """What the replicas of one model in one group need of it."""

    group: str
    gpus: tuple[int, ...]
    variant: str
    max_batch: int
    memory_bytes: tuple[int, ...]
    shape: tuple[int, int]
    committed: bool


def reconcile(
    replicas: Sequence[Replica],
    groups: Sequence[GroupView],
    pending: Mapping[ReplicaKey, int],
    capacity_bytes: int,
    now_s: float,
) -> tuple[Action, ...]:
    """Return what to do now.

    Args:
        replicas: Every replica of the node.
        groups: Every group that the node knows.
        pending: Requests of each replica that wait or run.
        capacity_bytes: Memory of one GPU.
        now_s: The time, on the clock of ``not_before_s`` and ``drain_until_s``.
    """
    views = {view.id: view for view in groups}
    needs = _needs(replicas)
    admitted = _admitted(needs, groups, capacity_bytes)
    actions: list[Action] = [
        Release(key=replica.key)
        for replica in replicas
        if replica.phase is Phase.DRAINING and (not pending.get(replica.key) or now_s >= replica.drain_until_s)
    ]
    actions += _adoptions(replicas, views)
    starting: set[str] = set()
    for need in needs:
        view = views.get(need.group)
        if view is None or view.worker is WorkerPhase.ENDED:
            due = view is None or now_s >= view.not_before_s
            if due and need.group not in starting:
                starting.add(need.group)
                actions.append(StartWorker(group=need.group, gpus=need.gpus))
        elif view.worker is WorkerPhase.READY and _load_due(need, view.model(need.variant), admitted, now_s):
            actions.append(
                LoadModel(
                    group=need.group,
                    variant=need.variant,
                    max_batch=need.max_batch,
                    memory_bytes=need.memory_bytes,
                    shape=need.shape,
                )
            )
    actions += _charges(needs, views, admitted)
    for view in groups:
        actions += _cleared(view, [replica for replica in replicas if replica.key.group == view.id])
    return tuple(actions)


def deferred(replicas: Sequence[Replica], groups: Sequence[GroupView], capacity_bytes: int) -> tuple[ReplicaKey, ...]:
    """Return the replicas whose models do not fit beside what the GPUs hold now."""
    needs = _needs(replicas)
    admitted = _admitted(needs, groups, capacity_bytes)
    waiting = {(need.group, need.variant) for need in needs} - admitted
    return tuple(
        replica.key
        for replica in replicas
        if replica.phase is not Phase.DRAINING and (replica.key.group, replica.key.variant) in waiting
    )


def has_room(model: ModelView, max_batch: int, memory_bytes: Sequence[int], shape: tuple[int, int]) -> bool:
    """Say whether a model is loaded in ``shape`` for batches of ``max_batch`` or more, and charged enough memory."""
    if model.phase is not ModelPhase.LOADED or model.max_batch < max_batch or model.shape != shape:
        return False
    return all(has >= size for has, size in zip(model.memory_bytes, memory_bytes, strict=True))


def next_time_s(replicas: Iterable[Replica], groups: Iterable[GroupView], now_s: float) -> float | None:
    """Return the next time at which `reconcile` may answer otherwise with nothing else changed, or None."""
    times = [replica.drain_until_s for replica in replicas if replica.phase is Phase.DRAINING]
    for view in groups:
        times.append(view.not_before_s)
        times += [model.not_before_s for model in view.models]
    return min((time_s for time_s in times if time_s > now_s), default=None)


def _needs(replicas: Iterable[Replica]) -> list[_Need]:
    """Return what must be loaded, committed models first, otherwise in the order of the replicas.

    A replica that drains needs no load, but the memory of a model that it shares with others as long as it is here.
    """
    users: dict[tuple[str, str], list[Replica]] = defaultdict(list)
    for replica in replicas:
        users[replica.key.group, replica.key.variant].append(replica)
    needs = []
    for (group, variant), mine in users.items():
        staying = [replica for replica in mine if replica.phase is not Phase.DRAINING]
        if staying:
            need = _Need(
                group=group,
                gpus=mine[0].gpus,
                variant=variant,
                max_batch=max(replica.max_batch_needed for replica in staying),
                memory_bytes=tuple(max(sizes) for sizes in zip(*(one.memory_bytes for one in mine), strict=True)),
                shape=staying[-1].shape,
                committed=any(replica.committed for replica in staying),
            )
            needs.append(need)
    return sorted(needs, key=lambda need: not need.committed)


def _admitted(needs: Sequence[_Need], groups: Iterable[GroupView], capacity_bytes: int) -> set[tuple[str, str]]:
    """Return the models, as (group, variant), whose need is met already or fits on top of what others hold."""
    needed = {(need.group, need.variant): need.memory_bytes for need in needs}
    held: dict[tuple[str, str], tuple[int, ...]] = {}
    used: dict[int, int] = defaultdict(int)
    for view in groups:
        for model in view.models:
            if model.phase in _HOLDS_MEMORY:
                sizes = model.memory_bytes
                if model.phase is ModelPhase.LOADED:  # one that is needed for less gives up the rest
                    sizes = tuple(map(min, sizes, needed.get((view.id, model.variant), sizes)))
                held[view.id, model.variant] = sizes
                for gpu, size in zip(view.gpus, sizes, strict=True):
                    used[gpu] += size
    admitted: set[tuple[str, str]] = set()
    for need in sorted(needs, key=lambda need: (not need.committed, (need.group, need.variant) not in held)):
        has = held.get((need.group, need.variant), (0,) * len(need.gpus))
        more = [max(0, size - part) for size, part in zip(need.memory_bytes, has, strict=True)]
        if all(size == 0 or used[gpu] + size <= capacity_bytes for gpu, size in zip(need.gpus, more, strict=True)):
            admitted.add((need.group, need.variant))
            for gpu, size in zip(need.gpus, more, strict=True):
                used[gpu] += size
    return admitted


def _load_due(need: _Need, model: ModelView | None, admitted: set[tuple[str, str]], now_s: float) -> bool:
    if (need.group, need.variant) not in admitted:
        return False
    if model is None:
        return True
    if model.phase is ModelPhase.FAILED:  # what is only staged is not tried again: its stage has failed
        return need.committed and now_s >= model.not_before_s
    falls_short = model.max_batch < need.max_batch or model.shape != need.shape
    return model.phase is ModelPhase.LOADED and falls_short and now_s >= model.not_before_s


def _charges(
    needs: Iterable[_Need], views: Mapping[str, GroupView], admitted: set[tuple[str, str]]
) -> Iterator[Charge]:
    for need in needs:
        view = views.get(need.group)
        model = view.model(need.variant) if view else None
        if model is None or model.phase is not ModelPhase.LOADED or (need.group, need.variant) not in admitted:
            continue
        fits = model.max_batch >= need.max_batch and model.shape == need.shape
        if fits and model.memory_bytes != need.memory_bytes:
            yield Charge(group=need.group, variant=need.variant, memory_bytes=need.memory_bytes)


def _adoptions(replicas: Iterable[Replica], views: Mapping[str, GroupView]) -> Iterator[Adopt]:
    for replica in replicas:
        view = views.get(replica.key.group)
        model = view.model(replica.key.variant) if view else None
        if model is None or replica.phase not in (Phase.LOADING, Phase.FAILED):
            continue
        if has_room(model, replica.max_batch_needed, replica.memory_bytes, replica.shape):
            yield Adopt(key=replica.key)


def _cleared(view: GroupView, replicas: Sequence[Replica]) -> Iterator[Action]:
    """Yield what takes unused models, and then the worker itself, away, with it loads that nobody needs any more."""
    used = {replica.key.variant for replica in replicas}
    if view.worker is WorkerPhase.READY:
        for model in view.models:
            if model.variant not in used and model.phase in (ModelPhase.LOADED, ModelPhase.FAILED):
                yield UnloadModel(group=view.id, variant=model.variant)
    idle = not replicas and all(model.phase is ModelPhase.LOADING for model in view.models)
    if idle and view.worker in (WorkerPhase.READY, WorkerPhase.ENDED):
        yield StopWorker(group=view.id)
