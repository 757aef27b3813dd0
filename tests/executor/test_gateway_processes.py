"""A gateway of two processes on one port, as a client and a controller see it, and what a kill of one costs."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import psutil
import pytest

from executor.cluster_status import status
from executor.controller import Applied, apply
from executor.gateway import GatewayConfig
from executor.gateway_family import merged
from executor.gateway_processes import run_gateway, serve_gateways
from executor.proto import open_inference_pb2_grpc
from executor.state import GatewayState, TargetState
from executor.tensors import encode_request
from plans.errors import InvalidInput
from tests.executor.peer_process import ROOT, PeerProcess, cluster_of, outlived, processes
from tests.executor.placements import placement
from tests.executor.running_agent import WAIT_S, eventually
from tests.free_port import free_port

FIRST = placement({"a/0": {"double": "fake-double"}})
SECOND = placement({"a/1": {"double": "fake-double"}}, prior=FIRST)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PeerProcess, PeerProcess]]:
    folder = tmp_path_factory.mktemp("family")
    agent = PeerProcess("agent", folder / "a", node="a")
    http, pinned = f"127.0.0.1:{free_port()}", len(cores()) > 1
    gateway = PeerProcess("gateway", folder / "g", processes=2, http=http, pinned=pinned)
    with processes(agent, gateway):
        yield agent, gateway


def cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def members(gateway: PeerProcess) -> list[psutil.Process]:
    """Return the two processes, without the one that keeps them."""
    found = []
    for child in psutil.Process(gateway.process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


async def ask(address: str, times: int) -> list[str]:
    """Send requests over a connection each, so that they spread over the processes; return statuses."""

    async def one() -> str:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            stub: Any = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            message = encode_request("double", {"x": np.ones((1, 4), np.float32)})
            try:
                await stub.ModelInfer(message, timeout=30)
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return "OK"

    return [await one() for _ in range(times)]


def test_both_processes_follow_every_plan(site: tuple[PeerProcess, PeerProcess]) -> None:
    agent, gateway = site
    cluster = cluster_of(agent)
    assert len(members(gateway)) == 2
    live = asyncio.run(status(cluster, [gateway.address])).live
    for plan in (FIRST, SECOND, FIRST):
        result = asyncio.run(apply(plan, cluster, [gateway.address], prior=live))
        live = asyncio.run(status(cluster, [gateway.address])).live
        assert isinstance(result, Applied)
        assert asyncio.run(ask(gateway.address, 12)) == ["OK"] * 12
        assert live is not None
        assert live.digest == plan.placement_digest


@pytest.mark.skipif(len(cores()) < 2, reason="two processes need a core each")
def test_every_thread_of_a_process_keeps_to_a_core_of_its_own(site: tuple[PeerProcess, PeerProcess]) -> None:
    found = []
    for member in members(site[1]):
        threads = {frozenset(os.sched_getaffinity(thread.id)) for thread in member.threads()}
        assert len(member.threads()) > 1
        assert len(threads) == 1
        found.append(sorted(*threads))
    assert sorted(found) == [[core] for core in cores()[-2:]]


def test_more_processes_than_cores_are_not_pinned(tmp_path: Path) -> None:
    config = GatewayConfig(listen="127.0.0.1:0", state_dir=tmp_path / "g", pin_cores=True)
    with pytest.raises(InvalidInput, match=r"--pin-cores: found .* cores, expected at least"):
        run_gateway(config, processes=len(cores()) + 1)
    assert not (tmp_path / "g").exists()


def test_a_killed_process_comes_back_with_the_routes_in_force(site: tuple[PeerProcess, PeerProcess]) -> None:
    agent, gateway = site
    cluster = cluster_of(agent)
    live = asyncio.run(status(cluster, [gateway.address])).live
    asyncio.run(apply(SECOND, cluster, [gateway.address], prior=live))
    before = {one.pid for one in members(gateway)}
    for victim in members(gateway):
        victim.kill()

        async def both_answer(gone: int = victim.pid) -> bool:
            now = {one.pid for one in members(gateway)}
            return len(now) == 2 and gone not in now and await ask(gateway.address, 16) == ["OK"] * 16

        asyncio.run(eventually(both_answer))
    assert not before & {one.pid for one in members(gateway)}
    found = asyncio.run(status(cluster, [gateway.address]))
    assert found.live is not None
    assert found.live.digest == SECOND.placement_digest
    assert isinstance(asyncio.run(apply(FIRST, cluster, [gateway.address], prior=found.live)), Applied)


def test_a_stock_tritonclient_speaks_http_to_it(site: tuple[PeerProcess, PeerProcess]) -> None:
    agent, gateway = site
    live = asyncio.run(status(cluster_of(agent), [gateway.address])).live
    asyncio.run(apply(FIRST, cluster_of(agent), [gateway.address], prior=live))
    probe = subprocess.run(
        [sys.executable, str(ROOT / "tests/executor/triton_http_probe.py"), gateway.http, "double"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert probe.returncode == 0, probe.stderr
    found = json.loads(probe.stdout)
    assert found["live"]
    assert found["ready"]
    assert found["model_ready"]
    assert not found["unknown_ready"]
    assert found["server"] == "foreplan-gateway"
    assert found["inputs"] == [["x", "FP32", [-1, 4]]]
    assert found["config"] == ["double", 4, [{"name": "x", "data_type": "TYPE_FP32", "dims": [4]}], [4]]
    assert found["index"] == [["double", "READY"]]
    assert found["got"] == [[[2 * value for value in row] for row in found["sent"]]] * 4
    assert min(found["statistics"]) >= 4
    assert {name: code for name, (code, _) in found["errors"].items()} == {
        "infer": "404",
        "unload": "400",
        "wrong_shape": "400",
    }


def test_what_http_does_not_know_is_told_as_json(site: tuple[PeerProcess, PeerProcess]) -> None:
    _, gateway = site
    for path, code in (("/v3", 404), ("/v2/models/double/infer", 405), ("/v2/models/nobody/stats", 404)):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"http://{gateway.http}{path}", timeout=30)
        with caught.value as answer:
            assert answer.code == code
            assert json.loads(answer.read())["error"]


def test_an_interrupt_from_the_keyboard_is_for_the_process_that_keeps_them(
    site: tuple[PeerProcess, PeerProcess],
) -> None:
    for member in members(site[1]):
        told = Path(f"/proc/{member.pid}/status").read_text()
        (blocked,) = [int(line.split()[1], 16) for line in told.splitlines() if line.startswith("SigBlk:")]
        assert blocked & 1 << signal.SIGINT - 1
        assert not blocked & 1 << signal.SIGTERM - 1


def test_it_ends_with_all_its_processes(site: tuple[PeerProcess, PeerProcess]) -> None:
    _, gateway = site
    mine = members(gateway)
    assert gateway.stop() == 0
    assert not outlived(mine)
    gateway.start()
    mine = members(gateway)
    assert len(mine) == 2
    between = {Path(one.laddr).parent for member in mine for one in member.net_connections("unix") if one.laddr}
    between = {folder for folder in between if folder.name.startswith("foreplan-gateway-")}
    assert len(between) == 1
    gateway.process.kill()
    assert not outlived(mine), "processes outlived the one that keeps them"
    assert not any(folder.exists() for folder in between), "they left their sockets"
    gateway.start()


@pytest.mark.parametrize("option", ["listen", "http"])
def test_a_port_that_another_gateway_shares_among_its_processes_is_taken(
    tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("executor.gateway_processes._FREE_S", 0.0)
    with socket.socket() as theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        theirs.bind(("127.0.0.1", 0))
        theirs.listen()
        addresses = {"listen": "127.0.0.1:0", option: f"127.0.0.1:{theirs.getsockname()[1]}"}
        with pytest.raises(InvalidInput, match=f"--{option}: found 127.0.0.1:.* a free port"):
            run_gateway(GatewayConfig(state_dir=tmp_path, **addresses), processes=2)


def test_a_process_that_the_system_has_no_room_for_is_started_as_soon_as_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start, refused = SpawnProcess.start, list[SpawnProcess]()

    def starved(process: SpawnProcess) -> None:
        if not refused:
            refused.append(process)
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        start(process)

    def second() -> int | None:
        return next((one.pid for one in multiprocessing.active_children() if one.name == "gateway-1"), None)

    async def scenario() -> None:
        ready = asyncio.get_running_loop().create_future()
        config = GatewayConfig(listen="127.0.0.1:0", state_dir=tmp_path)
        serving = asyncio.create_task(serve_gateways(config, 2, ready.set_result, log_level="ERROR"))
        await asyncio.wait({ready, serving}, timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
        try:
            killed = second()
            assert killed is not None
            monkeypatch.setattr(SpawnProcess, "start", starved)
            os.kill(killed, signal.SIGKILL)
            await eventually(lambda: second() not in (None, killed))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(serving, WAIT_S)

    asyncio.run(scenario())
    assert "event=gateway_process_not_started index=1" in caplog.text
    assert len(refused) == 1


def test_a_process_that_does_not_end_when_it_is_told_to_is_ended_by_force() -> None:
    """A gateway whose event loop is stuck must not keep the port; the stack tells where it was."""
    script = """if True:
        import asyncio, threading
        from pathlib import Path
        from executor import gateway_processes
        from executor.gateway import GatewayConfig

        gateway_processes._END_S = 0.1

        async def stuck(config, on_ready, *, member, stop):
            stop.set()
            await asyncio.sleep(0.01)
            threading.Event().wait()

        gateway_processes.serve_gateway = stuck
        gateway_processes.run_gateway(GatewayConfig(listen="", state_dir=Path(), grace_s=0.1))
    """
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "in stuck" in done.stderr


def test_states_are_merged_to_the_oldest_and_the_worst() -> None:
    def state(generation: int, *, healthy: bool, sent: int) -> GatewayState:
        target = TargetState(service="s", group="g", healthy=healthy, reason="" if healthy else "gone", sent=sent)
        return GatewayState(version="1", generation=generation, targets=(target,), ready=healthy)

    found = merged([state(2, healthy=True, sent=3), state(2, healthy=False, sent=4)])
    assert (found.ready, found.targets[0].healthy, found.targets[0].reason, found.targets[0].sent) == (
        False,
        False,
        "gone",
        7,
    )
    assert merged([state(3, healthy=True, sent=1), state(2, healthy=True, sent=1)]).generation == 2


def test_several_processes_tell_of_each_target_what_one_does() -> None:
    target = TargetState(service="flow", group="a/0", healthy=True, reason="", sent=3, failed=1, stage="detect")
    one = GatewayState(version="0", generation=2, placement_digest="d", targets=(target,), ready=True)
    assert merged([one]) == one
    assert [found.stage for found in merged([one, one]).targets] == ["detect"]
