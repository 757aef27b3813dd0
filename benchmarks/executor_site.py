"""Agents and a gateway as processes on loopback, for the benchmarks of the executor. Not a benchmark itself."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
from timed_runtime import latency_table_s

from executor.controller import apply
from executor.load import LoadOptions, replay
from foreplan.demo.processes import ChildProcesses
from foreplan.demo.stage import cluster_yaml
from foreplan.measure import processor_name
from foreplan.ports import free_ports
from plans import Cluster, Group, LoadoutEntry, Plan, Route, Services, SolverReport, write_text
from plans.plan import Prior
from traces.table import RequestTrace

HERE = Path(__file__).resolve().parent
TIMED = "timed_runtime:TimedRuntime"


def about() -> str:
    """Return machine and date, which every figure needs."""
    load = os.getloadavg()[0]
    now = datetime.datetime.now(tz=datetime.UTC)
    return f"machine: {processor_name()}, {os.cpu_count()} cores, load {load:.1f}; {now:%Y-%m-%d %H:%M} UTC"


def placed(
    groups: Mapping[str, Mapping[str, str]],
    *,
    deadline_s: float,
    max_batch: int = 8,
    prior: Plan | None = None,
    memory_bytes: int = 2**20,
    latency_s: Callable[[str, int], tuple[tuple[float], ...]] = latency_table_s,
) -> Plan:
    """Return a plan that runs ``groups`` (group id to service to variant), each service in equal shares.

    A group over several devices, such as ``a/0-1``, runs its models tensor parallel. ``latency_s`` gives the planned
    latencies of a variant, by batch.
    """
    gpus = {group: _gpus(group) for group in groups}
    hosts: dict[str, list[str]] = {}
    for group, services in groups.items():
        for service in services:
            hosts.setdefault(service, []).append(group)
    return Plan(
        solver=SolverReport(name="by hand", status="feasible", objective=0, bound=0, gap=0, wall_s=0, seed=0),
        groups=tuple(
            Group(
                id=group,
                node=group.split("/")[0],
                gpus=gpus[group],
                tp=len(gpus[group]),
                loadout=tuple(
                    LoadoutEntry(
                        service=service,
                        variant=variant,
                        max_batch=max_batch,
                        rate_rps=1.0,
                        memory_bytes=(memory_bytes,) * len(gpus[group]),
                        deadline_s=deadline_s,
                        load_s=0.1,
                        stage_latency_s=latency_s(variant, max_batch),
                    )
                    for service, variant in services.items()
                ),
            )
            for group, services in groups.items()
        ),
        routes={service: tuple(Route(group=one, weight=1 / len(of)) for one in of) for service, of in hosts.items()},
        prior=Prior(generation=1, digest=prior.placement_digest) if prior else None,
    )


def _gpus(group: str) -> tuple[int, ...]:
    first, _, last = group.split("/")[1].partition("-")
    return tuple(range(int(first), int(last or first) + 1))


def planned(groups: Mapping[str, str], tables: Mapping[str, list[float]], deadline_s: float, max_batch: int) -> Plan:
    """Return a plan that runs a variant on each group, with the latencies of ``tables`` by variant."""
    return placed(
        {group: {"m": variant} for group, variant in groups.items()},
        deadline_s=deadline_s,
        max_batch=max_batch,
        latency_s=lambda variant, most: tuple((one,) for one in tables[variant][:most]),
    )


def services_of(*names: str, deadline_s: float, variants: Sequence[str]) -> Services:
    """Return a services document with one deadline for all."""
    return Services.model_validate(
        {
            "services": [
                {"name": name, "slo": {"deadline": deadline_s}, "variants": [{"model": one} for one in variants]}
                for name in names
            ]
        }
    )


@dataclass
class Site:
    """Running peers."""

    folder: Path
    cluster: Cluster
    gateway: str
    http: str
    processes: ChildProcesses
    live: Plan | None = None
    pids: dict[str, int] = field(default_factory=dict)

    def apply(self, plan: Plan, **options: Any) -> Any:
        """Bring the cluster to ``plan``, whatever is live."""
        prior = Prior(generation=1, digest=self.live.placement_digest) if self.live else None
        result = asyncio.run(apply(plan, self.cluster, [self.gateway], prior=prior, **options))
        self.live = plan
        return result

    def cpu_s(self, name: str) -> float:
        """Return the processor time that a process and its children have used."""
        process = psutil.Process(self.pids[name])
        return sum(
            one.cpu_times().user + one.cpu_times().system for one in (process, *process.children(recursive=True))
        )

    def resident_bytes(self, name: str) -> int:
        """Return the memory of a process and its children."""
        process = psutil.Process(self.pids[name])
        return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))


@contextlib.contextmanager
def running_site(
    nodes: Sequence[str] = ("a",),
    *,
    devices: int = 2,
    processes: int = 1,
    runtime: str = TIMED,
    agent_options: Sequence[str] = (),
    gateway_options: Sequence[str] = (),
) -> Iterator[Site]:
    """Run an agent for each node and a gateway inside the block."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a benchmark that is told to stop leaves nothing behind
    ports = free_ports(len(nodes) + 2)
    cluster = Cluster.model_validate(
        {
            "gpu_types": {"cpu": {"memory": "2GiB"}},
            "nodes": [
                {"name": node, "address": f"127.0.0.1:{port}", "gpus": {"type": "cpu", "count": devices}}
                for node, port in zip(nodes, ports, strict=False)
            ],
        }
    )
    os.environ["PYTHONPATH"] = str(HERE)  # where agents find the runtime
    gateway, http = (f"127.0.0.1:{port}" for port in ports[-2:])
    with tempfile.TemporaryDirectory() as name, ChildProcesses(Path(name) / "logs") as children:
        folder = Path(name)
        write_text(folder / "cluster.yaml", cluster_yaml(cluster))
        site = Site(folder=folder, cluster=cluster, gateway=gateway, http=http, processes=children)
        for node in nodes:
            where = ["--cluster", str(folder / "cluster.yaml"), "--node", node, "--state-dir", str(folder / node)]
            with _noted(site, node):
                children.start(node, ["agent", *where, "--runtime", runtime, "--log-level", "warning", *agent_options])
        with _noted(site, "gateway"):
            where = ["--listen", gateway, "--http", http, "--state-dir", str(folder / "g")]
            children.start(
                "gateway",
                ["gateway", *where, "--processes", str(processes), "--log-level", "warning", *gateway_options],
            )
        yield site


@contextlib.contextmanager
def _noted(site: Site, name: str) -> Iterator[None]:
    before = {child.pid for child in psutil.Process().children()}
    yield
    (site.pids[name],) = {child.pid for child in psutil.Process().children()} - before


def latency_measured_s(site: Site, group: str, variant: str, model: Any) -> list[float]:
    """Return how long ``group`` is taken up by each batch, seconds: the time between answers while full ones wait.

    That is more than the model runs, by what the worker waits for its agent in between.
    """
    services = services_of("m", deadline_s=10.0, variants=[variant])
    trace = RequestTrace(pd.DataFrame({"arrival_s": np.zeros(20), "service": "m"}))
    table: list[float] = []
    for batch in range(model.max_batch, 0, -1):
        site.apply(planned({group: variant}, {variant: [0.01] * batch}, 10.0, batch))
        options = LoadOptions(payloads={"m": model.example(batch)})
        found = asyncio.run(replay(trace, site.gateway, services, options)).requests
        assert set(found["outcome"]) == {"good"}, found
        table.insert(0, float(np.median(np.diff(np.sort(found["latency_s"])))))
    table = np.maximum.accumulate(table).tolist()
    print(f"{variant} on {group}: batches of 1 to {len(table)} take {', '.join(f'{s * 1e3:.1f}' for s in table)} ms")
    return table
