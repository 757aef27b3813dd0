"""Keeping a node as it is wanted: the replicas, the groups that serve them, and the loop that brings them together.

The loop asks `executor.reconcile` what to do, does it, notes the events in the replicas' state machines, and asks again
whenever something changed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from executor.errors import WorkerGone, WorkerRefused
from executor.group_server import GroupServer
from executor.logs import log_failure
from executor.reconcile import (
    Action,
    Adopt,
    Charge,
    GroupView,
    LoadModel,
    Release,
    StartWorker,
    StopWorker,
    UnloadModel,
    deferred,
    has_room,
    next_time_s,
    reconcile,
)
from executor.replica import Event, Replica, advance
from executor.spare_worker import SpareWorker
from executor.state import DesiredGroup, DesiredReplica, DesiredState, Phase, ReplicaKey, ReplicaState
from executor.statistics import Counters
from executor.worker_link import WorkerSettings

__all__ = ["Upkeep"]

_log = logging.getLogger("executor.agent")

_STOP_S = 5.0
"""How long a worker that is not needed any more may take to end."""

_DRAIN_POLL_S = 0.02
"""How often a draining replica is looked at."""

_TIMER_SLACK_S = 0.001
"""What a timer is set late by, so that what it waits for is due when it rings."""


class Upkeep:
    """Owns the replicas and groups of a node.

    Args:
        worker: How workers are started.
        memory_bytes: Memory of one device.
        drain_s: How long a replica that left the plan may go on answering what it has taken.
        on_change: Called after every change of what serves.
        clock: The time in seconds.

    Attributes:
        replicas: Every replica, by its key.
        groups: Every group that runs, or shall run, something.
        departed: What replicas that are gone have counted, by service.
        spare: A worker started ahead.
    """

    def __init__(
        self,
        worker: WorkerSettings,
        *,
        memory_bytes: int,
        drain_s: float,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.replicas: dict[ReplicaKey, Replica] = {}
        self.groups: dict[str, GroupServer] = {}
        self.departed: dict[str, Counters] = {}
        self.spare = SpareWorker(worker)
        self._worker = worker
        self._memory_bytes = memory_bytes
        self._drain_s = drain_s
        self._on_change = on_change
        self._clock = clock
        self._changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._kicked = False
        self._closing = False
        self._timer: asyncio.TimerHandle | None = None

    async def stop(self) -> None:
        """End every worker; what waits fails, what runs is finished."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(self.spare.close(), *(group.stop_worker() for group in self.groups.values()))

    # What is wanted.

    def want(self, desired: DesiredState) -> None:
        """Make a replica for everything in ``desired`` that has none, and note new settings for the others."""
        for group in desired.groups:
            if group.id not in self.groups:
                self.groups[group.id] = self._group_server(group.id, group.gpus)
            for wanted in group.replicas:
                key = group.key_of(wanted)
                replica = self.replicas.get(key)
                if replica is None:
                    self.replicas[key] = Replica(key=key, gpus=group.gpus, settings=wanted)
                    self.groups[group.id].configure(key, wanted)
                else:
                    self.replicas[key] = dataclasses.replace(replica, staged=wanted)
                self.groups[group.id].worker.retry_now(key.variant)
        self.kick()

    def commit(self, keys: Iterable[ReplicaKey]) -> None:
        """Let these replicas serve, by the settings that were staged for them."""
        for key in keys:
            self.advance(key, Event.COMMITTED)
            self._configure(key)
        self.kick()

    def settle(self) -> None:
        """Give up what the last commit replaced: it cannot be taken back any more."""
        for key, replica in self.replicas.items():
            self.replicas[key] = dataclasses.replace(replica, earlier=None)
        self.kick()

    def unstage(self) -> None:
        """Forget what is not committed."""
        for key, replica in tuple(self.replicas.items()):
            if replica.committed:
                self.replicas[key] = dataclasses.replace(replica, staged=None)
        self.retire([key for key, replica in self.replicas.items() if not replica.committed])

    def restore(self, earlier: dict[ReplicaKey, DesiredReplica]) -> None:
        """Go back to these replicas, all of which are still here, and these settings."""
        for key, wanted in earlier.items():
            self.replicas[key] = dataclasses.replace(self.replicas[key], settings=wanted, staged=None, earlier=None)
            self._configure(key)
        self.retire([key for key in self.replicas if key not in earlier])

    def retire(self, keys: Iterable[ReplicaKey]) -> None:
        """Drain these replicas, unload what they used, and forget them."""
        for key in keys:
            if self.replicas[key].phase is not Phase.DRAINING:
                self.advance(key, Event.RETIRED)
                drain_until_s = self._clock() + self._drain_s
                self.replicas[key] = dataclasses.replace(self.replicas[key], drain_until_s=drain_until_s)
        self.kick()

    def _configure(self, key: ReplicaKey) -> None:
        """Put the settings of a replica in force; a larger batch only once its model is loaded and has room for it."""
        replica, server = self.replicas[key], self.groups[key.group]
        settings = replica.settings
        has_room = self._has_room(key, settings.max_batch, settings.memory_bytes, settings.shape)
        server.configure(key, replica.settings, limit=None if has_room else server.max_batch(key))

    def _has_room(self, key: ReplicaKey, max_batch: int, memory_bytes: tuple[int, ...], shape: tuple[int, int]) -> bool:
        model = self.groups[key.group].worker.view().model(key.variant)
        return model is not None and has_room(model, max_batch, memory_bytes, shape)

    # What is.

    def is_serving(self, keys: Iterable[ReplicaKey]) -> bool:
        """Say whether all of these replicas serve."""
        return all((one := self.replicas.get(key)) is not None and one.phase is Phase.SERVING for key in keys)

    def is_draining(self) -> bool:
        """Say whether some replica drains."""
        return any(replica.phase is Phase.DRAINING for replica in self.replicas.values())

    def is_clearing(self, desired: DesiredState) -> bool:
        """Say whether a device on which ``desired`` is not loaded yet still holds what leaves.

        That is a replica that drains, or a model that no replica uses. What leaves other devices may take its time.
        """
        used = {(key.group, key.variant) for key in self.replicas}
        leaving = {gpu for one in self.replicas.values() if one.phase is Phase.DRAINING for gpu in one.gpus}
        for view in self._views():
            if any((view.id, model.variant) not in used for model in view.models):
                leaving.update(view.gpus)
        return any(leaving.intersection(group.gpus) and not self._is_here(group) for group in desired.groups)

    def _is_here(self, group: DesiredGroup) -> bool:
        """Say whether all of ``group`` is loaded, for replicas that stay."""
        return all(
            (one := self.replicas.get(key)) is not None
            and one.phase is not Phase.DRAINING
            and self._has_room(key, wanted.max_batch, wanted.memory_bytes, wanted.shape)
            for wanted in group.replicas
            for key in (group.key_of(wanted),)
        )

    def has_idle_group(self) -> bool:
        """Say whether a group is still here that runs nothing."""
        used = {key.group for key in self.replicas}
        return any(group not in used for group in self.groups)

    def failures(self, keys: Iterable[ReplicaKey]) -> list[str]:
        """Return why those of these replicas that failed did."""
        problems = []
        for replica in (self.replicas[key] for key in keys if key in self.replicas):
            load_problem = self.groups[replica.key.group].worker.load_problem(replica.key.variant)
            if replica.phase is Phase.FAILED:
                problems.append(f"{replica.key}: {replica.reason}")
            elif load_problem and not self.is_loaded(replica.key):  # it was to be loaded again for larger batches
                problems.append(f"{replica.key}: {load_problem}")
        return problems

    def stage_problems(self, keys: Iterable[ReplicaKey]) -> list[str]:
        """Return why loads failed that only what is staged needs."""
        problems = []
        for key in keys:
            replica = self.replicas.get(key)
            if replica is None:
                continue
            load_problem = self.groups[key.group].worker.load_problem(key.variant)
            if not replica.committed and replica.phase is Phase.FAILED:
                problems.append(f"{key}: {replica.reason}")
            elif replica.phase is Phase.SERVING and load_problem:  # it was to be loaded again for larger batches
                problems.append(f"{key}: {load_problem}")
        return problems

    def is_loaded(self, key: ReplicaKey) -> bool:
        """Say whether a replica is loaded as it is needed after the commit; one that recovers from a crash counts."""
        replica = self.replicas[key]
        if replica.committed and replica.phase in (Phase.LOADING, Phase.FAILED):
            return True
        loaded = replica.phase in (Phase.STAGED, Phase.SERVING)
        return loaded and self._has_room(key, replica.max_batch_needed, replica.memory_bytes, replica.shape)

    def deferred(self, planned: DesiredState | None = None) -> tuple[ReplicaKey, ...]:
        """Return the replicas that do not fit beside what the devices hold now; with those of ``planned``, if given.

        Every model that fits takes its memory away from those after it, planned or here.
        """
        replicas = dict(self.replicas)
        for group in planned.groups if planned else ():
            for wanted in group.replicas:
                key = group.key_of(wanted)
                known = replicas.get(key)
                replicas[key] = (
                    dataclasses.replace(known, staged=wanted)
                    if known
                    else Replica(key=key, gpus=group.gpus, settings=wanted)
                )
        return deferred(tuple(replicas.values()), self._views(), self._memory_bytes)

    def states(self) -> tuple[ReplicaState, ...]:
        """Return the state of every replica."""
        waiting = self.deferred()
        return tuple(self._state(replica, replica.key in waiting) for replica in self.replicas.values())

    def _state(self, replica: Replica, waits_for_memory: bool) -> ReplicaState:
        group = self.groups[replica.key.group]
        counters = group.counters[replica.key]
        loaded = group.worker.loaded(replica.key.variant)
        return ReplicaState(
            key=replica.key,
            phase=replica.phase,
            reason=replica.reason or ("waits for memory that others hold" if waits_for_memory else ""),
            queued=group.queued(replica.key),
            running=group.running(replica.key),
            completed=counters.completed,
            dropped=counters.dropped,
            failed=counters.failed,
            batches=counters.batches,
            expected_wait_s=group.expected_wait_s(),
            max_batch=replica.settings.max_batch,
            weight_bytes=loaded.weight_bytes if loaded else 0,
            load_s=loaded.load_s if loaded else 0.0,
        )

    # The loop.

    def kick(self) -> None:
        """Ask for a turn of the loop, and wake those who wait."""
        if not self._kicked and not self._closing:
            self._kicked = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._kicked = False
        if self._closing:
            return
        now_s = self._clock()
        replicas, views = tuple(self.replicas.values()), self._views()
        pending = {
            replica.key: server.queued(replica.key) + server.running(replica.key)
            for replica in replicas
            if replica.phase is Phase.DRAINING
            for server in (self.groups[replica.key.group],)
        }
        actions = reconcile(replicas, views, pending, self._memory_bytes, now_s)
        for action in actions:
            self._act(action)
        for key, replica in self.replicas.items():
            if self.groups[key.group].max_batch(key) < replica.settings.max_batch:
                self._configure(key)
        if any(isinstance(action, Release | Adopt | Charge) for action in actions):
            self.kick()  # only now: tasks made above must note what they do before the next turn
        self._set_timer(pending, now_s)
        self._on_change()
        changed, self._changed = self._changed, asyncio.get_running_loop().create_future()
        changed.set_result(None)

    def _set_timer(self, pending: dict[ReplicaKey, int], now_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        next_s = next_time_s(tuple(self.replicas.values()), self._views(), now_s)
        if any(pending.values()):  # draining is watched closely, it takes a few batches
            next_s = min(now_s + _DRAIN_POLL_S, next_s or now_s + _DRAIN_POLL_S)
        if next_s is not None:
            self._timer = asyncio.get_running_loop().call_later(next_s - now_s + _TIMER_SLACK_S, self.kick)

    def _act(self, action: Action) -> None:
        match action:
            case Release():
                group = self.groups[action.key.group]
                counters = group.counters.get(action.key)
                group.close(action.key, "it left the plan")
                if counters is not None:
                    self.departed.setdefault(action.key.service, Counters()).add(counters)
                del self.replicas[action.key]
            case Adopt():
                if self.replicas[action.key].phase is Phase.FAILED:
                    self.advance(action.key, Event.RETRIED)
                self.advance(action.key, Event.LOADED)
            case Charge():
                self.groups[action.group].worker.charge(action.variant, action.memory_bytes)
            case StartWorker():
                for replica in self._of_group(action.group):
                    if replica.phase is Phase.FAILED:
                        self.advance(replica.key, Event.RETRIED, replica.reason)
                self._spawn(self._start_worker(self.groups[action.group]))
            case StopWorker():
                self._spawn(self._stop_worker(self.groups[action.group]))
            case LoadModel():
                self._spawn(self._load(action))
            case UnloadModel():
                self._spawn(self._unload(action))

    async def _start_worker(self, group: GroupServer) -> None:
        group.worker.begin_start()
        spare = await self.spare.take(group.gpus)
        try:
            variants = await group.start_worker(spare)
        except (WorkerGone, WorkerRefused) as error:
            _log.error("event=worker_not_started group=%s reason=%r", group.id, str(error))
            self._group_lost(group.id, str(error))
        else:
            self.spare.learn(variants)

    async def _stop_worker(self, group: GroupServer) -> None:
        """End a worker that nobody uses; one that only loads may never be done, and is not waited for."""
        models = group.worker.view().models
        only_loads = models and not any(group.worker.loaded(model.variant) for model in models)
        await group.stop_worker(0.0 if only_loads else _STOP_S)
        if not self._of_group(group.id):
            self.groups.pop(group.id, None)

    async def _load(self, action: LoadModel) -> None:
        group = self.groups[action.group]
        for replica in self._of_model(action.group, action.variant):
            if replica.phase is Phase.FAILED:
                self.advance(replica.key, Event.RETRIED, replica.reason)
        try:
            await group.worker.load(
                action.variant,
                action.max_batch,
                action.memory_bytes,
                action.shape,
                kv_bytes=sum(replica.kv_bytes for replica in self._of_model(action.group, action.variant)),
            )
        except WorkerRefused as error:
            _log.error("event=load_failed group=%s variant=%s reason=%r", action.group, action.variant, str(error))
            for replica in self._of_model(action.group, action.variant):
                if replica.phase is Phase.LOADING:
                    self.advance(replica.key, Event.LOAD_FAILED, str(error))
            return
        except WorkerGone:
            return  # the loss of the worker is an event of its own
        for replica in self._of_model(action.group, action.variant):
            if replica.phase is Phase.LOADING:
                self.advance(replica.key, Event.LOADED)

    async def _unload(self, action: UnloadModel) -> None:
        try:
            await self.groups[action.group].worker.unload(action.variant)
        except WorkerGone:
            return

    def _group_lost(self, group: str, reason: str) -> None:
        for replica in self._of_group(group):
            self.advance(replica.key, Event.WORKER_LOST, reason)
        self.kick()

    def advance(self, key: ReplicaKey, event: Event, reason: str = "") -> None:
        """Note an event of a replica."""
        replica = self.replicas[key]
        after = advance(replica, event, reason)
        self.replicas[key] = after
        if after.phase is not replica.phase:
            _log.info("event=replica_%s replica=%r reason=%r", after.phase.value, str(key), after.reason)

    def _of_group(self, group: str) -> list[Replica]:
        return [replica for replica in self.replicas.values() if replica.key.group == group]

    def _of_model(self, group: str, variant: str) -> list[Replica]:
        return [replica for replica in self._of_group(group) if replica.key.variant == variant]

    def _views(self) -> tuple[GroupView, ...]:
        return tuple(group.worker.view() for group in self.groups.values())

    def _spawn(self, action: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(action)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        log_failure(task)
        self.kick()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds, or raises."""
        while not condition():
            await asyncio.shield(self._changed)

    def _group_server(self, group: str, gpus: tuple[int, ...]) -> GroupServer:
        def lost(reason: str) -> None:
            self._group_lost(group, reason)

        return GroupServer(group, gpus, self._worker, lost, clock=self._clock)
