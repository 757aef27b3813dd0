"""The steps by which one generation reaches every peer, and the way back. `executor.controller.apply` runs them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from executor.apply_plan import Live, left_over
from executor.assignment import desired_state, routing_table
from executor.cluster_connection import Call, ClusterConnection, gather, joined
from executor.control_client import TimedOut
from executor.rounds import Stop
from executor.state import AgentState, DesiredState, ReplicaKey
from executor.tracing import NoSpans
from plans.cluster import Cluster
from plans.errors import Fault, InvalidInput, RemoteFailure
from plans.plan import Plan

__all__ = ["ApplyTimeouts", "FlipRefused", "Progress", "ProgressEvent", "Rollout", "TakenBack"]

_Answer = TypeVar("_Answer")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
_LIMIT_OF = {"route": "routes", "route the rest": "routes"}
"""Names of limits that are not those of their steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyTimeouts:
    """Seconds that each call of an apply may take, and the whole of what is retried.

    Attributes:
        state_s: A peer's state.
        validate_s: An agent's check of what it shall run.
        stage_s: Loading what is new on a node.
        commit_s: Letting staged replicas serve.
        routes_s: Putting routes in force.
        finish_s: Draining, unloading, and loading what had to wait.
        abort_s: Taking a generation back on all nodes, with retries.
        converge_s: How long after the flip failed calls are repeated, and how long a plan that is live already may take
            until it serves.
    """

    state_s: float = 5.0
    validate_s: float = 30.0
    stage_s: float = 600.0
    commit_s: float = 30.0
    routes_s: float = 10.0
    finish_s: float = 600.0
    abort_s: float = 10.0
    converge_s: float = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressEvent:
    """One peer began, ended or failed one step: ``outcome`` is "begun", "done" or "failed", with ``detail``."""

    step: str
    peer: str
    outcome: str
    detail: str = ""


Progress = Callable[[ProgressEvent], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenBack:
    """How taking a generation back ended.

    Attributes:
        remaining: Nodes that are not where they were, a line each.
        successor: The generation of another apply that took over on some node, or None; what is there is its own.
    """

    remaining: tuple[str, ...] = ()
    successor: int | None = None


class FlipRefused(RemoteFailure):
    """Every gateway refused the new routes, so the old ones are in force everywhere."""


class Rollout:
    """One generation of ``plan`` on its way to every peer of ``connection``.

    Up to and including `commit` everything can be taken back with `abort`; once `flip` succeeded, only forward.
    """

    def __init__(
        self,
        plan: Plan,
        cluster: Cluster,
        connection: ClusterConnection,
        *,
        generation: int,
        timeouts: ApplyTimeouts,
        progress: Progress,
        spans: NoSpans | None = None,
    ) -> None:
        self.generation = generation
        self._spans = spans or NoSpans()
        self.deferred: dict[str, tuple[ReplicaKey, ...]] = {}
        self.plan = plan
        self._digest = plan.placement_digest
        self._connection = connection
        self._timeouts = timeouts
        self._progress = progress
        self._addresses = {node.name: node.address for node in cluster.nodes}

    async def validate(self) -> None:
        """Ask every agent whether it can run its part.

        ``deferred`` then holds what would have to wait for memory.

        Raises:
            InvalidInput: Some cannot; with the faults of all.
            RemoteFailure: An agent did not answer.
        """
        timeout_s = self._timeouts.validate_s
        answers = await self._everywhere(
            "validate",
            {n: partial(a.validate, self._desired(n), timeout_s=timeout_s) for n, a in self._connection.agents.items()},
        )
        faults: list[Fault] = [fault for found, _ in answers.values() for fault in found]
        if faults:
            raise InvalidInput(faults)
        self.deferred = {node: waiting for node, (_, waiting) in answers.items()}

    async def stage(self) -> None:
        """Load what is new beside what runs, on all nodes at once; ``deferred`` then holds what must wait for memory.

        Raises:
            RemoteFailure: A node could not.
        """
        timeout_s = self._timeouts.stage_s
        self.deferred = await self._everywhere(
            "stage",
            {n: partial(a.stage, self._desired(n), timeout_s=timeout_s) for n, a in self._connection.agents.items()},
        )

    async def commit(self) -> None:
        """Let staged replicas take requests; the old ones still do.

        Raises:
            RemoteFailure: A node could not.
        """
        timeout_s = self._timeouts.commit_s
        await self._everywhere(
            "commit",
            {
                n: partial(a.commit, self.generation, self._digest, timeout_s=timeout_s)
                for n, a in self._connection.agents.items()
            },
        )

    async def abort(self, before: Live) -> TakenBack:
        """Take the generation back everywhere, and check the nodes.

        A peer that cannot be reached is tried again for as long as ``abort_s``. One that has seen a newer generation,
        or the same one of another plan, refuses; it holds nothing of this one any more.
        """
        agents = self._connection.agents
        _, lost = await gather(
            {n: partial(self._repeat, "abort", n, self._aborting(n), self._timeouts.abort_s) for n in agents}
        )
        states, _, _ = await self._connection.states(timeout_s=self._timeouts.state_s)
        successors = {
            node: max(state.generation, state.staged_generation)
            for node, state in states.items()
            if self._is_past(state) or state.leased_to not in ("", agents[node].holder)
        }
        found = [
            f"{failure}; it may hold generation {self.generation} yet, which the next apply takes back"
            for node, failure in lost.items()
            if node not in successors
        ]
        for node, state in states.items():
            if node not in lost and node not in successors and _place(state) != _place(before.agents[node]):
                found.append(f"{node}: is at generation {state.generation}, not {before.agents[node].generation}")
        return TakenBack(remaining=tuple(found), successor=max(successors.values(), default=None))

    def _is_past(self, state: AgentState) -> bool:
        """Say whether another apply has taken over on a node."""
        if state.generation == self.generation:
            return state.placement_digest != self._digest
        return max(state.generation, state.staged_generation) > self.generation

    async def flip(self, *, insist: bool = False) -> dict[str, RemoteFailure]:
        """Put the new routes in force on every gateway, without the replicas that are still to be loaded.

        Once one gateway has them there is no way back: those that refused are asked again until ``converge_s``. With
        ``insist`` that is so from the start.

        Returns:
            The gateways that did not follow to the end of ``converge_s``, by address; they may or may not have flipped.

        Raises:
            FlipRefused: Every gateway refused, so nothing has changed; not with ``insist``.
        """
        waiting = [key for keys in self.deferred.values() for key in keys]
        gateways = tuple(self._connection.gateways)
        failures = await self._route("route", waiting, gateways, insist=insist)
        refused = [address for address, failure in failures.items() if not failure.retryable]
        if insist or not refused:
            return failures
        if len(refused) == len(gateways):
            failure = failures[refused[0]]
            raise FlipRefused(failure.peer, failure.problem, retryable=False)
        others = {address: failure for address, failure in failures.items() if address not in refused}
        return others | await self._route("route", waiting, refused, insist=True)

    async def settle(self) -> None:
        """Drain and unload what an apply that was cut short left: this generation is committed and routed everywhere.

        Raises:
            RemoteFailure: A node could not.
        """
        timeout_s = self._timeouts.finish_s
        await self._everywhere(
            "finish",
            {
                node: partial(agent.finish, self.generation, self._digest, timeout_s=timeout_s)
                for node, agent in self._connection.agents.items()
            },
        )

    async def finish(self) -> dict[str, RemoteFailure]:
        """Drain and unload what left, load what had to wait, and then route to that as well.

        An agent that fails is brought to the generation anew until ``converge_s`` is over.

        Returns:
            The peers that are not done, by node or address.
        """
        _, failures = await gather(
            {
                node: partial(self._repeat, "finish", node, self._finishing(node), self._timeouts.converge_s)
                for node in self._connection.agents
            }
        )
        if any(self.deferred.values()):
            waiting = [key for node, keys in self.deferred.items() if node in failures for key in keys]
            failures |= await self._route("route the rest", waiting, tuple(self._connection.gateways), insist=True)
        return failures

    async def left_over(self) -> tuple[str, ...]:
        """Return what still differs from the plan, a line each; peers that do not answer included."""
        agents, gateways, lost = await self._connection.states(timeout_s=self._timeouts.state_s)
        found = left_over(self.plan, self.generation, Live(agents=agents, gateways=gateways), self._addresses)
        return (*(str(failure) for failure in lost.values()), *found)

    def _desired(self, node: str) -> DesiredState:
        return desired_state(self.plan, node, self.generation, self._addresses, underway=isinstance(self.plan, Stop))

    async def _route(
        self, step: str, without: Sequence[ReplicaKey], gateways: Sequence[str], *, insist: bool
    ) -> dict[str, RemoteFailure]:
        table = routing_table(self.plan, self._addresses, self.generation, without=without)

        def sending(address: str) -> Call[None]:
            return partial(self._connection.gateways[address].set_routes, table, timeout_s=self._timeouts.routes_s)

        _, failures = await gather(
            {
                address: partial(
                    self._repeat, step, address, sending(address), self._timeouts.converge_s, insist=insist
                )
                for address in gateways
            }
        )
        return failures

    def _aborting(self, node: str) -> Call[None]:
        abort = self._connection.agents[node].abort
        return partial(abort, self.generation, self._digest, timeout_s=self._timeouts.abort_s)

    def _finishing(self, node: str) -> Call[None]:
        """Return an attempt to finish; from the second on it looks first, for the agent may have been restarted."""
        client = self._connection.agents[node]
        tried = False

        async def attempt() -> None:
            nonlocal tried
            if tried:
                state = await client.state(timeout_s=self._timeouts.state_s)
                if state.generation != self.generation:
                    await client.stage(self._desired(node), timeout_s=self._timeouts.stage_s)
                    await client.commit(self.generation, self._digest, timeout_s=self._timeouts.commit_s)
            tried = True
            await client.finish(self.generation, self._digest, timeout_s=self._timeouts.finish_s)

        return attempt

    async def _everywhere(self, step: str, calls: Mapping[str, Call[_Answer]]) -> dict[str, _Answer]:
        """Make one call per peer; raise what failed when all have ended."""
        answers, failures = await gather({node: partial(self._tell, step, node, call) for node, call in calls.items()})
        if failures:
            raise joined(failures.values())
        return answers

    async def _tell(self, step: str, peer: str, call: Call[_Answer]) -> _Answer:
        self._progress(ProgressEvent(step=step, peer=peer, outcome="begun"))
        try:
            with self._spans.span(f"apply.{step}", peer=peer, generation=self.generation):
                answer = await call()
        except RemoteFailure as failure:
            self._progress(ProgressEvent(step=step, peer=peer, outcome="failed", detail=failure.problem))
            if isinstance(failure, TimedOut):
                problem = (
                    f"{step}: {failure.problem}; give it longer with --timeout {_LIMIT_OF.get(step, step)}=SECONDS"
                )
                raise RemoteFailure(failure.peer, problem, retryable=True) from failure
            raise
        self._progress(ProgressEvent(step=step, peer=peer, outcome="done"))
        return answer

    async def _repeat(self, step: str, peer: str, attempt: Call[None], limit_s: float, *, insist: bool = False) -> None:
        """Repeat ``attempt`` with growing pauses until it succeeds, is refused twice, or ``limit_s`` is over.

        With ``insist`` refusals end it no sooner.
        """
        clock = asyncio.get_running_loop().time
        end_s = clock() + limit_s
        pause_s = _FIRST_PAUSE_S
        refused = False
        while True:
            try:
                return await self._tell(step, peer, attempt)
            except RemoteFailure as failure:
                if clock() + pause_s > end_s or (refused and not failure.retryable and not insist):
                    raise
                refused = refused or not failure.retryable
            await asyncio.sleep(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)


def _place(state: AgentState) -> tuple[int, str]:
    return state.generation, state.placement_digest
