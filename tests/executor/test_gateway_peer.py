from __future__ import annotations

import asyncio

from executor.gateway_peer import Peer, PeerTiming
from executor.routing import NodeView
from executor.state import Backend
from executor.tls import Dialer
from tests.executor.fake_agent import FakeAgent


def test_a_watch_ends_though_there_is_news_in_the_moment_in_which_it_is_told_to() -> None:
    async def scenario() -> None:
        agent = await FakeAgent("n").start()
        looks: asyncio.Queue[NodeView] = asyncio.Queue()
        peer = Peer(
            Backend(node="n", address=agent.address),
            timing=PeerTiming(poll_interval_s=60.0, poll_timeout_s=60.0),
            max_message_bytes=1 << 20,
            dialer=Dialer(),
            on_view=lambda _, view: looks.put_nowait(view),
            on_wait=lambda *_: None,
        )
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
