"""Brings a cluster to a plan, all or nothing: the one-shot controller behind ``foreplan apply``.

The order of the calls is that of ``executor/proto/control.proto``. The flip of the routes on the gateways is the point
of no return: a failure before it takes everything back, a failure after it is repeated until it succeeds. An apply that
was killed in between is taken up by running it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from executor.apply_plan import (
    Fresh,
    InForce,
    Live,
    ReplicaChange,
    Stale,
    assess,
    changes,
    check_plan,
    check_rotation,
    not_serving,
)
from executor.cluster_connection import ClusterConnection, unheard
from executor.cluster_status import ClusterStatus, status
from executor.lease import LeaseTiming, holding, new_holder
from executor.rollout import ApplyTimeouts, Progress, ProgressEvent, Rollout, TakenBack
from executor.rounds import PlannedWave, is_settled, outlook, running_plan, stops_from
from executor.state import ReplicaKey
from executor.tls import Dialer
from executor.tracing import start_tracing
from plans.cluster import Cluster
from plans.errors import ApplyRolledBack, InvalidInput, RemoteFailure, StalePlan
from plans.plan import Plan, Prior

__all__ = [
    "Applied",
    "ApplyResult",
    "ApplyTimeouts",
    "ClusterStatus",
    "LeaseTiming",
    "NoChanges",
    "PlannedWave",
    "Progress",
    "ProgressEvent",
    "WouldApply",
    "apply",
    "status",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoChanges:
    """The plan was live already, as ``generation``.

    ``converged``: what was put right all the same, a line each. ``not_serving``: what does not serve all the same.
    """

    generation: int
    placement_digest: str
    converged: tuple[str, ...] = ()
    not_serving: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """The plan is live as ``generation``. ``deferred`` had to wait for the memory of what it replaced."""

    generation: int
    placement_digest: str
    changes: tuple[ReplicaChange, ...]
    deferred: tuple[ReplicaKey, ...]
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WouldApply:
    """What an apply would do; nothing was changed.

    ``deferred`` would have to wait for the memory of what it replaces: what fits beside it on the same devices, planned
    before it, is deducted. ``waves`` say what would go and come when. ``left_over`` is what an apply of the live plan
    would put right.
    """

    generation: int
    placement_digest: str
    changes: tuple[ReplicaChange, ...]
    deferred: tuple[ReplicaKey, ...] = ()
    waves: tuple[PlannedWave, ...] = ()
    left_over: tuple[str, ...] = ()


ApplyResult = NoChanges | Applied | WouldApply
"""How an apply ended that did not fail."""


_log = logging.getLogger("executor.controller")

_FOLLOW_PAUSE_S = 0.2
"""Between two attempts to bring agents to the next stop."""

_GO_ON = "run `foreplan apply` again to go on from here"


def _silent(event: ProgressEvent) -> None:
    """Tell nobody."""


async def apply(
    plan: Plan,
    cluster: Cluster,
    gateways: Sequence[str],
    *,
    prior: Prior | None = None,
    dry_run: bool = False,
    timeouts: ApplyTimeouts | None = None,
    progress: Progress = _silent,
    dialer: Dialer | None = None,
    lease: LeaseTiming | None = None,
) -> ApplyResult:
    """Bring every node of ``cluster``, and the routes of ``gateways``, to ``plan``.

    Where something has to wait for memory that others hold, this takes the waves of `plans.transition`, each a
    generation of its own, from what agents say that they have committed.

    Args:
        plan: What shall run. Nodes that it does not use are emptied.
        cluster: The inventory, with the address of every agent.
        gateways: ``host:port`` of each gateway.
        prior: What the plan follows, in place of its own ``prior``: a stored plan is applied anew by passing what is
            live (`status` says).
        dry_run: Check everything, and say what would happen.
        timeouts: Limits of the calls.
        progress: Told about each step on each peer.
        dialer: Opens the channels; without one, in the clear.
        lease: How long to wait for another controller, and for how long the nodes are held.

    Raises:
        InvalidInput: The plan is for another cluster, a node cannot run its part, or a service that is served would be
            left to drained nodes; with all faults.
        StalePlan: Something else is live than what the plan was made against, or another controller is at work; also
            one that took over from this one before the flip.
        ApplyRolledBack: A step before the flip failed, and everything was taken back.
        RemoteFailure: A peer cannot be reached; or the routes have flipped and some peers are not done yet, in which
            case running the apply again goes on from there.
    """
    limits = timeouts or ApplyTimeouts()
    started_s = asyncio.get_running_loop().time()
    check_plan(plan, cluster)
    async with ClusterConnection(cluster, gateways, dialer) as connection, contextlib.AsyncExitStack() as held:
        if not dry_run:
            await held.enter_async_context(holding(connection, new_holder(), lease or LeaseTiming()))
        live = await _live(connection, limits)
        standing = assess(plan, prior or plan.prior, live, {node.name: node.address for node in cluster.nodes})
        match standing:
            case Stale(problem=problem):
                raise StalePlan(problem)
            case InForce(generation=generation, left_over=()):
                await held.aclose()  # nothing is changed while it is waited for
                missing = () if dry_run else await _not_serving(plan, connection, live, limits, progress)
                digest = plan.placement_digest
                return NoChanges(generation=generation, placement_digest=digest, not_serving=missing)
        check_rotation(plan, live)
        found = standing.left_over if isinstance(standing, InForce) else ()
        generation = standing.generation if isinstance(standing, Fresh) else live.last_generation + 1
        spans = start_tracing("foreplan-controller")
        held.callback(spans.close)
        held.enter_context(spans.span("apply", generation=generation, placement_digest=plan.placement_digest))

        def rollout_to(stop: Plan, number: int) -> Rollout:
            return Rollout(
                stop, cluster, connection, generation=number, timeouts=limits, progress=progress, spans=spans
            )

        rollout = rollout_to(plan, generation)
        if dry_run:
            await rollout.validate()
        else:
            await _reach(rollout.validate, rollout, live)
        running = running_plan(live, plan) if any(rollout.deferred.values()) else None
        if running is not None and is_settled(live) and _has_left_over(live) and not dry_run:
            await _settle(rollout_to(running, live.generation))
        plans = stops_from(running, plan, cluster, settled=is_settled(live)) if running is not None else ()
        way = [rollout_to(stop, generation + number) for number, stop in enumerate(plans)]
        if not way or not await _is_possible(way):
            way = [rollout]
        if dry_run:
            present = {one.key for one in changes(plan, live) if one.action != "load"}
            return WouldApply(
                generation=way[-1].generation,
                placement_digest=plan.placement_digest,
                changes=changes(plan, live),
                deferred=_waiting([rollout]),
                waves=outlook(present, [one.plan for one in way], _waiting(way[:1])),
                left_over=found,
            )
        await _run(way, live, limits)
    if isinstance(standing, InForce):
        return NoChanges(generation=way[-1].generation, placement_digest=plan.placement_digest, converged=found)
    return Applied(
        generation=way[-1].generation,
        placement_digest=plan.placement_digest,
        changes=changes(plan, live),
        deferred=_waiting(way),
        wall_s=asyncio.get_running_loop().time() - started_s,
    )


def _waiting(way: Sequence[Rollout]) -> tuple[ReplicaKey, ...]:
    return tuple(dict.fromkeys(key for rollout in way for keys in rollout.deferred.values() for key in keys))


def _has_left_over(live: Live) -> bool:
    """Say whether a node still runs what has left the plan, since an apply was cut short."""
    return any(one.left_over for state in live.agents.values() for one in state.replicas)


async def _settle(rollout: Rollout) -> None:
    """End what was cut short, so that memory which nothing needs any more stands in nobody's way."""
    try:
        await rollout.settle()
    except RemoteFailure as failure:
        raise _unfinished(rollout, {failure.peer: failure}, []) from failure


async def _is_possible(way: Sequence[Rollout]) -> bool:
    """Say whether every node can hold what stands on the way; one may have less memory than the cluster file says."""
    try:
        for rollout in way:
            await rollout.validate()
    except (InvalidInput, RemoteFailure) as failure:
        _log.warning("everything that leaves goes at once: %s", failure)
        return False
    return True


async def _live(connection: ClusterConnection, limits: ApplyTimeouts) -> Live:
    """Ask every peer for its state.

    Raises:
        RemoteFailure: Some do not answer; with all of them, and what to do.
    """
    agents, gateways, lost = await connection.states(timeout_s=limits.state_s, with_desired=True)
    if lost:
        raise unheard(lost, connection.gateways, longer="give it longer with --timeout state=SECONDS")
    return Live(agents=agents, gateways=gateways)


async def _not_serving(
    plan: Plan, connection: ClusterConnection, live: Live, limits: ApplyTimeouts, progress: Progress
) -> tuple[str, ...]:
    """Wait until the plan that is live serves, and return what does not after ``converge_s``, a line each.

    An agent that was restarted loads its models first.
    """
    clock = asyncio.get_running_loop().time
    end_s = clock() + limits.converge_s
    told: tuple[str, ...] = ()
    missing = not_serving(plan, live)
    while missing and clock() <= end_s:
        for line in missing if missing != told else ():
            progress(ProgressEvent(step="serve", peer="cluster", outcome="begun", detail=line))
        told = missing
        await asyncio.sleep(_FOLLOW_PAUSE_S)
        agents, gateways, lost = await connection.states(timeout_s=limits.state_s)
        missing = (*map(str, lost.values()), *not_serving(plan, Live(agents=agents, gateways=gateways)))
    if told and not missing:
        progress(ProgressEvent(step="serve", peer="cluster", outcome="done"))
    return missing


async def _run(way: Sequence[Rollout], before: Live, limits: ApplyTimeouts) -> None:
    """Take the steps of one apply, stop by stop. Nothing is unloaded before every gateway is known to have flipped."""
    first, last = way[0], way[-1]
    await _reach(first.stage, first, before)
    await _reach(first.commit, first, before)
    try:
        failures = await _flip(first, before)
        if failures:
            raise _unfinished(first, failures, ["no node has unloaded anything"])
        failures = await first.finish()
        for rollout in way[1:]:
            if not failures:
                failures = await _follow(rollout, limits)
        remaining = await last.left_over()
    except asyncio.CancelledError:
        _log.error("interrupted: generation %d is not everywhere yet; %s", last.generation, _GO_ON)
        raise
    if failures or remaining:
        raise _unfinished(last, failures, remaining)


async def _follow(rollout: Rollout, limits: ApplyTimeouts) -> dict[str, RemoteFailure]:
    """Go on to a further stop, for which nothing is taken back any more; return the peers that are not there."""
    clock = asyncio.get_running_loop().time
    end_s = clock() + limits.converge_s
    waiting: dict[str, tuple[ReplicaKey, ...]] = {}
    while True:
        try:
            await rollout.stage()
            waiting |= {node: keys for node, keys in rollout.deferred.items() if keys}  # of the second time none waits
            await rollout.commit()
            break
        except RemoteFailure as failure:
            if not failure.retryable or clock() > end_s:
                return {failure.peer: failure}
        await asyncio.sleep(_FOLLOW_PAUSE_S)
    rollout.deferred = waiting
    return await rollout.flip(insist=True) or await rollout.finish()


def _unfinished(rollout: Rollout, failures: Mapping[str, RemoteFailure], remaining: Sequence[str]) -> RemoteFailure:
    peer = next((failure.peer for failure in failures.values()), "cluster")
    lines = dict.fromkeys((*(str(failure) for failure in failures.values()), *remaining))
    text = f"generation {rollout.generation} is not everywhere yet: {'; '.join(lines)}"
    return RemoteFailure(peer, f"{text}; {_GO_ON}", retryable=True)


async def _reach(step: Callable[[], Awaitable[None]], rollout: Rollout, before: Live) -> None:
    """Take a step before the flip; take everything back where it fails."""
    try:
        await step()
    except RemoteFailure as failure:
        await _roll_back(rollout, before, failure)
    except asyncio.CancelledError:
        outcome = _told(await asyncio.shield(rollout.abort(before)))
        _log.error("interrupted before the flip: %s", outcome)
        raise


async def _flip(rollout: Rollout, before: Live) -> dict[str, RemoteFailure]:
    try:
        return await rollout.flip()
    except RemoteFailure as refusal:
        await _roll_back(rollout, before, refusal)
        raise


async def _roll_back(rollout: Rollout, before: Live, cause: RemoteFailure) -> None:
    end = await rollout.abort(before)
    if end.successor is not None:
        raise StalePlan(f"{cause}; {_told(end)}; plan again from what is live once that is done") from cause
    raise ApplyRolledBack(f"{cause}; {_told(end)}") from cause


def _told(end: TakenBack) -> str:
    """Return what a user is told of how taking a generation back ended."""
    parts = [] if end.successor is None else [f"another apply (generation {end.successor}) took over"]
    if end.remaining:
        parts.append(f"taken back, except: {'; '.join(end.remaining)}")
    elif end.successor is None:
        parts.append("everything was taken back, and every node is back where it was")
    return "; ".join(parts)
