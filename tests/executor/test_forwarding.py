"""Frames between gateway and agent: shared, broken, oversized, hostile."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executor.errors import QueueFull
from executor.forward_wire import Request, decode_answers, encode_requests
from executor.forwarding import Body, CallFailed, ForwardLink, ForwardServer
from executor.roles import Role
from executor.tls import Credentials
from tests.executor.authority import Authority

LIMIT = 1 << 16


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 120))


async def echo(body: Body, group: str, timeout_s: float) -> bytes:
    if body == b"full":
        raise QueueFull("too much waits")
    if body == b"bug":
        raise ZeroDivisionError
    if body == b"large":
        return bytes(LIMIT + 1)
    if body == b"slow":
        await asyncio.sleep(60)
    return group.encode() + bytes(body)


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[ForwardServer, ForwardLink, dict[str, float]]]:
    server = ForwardServer(echo, lambda group: 0.25, max_message_bytes=LIMIT)
    await server.listen("127.0.0.1")
    waits: dict[str, float] = {}
    link = ForwardLink("127.0.0.1", None, waits.__setitem__, max_message_bytes=LIMIT)
    link.port = server.port
    try:
        yield server, link, waits
    finally:
        await link.close(0.0)
        await server.close()


async def code(call: Coroutine[Any, Any, bytes]) -> grpc.StatusCode:
    with pytest.raises(CallFailed) as caught:
        await call
    return caught.value.code


def test_requests_of_one_moment_are_answered_each_with_its_own() -> None:
    async def scenario() -> None:
        async with linked() as (_, link, waits):
            bodies = [str(number).encode() * (number % 50 + 1) for number in range(300)]
            answers = await asyncio.gather(*(link.send(body, "g", 5) for body in bodies))
            assert answers == [b"g" + body for body in bodies]
            assert waits == {"g": 0.25}

    run(scenario())


def test_thousands_of_one_moment_are_in_no_frame_that_is_longer_than_is_taken() -> None:
    async def scenario() -> None:
        async with linked() as (_, link, _):
            await link.send(b"x", "g", 60)
            bodies = [number.to_bytes(20) for number in range(6000)]
            answers = await asyncio.gather(*(link.send(body, "g", 60) for body in bodies))
            assert answers == [b"g" + body for body in bodies]
            refused = await asyncio.gather(*(link.send(b"full", "g", 60) for _ in bodies), return_exceptions=True)
            assert {str(error) for error in refused} == {"RESOURCE_EXHAUSTED: too much waits"}

    run(scenario())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40_000) | st.sampled_from([16_384, 32_760, 32_768, 65_520, 65_530]), max_size=12))
def test_law_bodies_of_any_size_come_back_whole(sizes: list[int]) -> None:
    async def scenario() -> None:
        async with linked() as (_, link, _):
            bodies = [bytes([number + 1]) * size for number, size in enumerate(sizes)]
            answers = await asyncio.gather(*(link.send(body, "g", 5) for body in bodies))
            assert answers == [b"g" + body for body in bodies]

    run(scenario())


def test_an_agent_that_reads_nothing_costs_no_more_memory_than_may_wait_for_it() -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as hanging:
            most_bytes = 4 << 20
            link = ForwardLink(
                "127.0.0.1", None, lambda group, wait_s: None, max_message_bytes=1 << 24, most_unsent_bytes=most_bytes
            )
            link.port = hanging.getsockname()[1]
            found = [await code(link.send(bytes(200_000), "g", 0.001)) for _ in range(200)]
            assert found[0] is grpc.StatusCode.DEADLINE_EXCEEDED
            assert found[-1] is grpc.StatusCode.UNAVAILABLE
            assert link._frames is not None
            assert link._frames.unsent_bytes < most_bytes + 300_000
            await link.close(0.0)

    run(scenario())


def test_the_agent_is_told_of_the_time_that_is_left_after_the_way_and_of_nine_tenths_at_least() -> None:
    async def scenario() -> None:
        told: list[float] = []

        async def note(body: Body, group: str, timeout_s: float) -> bytes:
            told.append(timeout_s)
            return b"noted"

        server = ForwardServer(note, lambda group: 0.0, max_message_bytes=LIMIT)
        await server.listen("127.0.0.1")
        link = ForwardLink("127.0.0.1", None, lambda group, wait_s: None, max_message_bytes=LIMIT)
        link.port = server.port
        for _ in range(5):
            await link.send(b"x", "g", 5.0)
        await link.send(b"x", "g", 1.0)
        assert told[0] == 5.0
        assert min(told[1:5]) >= 4.5
        assert max(told[1:5]) < 5.0
        assert 0.9 <= told[5] < 1.0
        await link.close(0.0)
        await server.close()

    run(scenario())


def test_a_body_that_reaches_beyond_its_frame_ends_the_connection() -> None:
    async def scenario() -> None:
        async with linked() as (server, link, _):
            message = encode_requests([Request(1, "g", body_bytes=9)])
            assert await sent(server.port, struct.pack("<II", len(message), 1) + message + b"x") == b""
            assert await link.send(b"x", "g", 5) == b"gx"

    run(scenario())


def test_every_refusal_has_its_status_and_costs_no_other_request() -> None:
    async def scenario() -> None:
        async with linked() as (_, link, _):
            assert await code(link.send(b"full", "g", 5)) is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert await code(link.send(b"bug", "g", 5)) is grpc.StatusCode.INTERNAL
            assert await code(link.send(b"large", "g", 5)) is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert await code(link.send(b"slow", "g", 0.05)) is grpc.StatusCode.DEADLINE_EXCEEDED
            assert await link.send(b"x", "g", 5) == b"gx"

    run(scenario())


def test_a_broken_connection_fails_what_waits_and_the_next_request_makes_another() -> None:
    async def scenario() -> None:
        async with linked() as (server, link, _):
            waiting = asyncio.ensure_future(code(link.send(b"slow", "g", 30)))
            assert await link.send(b"x", "g", 5) == b"gx"
            for connection in tuple(server._connections):
                connection.abort()
            assert await waiting is grpc.StatusCode.UNAVAILABLE
            assert await link.send(b"x", "g", 5) == b"gx"

    run(scenario())


def test_an_agent_that_stops_or_is_gone_is_unavailable() -> None:
    async def scenario() -> None:
        async with linked() as (server, link, _):
            server.refuse()
            assert await code(link.send(b"x", "g", 5)) is grpc.StatusCode.UNAVAILABLE
        link = ForwardLink("127.0.0.1", None, lambda *_: None, max_message_bytes=LIMIT)
        link.port = server.port
        assert await code(link.send(b"x", "g", 5)) is grpc.StatusCode.UNAVAILABLE
        await link.close(0.0)

    run(scenario())


async def sent(port: int, data: bytes) -> bytes:
    """Send bytes to an agent, and return what it answers until it ends the connection or a moment has passed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    return answer


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_law_hostile_bytes_end_their_own_connection_at_most(data: bytes, framed: bool) -> None:
    async def scenario() -> None:
        async with linked() as (server, link, _):
            await sent(server.port, struct.pack("<II", len(data), 0) + data if framed else data)
            await sent(server.port, struct.pack("<II", 0, len(data)) + data)
            await sent(server.port, struct.pack("<II", 2**31, 2**31) + data)
            assert await link.send(b"x", "g", 5) == b"gx"

    run(scenario())


def test_a_request_may_arrive_byte_by_byte() -> None:
    async def scenario() -> None:
        async with linked() as (server, _, _):
            message = encode_requests([Request(7, "g", timeout_s=5, body_bytes=1)])
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            for byte in struct.pack("<II", len(message), 1) + message + b"x":
                writer.write(bytes([byte]))
                await writer.drain()
            size, bodies = struct.unpack("<II", await reader.readexactly(8))
            (answer,) = decode_answers(await reader.readexactly(size))
            assert (answer.number, answer.body_bytes, answer.status) == (7, bodies, 0)
            assert await reader.readexactly(bodies) == b"gx"
            writer.close()

    run(scenario())


@pytest.mark.parametrize(
    ("role", "served"),
    [(Role.GATEWAY, True), (Role.OPERATOR, True), (Role.AGENT, True), (Role.CLIENT, False)],
)
def test_with_certificates_only_gateways_agents_and_operators_may_forward(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, role: Role, served: bool
) -> None:
    authority = Authority.made(tmp_path)
    credentials = Credentials(authority.issue(Role.AGENT))

    async def scenario() -> None:
        server = ForwardServer(echo, lambda group: 0.25, max_message_bytes=LIMIT, credentials=credentials)
        await server.listen("127.0.0.1")
        theirs = Credentials(authority.issue(role))
        link = ForwardLink("127.0.0.1", theirs, lambda *_: None, max_message_bytes=LIMIT)
        link.port = server.port
        if served:
            large = bytes(LIMIT - 1)
            assert await link.send(large, "g", 10) == b"g" + large
        else:
            assert await code(link.send(b"x", "g", 10)) is grpc.StatusCode.UNAVAILABLE
        await link.close(0.0)
        await server.close()

    run(scenario())
    assert ("event=refused method=forward" in caplog.text) is not served
