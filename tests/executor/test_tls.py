"""The TLS matrix: who gets in, who does not, and that new certificates are taken up without a restart."""

from __future__ import annotations

import asyncio
import logging
import shutil
import ssl
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from executor.agent import AgentConfig, serve_agent
from executor.control_client import AgentClient, GatewayClient, channel_options
from executor.controller import apply
from executor.gateway import GatewayConfig, running_gateway
from executor.gateway_processes import run_gateway
from executor.http_server import http_server, metrics_application
from executor.proto import open_inference_pb2_grpc
from executor.roles import Guard, Role, roles_of_names
from executor.state import RoutingTable
from executor.tensors import encode_request
from executor.tls import Credentials, Dialer, TlsFiles, check_transport, is_loopback
from plans.cluster import Cluster
from plans.errors import ForeplanError, InvalidInput, RemoteFailure
from tests.executor.authority import Authority
from tests.executor.placements import placement
from tests.executor.running_agent import WAIT_S, agent_config, eventually
from tests.free_port import free_port

PLAN = placement({"node-a/0": {"chat": "fake-double"}}, memory_bytes=100)
Code = grpc.StatusCode


@dataclass
class Site:
    authority: Authority
    agent: str
    gateway: str
    http: str
    metrics: str
    gateway_metrics: str
    cluster: Cluster

    def open(self, role: Role, address: str) -> grpc.aio.Channel:
        return self.authority.dialer(role).open(address, channel_options(1 << 20))


@asynccontextmanager
async def site(folder: Path) -> AsyncIterator[Site]:
    """An agent and a gateway with certificates, and a plan applied by an operator."""
    authority = Authority.made(folder / "ca")
    stop = asyncio.Event()
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    metrics, gateway_metrics = (f"127.0.0.1:{free_port()}" for _ in range(2))
    config: AgentConfig = agent_config(folder / "agent", tls=authority.issue(Role.AGENT), metrics=metrics)
    serving = asyncio.create_task(serve_agent(config, on_ready=port.set_result, stop=stop))
    try:
        agent = f"127.0.0.1:{await asyncio.wait_for(port, WAIT_S)}"
        cluster = Cluster.model_validate(
            {
                "gpu_types": {"cpu": {"memory": "1GiB"}},
                "nodes": [{"name": "node-a", "address": agent, "gpus": {"type": "cpu", "count": 2}}],
            }
        )
        http = f"127.0.0.1:{free_port()}"
        files = authority.issue(Role.GATEWAY)
        settings = GatewayConfig(
            listen="127.0.0.1:0",
            state_dir=folder / "gateway",
            http=http,
            metrics=gateway_metrics,
            tls=files,
            poll_interval_s=0.02,
        )
        async with running_gateway(settings) as gateway:
            await apply(PLAN, cluster, [gateway], dialer=authority.dialer(Role.OPERATOR))
            yield Site(authority, agent, gateway, http, metrics, gateway_metrics, cluster)
    finally:
        stop.set()
        await asyncio.wait_for(serving, WAIT_S)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 120))


async def infer(channel: grpc.aio.Channel, timeout_s: float = 30.0) -> str:
    """Send a request; return the name of the status."""
    stub: Any = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
    message = encode_request("chat", {"x": np.ones((1, 4), np.float32)})
    try:
        await stub.ModelInfer(message, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


def test_every_role_may_do_what_is_its_own_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with site(tmp_path) as made:
            found: dict[Role, list[str]] = {}
            for role in Role:
                async with made.open(role, made.gateway) as door, made.open(role, made.agent) as node:
                    found[role] = [
                        await infer(door),
                        await infer(node),
                        await _code(AgentClient(node, "node").state(timeout_s=5)),
                        await _code(AgentClient(node, "node").commit(1, "", timeout_s=5)),
                        await _code(GatewayClient(door, "door").set_routes(_table(), timeout_s=5)),
                    ]
            denied = "PERMISSION_DENIED"
            refused = "FAILED_PRECONDITION"  # the call itself, not the caller
            assert found == {
                Role.OPERATOR: ["OK", "OK", "OK", refused, refused],
                Role.GATEWAY: [denied, "OK", "OK", denied, denied],
                Role.AGENT: [denied, "OK", "OK", denied, denied],
                Role.CLIENT: ["OK", denied, denied, denied, denied],
            }

    run(scenario())
    refusals = [record.getMessage() for record in caplog.records if "event=refused" in record.getMessage()]
    assert any("method=/foreplan.control.v1.Agent/Commit" in line and "name='client'" in line for line in refusals)


async def _code(call: Coroutine[Any, Any, Any]) -> str:
    try:
        await call
    except RemoteFailure as failure:
        return failure.problem.partition(":")[0]
    return "OK"


def _table() -> RoutingTable:
    return RoutingTable(generation=1, placement_digest="another")


@pytest.mark.parametrize("wrong", ["in the clear", "no certificate", "another authority", "expired"])
def test_whoever_proves_nothing_gets_nowhere(tmp_path: Path, wrong: str) -> None:
    async def scenario() -> None:
        async with site(tmp_path) as made:
            trusted = made.authority.files("gateway").authorities.read_bytes()
            for address in (made.gateway, made.agent):
                async with _wrong_channel(wrong, address, trusted, made.authority, tmp_path) as channel:
                    assert await infer(channel, 30.0) == "UNAVAILABLE"
            async with made.open(Role.CLIENT, made.gateway) as channel:
                assert await infer(channel) == "OK"

    run(scenario())


def _wrong_channel(wrong: str, address: str, trusted: bytes, authority: Authority, folder: Path) -> grpc.aio.Channel:
    if wrong == "in the clear":
        return grpc.aio.insecure_channel(address)
    if wrong == "no certificate":
        return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(trusted))
    if wrong == "expired":
        files = authority.issue(Role.OPERATOR, "old", days_ago=5)
    else:
        files = Authority.made(folder / f"other-{address[-5:]}").issue(Role.OPERATOR)
    credentials = grpc.ssl_channel_credentials(trusted, files.key.read_bytes(), files.certificate.read_bytes())
    return grpc.aio.secure_channel(address, credentials)


def test_a_refused_operator_is_told_what_to_give(tmp_path: Path) -> None:
    async def told(client: AgentClient | GatewayClient) -> str:
        with pytest.raises(RemoteFailure) as caught:
            await client.state(timeout_s=30)
        return caught.value.problem

    async def scenario() -> None:
        async with site(tmp_path) as made:
            other = Authority.made(tmp_path / "other").dialer(Role.OPERATOR)
            options = channel_options(1 << 20)
            async with (
                Dialer().open(made.agent, options) as clear,
                other.open(made.agent, options) as foreign,
                made.open(Role.CLIENT, made.agent) as client,
                made.open(Role.OPERATOR, made.agent) as operator,
                grpc.aio.insecure_channel(f"127.0.0.1:{free_port()}") as nobody,
            ):
                assert "a certificate that it trusts: --grpc-client-cert" in await told(AgentClient(clear, "a"))
                assert "no authority in --grpc-root-cert" in await told(AgentClient(foreign, "a"))
                assert "give an operator's certificate" in await told(AgentClient(client, "a"))
                assert "another kind of process answers" in await told(GatewayClient(operator, "a"))
                refused = await told(AgentClient(nobody, "a"))
                assert "Connection refused" in refused
                assert "(" not in refused

    run(scenario())


def test_a_client_refuses_a_server_of_another_authority(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with site(tmp_path) as made:
            other = Authority.made(tmp_path / "other").dialer(Role.CLIENT)
            async with other.open(made.gateway, ()) as channel:
                assert await infer(channel, 30.0) == "UNAVAILABLE"

    run(scenario())


def test_new_certificates_are_taken_up_by_running_processes(tmp_path: Path) -> None:
    """Rotate everything, the authority too: new callers are let in, and gateway and agent still find each other."""
    from executor.certificates import rotate, rotate_authority

    async def scenario() -> None:
        async with site(tmp_path) as made:
            folder = made.authority.folder
            made.authority.issue(Role.CLIENT)
            for _ in range(2):  # twice: after it the first authority is trusted no more
                rotate_authority(folder)
                rotate(folder)
            dialer = Dialer(Credentials(made.authority.files("client")))

            async def answered() -> bool:
                async with dialer.open(made.gateway, ()) as channel:
                    return await infer(channel) == "OK"

            await eventually(answered)
            async with made.open(Role.OPERATOR, made.gateway) as channel:
                state = await GatewayClient(channel, "door").state(timeout_s=5)
                assert state.ready

    run(scenario())


def test_files_that_are_wrong_for_a_while_change_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    authority = Authority.made(tmp_path)
    files = authority.issue(Role.CLIENT)
    credentials = Credentials(files)
    kept = files.key.read_bytes()
    files.key.write_text("half a key")
    assert not credentials.refresh()
    assert credentials.version == 1
    assert "certificates_unusable" in caplog.text
    files.key.write_bytes(kept)
    assert not credentials.refresh()
    authority.issue(Role.CLIENT)
    assert credentials.refresh()
    assert credentials.version == 2


def test_a_certificate_whose_key_is_not_copied_yet_leaves_connections_by_the_old_one_possible(tmp_path: Path) -> None:
    authority = Authority.made(tmp_path)
    credentials = Credentials(authority.issue(Role.GATEWAY))
    before = credentials.client_context()
    files, other = credentials.files, authority.issue(Role.CLIENT)
    files.certificate.write_bytes(other.certificate.read_bytes())
    assert credentials.client_context() is before
    files.key.write_bytes(other.key.read_bytes())
    assert credentials.client_context() is not before


def test_https_goes_by_the_files_of_now_and_trusts_no_authority_that_has_left_them(tmp_path: Path) -> None:
    """Nothing but the handshake itself looks at the files here: nobody calls by gRPC, nobody polls."""
    from executor.certificates import rotate, rotate_authority

    async def scenario() -> None:
        authority = Authority.made(tmp_path / "ca")
        server, files = Credentials(authority.issue(Role.AGENT)), authority.issue(Role.CLIENT)
        shutil.copytree(authority.folder, tmp_path / "stolen")

        async def asked(callers: Path) -> int:
            context = ssl.create_default_context(cafile=str(files.authorities))
            context.load_cert_chain(callers / "client.pem", callers / "client-key.pem")
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"https://127.0.0.1:{port}/metrics", ssl=context) as answer,
            ):
                return answer.status

        async def told() -> bytes:
            return b"up 1"

        page = metrics_application(told)
        async with http_server(page, "127.0.0.1:0", where="--metrics", credentials=server) as port:
            assert await asked(tmp_path / "stolen") == 200
            for _ in range(2):  # after the second time the first authority is trusted no more
                rotate_authority(authority.folder)
                rotate(authority.folder)
            with pytest.raises(aiohttp.ClientError):
                await asked(tmp_path / "stolen")
            assert await asked(authority.folder) == 200

    run(scenario())


def test_http_asks_for_certificates_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with site(tmp_path) as made:
            found = {}
            for role in (Role.CLIENT, Role.AGENT):
                context = Credentials(made.authority.issue(role)).client_context()
                url = f"https://{made.http}/v2/models/chat/ready"
                async with aiohttp.ClientSession() as session, session.get(url, ssl=context) as answer:
                    found[role] = answer.status
            assert found == {Role.CLIENT: 200, Role.AGENT: 403}
            nameless = ssl.create_default_context(cafile=str(made.authority.files("client").authorities))
            async with aiohttp.ClientSession() as session:
                with pytest.raises(aiohttp.ClientError):
                    async with session.get(f"https://{made.http}/v2/health/live", ssl=nameless):
                        pass
                with pytest.raises(aiohttp.ClientError):
                    async with session.get(f"http://{made.http}/v2/health/live"):
                        pass

    run(scenario())


def test_a_certificate_of_no_role_opens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As an authority issues it that signs for others than Foreplan too."""

    async def scenario() -> None:
        async with site(tmp_path) as made:
            with monkeypatch.context() as patch:
                patch.setattr("executor.certificates.role_uri", lambda role: f"urn:other:{role}")
                stranger = Credentials(made.authority.issue(Role.OPERATOR, "stranger"))
            for url in (f"{made.http}/v2/health/live", f"{made.gateway_metrics}/metrics", f"{made.metrics}/metrics"):
                async with (
                    aiohttp.ClientSession() as session,
                    session.get(f"https://{url}", ssl=stranger.client_context()) as answer,
                ):
                    assert (answer.status, "'stranger' has no role" in await answer.text()) == (403, True)
            for address in (made.gateway, made.agent):
                async with Dialer(stranger).open(address, ()) as channel:
                    assert await infer(channel) == "PERMISSION_DENIED"
                    stub: Any = health_pb2_grpc.HealthStub(channel)
                    with pytest.raises(grpc.aio.AioRpcError, match="has no role"):
                        await stub.Check(health_pb2.HealthCheckRequest(), timeout=30)

    run(scenario())
    refused = [one.getMessage() for one in caplog.records if "event=refused" in one.getMessage()]
    assert len([one for one in refused if "method=/metrics" in one]) == 2


@pytest.mark.parametrize("wrong", ["in the clear", "no certificate", "another authority", "expired"])
def test_whoever_proves_nothing_gets_nowhere_by_http(tmp_path: Path, wrong: str) -> None:
    async def scenario() -> None:
        async with site(tmp_path) as made:
            context = _wrong_context(wrong, made.authority, tmp_path)
            scheme = "http" if context is None else "https"
            good = Credentials(made.authority.issue(Role.CLIENT)).client_context()
            for url in (f"{made.http}/v2/health/live", f"{made.gateway_metrics}/metrics", f"{made.metrics}/metrics"):
                async with aiohttp.ClientSession() as session:
                    with pytest.raises(aiohttp.ClientError):
                        async with session.get(f"{scheme}://{url}", ssl=context or True):
                            pass
                    async with session.get(f"https://{url}", ssl=good) as answer:
                        assert answer.status == 200

    run(scenario())


def _wrong_context(wrong: str, authority: Authority, folder: Path) -> ssl.SSLContext | None:
    if wrong == "in the clear":
        return None
    context = ssl.create_default_context(cafile=str(authority.issue(Role.CLIENT).authorities))
    if wrong == "expired":
        files = authority.issue(Role.OPERATOR, "old", days_ago=5)
    elif wrong == "another authority":
        files = Authority.made(folder / "other-http").issue(Role.OPERATOR)
    else:
        return context
    context.load_cert_chain(files.certificate, files.key)
    return context


def test_off_loopback_it_takes_certificates_or_an_express_wish(tmp_path: Path) -> None:
    for address in ("0.0.0.0:1", "10.0.0.1:1", "[::]:1", "node-a:1"):
        assert not is_loopback(address)
        with pytest.raises(InvalidInput, match=r"--listen.*certs init"):
            check_transport(address, None, insecure=False, where="--listen")
        check_transport(address, None, insecure=True, where="--listen")
        check_transport(
            address, Credentials(Authority.made(tmp_path / address[:4]).issue(Role.AGENT)), insecure=False, where=""
        )
        shutil.rmtree(tmp_path / address[:4])
    for address in ("127.0.0.1:1", "127.3.2.1:1", "[::1]:1", "localhost:1"):
        assert is_loopback(address)

    async def scenario() -> None:
        with pytest.raises(InvalidInput, match="certificates"):
            await serve_agent(agent_config(tmp_path / "agent", address="0.0.0.0:0"))
        with pytest.raises(InvalidInput, match="certificates"):
            async with running_gateway(GatewayConfig(listen="0.0.0.0:0", state_dir=tmp_path / "gateway")):
                pass

    run(scenario())


def test_missing_and_mixed_up_files_are_refused_with_every_fault(tmp_path: Path) -> None:
    authority = Authority.made(tmp_path / "ca")
    one, other = authority.issue(Role.CLIENT), authority.issue(Role.OPERATOR)
    with pytest.raises(InvalidInput, match="the key of another certificate"):
        Credentials(TlsFiles(certificate=one.certificate, key=other.key, authorities=one.authorities))
    gone = TlsFiles(certificate=tmp_path / "a", key=tmp_path / "b", authorities=tmp_path / "c")
    with pytest.raises(InvalidInput) as caught:
        Credentials(gone)
    assert len(caught.value.faults) == 3
    with pytest.raises(InvalidInput) as caught:
        Credentials(TlsFiles(certificate=one.key, key=one.certificate, authorities=one.key))
    assert len(caught.value.faults) == 3


@pytest.mark.parametrize("role", [Role.OPERATOR, Role.GATEWAY, None])
def test_an_agent_does_not_start_with_a_certificate_of_another_role(tmp_path: Path, role: Role | None) -> None:
    authority = Authority.made(tmp_path / "ca")
    files = (
        authority.issue(role)
        if role
        else TlsFiles(
            certificate=authority.folder / "ca.pem",
            key=authority.folder / "ca-key.pem",
            authorities=authority.folder / "ca.pem",
        )
    )
    found = f"role {role}" if role else "no role"
    problem = rf"{files.certificate.name}: found {found}, expected a certificate of role agent; .*--role agent"
    with pytest.raises(InvalidInput, match=problem):
        asyncio.run(serve_agent(agent_config(tmp_path / "agent", tls=files)))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_gateway_does_not_start_with_a_certificate_of_another_role(tmp_path: Path, processes: int) -> None:
    files = Authority.made(tmp_path / "ca").issue(Role.AGENT)
    config = GatewayConfig(listen="127.0.0.1:0", state_dir=tmp_path / "gateway", tls=files)
    with pytest.raises(ForeplanError, match=r"agent\.pem: found role agent, expected a certificate of role gateway"):
        run_gateway(config, processes=processes)


def test_a_certificate_of_another_role_that_is_copied_in_place_is_not_taken_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority.made(tmp_path)
    credentials = Credentials(authority.issue(Role.AGENT, "node"), Role.AGENT)
    authority.issue(Role.OPERATOR, "node")
    assert not credentials.refresh()
    assert "found role operator, expected a certificate of role agent" in caplog.text
    authority.issue(Role.AGENT, "node")
    assert credentials.refresh()


def test_an_expired_certificate_is_named_by_whoever_would_show_it(tmp_path: Path) -> None:
    expired = Authority.made(tmp_path / "ca").issue(Role.OPERATOR, days_ago=5)
    with pytest.raises(InvalidInput, match=r"operator\.pem: found valid from .* renew it with `foreplan certs rotate`"):
        Credentials(expired)


def test_a_certificate_that_ends_soon_is_told_of_once_a_day(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    credentials = Credentials(Authority.made(tmp_path / "ca").issue(Role.AGENT), Role.AGENT)  # for a day

    def told(before_end: timedelta) -> list[tuple[int, str]]:
        caplog.clear()
        credentials.remind(credentials.expires - before_end)
        return [(record.levelno, record.getMessage()) for record in caplog.records]

    assert told(timedelta(days=15)) == []
    ((level, text),) = told(timedelta(days=13))
    assert level == logging.WARNING
    assert "event=certificate_expires" in text
    assert "agent.pem" in text
    assert "foreplan certs rotate" in text
    assert told(timedelta(days=12, hours=1)) == []
    ((level, text),) = told(timedelta(hours=-1))
    assert level == logging.ERROR
    assert "event=certificate_expired" in text


def test_a_server_tells_of_its_certificate_by_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with site(tmp_path) as made:
            await eventually(lambda: caplog.text.count("event=certificate_expires") >= 2)  # agent and gateway
            context = Credentials(made.authority.issue(Role.CLIENT)).client_context()
            ends = Credentials(made.authority.files("agent"), Role.AGENT).expires.timestamp()
            for address in (made.metrics, made.gateway_metrics):
                async with (
                    aiohttp.ClientSession() as session,
                    session.get(f"https://{address}/metrics", ssl=context) as page,
                ):
                    lines = (await page.text()).splitlines()
                (line,) = [one for one in lines if one.startswith("executor_certificate_not_after_timestamp_seconds ")]
                assert float(line.split()[1]) == pytest.approx(ends, abs=60.0)

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


def test_a_method_that_no_rule_names_is_for_nobody() -> None:
    for server in (Role.AGENT, Role.GATEWAY):
        assert Guard(server).allowed("/foreplan.control.v9.Agent/Stage") == frozenset()
        assert Guard(server).allowed("") == frozenset()
    assert roles_of_names(["urn:foreplan:role:king", "urn:other:operator", "operator"]) == frozenset()
