"""64 agents on loopback, each a process, without models: how long an apply takes, and a new routing table.

To reach: apply in at most 10 s, routing table in force in at most 1 s. The table names all 64 agents and 512 targets;
it is in force when the gateway answers, which is after it has asked every agent for its state.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

COUNT = int(sys.argv[1]) if len(sys.argv) > 1 else 64


def main() -> None:  # imports are inside: every agent process imports this file too
    """Measure and print."""
    import psutil
    from executor_site import about

    from plans.cluster import Cluster

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["executor.agent"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pipes = []
        children = []
        start_s = time.perf_counter()
        for number in range(COUNT):
            ours, theirs = context.Pipe()
            child = context.Process(target=_agent, args=(f"n{number}", folder / f"n{number}", theirs), daemon=True)
            child.start()
            theirs.close()
            pipes.append(ours)
            children.append(child)
        ports = [ours.recv() for ours in pipes]
        started_s = time.perf_counter() - start_s
        unique = sum(psutil.Process(child.pid).memory_full_info().uss for child in children) / COUNT / 2**20
        nodes = [
            {"name": f"n{number}", "address": f"127.0.0.1:{port}", "gpus": {"type": "cpu", "count": 1}}
            for number, port in enumerate(ports)
        ]
        cluster = Cluster.model_validate({"gpu_types": {"cpu": {"memory": "1GiB"}}, "nodes": nodes})
        print(about())
        print(f"{COUNT} agents listen after {started_s:.1f} s; {unique:.0f} MiB of memory each of their own")
        asyncio.run(_measure(cluster, folder))
        for child in children:
            child.kill()


async def _measure(cluster: Any, folder: Path) -> None:
    import grpc.aio
    from executor_site import placed

    from executor.control_client import GatewayClient, channel_options
    from executor.controller import apply
    from executor.gateway import GatewayConfig, running_gateway

    async with running_gateway(GatewayConfig(listen="127.0.0.1:0", state_dir=folder / "g")) as address:
        result = await apply(placed({}, deadline_s=1.0), cluster, [address])
        print(f"apply: {result.wall_s:.2f} s")
        async with grpc.aio.insecure_channel(address, options=channel_options(1 << 26)) as channel:
            client = GatewayClient(channel, "gateway")
            for generation in (2, 3, 4):
                table = _table(cluster, generation)
                start_s = time.perf_counter()
                await client.set_routes(table, timeout_s=30)
                taken_s = time.perf_counter() - start_s
                assert (await client.state(timeout_s=5)).generation == generation
                print(f"routing table {'to new agents' if generation == 2 else 'again'}: {taken_s:.2f} s")


def _table(cluster: Any, generation: int) -> Any:
    from executor.state import Backend, RoutingTable, ServiceRoutes, Target

    names = [node.name for node in cluster.nodes]
    share = 1 / len(names)
    return RoutingTable(
        generation=generation,
        placement_digest=f"table {generation}",
        backends=tuple(Backend(node=node.name, address=node.address) for node in cluster.nodes),
        services=tuple(
            ServiceRoutes(
                service=f"s{number}",
                deadline_s=1.0,
                targets=tuple(Target(group=f"{name}/0", node=name, weight=share, variant="v") for name in names),
            )
            for number in range(8)
        ),
    )


def _agent(node: str, folder: Path, ready: Connection) -> None:
    from executor.agent import AgentConfig, serve_agent

    config = AgentConfig(
        node=node,
        address="127.0.0.1:0",
        device_count=1,
        memory_bytes=2**30,
        state_dir=folder,
        spare_worker=False,
        log_level="WARNING",
    )
    asyncio.run(serve_agent(config, on_ready=ready.send))


if __name__ == "__main__":
    main()
