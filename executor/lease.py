"""One controller at a time: who may change a node now, and how a controller comes to be it.

A lease is a name and a time. While it lasts, an agent refuses control calls under any other name; when it ends, because
the controller gave it back or died, the generation alone decides again. Agents keep it in memory: an agent that was
restarted has none, and the next renewal brings it back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

from executor.cluster_connection import ClusterConnection
from executor.control_client import AgentClient
from executor.errors import LeaseHeld
from plans.errors import RemoteFailure, StalePlan

__all__ = ["Lease", "LeaseTiming", "holding", "new_holder"]


class Lease:
    """The lease of one node, on the clock of the caller."""

    def __init__(self) -> None:
        self._holder = ""
        self._until_s = 0.0

    def holder(self, now_s: float) -> str:
        """Return who has the lease; empty when nobody does."""
        return self._holder if now_s < self._until_s else ""

    def remaining_s(self, now_s: float) -> float:
        """Return how long it lasts yet."""
        return max(0.0, self._until_s - now_s) if self._holder else 0.0

    def ask(self, holder: str, ttl_s: float, now_s: float) -> bool:
        """Give ``holder`` the lease for ``ttl_s`` seconds, or take it back with 0; False when another one has it."""
        if self.holder(now_s) not in ("", holder):
            return False
        self._holder, self._until_s = holder, now_s + ttl_s
        return True

    def check(self, caller: str, now_s: float) -> None:
        """Refuse a call under another name than the holder's.

        Raises:
            LeaseHeld: Another controller has the lease.
        """
        holder = self.holder(now_s)
        if holder not in ("", caller):
            left_s = self.remaining_s(now_s)
            raise LeaseHeld(f"controller {holder} is changing this node (its lease lasts {left_s:.1f} s)")


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseTiming:
    """Seconds: how long a lease lasts without renewal, and how long a controller waits for another one to be done."""

    ttl_s: float = 10.0
    wait_s: float = 15.0
    call_s: float = 5.0


def new_holder() -> str:
    """Return a name that no other controller has."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"


@contextlib.asynccontextmanager
async def holding(connection: ClusterConnection, holder: str, timing: LeaseTiming) -> AsyncIterator[None]:
    """Hold the lease of every agent of ``connection`` inside the block, and make its calls under ``holder``.

    Agents are asked in one order by all controllers, the first one alone: so two controllers never hold each other up.
    An agent that does not answer is passed over; what is done with it next says so.

    Raises:
        StalePlan: Another controller did not get done within ``wait_s``.
    """
    agents = [connection.agents[node] for node in sorted(connection.agents)]
    await _acquire(agents, holder, timing)
    for agent in agents:
        agent.holder = holder
    renewing = asyncio.create_task(_renew(agents, holder, timing), name="lease")
    try:
        yield
    finally:
        renewing.cancel()
        await asyncio.gather(renewing, return_exceptions=True)
        await asyncio.shield(_release(agents, holder, timing))


async def _acquire(agents: list[AgentClient], holder: str, timing: LeaseTiming) -> None:
    clock = asyncio.get_running_loop().time
    end_s = clock() + timing.wait_s
    while True:
        other = await _ask_all(agents, holder, timing)
        if not other:
            return
        await _release(agents, holder, timing)
        if clock() >= end_s:
            remedy = "wait until it is done, and run this again"
            raise StalePlan(f"controller {other} is changing the cluster; {remedy}")
        await asyncio.sleep(min(_PAUSE_S, timing.wait_s))


_PAUSE_S = 0.2


async def _ask_all(agents: list[AgentClient], holder: str, timing: LeaseTiming) -> str:
    """Ask every agent for its lease; return who else has one, or nothing."""
    if not agents:
        return ""
    first, *others = agents
    if other := await _ask(first, holder, timing.ttl_s, timing):
        return other
    answers = await asyncio.gather(*(_ask(agent, holder, timing.ttl_s, timing) for agent in others))
    return next((other for other in answers if other), "")


async def _ask(agent: AgentClient, holder: str, ttl_s: float, timing: LeaseTiming) -> str:
    try:
        return await agent.lease(holder, ttl_s, timeout_s=timing.call_s)
    except RemoteFailure as failure:
        if failure.retryable:  # it is not there: whoever goes on will see
            return ""
        raise


async def _renew(agents: list[AgentClient], holder: str, timing: LeaseTiming) -> None:
    while True:
        await asyncio.sleep(timing.ttl_s / 3)
        await asyncio.gather(*(_ask(agent, holder, timing.ttl_s, timing) for agent in agents), return_exceptions=True)


async def _release(agents: list[AgentClient], holder: str, timing: LeaseTiming) -> None:
    await asyncio.gather(*(_ask(agent, holder, 0.0, timing) for agent in agents), return_exceptions=True)
