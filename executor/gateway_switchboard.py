"""The gateway's state: routes in force, peers, and the two brought in step with each other."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from executor.errors import RoutesRefused
from executor.first_tries import FirstTries
from executor.gateway_journal import RoutingJournal
from executor.gateway_peer import Peer, PeerTiming
from executor.moves import WholeMoves
from executor.routing import NodeView, Router, Routing
from executor.state import Backend, RoutingTable, Target
from executor.tls import Dialer

__all__ = ["Switchboard"]

_log = logging.getLogger("executor.gateway")


class Switchboard:
    """Installs routing tables, and keeps one `Peer` for each agent that they name.

    Args:
        journal: Where the table in force is kept.
        timing: How closely agents are watched.
        max_message_bytes: Largest message to and from an agent.
        dialer: Opens the channels to agents.
        on_change: Called after anything that may have changed which services are served.
        routing: How requests are routed.

    Attributes:
        router: The routes in force.
        first_tries: Requests that are given up when their agent does not answer any more.
    """

    def __init__(
        self,
        *,
        journal: RoutingJournal,
        timing: PeerTiming,
        max_message_bytes: int,
        dialer: Dialer,
        on_change: Callable[[], None],
        routing: Routing = "corrected",
    ) -> None:
        self.router = Router(routing)
        self.first_tries = FirstTries()
        self._journal = journal
        self._timing = timing
        self._max_message_bytes = max_message_bytes
        self._dialer = dialer
        self._on_change = on_change
        self._peers: dict[str, Peer] = {}
        self._former: dict[str, Peer] = {}
        self._problems: dict[Backend, str] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._installing = asyncio.Lock()
        self._moves = WholeMoves(_log)

    def restore(self) -> None:
        """Put the table of the journal in force, if there is one. Its targets join the rotation as agents answer.

        Raises:
            BadStoredData: The journal is damaged.
        """
        table = self._journal.read()
        if table is not None:
            _log.info("event=restored generation=%d services=%d", table.generation, len(table.services))
            self._put_in_force(table, self._new_peers(table))

    async def install(self, table: RoutingTable, *, stored: bool = False) -> None:
        """Put ``table`` in force, all at once, after its agents were asked for their state and it is stored.

        With ``stored`` another process has checked and stored it. A caller that goes away does not stop it half way.

        Raises:
            StalePlan: The table may not follow the one in force.
            RoutesRefused: A service that is served now would have no healthy target.
            StateNotStored: It cannot be stored.
        """
        await self._moves.run(self._install(table, stored=stored))

    async def _install(self, table: RoutingTable, *, stored: bool) -> None:
        async with self._installing:
            self.router.check_generation(table)
            fresh = self._new_peers(table)
            try:
                await self._poll(self._peers | fresh)
                if not stored:
                    await self._check_losses(table, self._peers | fresh)
                    await self._journal.write(table)
            except BaseException:
                await asyncio.gather(*(peer.close(0.0) for peer in fresh.values()))
                raise
            self._put_in_force(table, fresh)
            _log.info("event=routed generation=%d services=%d", table.generation, len(table.services))

    async def _poll(self, peers: Mapping[str, Peer]) -> None:
        await asyncio.gather(*(peer.poll() for peer in peers.values()))

    async def _check_losses(self, table: RoutingTable, peers: Mapping[str, Peer]) -> None:
        """Refuse routes by which a service would go out; agents that are away for a moment are waited for."""
        clock = asyncio.get_running_loop().time
        end_s = clock() + _PATIENCE_S
        while losses := self.router.losses(table):
            if clock() > end_s:
                raise RoutesRefused(f"generation {table.generation} is not routed: {'; '.join(losses)}")
            await asyncio.sleep(self._timing.poll_interval_s)
            await self._poll(peers)

    def peer(self, node: str) -> Peer | None:
        """Return the peer of ``node``; None when no table in force names it."""
        return self._peers.get(node)

    @property
    def peers(self) -> Mapping[str, Peer]:
        """The peer of each node that the table in force names."""
        return self._peers

    @property
    def former(self) -> Mapping[str, Peer]:
        """Peers of nodes that older tables named, not watched: what their agents have counted still counts."""
        return self._former

    def forget(self, node: str) -> None:
        """Keep no peer of a node that older tables named."""
        if (peer := self._former.pop(node, None)) is not None:
            self._close(peer, 0.0)

    def suspect(self, service: str, target: Target, problem: str) -> None:
        """Take a target out of the rotation until its agent answers to a question that is asked from now on."""
        _log.warning("event=suspected service=%s group=%s problem=%r", service, target.group, problem)
        if (peer := self._peers.get(target.node)) is not None:
            peer.outdate()
        self.router.suspect(service, target.group, problem)
        self._on_change()

    async def close(self, grace_s: float) -> None:
        """Stop watching every agent; calls in flight get ``grace_s`` seconds to end."""
        await self._moves.wait()
        peers, self._peers, self._former = [*self._peers.values(), *self._former.values()], {}, {}
        await asyncio.gather(*(peer.close(grace_s) for peer in peers), *self._leaving)

    def _new_peers(self, table: RoutingTable) -> dict[str, Peer]:
        """Return a peer for each backend of ``table`` that is new or has moved."""
        return {
            backend.node: self._peer_at(backend)
            for backend in table.backends
            if (known := self._peers.get(backend.node)) is None or known.backend != backend
        }

    def _peer_at(self, backend: Backend) -> Peer:
        return Peer(
            backend,
            timing=self._timing,
            max_message_bytes=self._max_message_bytes,
            dialer=self._dialer,
            on_view=self._observe,
            on_wait=self.router.note_wait,
        )

    def _put_in_force(self, table: RoutingTable, fresh: dict[str, Peer]) -> None:
        peers = self._peers | fresh
        named = {backend.node for backend in table.backends}
        gone = [peer for node, peer in self._peers.items() if node not in named or node in fresh]
        self._peers = {node: peers[node] for node in named}
        self._problems = {backend: problem for backend, problem in self._problems.items() if backend in table.backends}
        self.router.install(table)
        for peer in fresh.values():
            peer.start()
        longest_s = max((routes.deadline_s for routes in table.services), default=0.0)
        for peer in gone:
            self._close(peer, max(_LEAVE_S, longest_s))
            if peer.backend.node not in named:
                self._former[peer.backend.node] = self._peer_at(peer.backend)
        for node in named & self._former.keys():
            self.forget(node)
        self._on_change()

    def _close(self, peer: Peer, grace_s: float) -> None:
        task = asyncio.create_task(peer.close(grace_s))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def _observe(self, backend: Backend, view: NodeView) -> None:
        if self._problems.get(backend, "") != view.problem:
            self._problems[backend] = view.problem
            state = "lost" if view.problem else "found"
            _log.warning("event=%s node=%s address=%s problem=%r", state, backend.node, backend.address, view.problem)
        self.router.observe(backend, view)
        if view.doubtful:
            self.first_tries.give_up(backend.node, lambda service: not self.router.problem(service))
        self._on_change()


_PATIENCE_S = 2.0
"""How long new routes wait for agents that cannot serve; below the seconds that a caller has for its call."""

_LEAVE_S = 5.0
"""Seconds that requests in flight get at least, when the routes to their agent are gone."""
