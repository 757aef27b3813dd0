from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest

from tests.executor.front_door import run
from tests.executor.logged import errors_logged
from tests.executor.test_gateway_http import EMPTY, posted, served

LONG = EMPTY + b" " * 700_000
ANSWER = b'{"id":"%s"}' % (b"a" * 2**25)
"""More than the buffers of a connection hold."""

ENCODINGS = pytest.mark.parametrize(
    ("encoding", "encode"), [("identity", bytes), ("gzip", gzip.compress), ("deflate", zlib.compress)]
)


@ENCODINGS
def test_bodies_beyond_what_a_gateway_holds_are_refused_while_others_come(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    encoding: str,
    encode: Callable[[bytes], bytes],
) -> None:
    monkeypatch.setattr("executor.gateway_bodies._HELD_BYTES", 2**20)
    sent = encode(LONG)

    async def body(end: asyncio.Event) -> AsyncIterator[bytes]:
        yield sent[:-1]
        await end.wait()
        yield sent[-1:]

    async def scenario() -> None:
        async with served(tmp_path) as (_, session):
            for _ in range(2):  # what was held is given back
                end = asyncio.Event()
                both = [asyncio.create_task(posted(session, body(end), Content_Encoding=encoding)) for _ in range(2)]
                (refused,), (taken,) = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                status, problem = refused.result()
                assert (status, "more exceed its limit of 1048576; send less" in problem) == (429, True), problem
                end.set()
                assert (await taken)[0] == 200

    run(scenario())
    assert not errors_logged(caplog)


def test_answers_beyond_what_a_gateway_holds_are_refused_while_others_are_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("executor.gateway_bodies._HELD_BYTES", 2**20)
    monkeypatch.setattr("executor.gateway_http.answer_to_http", lambda *_: (ANSWER, None))

    async def scenario() -> None:
        async with served(tmp_path) as (_, session):
            async with session.post("/v2/models/chat/infer", data=EMPTY) as slow:
                status, problem = await posted(session, EMPTY)
                assert (status, "more exceed its limit of 1048576; send less" in problem) == (429, True), problem
                assert await slow.read() == ANSWER
            assert (await posted(session, EMPTY))[0] == 200

    run(scenario())


def test_a_client_that_does_not_take_its_answer_loses_its_connection_and_the_answer_is_held_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("executor.gateway_bodies._HELD_BYTES", 2**20)
    monkeypatch.setattr("executor.gateway_http.answer_to_http", lambda *_: (ANSWER, None))
    monkeypatch.setattr("executor.gateway_bodies._ANSWER_S", 0.05)

    async def scenario() -> None:
        async with served(tmp_path) as (_, session), session.post("/v2/models/chat/infer", data=EMPTY) as slow:
            monkeypatch.setattr("executor.gateway_bodies._ANSWER_S", 60.0)
            while (await posted(session, EMPTY))[0] == 429:
                pass
            with pytest.raises(aiohttp.ClientPayloadError):
                await slow.read()

    run(scenario())
    assert not errors_logged(caplog)


@pytest.mark.parametrize(
    ("encoding", "sent", "status", "named"),
    [
        ("br", EMPTY, 400, "Content-Encoding: found 'br', expected gzip, deflate or identity"),
        ("gzip, gzip", EMPTY, 400, "Content-Encoding: found 'gzip, gzip'"),
        ("gzip", gzip.compress(EMPTY)[:-1], 400, "the body cannot be read"),
        ("gzip", gzip.compress(EMPTY) + b"x", 400, "the body cannot be read"),
        ("deflate", zlib.compress(EMPTY) * 2, 400, "the body cannot be read"),
        ("gzip", gzip.compress(bytes(2**26)), 413, "Maximum request body size 1114112 exceeded"),
        ("deflate", zlib.compress(bytes(2**26)), 413, "Maximum request body size 1114112 exceeded"),
    ],
    ids=["other", "twice", "cut", "more", "second", "gzip bomb", "deflate bomb"],
)
def test_bodies_that_do_not_inflate_to_a_request_are_refused(
    tmp_path: Path, encoding: str, sent: bytes, status: int, named: str
) -> None:
    async def scenario() -> None:
        async with served(tmp_path, max_message_bytes=2**16) as (agent, session):
            found, problem = await posted(session, sent, Content_Encoding=encoding)
            assert (found, named in problem) == (status, True), problem
            assert not agent.served
            assert (await posted(session, EMPTY))[0] == 200

    run(scenario())


@ENCODINGS
def test_bodies_are_taken_in_encodings_that_stock_clients_send(
    tmp_path: Path, encoding: str, encode: Callable[[bytes], bytes]
) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as (_, session):
            for body in (EMPTY, LONG, EMPTY + b" " * (3 * 2**20)):
                assert (await posted(session, encode(body), Content_Encoding=encoding)) == (200, "")

    run(scenario())
