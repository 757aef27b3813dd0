"""Agents of the fake runtime and gateways as processes of their own, for tests that kill them.

As a program (``python -m tests.executor.peer_process agent|gateway ...``) it runs one and prints the address that it
listens on; as a module it starts such programs and sees to it that they end.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from plans.cluster import Cluster
from tests.free_port import free_port

ROOT = Path(__file__).resolve().parents[2]
FAKE_RUNTIME = "tests.executor.fake_runtime:FakeRuntime"
_END_S = 60.0


class PeerProcess:
    """One process; `start` again after `kill` listens on the same address with the same state."""

    def __init__(
        self, kind: str, folder: Path, *, node: str = "", processes: int = 1, http: str = "", pinned: bool = False
    ) -> None:
        self.kind = kind
        self.processes = processes
        self.http = http
        self.pinned = pinned
        self.node = node
        self.folder = folder
        self.address = f"127.0.0.1:{free_port()}"  # comes back on it: no outgoing connection may take it meanwhile
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> PeerProcess:
        self.launch()
        return self.wait_until_it_listens()

    def launch(self) -> None:
        if self._process is not None:
            self._reap()
        self.folder.mkdir(parents=True, exist_ok=True)
        arguments = [self.kind, "--listen", self.address, "--state-dir", str(self.folder), "--node", self.node]
        arguments += [
            "--processes",
            str(self.processes),
            "--http",
            self.http,
            *(["--pin-cores"] if self.pinned else []),
        ]
        with (self.folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.executor.peer_process", *arguments],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def wait_until_it_listens(self) -> PeerProcess:
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address, (self.folder / "log").read_text()
        return self

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def process(self) -> subprocess.Popen[str]:
        assert self._process is not None
        return self._process

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> None:
        """End it at once, as a crash does; its workers have to notice by themselves."""
        children = self.children()
        self.process.kill()
        self._reap()
        assert not (alive := outlived(children)), f"workers outlived their agent: {alive}"

    def stop(self) -> int:
        """Ask it to end, and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(_END_S)
        return self._reap()

    def end(self) -> None:
        """Leave nothing behind, whatever state it is in."""
        if self.alive:
            with suppress(psutil.NoSuchProcess):
                for child in self.children():
                    child.kill()
            self.process.kill()
        if self._process is not None:
            self._reap()

    def _reap(self) -> int:
        code = self.process.wait(_END_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


def outlived(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Wait until ``processes`` have ended; return those that have not within a minute.

    One whose parent is gone has ended when it is a zombie: when process 1 looks at it is not for us to say, and in a
    container it may never.
    """
    end_s = time.monotonic() + _END_S
    while (alive := [one for one in processes if _runs(one)]) and time.monotonic() < end_s:
        time.sleep(0.01)
    return alive


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@contextmanager
def processes(*peers: PeerProcess) -> Iterator[None]:
    """Start ``peers``; all are gone afterwards."""
    try:
        for peer in peers:
            peer.launch()
        for peer in peers:
            peer.wait_until_it_listens()
        yield
    finally:
        for peer in peers:
            peer.end()


def cluster_of(*agents: PeerProcess) -> Cluster:
    """Return the cluster document for agents that run; each node has two devices of 1 GiB."""
    return Cluster.model_validate(
        {
            "gpu_types": {"cpu": {"memory": "1GiB"}},
            "nodes": [
                {"name": agent.node, "address": agent.address, "gpus": {"type": "cpu", "count": 2}} for agent in agents
            ],
        }
    )


def main() -> None:
    """Run one peer until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["agent", "gateway"])
    parser.add_argument("--listen", required=True)
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("--node", required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--http", default="")
    parser.add_argument("--pin-cores", action="store_true")
    chosen = parser.parse_args()
    if chosen.kind == "gateway":
        _gateway(chosen)
    else:
        asyncio.run(_agent(chosen))


async def _agent(chosen: argparse.Namespace) -> None:
    from executor.agent import AgentConfig, serve_agent

    config = AgentConfig(
        node=chosen.node,
        address=chosen.listen,
        device_count=2,
        memory_bytes=2**30,
        state_dir=chosen.state_dir,
        runtime=FAKE_RUNTIME,
        drain_s=5.0,
    )
    await serve_agent(config, on_ready=lambda port: _say(f"127.0.0.1:{port}"))


def _gateway(chosen: argparse.Namespace) -> None:
    from executor.gateway import GatewayConfig
    from executor.gateway_processes import run_gateway

    config = GatewayConfig(
        listen=chosen.listen, state_dir=chosen.state_dir, http=chosen.http, pin_cores=chosen.pin_cores
    )
    run_gateway(config, _say, processes=chosen.processes)


def _say(address: str) -> None:
    sys.stdout.write(f"{address}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
