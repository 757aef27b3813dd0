"""A node as its agent sees it: which generation is committed, which is staged, and the calls that move it on.

A call changes what is wanted, at once and without waiting; then it waits until `executor.upkeep` has brought it about.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from executor.admission import NodeFacts, memory_faults, placement_faults
from executor.errors import ReplicaUnavailable, StageFailed, UnknownService, WorkerGone, WorkerRefused, WrongGeneration
from executor.journal import Journal
from executor.moves import WholeMoves
from executor.replica import Replica
from executor.state import DesiredState, Phase, ReplicaKey, ReplicaState
from executor.upkeep import Upkeep
from executor.worker_link import WorkerSettings
from plans.errors import BadStoredData, Fault, InvalidInput

__all__ = ["Node", "NodeSettings"]

_log = logging.getLogger("executor.agent")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """What a node is and has.

    Attributes:
        node: Its name.
        device_count: Its devices, numbered from 0.
        memory_bytes: Memory of one device.
        worker: How workers are started.
        drain_s: How long a replica that left the plan may go on answering what it has taken.
        spare_worker: Whether to start a worker ahead.
    """

    node: str
    device_count: int
    memory_bytes: int
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    drain_s: float = 30.0
    spare_worker: bool = True


_ANY_BYTES = 2**62
"""Where workers swap models, nothing has to wait for memory that others hold."""


class Node:
    """Moves a node from one generation to the next.

    Args:
        settings: What the node is and has.
        journal: Where the committed state is kept.
        on_change: Called after every change of what serves.
        on_move: Called after every change of what is committed, or may still be taken back to.
        clock: The time in seconds.

    Attributes:
        committed: What shall run; None before the first commit.
        staged: What is being loaded to follow it, or None.
        upkeep: The replicas and groups.
        drained: Whether an operator keeps the node out of the rotation.
    """

    def __init__(
        self,
        settings: NodeSettings,
        journal: Journal,
        *,
        on_change: Callable[[], None] = lambda: None,
        on_move: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self._on_move = on_move
        self.committed: DesiredState | None = None
        self.staged: DesiredState | None = None
        self.upkeep = Upkeep(
            settings.worker,
            memory_bytes=_ANY_BYTES if settings.worker.swap_bytes else settings.memory_bytes,
            drain_s=settings.drain_s,
            on_change=on_change,
            clock=clock,
        )
        self._journal = journal
        self._moving = asyncio.Lock()  # held while a call moves the node on, never while it waits for loads
        self._is_staged = False
        self._waiting: tuple[ReplicaKey, ...] = ()  # of what is staged: must wait for memory
        self._moves = WholeMoves(_log)
        self.drained = False
        self._before: DesiredState | None = None
        self._can_take_back = False

    async def start(self) -> None:
        """Take up what the journal holds, and start a worker ahead.

        Raises:
            BadStoredData: The journal is damaged, or was written by another node or one with more devices.
        """
        stored = await asyncio.to_thread(self._journal.read)
        if stored is not None:
            self._check_stored(stored)
            for fault in memory_faults(stored, self._facts(())):
                _log.error("event=memory_short fault=%r", str(fault))
        self.committed = stored
        self.drained = await asyncio.to_thread(self._journal.read_drained)
        if self.settings.spare_worker:
            self.upkeep.spare.start()
        if self.committed is not None:
            _log.info("event=restored generation=%d groups=%d", self.committed.generation, len(self.committed.groups))
            self.upkeep.want(self.committed)
            self.upkeep.commit(_keys(self.committed))
            self._on_move()

    def _check_stored(self, stored: DesiredState) -> None:
        if stored.node != self.settings.node:
            problem = f"this is the state of node {stored.node!r}, and this agent is {self.settings.node!r}"
            raise BadStoredData(self._journal.path, f"{problem}; give every agent a folder of its own")
        last = max((gpu for group in stored.groups for gpu in group.gpus), default=0)
        if last >= self.settings.device_count:
            problem = f"device {last} is in use there, and this node has {self.settings.device_count}"
            remedy = "start the agent with the devices it had, or move the file away and run `foreplan apply` again"
            raise BadStoredData(self._journal.path, f"{problem}; {remedy}")

    async def stop(self) -> None:
        """End every worker; what waits fails, what runs is finished."""
        await self._moves.wait()
        await self.upkeep.stop()

    @property
    def generation(self) -> int:
        """The generation committed last; 0 before the first."""
        return self.committed.generation if self.committed else 0

    @property
    def in_force(self) -> tuple[DesiredState, ...]:
        """What is committed, then what it replaces and is still here, then what is staged, as far as there is any."""
        return tuple(state for state in (self.committed, self._before, self.staged) if state is not None)

    @property
    def ready(self) -> bool:
        """Whether everything that is committed serves."""
        return self.upkeep.is_serving(_keys(self.committed))

    async def faults_of(self, desired: DesiredState) -> tuple[Fault, ...]:
        """Return every reason why this node cannot run ``desired``."""
        try:
            variants = await self.upkeep.spare.variants() if desired.groups else ()
        except (WorkerGone, WorkerRefused) as error:
            remedy = "correct the agent's device, runtime or model folder and start it again"
            return (Fault(field="runtime", found=str(error), expected="a runtime that starts", remedy=remedy),)
        return placement_faults(desired, self._facts(variants))

    def _facts(self, variants: tuple[str, ...]) -> NodeFacts:
        return NodeFacts(
            node=self.settings.node,
            device_count=self.settings.device_count,
            memory_bytes=self.settings.memory_bytes,
            swaps=self.settings.worker.swap_bytes > 0,
            variants=variants,
        )

    def states(self) -> tuple[ReplicaState, ...]:
        """Return the state of every replica."""
        keep = {*_keys(self.committed), *_keys(self.staged)}
        return tuple(
            state if state.key in keep else dataclasses.replace(state, left_over=True) for state in self.upkeep.states()
        )

    def would_wait(self, desired: DesiredState) -> tuple[ReplicaKey, ...]:
        """Return the replicas of ``desired`` that could not be loaded beside what is here now."""
        wanted = set(desired.keys())
        return tuple(key for key in self.upkeep.deferred(desired) if key in wanted)

    async def drain(self, drained: bool) -> None:
        """Take the node out of the rotation, or back into it; stored first.

        A caller that goes away does not stop it half way.

        Raises:
            StateNotStored: The state folder cannot be written.
        """
        await self._moves.run(self._drain(drained))

    async def _drain(self, drained: bool) -> None:
        async with self._moving:  # also because the journal is for one writer at a time
            await asyncio.to_thread(self._journal.write_drained, drained)
            self.drained = drained
        _log.info("event=%s", "drained" if drained else "undrained")

    async def stage(self, desired: DesiredState) -> tuple[ReplicaKey, ...]:
        """Load what ``desired`` needs beside what runs; return the replicas that cannot serve yet for want of memory.

        One that serves already and is to grow keeps its batch limit until there is room.

        Raises:
            WrongGeneration: It is older than what was seen, or other than what is staged or committed under its number;
                or it was aborted or replaced meanwhile.
            InvalidInput: The node cannot run it.
            StageFailed: A model could not be loaded.
        """
        self._refuse_older(desired.generation)
        if faults := await self.faults_of(desired):
            raise InvalidInput(faults)
        async with self._moving:
            self._refuse_older(desired.generation)
            if desired.generation == self.generation:
                if desired == self.committed:
                    return ()
                raise WrongGeneration(f"generation {desired.generation} is committed here with another content")
            if self.staged is not None and self.staged.generation == desired.generation and self.staged != desired:
                raise WrongGeneration(f"generation {desired.generation} is staged here with another content")
            if self.staged is not None and (self.staged != desired or self.upkeep.stage_problems(_keys(desired))):
                self.upkeep.unstage()
            self.staged, self._is_staged = desired, False
        await self.upkeep.until(lambda: not self.upkeep.is_clearing(desired))  # or what leaves seems to be in the way
        self._check_staged(desired)
        self.upkeep.want(desired)
        wanted = set(_keys(desired))
        waiting = tuple(key for key in self.upkeep.deferred() if key in wanted)
        await self.upkeep.until(lambda: self._stage_settled(desired, waiting))
        self._is_staged, self._waiting = self.staged == desired, waiting
        _log.info("event=staged generation=%d deferred=%d", desired.generation, len(waiting))
        return tuple(key for key in waiting if not self.upkeep.is_serving([key]))

    async def commit(self, generation: int, digest: str) -> int:
        """Make what is staged under ``generation`` accept requests; what ran before still does. Journalled first.

        A caller that goes away does not stop it half way.

        Raises:
            WrongGeneration: It is older than what is committed, or is not what is staged.
            StageFailed: Something of it was lost since it was staged.
        """
        await self._moves.run(self._commit(generation, digest))
        return generation

    async def _commit(self, generation: int, digest: str) -> None:
        async with self._moving:
            if self._holds(self.committed, generation, digest):
                return
            self._refuse_older(generation)
            staged = self.staged
            if staged is None or not self._holds(staged, generation, digest) or not self._is_staged:
                held = "nothing is" if staged is None else f"{_named(staged.generation, staged.placement_digest)} is"
                done = "" if self._is_staged or staged is None else ", and not loaded yet"
                asked = _named(generation, digest)
                raise WrongGeneration(f"{asked} cannot be committed: {held} staged here{done}")
            if not self._stage_settled(staged, self._waiting):
                raise StageFailed(f"generation {generation} is not loaded any more: a worker was lost; stage it again")
            await asyncio.to_thread(self._journal.write, staged)
            self._before, self._can_take_back = self.committed, True
            self.committed, self.staged = staged, None
            self.upkeep.commit(_keys(staged))
            self._on_move()
        _log.info("event=committed generation=%d digest=%s", generation, staged.placement_digest)

    async def finish(self, generation: int, digest: str) -> int:
        """Drain and unload what left the plan, then load what had to wait; return when everything serves.

        Raises:
            WrongGeneration: ``generation`` with ``digest`` is not the committed one.
            StageFailed: A model that had to wait could not be loaded; it is tried again later.
        """
        async with self._moving:
            wanted = self.committed
            if wanted is None or not self._holds(wanted, generation, digest):
                held = _named(wanted.generation, wanted.placement_digest) if wanted else "generation 0"
                raise WrongGeneration(f"{_named(generation, digest)} cannot be finished: {held} is committed here")
            self._before, self._can_take_back = None, False
            self._on_move()
            self.upkeep.settle()
            keep = {*_keys(wanted), *_keys(self.staged)}
            self.upkeep.retire([key for key in self.upkeep.replicas if key not in keep])
        await self.upkeep.until(lambda: self._finish_settled(wanted))
        if problems := self.upkeep.failures(_keys(wanted)):
            raise StageFailed("; ".join(problems))
        _log.info("event=finished generation=%d", generation)
        return generation

    async def abort(self, generation: int, digest: str) -> int:
        """Take ``generation`` back, staged or committed; return the committed generation. Unknown to this node is fine.

        What was committed comes back as it was, since nothing of what ran before it is unloaded until `finish`. The
        same number with another ``digest`` is of another apply, and stays. A caller that goes away does not stop it.

        Raises:
            WrongGeneration: It is finished, or was committed before this agent was started; or it is older than that.
        """
        await self._moves.run(self._abort(generation, digest))
        await self.upkeep.until(lambda: not self.upkeep.is_draining())
        return self.generation

    async def _abort(self, generation: int, digest: str) -> None:
        async with self._moving:
            self._refuse_older(generation)
            if self._holds(self.committed, generation, digest):
                await self._take_back(generation)
            elif self._holds(self.staged, generation, digest):
                self.staged = None
                self.upkeep.unstage()
            else:
                return
        _log.info("event=aborted generation=%d", generation)

    async def _take_back(self, generation: int) -> None:
        """Make the state before the last commit the committed one again."""
        if not self._can_take_back:
            raise WrongGeneration(f"generation {generation} is in use here: it can only be followed by another")
        before = self._before
        if before is None:
            await asyncio.to_thread(self._journal.clear)
        else:
            await asyncio.to_thread(self._journal.write, before)
        self.committed, self._before, self._can_take_back = before, None, False
        self._on_move()
        groups = before.groups if before else ()
        self.upkeep.restore({group.key_of(wanted): wanted for group in groups for wanted in group.replicas})

    @staticmethod
    def _holds(state: DesiredState | None, generation: int, digest: str) -> bool:
        return state is not None and (state.generation, state.placement_digest) == (generation, digest)

    def _refuse_older(self, generation: int) -> None:
        seen = max(self.generation, self.staged.generation if self.staged else 0)
        if generation < seen:
            raise WrongGeneration(f"generation {generation} is older than {seen}, which this node has seen")

    def _check_staged(self, desired: DesiredState) -> None:
        if desired not in (self.staged, self.committed):
            raise WrongGeneration(f"generation {desired.generation} was aborted or replaced while it was staged")

    def _stage_settled(self, desired: DesiredState, waiting: Collection[ReplicaKey]) -> bool:
        self._check_staged(desired)
        if problems := self.upkeep.stage_problems(_keys(desired)):
            raise StageFailed("; ".join(problems))
        return all(key in waiting or self.upkeep.is_loaded(key) for key in _keys(desired))

    def _finish_settled(self, wanted: DesiredState) -> bool:
        if self.committed is not wanted:
            return True
        if self.upkeep.is_draining():
            return False
        if self.upkeep.failures(_keys(wanted)):
            return True
        grown = all(self.upkeep.is_loaded(key) for key in _keys(wanted))
        return self.ready and grown and not self.upkeep.has_idle_group()

    def choose(self, service: str, group: str | None) -> Replica:
        """Return the replica that shall serve a request: of ``group``, or the one with the shortest expected wait.

        Replicas of the committed generation go before those that it replaces.

        Raises:
            UnknownService: Nothing of that name is here.
            ReplicaUnavailable: It is here, but cannot serve now.
        """
        mine = [
            replica
            for key, replica in self.upkeep.replicas.items()
            if key.service == service and group in (None, key.group)
        ]
        if not mine:
            if not any(key.service == service for key in self.upkeep.replicas):
                raise UnknownService(f"service {service!r} does not run on node {self.settings.node!r}")
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
            key=lambda replica: (replica.key not in wanted, self.upkeep.groups[replica.key.group].expected_wait_s()),
        )


def _keys(state: DesiredState | None) -> tuple[ReplicaKey, ...]:
    return state.keys() if state else ()


def _named(generation: int, digest: str) -> str:
    return f"generation {generation} ({digest[:19]})"
