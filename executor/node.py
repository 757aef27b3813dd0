"""A node as its agent sees it: what is committed, what is staged, the replicas, and the groups that serve them.

Control calls change what is wanted, at once and without waiting; then they wait until it has come about. One loop
brings it about: it asks `executor.reconcile` what to do, does it, notes the events in the replicas' state machines, and
asks again whenever something changed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from executor.admission import NodeFacts, placement_faults
from executor.errors import ReplicaUnavailable, StageFailed, UnknownService, WorkerGone, WorkerRefused, WrongGeneration
from executor.group_server import GroupServer
from executor.journal import Journal
from executor.reconcile import (
    Action,
    Adopt,
    GroupView,
    LoadModel,
    Release,
    StartWorker,
    StopWorker,
    UnloadModel,
    deferred,
    next_time_s,
    reconcile,
)
from executor.replica import Event, Replica, advance
from executor.state import DesiredState, Phase, ReplicaKey, ReplicaState
from executor.worker_link import WorkerLink, WorkerSettings
from plans.errors import Fault, InvalidInput

__all__ = ["Node", "NodeSettings"]

_log = logging.getLogger("executor.agent")

_DRAIN_POLL_S = 0.02
"""How often a draining replica is looked at."""

_TIMER_SLACK_S = 0.001
"""What a timer is set late by, so that what it waits for is due when it rings."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """What a node is and has.

    Attributes:
        node: Its name.
        device_count: Its devices, numbered from 0.
        memory_bytes: Memory of one device.
        worker: How workers are started.
        drain_s: How long a replica that left the plan may go on answering what it has taken.
    """

    node: str
    device_count: int
    memory_bytes: int
    worker: WorkerSettings = dataclasses.field(default_factory=WorkerSettings)
    drain_s: float = 30.0


class Node:
    """Brings a node to its desired state, and keeps it there.

    Args:
        settings: What the node is and has.
        journal: Where the committed state is kept.
        on_change: Called after every change of what serves.
        clock: The time in seconds.
    """

    def __init__(
        self,
        settings: NodeSettings,
        journal: Journal,
        *,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.committed: DesiredState | None = None
        self.staged: DesiredState | None = None
        self._before: DesiredState | None = None
        self._can_take_back = False
        self.groups: dict[str, GroupServer] = {}
        self.replicas: dict[ReplicaKey, Replica] = {}
        self._journal = journal
        self._on_change = on_change
        self._clock = clock
        self._committing = asyncio.Lock()
        self._changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._kicked = False
        self._closing = False
        self._timer: asyncio.TimerHandle | None = None
        self._stage_done = False
        self._variants: tuple[str, ...] | None = None
        self._asking: asyncio.Task[str] | None = None

    async def start(self) -> None:
        """Take up what the journal holds, and find out which variants the runtime knows.

        Raises:
            BadStoredData: The journal is damaged.
        """
        self.committed = await asyncio.to_thread(self._journal.read)
        if self.committed is not None:
            _log.info("event=restored generation=%d groups=%d", self.committed.generation, len(self.committed.groups))
            self._want(self.committed)
            for key in _keys(self.committed):
                self._advance(key, Event.COMMITTED)
        self._ask_variants()
        self._kick()

    async def stop(self) -> None:
        """End every worker; what waits fails, what runs is finished."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        tasks: list[asyncio.Task[Any]] = [*self._tasks, *([self._asking] if self._asking else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(group.stop_worker() for group in self.groups.values()))

    # Control.

    @property
    def generation(self) -> int:
        """The generation committed last; 0 before the first."""
        return self.committed.generation if self.committed else 0

    @property
    def ready(self) -> bool:
        """Whether everything that is committed serves."""
        return self.committed is None or all(
            (replica := self.replicas.get(key)) is not None and replica.phase is Phase.SERVING
            for key in _keys(self.committed)
        )

    async def faults_of(self, desired: DesiredState) -> tuple[Fault, ...]:
        """Return every reason why this node cannot run ``desired``."""
        if self._variants is None and (problem := await asyncio.shield(self._ask_variants())):
            remedy = "correct the agent's device, runtime or model folder and start it again"
            return (Fault(field="runtime", found=problem, expected="a runtime that starts", remedy=remedy),)
        facts = NodeFacts(
            node=self.settings.node,
            device_count=self.settings.device_count,
            memory_bytes=self.settings.memory_bytes,
            variants=self._variants or (),
        )
        return placement_faults(desired, facts)

    async def stage(self, desired: DesiredState) -> tuple[ReplicaKey, ...]:
        """Load what ``desired`` needs beside what runs; return the replicas that must wait for memory.

        Raises:
            WrongGeneration: It is older than what was seen, or other than what is committed under its number; or it was
                aborted or replaced meanwhile.
            InvalidInput: The node cannot run it.
            StageFailed: A model could not be loaded.
        """
        self._refuse_older(desired.generation)
        if self.committed is not None and desired.generation == self.committed.generation:
            if desired == self.committed:
                return ()
            raise WrongGeneration(f"generation {desired.generation} is committed here with another content")
        if faults := await self.faults_of(desired):
            raise InvalidInput(faults)
        self._refuse_older(desired.generation)
        if self.staged is not None and (self.staged != desired or self._stage_problems(self.staged)):
            self._drop_stage()
        self.staged, self._stage_done = desired, False
        await self._until(lambda: not self._of_phase(Phase.DRAINING))
        self._check_staged(desired)
        self._want(desired)
        wanted = set(_keys(desired))
        replicas = tuple(self.replicas.values())
        waiting = tuple(key for key in deferred(replicas, self._views(), self.settings.memory_bytes) if key in wanted)
        self._kick()
        await self._until(lambda: self._stage_settled(desired, waiting))
        self._stage_done = self.staged == desired
        _log.info("event=staged generation=%d deferred=%d", desired.generation, len(waiting))
        return waiting

    async def commit(self, generation: int) -> int:
        """Make what is staged under ``generation`` accept requests; what ran before still does. Journalled first.

        Raises:
            WrongGeneration: It is older than what is committed, or is not what is staged.
        """
        async with self._committing:
            if generation == self.generation:
                return generation
            self._refuse_older(generation)
            staged = self.staged
            if staged is None or staged.generation != generation or not self._stage_done:
                held = f"generation {staged.generation} is" if staged else "nothing is"
                done = "" if self._stage_done or staged is None else ", and not loaded yet"
                raise WrongGeneration(f"generation {generation} cannot be committed: {held} staged here{done}")
            await asyncio.to_thread(self._journal.write, staged)
            self._before, self._can_take_back = self.committed, True
            self.committed = staged
            if self.staged is staged:
                self.staged = None
            for key in _keys(staged):
                self._advance(key, Event.COMMITTED)
                replica = self.replicas[key]
                self.groups[key.group].configure(key, replica.settings)
        _log.info("event=committed generation=%d digest=%s", generation, staged.placement_digest)
        self._kick()
        return generation

    async def finish(self, generation: int) -> int:
        """Drain and unload what left the plan, then load what had to wait; return when everything serves.

        Raises:
            WrongGeneration: ``generation`` is not the committed one.
            StageFailed: A model that had to wait could not be loaded; it is tried again later.
        """
        if generation != self.generation or self.committed is None:
            raise WrongGeneration(f"generation {generation} cannot be finished: {self.generation} is committed here")
        wanted = self.committed
        self._before, self._can_take_back = None, False
        keep = {*_keys(wanted), *_keys(self.staged)}
        self._retire([key for key in self.replicas if key not in keep])
        self._kick()
        await self._until(lambda: self.committed is not wanted or self._finished(wanted))
        problems = self._failures(wanted)
        if problems:
            raise StageFailed("; ".join(problems))
        _log.info("event=finished generation=%d", generation)
        return generation

    async def abort(self, generation: int) -> int:
        """Take ``generation`` back, staged or committed; return the committed generation. Unknown to this node is fine.

        What was committed comes back as it was, since nothing of what ran before it is unloaded until `finish`.

        Raises:
            WrongGeneration: It is finished, or was committed before this agent was started; or it is older than that.
        """
        self._refuse_older(generation)
        if generation == self.generation:
            await self._take_back(generation)
        elif self.staged is not None and self.staged.generation == generation:
            self._drop_stage()
        else:
            return self.generation
        _log.info("event=aborted generation=%d", generation)
        await self._until(lambda: not self._of_phase(Phase.DRAINING))
        return self.generation

    async def _take_back(self, generation: int) -> None:
        """Make the state before the last commit the committed one again."""
        async with self._committing:
            if not self._can_take_back:
                raise WrongGeneration(f"generation {generation} is in use here: it can only be followed by another")
            before = self._before
            if before is None:
                await asyncio.to_thread(self._journal.clear)
            else:
                await asyncio.to_thread(self._journal.write, before)
            self.committed, self._before, self._can_take_back = before, None, False
            groups = before.groups if before else ()
            earlier = {group.key_of(wanted): wanted for group in groups for wanted in group.replicas}
            for key, wanted in earlier.items():
                self.replicas[key] = dataclasses.replace(self.replicas[key], settings=wanted, staged=None)
                self.groups[key.group].configure(key, wanted)
            self._retire([key for key in self.replicas if key not in earlier])
        self._kick()

    def _refuse_older(self, generation: int) -> None:
        seen = max(self.generation, self.staged.generation if self.staged else 0)
        if generation < seen:
            raise WrongGeneration(f"generation {generation} is older than {seen}, which this node has seen")

    def _check_staged(self, desired: DesiredState) -> None:
        if desired not in (self.staged, self.committed):
            raise WrongGeneration(f"generation {desired.generation} was aborted or replaced while it was staged")

    def _want(self, desired: DesiredState) -> None:
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
                    self.groups[group.id].retry_now(key.variant)

    def _group_server(self, group: str, gpus: tuple[int, ...]) -> GroupServer:
        def lost(reason: str) -> None:
            self._group_lost(group, reason)

        return GroupServer(group, gpus, self.settings.worker, lost, clock=self._clock)

    def _drop_stage(self) -> None:
        self.staged = None
        for key, replica in tuple(self.replicas.items()):
            if replica.committed:
                self.replicas[key] = dataclasses.replace(replica, staged=None)
        self._retire([key for key, replica in self.replicas.items() if not replica.committed])
        self._kick()

    def _retire(self, keys: list[ReplicaKey]) -> None:
        for key in keys:
            if self.replicas[key].phase is not Phase.DRAINING:
                self._advance(key, Event.RETIRED)
                drain_until_s = self._clock() + self.settings.drain_s
                self.replicas[key] = dataclasses.replace(self.replicas[key], drain_until_s=drain_until_s)

    def _of_phase(self, phase: Phase) -> list[ReplicaKey]:
        return [key for key, replica in self.replicas.items() if replica.phase is phase]

    def _stage_problems(self, desired: DesiredState) -> list[str]:
        """Return why loads that only ``desired`` needs failed."""
        problems = []
        for key in _keys(desired):
            replica = self.replicas.get(key)
            if replica is None:
                continue
            load_problem = self.groups[key.group].load_problem(key.variant)
            if not replica.committed and replica.phase is Phase.FAILED:
                problems.append(f"{key}: {replica.reason}")
            elif replica.phase is Phase.SERVING and load_problem:  # it was to be loaded again for larger batches
                problems.append(f"{key}: {load_problem}")
        return problems

    def _stage_settled(self, desired: DesiredState, waiting: tuple[ReplicaKey, ...]) -> bool:
        self._check_staged(desired)
        problems = self._stage_problems(desired)
        if problems:
            raise StageFailed("; ".join(problems))
        return all(key in waiting or self._loaded_enough(key) for key in _keys(desired))

    def _loaded_enough(self, key: ReplicaKey) -> bool:
        replica = self.replicas[key]
        if replica.committed and replica.phase in (Phase.LOADING, Phase.FAILED):
            return True  # it recovers by itself, and no plan waits for that
        model = self.groups[key.group].view().model(key.variant)
        loaded = replica.phase in (Phase.STAGED, Phase.SERVING)
        return loaded and model is not None and model.max_batch >= replica.max_batch_needed

    def _failures(self, wanted: DesiredState) -> list[str]:
        return [
            f"{key}: {replica.reason}"
            for key in _keys(wanted)
            if (replica := self.replicas.get(key)) is not None and replica.phase is Phase.FAILED
        ]

    def _finished(self, wanted: DesiredState) -> bool:
        if self._of_phase(Phase.DRAINING):
            return False
        used = {key.group for key in self.replicas}
        if self._failures(wanted):
            return True
        return self.ready and all(group in used for group in self.groups)

    def states(self) -> tuple[ReplicaState, ...]:
        """Return the state of every replica."""
        replicas = tuple(self.replicas.values())
        waiting = deferred(replicas, self._views(), self.settings.memory_bytes)
        return tuple(self._state(replica, replica.key in waiting) for replica in replicas)

    def _state(self, replica: Replica, waits_for_memory: bool) -> ReplicaState:
        group = self.groups[replica.key.group]
        counters = group.counters[replica.key]
        loaded = group.loaded(replica.key.variant)
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

    # Requests.

    def choose(self, service: str, group: str | None) -> Replica:
        """Return the replica that shall serve a request: of ``group``, or the one with the shortest expected wait.

        Replicas of the committed generation go before those that it replaces.

        Raises:
            UnknownService: Nothing of that name is here.
            ReplicaUnavailable: It is here, but cannot serve now.
        """
        mine = [replica for replica in self.replicas.values() if replica.key.service == service]
        if not mine:
            raise UnknownService(f"service {service!r} does not run on node {self.settings.node!r}")
        if group is not None:
            mine = [replica for replica in mine if replica.key.group == group]
            if not mine:
                raise ReplicaUnavailable(f"service {service!r} does not run on group {group!r}")
        serving = [replica for replica in mine if replica.phase is Phase.SERVING]
        if not serving:
            why = "; ".join(f"{one.key} is {one.phase.value}{': ' if one.reason else ''}{one.reason}" for one in mine)
            raise ReplicaUnavailable(why)
        if len(serving) == 1:
            return serving[0]
        wanted = set(_keys(self.committed))
        return min(
            serving,
            key=lambda replica: (replica.key not in wanted, self.groups[replica.key.group].expected_wait_s()),
        )

    # The loop.

    def _kick(self) -> None:
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
        actions = reconcile(replicas, views, pending, self.settings.memory_bytes, now_s)
        for action in actions:
            self._act(action)
        if any(isinstance(action, Release | Adopt) for action in actions):
            self._kick()  # only now: tasks made above must note what they do before the next turn
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
            self._timer = asyncio.get_running_loop().call_later(next_s - now_s + _TIMER_SLACK_S, self._kick)

    def _act(self, action: Action) -> None:
        match action:
            case Release():
                self.groups[action.key.group].close(action.key, "it left the plan")
                del self.replicas[action.key]
            case Adopt():
                self._advance(action.key, Event.LOADED)
            case StartWorker():
                for replica in self._of_group(action.group):
                    if replica.phase is Phase.FAILED:
                        self._advance(replica.key, Event.RETRIED, replica.reason)
                self._spawn(self._start_worker(self.groups[action.group]))
            case StopWorker():
                self._spawn(self._stop_worker(self.groups[action.group]))
            case LoadModel():
                self._spawn(self._load(action))
            case UnloadModel():
                self._spawn(self._unload(action))

    async def _start_worker(self, group: GroupServer) -> None:
        try:
            variants = await group.start_worker()
        except (WorkerGone, WorkerRefused) as error:
            _log.error("event=worker_not_started group=%s reason=%r", group.id, str(error))
            self._group_lost(group.id, str(error))
        else:
            self._variants = variants

    async def _stop_worker(self, group: GroupServer) -> None:
        await group.stop_worker()
        if not self._of_group(group.id):
            self.groups.pop(group.id, None)

    async def _load(self, action: LoadModel) -> None:
        group = self.groups[action.group]
        for replica in self._of_model(action.group, action.variant):
            if replica.phase is Phase.FAILED:
                self._advance(replica.key, Event.RETRIED, replica.reason)
        try:
            await group.load(action.variant, action.max_batch, action.memory_bytes)
        except WorkerRefused as error:
            _log.error("event=load_failed group=%s variant=%s reason=%r", action.group, action.variant, str(error))
            for replica in self._of_model(action.group, action.variant):
                if replica.phase is Phase.LOADING:
                    self._advance(replica.key, Event.LOAD_FAILED, str(error))
            return
        except WorkerGone:
            return  # the loss of the worker is an event of its own
        for replica in self._of_model(action.group, action.variant):
            if replica.phase is Phase.LOADING:
                self._advance(replica.key, Event.LOADED)

    async def _unload(self, action: UnloadModel) -> None:
        try:
            await self.groups[action.group].unload(action.variant)
        except WorkerGone:
            return

    def _ask_variants(self) -> asyncio.Task[str]:
        """Ask a worker that is started for nothing else; the task returns what went wrong, or nothing."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.get_running_loop().create_task(self._learn_variants())
        return self._asking

    async def _learn_variants(self) -> str:
        try:
            link = await WorkerLink.start(self.settings.worker, 0, lambda reason: None)
        except (WorkerGone, WorkerRefused) as error:
            _log.error("event=runtime_not_started reason=%r", str(error))
            return str(error)
        self._variants = link.variants
        await link.stop()
        return ""

    def _group_lost(self, group: str, reason: str) -> None:
        for replica in self._of_group(group):
            self._advance(replica.key, Event.WORKER_LOST, reason)
        self._kick()

    def _advance(self, key: ReplicaKey, event: Event, reason: str = "") -> None:
        replica = self.replicas[key]
        after = advance(replica, event, reason)
        self.replicas[key] = after
        if after.phase is not replica.phase:
            _log.info(
                "event=replica_%s replica=%r generation=%d reason=%r",
                after.phase.value,
                str(key),
                self.generation,
                after.reason,
            )

    def _of_group(self, group: str) -> list[Replica]:
        return [replica for replica in self.replicas.values() if replica.key.group == group]

    def _of_model(self, group: str, variant: str) -> list[Replica]:
        return [replica for replica in self._of_group(group) if replica.key.variant == variant]

    def _views(self) -> tuple[GroupView, ...]:
        return tuple(group.view() for group in self.groups.values())

    def _spawn(self, action: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(action)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("event=bug", exc_info=error)
        self._kick()

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds, or raises."""
        while not condition():
            await asyncio.shield(self._changed)


def _keys(state: DesiredState | None) -> tuple[ReplicaKey, ...]:
    return state.keys() if state else ()
