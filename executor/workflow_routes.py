"""Where an agent hands the stages of workflows over to: its own replicas, and those of other agents.

The routes come with what the node shall run, so they are journalled and change with its generation. Between a commit
and its finish both generations' replicas serve: those of the new one come first, those of the old one step in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from executor.first_tries import FirstTries
from executor.gateway_peer import Peer, PeerTiming
from executor.logs import log_failure
from executor.routing import NodeView, Router, Routing
from executor.state import Backend, RoutingTable
from executor.tls import Dialer

__all__ = ["Place", "Successors"]

_LEAVE_S = 5.0
"""Seconds that calls in flight get when the routes to their agent are gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A replica for one call.

    Attributes:
        group: Its group.
        node: Where that is.
        peer: Its agent; None for this one.
        router: That chose it.
    """

    group: str
    node: str
    peer: Peer | None
    router: Router


class Successors:
    """Chooses replicas, and watches the agents that have them.

    Args:
        node: Whose agent this is.
        view: What is known about that node itself.
        dialer: Opens channels to other agents.
        max_message_bytes: Largest message to and from them.
        timing: How closely they are watched.
        routing: The rule.

    Attributes:
        first_tries: Calls that are given up when their agent does not answer any more.
    """

    def __init__(
        self,
        node: str,
        view: Callable[[], NodeView],
        *,
        dialer: Dialer,
        max_message_bytes: int,
        timing: PeerTiming | None = None,
        routing: Routing = "corrected",
    ) -> None:
        self.first_tries = FirstTries()
        self._node = node
        self._view = view
        self._dialer = dialer
        self._max_message_bytes = max_message_bytes
        self._timing = timing or PeerTiming()
        self._routing: Routing = routing
        self._routers: list[Router] = []
        self._peers: dict[Backend, Peer] = {}
        self._views: dict[Backend, NodeView] = {}
        self._asking: dict[Backend, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[None]] = set()

    def follow(self, tables: Sequence[RoutingTable], *, watched: bool) -> None:
        """Choose by the first of ``tables`` that has a usable replica from now on.

        Where it is not ``watched``, agents are only watched from the first call on that needs one.
        """
        known = {router.table: router for router in self._routers}
        self._routers = [known.get(table) or self._new_router(table) for table in tables]
        named = {backend for table in tables for backend in table.backends if backend.node != self._node}
        for backend in self._peers.keys() - (named if watched else set()):
            self._views.pop(backend, None)
            self._leave(self._peers.pop(backend))
        for backend in named if watched else ():
            self._watch(backend)

    def _watch(self, backend: Backend) -> Peer:
        """Return the peer of an agent, which is watched from now on."""
        peer = self._peers.get(backend)
        if peer is None:
            self._peers[backend] = peer = Peer(
                backend,
                timing=self._timing,
                max_message_bytes=self._max_message_bytes,
                dialer=self._dialer,
                on_view=self._observe,
                on_wait=self._note_wait,
            )
            peer.start()
        return peer

    async def choose(self, service: str, *, without: str = "") -> Place | None:
        """Return the replica for a call of ``service``, passing over the group ``without``; None when none can be used.

        Before it gives up it asks the agents once more: a commit elsewhere may be newer than what is known.
        """
        found = self._next(service, without)
        if found is None:
            await asyncio.gather(*(self._asked(backend) for backend in self._backends_of(service)))
            found = self._next(service, without)
        return found

    def suspect(self, service: str, place: Place, problem: str) -> None:
        """Take a replica out of the rotation until its agent answers to a question that is asked from now on."""
        if place.peer is not None:
            place.peer.outdate()
        place.router.suspect(service, place.group, problem)

    def problem(self, service: str) -> str:
        """Return why no replica of ``service`` can be used."""
        return self._routers[0].problem(service) if self._routers else "no plan with workflows is committed here"

    async def close(self) -> None:
        """Stop watching."""
        peers, self._peers = self._peers, {}
        self._routers = []
        await asyncio.gather(*(peer.close(0.0) for peer in peers.values()), *self._leaving, return_exceptions=True)

    def _new_router(self, table: RoutingTable) -> Router:
        router = Router(self._routing)
        router.install(table)
        for backend, view in self._views.items():
            router.observe(backend, view)
        return router

    def _next(self, service: str, without: str) -> Place | None:
        for router in self._routers:
            self._look_here(router)
            target = router.choose(service, without=without)
            if target is None:
                continue
            if target.node == self._node:
                return Place(group=target.group, node=target.node, peer=None, router=router)
            backend = _backends(router)[target.node]
            return Place(group=target.group, node=target.node, peer=self._watch(backend), router=router)
        return None

    def _look_here(self, router: Router) -> None:
        own = _backends(router).get(self._node)
        if own is not None:
            router.observe(own, self._view())

    def _backends_of(self, service: str) -> set[Backend]:
        """Return the other agents that have replicas of ``service``."""
        found = set()
        for router in self._routers:
            routes, backends = router.routes(service), _backends(router)
            found |= {backends[target.node] for target in (routes.targets if routes else ())}
        return {backend for backend in found if backend.node != self._node}

    async def _asked(self, backend: Backend) -> None:
        """Ask an agent for its state; callers at the same time share one question."""
        task = self._asking.get(backend)
        if task is None:
            self._asking[backend] = task = asyncio.create_task(self._watch(backend).poll())
            task.add_done_callback(lambda _: self._asking.pop(backend, None))
        await asyncio.shield(task)

    def _observe(self, backend: Backend, view: NodeView) -> None:
        self._views[backend] = view
        for router in self._routers:
            router.observe(backend, view)
        if view.doubtful:
            self.first_tries.give_up(backend.node, self._is_served)

    def _is_served(self, service: str) -> bool:
        """Say whether some replica of ``service`` is known to take calls, here or elsewhere."""
        for router in self._routers:
            self._look_here(router)
        return any(not router.problem(service) for router in self._routers)

    def _note_wait(self, group: str, wait_s: float) -> None:
        for router in self._routers:
            router.note_wait(group, wait_s)

    def _leave(self, peer: Peer) -> None:
        task = asyncio.create_task(peer.close(_LEAVE_S))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        task.add_done_callback(log_failure)


def _backends(router: Router) -> dict[str, Backend]:
    return {backend.node: backend for backend in router.table.backends} if router.table else {}
