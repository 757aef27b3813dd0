from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.executor.fake_agent import FakeAgent
from tests.executor.front_door import agents, door, run, table
from tests.executor.logged import errors_logged
from tests.executor.test_metrics import scraped
from tests.free_port import free_port

INPUT = {"name": "x", "datatype": "FP32", "shape": [1], "data": [0.5]}
EMPTY = b'{"inputs": []}'


@asynccontextmanager
async def served(folder: Path, **options: Any) -> AsyncIterator[tuple[FakeAgent, aiohttp.ClientSession]]:
    """An agent that serves "chat", and a session with the HTTP form of a gateway before it."""
    address = f"127.0.0.1:{free_port()}"
    async with agents("a") as (agent,), door(folder, http=address, **options) as front:
        await front.control.set_routes(table(agent), timeout_s=5)
        async with aiohttp.ClientSession(f"http://{address}") as session:
            yield agent, session


async def posted(
    session: aiohttp.ClientSession, data: bytes | AsyncIterator[bytes], service: str = "chat", **headers: str
) -> tuple[int, str]:
    """Send a body; return the status and what the JSON of the answer says is wrong."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    sent = io.BytesIO(data) if isinstance(data, bytes) else data
    async with session.post(f"/v2/models/{service}/infer", data=sent, headers=named) as answer:
        assert answer.content_type == "application/json"
        return answer.status, (await answer.json()).get("error", "")


def body(**changed: Any) -> bytes:
    return json.dumps({"inputs": [INPUT | changed]}).encode()


@pytest.mark.parametrize(
    ("data", "headers", "named"),
    [
        (body(), {"Inference_Header_Content_Length": "²"}, "a number of bytes"),
        (body(), {"Inference_Header_Content_Length": "-1"}, "a number of bytes"),
        (body(), {"Inference_Header_Content_Length": "9" * 5000}, "a number of bytes"),
        (body(), {"Inference_Header_Content_Length": "9" * 9}, "a length of at most"),
        (body(), {"Content_Encoding": "gzip"}, "the body cannot be read"),
        (body(), {"Content_Encoding": "deflate"}, "the body cannot be read"),
        (body(name="\ud800"), {}, "inputs[0].name"),
        (json.dumps({"inputs": [], "parameters": {"\udc00": 1}}).encode(), {}, "parameters"),
        (json.dumps({"inputs": [], "id": "\udc00"}).encode(), {}, "id"),
        (body(data=[1e300]), {}, "inputs[0].data"),
        (b"[" * 5_000_000, {}, "at most 4194304 bytes of JSON"),
        (b"\xff", {}, "a JSON object"),
    ],
)
def test_whatever_a_client_sends_is_answered_and_fills_no_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, data: bytes, headers: dict[str, str], named: str
) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as (agent, session):
            status, problem = await posted(session, data, **headers)
            assert (status, named in problem) == (400, True), problem
            assert not agent.served
            assert (await posted(session, EMPTY))[0] == 200

    run(scenario())
    assert not errors_logged(caplog)


@pytest.mark.parametrize(("error", "status"), [(MemoryError(), 429), (RuntimeError("a bug"), 500)])
def test_what_fails_in_the_gateway_is_told_as_json_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def failing(*_: Any) -> None:
        raise error

    async def scenario() -> None:
        async with served(tmp_path) as (_, session):
            with monkeypatch.context() as patched:
                patched.setattr("executor.gateway_http.request_from_http", failing)
                assert (await posted(session, EMPTY))[0] == status
            assert (await posted(session, EMPTY))[0] == 200

    run(scenario())
    (logged,) = errors_logged(caplog)
    assert "event=http_" in logged
    assert type(error).__name__ in logged


def test_what_cannot_be_taken_is_refused_before_its_body_is_looked_at(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path, max_in_flight=1) as (agent, session):
            assert (await posted(session, b"no json", service="nobody"))[0] == 404
            agent.infer_waits_for = asyncio.Event()
            held = asyncio.create_task(posted(session, EMPTY))
            while not agent.served:
                await asyncio.sleep(0)
            status, problem = await posted(session, b"no json")
            assert (status, "1 requests are in flight at this gateway, its limit" in problem) == (429, True)
            agent.infer_waits_for.set()
            assert (await held)[0] == 200

    run(scenario())


def test_requests_that_cannot_be_read_are_counted_for_their_service(tmp_path: Path) -> None:
    async def scenario() -> None:
        metrics = f"127.0.0.1:{free_port()}"
        async with served(tmp_path, metrics=metrics) as (_, session):
            await posted(session, EMPTY)
            await posted(session, b"no json")
            await posted(session, body(), Content_Encoding="gzip")
            await posted(session, b"no json", service="nobody")
            name, found = "executor_gateway_requests_total", await scraped(metrics)
            counts = {labels: count for (key, labels), count in found.items() if key == name}
            assert counts == {
                (("code", "OK"), ("service", "chat")): 1,
                (("code", "INVALID_ARGUMENT"), ("service", "chat")): 2,
                (("code", "NOT_FOUND"), ("service", "")): 1,
            }
            assert found["executor_gateway_requests_in_flight", ()] == 0

    run(scenario())


def test_what_is_larger_than_agents_take_is_too_large_and_not_too_many(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path, max_message_bytes=4096) as (agent, session):
            tensor = INPUT | {"shape": [1023], "parameters": {"binary_data_size": 4092}}
            head = json.dumps({"inputs": [{name: tensor[name] for name in tensor if name != "data"}]}).encode()
            length = {"Inference_Header_Content_Length": str(len(head))}
            status, problem = await posted(session, head + bytes(4092), **length)
            assert (status, "Maximum request body size 4096 exceeded" in problem) == (413, True), problem
            assert not agent.served
            assert (await posted(session, EMPTY))[0] == 200

    run(scenario())


@pytest.mark.parametrize("path", ["/v2/models/%ff/infer", "/v2/models/%ed%a0%80/infer", "/v2/models/%00/infer"])
def test_a_name_that_is_no_text_is_no_service(tmp_path: Path, path: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as (_, session), session.post(path, data=body()) as answer:
            assert (answer.status, answer.content_type) == (404, "application/json")

    run(scenario())
    assert not errors_logged(caplog)


def test_a_broken_body_of_a_request_that_was_refused_already_fills_no_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        address = f"127.0.0.1:{free_port()}"
        async with door(tmp_path, http=address):
            reader, writer = await asyncio.open_connection(*address.split(":"))
            writer.write(b"POST /v2/models/nobody/infer HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\n")
            writer.write(b"Connection: close\r\nContent-Length: 9\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 404 ")
            writer.write(b"no gzip..")
            await reader.read()
            writer.close()

    run(scenario())
    assert not errors_logged(caplog)


@pytest.mark.parametrize(
    ("method", "path", "status", "named", "allowed"),
    [
        ("GET", "/v2/models/chat/infer", 405, "POST", "POST"),
        ("DELETE", "/v2/models/chat", 405, "GET", "GET, HEAD"),
        ("OPTIONS", "/v2/repository/index", 405, "POST", "POST"),
        ("GET", "/v1/models/chat:predict", 404, "/v1/models/chat:predict", None),
    ],
)
def test_what_is_not_served_says_what_is(
    tmp_path: Path, method: str, path: str, status: int, named: str, allowed: str | None
) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as (_, session), session.request(method, path) as answer:
            assert (answer.status, answer.headers.get("Allow")) == (status, allowed)
            assert named in (await answer.json())["error"]

    run(scenario())


def test_a_body_that_is_too_large_or_does_not_come_is_refused_and_its_connection_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("executor.http_server._LINGER_S", 0.1)

    async def answered(address: str, length: int, sent: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(*address.split(":"))
        writer.write(b"POST /v2/models/chat/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % length)
        writer.write(sent)
        try:
            return await reader.read()
        finally:
            writer.close()

    async def scenario() -> None:
        address = f"127.0.0.1:{free_port()}"
        options: dict[str, Any] = {"http": address, "max_message_bytes": 2**16}
        async with agents("a") as (agent,), door(tmp_path, **options) as front:
            await front.control.set_routes(table(agent), timeout_s=5)
            too_large = await answered(address, 2**22, b" " * 2**21)
            assert too_large.startswith(b"HTTP/1.1 413 ")
            assert b'"Maximum request body size' in too_large
            monkeypatch.setattr("executor.gateway_bodies._BODY_S", 0.05)
            late = await answered(address, 100, b"{")
            assert late.startswith(b"HTTP/1.1 408 ")
            assert b"did not come whole within 0.05 s" in late

    run(scenario())


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\xff\x13garbage\r\n\r\n",
        b"\x16\x03\x01\x00" + b"a" * 200,
        b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET /v2 HTTP/1.1\r\n" + b"X: y\r\n" * 50_000 + b"\r\n",
    ],
)
def test_what_is_no_http_is_refused_and_fills_no_log(
    tmp_path: Path, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        address = f"127.0.0.1:{free_port()}"
        async with door(tmp_path, http=address):
            reader, writer = await asyncio.open_connection(*address.split(":"))
            writer.write(garbage)
            assert (await reader.readline()).split(b" ")[1] == b"400"
            writer.close()

    run(scenario())
    assert not errors_logged(caplog)


def test_answers_while_a_gateway_stops_say_that_they_are_the_last_on_their_connection(tmp_path: Path) -> None:
    """A client that went on to use it would lose its next request."""

    async def scenario() -> None:
        address = f"127.0.0.1:{free_port()}"
        leave = asyncio.Event()
        async with agents("a") as (agent,), aiohttp.ClientSession(f"http://{address}") as session:

            async def serve() -> None:
                async with door(tmp_path, http=address) as front:
                    await front.control.set_routes(table(agent), timeout_s=5)
                    ready.set()
                    await leave.wait()

            async def connection_of(service: str) -> str | None:
                async with session.post(f"/v2/models/{service}/infer", data=io.BytesIO(EMPTY)) as answer:
                    return answer.headers.get("Connection")

            ready = asyncio.Event()
            gateway = asyncio.create_task(serve())
            await ready.wait()
            assert await connection_of("chat") is None
            assert await connection_of("nobody") is None
            agent.infer_waits_for = asyncio.Event()
            held = [asyncio.create_task(connection_of("chat")) for _ in range(2)]
            while len(agent.served) < 3:
                await asyncio.sleep(0)
            leave.set()
            while await is_listening(address):
                await asyncio.sleep(0)
            agent.infer_waits_for.set()
            assert await asyncio.gather(*held) == ["close", "close"]
            await gateway

    run(scenario())


async def is_listening(address: str) -> bool:
    host, _, port = address.partition(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
    except ConnectionRefusedError:
        return False
    writer.close()
    return True
