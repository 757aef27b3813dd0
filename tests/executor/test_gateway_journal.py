from __future__ import annotations

import asyncio
import errno
import re
from dataclasses import replace
from pathlib import Path

import pytest

from executor.gateway_journal import RoutingJournal
from executor.state import Backend, RoutingTable, ServiceRoutes, Target
from executor.wire import routing_table_from_proto, routing_table_to_proto
from plans.errors import BadStoredData

TABLE = RoutingTable(
    generation=3,
    placement_digest="sha256:3",
    backends=(Backend(node="a", address="127.0.0.1:1"),),
    services=(
        ServiceRoutes(
            service="chat",
            deadline_s=5.0,
            first_token_s=0.5,
            targets=(Target(group="a/0", node="a", weight=1.0, variant="v", share_s=0.25, alone_s=0.75),),
        ),
        ServiceRoutes(service="detect", deadline_s=0.1, targets=()),
    ),
)


@pytest.mark.parametrize(
    ("text", "by", "says"),
    [
        ('"generation": 3', f'"generation": {"3" * 5000}', "which cannot be read as int"),
        ('"generation": 3', '"generation": 0', "table.generation: found 0"),
        ('"generation": 3', '"generation": 4', "does not match its digest"),
        ("{", "", "expected "),
    ],
)
def test_a_damaged_table_is_named_and_how_to_get_another(tmp_path: Path, text: str, by: str, says: str) -> None:
    journal = RoutingJournal(tmp_path)
    asyncio.run(journal.write(TABLE))
    journal.path.write_text(journal.path.read_text().replace(text, by, 1))
    with pytest.raises(BadStoredData, match=rf"routes\.json.*{says}.*; remove the file and run `foreplan apply` again"):
        journal.read()


def test_law_a_table_that_was_stored_is_read_back_whole(tmp_path: Path) -> None:
    asyncio.run(RoutingJournal(tmp_path).write(TABLE))
    assert RoutingJournal(tmp_path).read() == TABLE


def test_law_a_table_that_was_sent_arrives_whole() -> None:
    assert routing_table_from_proto(routing_table_to_proto(TABLE)) == TABLE


def test_there_is_no_table_before_the_first(tmp_path: Path) -> None:
    assert RoutingJournal(tmp_path).read() is None


def test_a_table_that_knows_less_is_stored_as_an_older_version_did(tmp_path: Path) -> None:
    services = tuple(
        replace(
            routes,
            first_token_s=None,
            targets=tuple(replace(target, share_s=0.0, alone_s=0.0) for target in routes.targets),
        )
        for routes in TABLE.services
    )
    journal = RoutingJournal(tmp_path)
    asyncio.run(journal.write(replace(TABLE, services=services)))
    assert not {"share_s", "alone_s", "first_token_s"} & set(re.findall(r'"([a-z_]+)":', journal.path.read_text()))
    assert journal.read() == replace(TABLE, services=services)


def test_a_table_that_cannot_be_opened_is_not_to_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = RoutingJournal(tmp_path)
    asyncio.run(journal.write(TABLE))

    def refuse(self: Path, **_: str) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refuse)
        with pytest.raises(BadStoredData, match=r"Permission denied.*may be whole") as caught:
            journal.read()
    assert "remove" not in str(caught.value)
    assert journal.read() == TABLE
