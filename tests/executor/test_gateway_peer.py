from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import grpc

from executor.forwarding import CallFailed
from executor.gateway_peer import Peer, PeerTiming
from executor.routing import NodeView
from executor.state import Backend
from executor.tls import Dialer
from tests.executor.fake_agent import FakeAgent
from tests.executor.front_door import request


def _peer(agent: FakeAgent, on_view: Callable[[Backend, NodeView], None]) -> Peer:
    """A peer that asks only when it is woken."""
    return Peer(
        Backend(node="n", address=agent.address),
        timing=PeerTiming(poll_interval_s=60.0, poll_timeout_s=60.0),
        max_message_bytes=1 << 20,
        dialer=Dialer(),
        on_view=on_view,
        on_wait=lambda *_: None,
    )


def test_a_stream_whose_time_runs_out_at_any_moment_ends_with_that_status() -> None:
    async def scenario() -> None:
        agent = await FakeAgent("n").start()
        peer = _peer(agent, lambda *_: None)
        message = request().SerializeToString()
        ends: Counter[grpc.StatusCode] = Counter()

        async def one(timeout_s: float) -> None:
            try:
                async for _ in peer.stream(message, "n/0", timeout_s):
                    pass
                ends[grpc.StatusCode.OK] += 1
            except CallFailed as failed:
                ends[failed.code] += 1

        await one(60.0)
        for turn in range(10):
            await asyncio.gather(*(one((turn + part / 64) * 1e-4) for part in range(64)))
        assert ends.keys() <= {grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED}
        assert len(ends) == 2
        await peer.close(0.0)
        await agent.kill()

    asyncio.run(asyncio.wait_for(scenario(), 120))


def test_a_watch_ends_though_there_is_news_in_the_moment_in_which_it_is_told_to() -> None:
    async def scenario() -> None:
        agent = await FakeAgent("n").start()
        looks: asyncio.Queue[NodeView] = asyncio.Queue()
        peer = _peer(agent, lambda _, view: looks.put_nowait(view))
        peer.start()
        for _ in range(2):  # its first question, and that for its connection, which is up
            assert not (await looks.get()).problem
        for _ in range(5):
            await asyncio.sleep(0)
        peer._wake.set()  # as the watch over the connection does
        async with asyncio.timeout(20):
            await peer.close(0.0)
        await agent.kill()

    asyncio.run(asyncio.wait_for(scenario(), 120))
