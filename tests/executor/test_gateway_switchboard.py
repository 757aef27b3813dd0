from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from executor.gateway_journal import RoutingJournal
from executor.gateway_peer import PeerTiming
from executor.gateway_switchboard import Switchboard
from executor.state import RoutingTable
from executor.tls import Dialer
from plans.documents import Document, write_document
from plans.errors import StalePlan


def test_a_controller_that_goes_away_does_not_part_the_stored_routes_from_those_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, go_on = threading.Event(), threading.Event()

    def slowly(path: Path, document: Document) -> None:
        writing.set()
        assert go_on.wait(120)
        write_document(path, document)

    async def scenario() -> None:
        board = Switchboard(
            journal=RoutingJournal(tmp_path),
            timing=PeerTiming(),
            max_message_bytes=1 << 20,
            dialer=Dialer(),
            on_change=lambda: None,
        )
        monkeypatch.setattr("executor.gateway_journal.write_document", slowly)
        calling = asyncio.create_task(board.install(RoutingTable(generation=2, placement_digest="two")))
        await asyncio.to_thread(writing.wait, 120)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        late = asyncio.create_task(board.install(RoutingTable(generation=1, placement_digest="one")))
        go_on.set()
        with pytest.raises(StalePlan, match="generation 2 is in force"):
            await late
        await board.close(0.0)
        stored = RoutingJournal(tmp_path).read()
        assert stored is not None
        assert stored == board.router.table

    asyncio.run(asyncio.wait_for(scenario(), 120))
