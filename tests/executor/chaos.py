"""Random kills under load: what a small test in CI, a soak, and a benchmark share.

Two agents with two devices each run one service on both; a gateway of two processes is in front, and requests come in
all the time. A worker, an agent, one of the gateway's processes, or a controller in the middle of an apply is killed;
the next kill follows when everything is as the plan says again.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import psutil

from executor.cluster_status import status
from executor.controller import LeaseTiming, apply
from executor.proto import open_inference_pb2_grpc
from executor.tensors import encode_request
from plans.errors import ForeplanError
from tests.executor.controller_process import doomed_apply
from tests.executor.peer_process import PeerProcess, cluster_of, outlived, processes
from tests.executor.placements import placement

ONE = placement({"a/0": {"chat": "fake-double"}, "b/0": {"chat": "fake-double"}})
OTHER = placement({"a/1": {"chat": "fake-double"}, "b/1": {"chat": "fake-double"}})
KINDS = ("worker", "agent", "gateway", "controller")
_RECOVER_S = 120.0
_TIMING = LeaseTiming(ttl_s=0.5)


@dataclass
class Chaos:
    """What happened: statuses of the requests that ended, and the seconds to recovery of each kill, by kind of kill.

    ``answered`` counts the good answers of each client, and ``problems`` tells the others. Requests that end before the
    first kill and after the last recovery count under the kind "".
    """

    ended: dict[str, collections.Counter[str]] = field(
        default_factory=lambda: collections.defaultdict(collections.Counter)
    )
    kind: str = ""
    answered: collections.Counter[int] = field(default_factory=collections.Counter)
    problems: set[str] = field(default_factory=set)
    recovery_s: dict[str, list[float]] = field(default_factory=lambda: collections.defaultdict(list))
    unanswered: int = 0

    @property
    def statuses(self) -> collections.Counter[str]:
        return sum(self.ended.values(), collections.Counter())

    @property
    def requests(self) -> int:
        return sum(self.statuses.values())


class _Load(threading.Thread):
    """Sends requests one after the other on several connections until told to stop."""

    def __init__(self, address: str, chaos: Chaos, clients: int = 4) -> None:
        super().__init__(daemon=True)
        self._address, self._chaos, self.clients = address, chaos, clients
        self.stopping = threading.Event()

    def run(self) -> None:
        asyncio.run(self._all())

    async def _all(self) -> None:
        await asyncio.gather(*(self._one(number) for number in range(self.clients)))

    def wait_until_all_are_answered(self) -> None:
        """Wait until every client has an answer to a request that it sends from now on."""
        before = self._chaos.answered.copy()  # the answer that comes next may be to an earlier one
        end_s = time.monotonic() + _RECOVER_S
        while any(self._chaos.answered[number] < before[number] + 2 for number in range(self.clients)):
            assert time.monotonic() < end_s, f"clients are not answered: {self._chaos.problems}"
            time.sleep(0.01)

    async def _one(self, number: int) -> None:
        body = encode_request("chat", {"x": np.ones((1, 4), np.float32)})
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 200)]
        options += [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.min_reconnect_backoff_ms", 50)]
        async with grpc.aio.insecure_channel(self._address, options=options) as channel:
            stub: Any = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            while not self.stopping.is_set():
                self._chaos.unanswered += 1
                try:
                    await stub.ModelInfer(body, timeout=30)
                    self._chaos.ended[self._chaos.kind]["OK"] += 1
                    self._chaos.answered[number] += 1
                except grpc.aio.AioRpcError as error:
                    self._chaos.ended[self._chaos.kind][error.code().name] += 1
                    self._chaos.problems.add(f"{self._chaos.kind}: {error.details()}")
                self._chaos.unanswered -= 1
                await asyncio.sleep(0.01)


def run_chaos(folder: Path, kills: int, seed: int, limit_s: float = 600.0) -> Chaos:
    """Kill ``kills`` times, or until ``limit_s`` is over; return what happened."""
    chaos, chance = Chaos(), random.Random(seed)
    a, b = (PeerProcess("agent", folder / node, node=node) for node in "ab")
    gateway = PeerProcess("gateway", folder / "gateway", processes=2)
    with processes(a, b, gateway):
        cluster = cluster_of(a, b)
        asyncio.run(apply(ONE, cluster, [gateway.address]))
        live = ONE
        load = _Load(gateway.address, chaos)
        load.start()
        end_s = time.monotonic() + limit_s
        for number in range(kills):
            if time.monotonic() > end_s:
                break
            kind = KINDS[number % len(KINDS)] if number < len(KINDS) else chance.choice(KINDS)
            chaos.kind = kind
            start_s = time.monotonic()
            if kind == "controller":
                before, live = live, OTHER if live is ONE else ONE
                at = (chance.choice(("stage", "commit", "route", "finish")), "done")
                code = doomed_apply(folder, live, before.placement_digest, [a, b], gateway, at)
                assert code == -signal.SIGKILL, f"the controller outlived its {at}"
            else:
                _kill(kind, chance.choice((a, b)), gateway)
            _recover(live, cluster, gateway)
            chaos.recovery_s[kind].append(time.monotonic() - start_s)
            load.wait_until_all_are_answered()
        chaos.kind = ""
        load.stopping.set()
        load.join(60.0)
    return chaos


def _kill(kind: str, agent: PeerProcess, gateway: PeerProcess) -> None:
    if kind == "agent":
        agent.kill()
        agent.start()
        return
    victim = _worker_at_work(agent) if kind == "worker" else _named(gateway, "spawn_main")[0]
    victim.kill()
    assert not outlived([victim])


def _worker_at_work(agent: PeerProcess) -> psutil.Process:
    """Return the worker of ``agent`` that has served: tensors have passed to it, which they have not to a spare one."""
    end_s = time.monotonic() + _RECOVER_S
    while time.monotonic() < end_s:
        for worker in _named(agent, "executor.worker"):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any("foreplan-tensors" in mapped.path for mapped in worker.memory_maps()):
                    return worker
        time.sleep(0.01)
    raise AssertionError(f"no worker of {agent.node} serves")


def _named(parent: PeerProcess, name: str) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(parent.process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if name in " ".join(child.cmdline()):
                found.append(child)
    return found


def _recover(plan: Any, cluster: Any, gateway: PeerProcess) -> None:
    """Wait until the cluster is as ``plan`` says, applying it where it is not."""

    seen: list[Any] = []

    async def recovering() -> None:
        async with asyncio.timeout(_RECOVER_S):
            while True:
                try:
                    found = await status(cluster, [gateway.address])
                    routed = all(one.routed_by for one in found.replicas)
                    if found.live and found.live.digest == plan.placement_digest and found.healthy and routed:
                        return
                    wrong = found.live is None or found.live.digest != plan.placement_digest
                    if wrong or not found.healthy:
                        await apply(plan, cluster, [gateway.address], prior=found.live, lease=_TIMING)
                    seen[:] = [found.to_json()]
                except ForeplanError as error:
                    seen[:] = [error]
                await asyncio.sleep(0.02)

    try:
        asyncio.run(recovering())
    except TimeoutError as error:
        raise AssertionError(f"not as planned after {_RECOVER_S:g} s: {seen}") from error
