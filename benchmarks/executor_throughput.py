"""How many small requests one gateway process forwards per second, beside a bare grpc.aio echo server, in one run.

Closed loop, 64 requests in flight, model of no time, on loopback. All processes share the machine's cores, so the
figure that does not depend on the others is requests per second of *the gateway's own processor time*: what a gateway
with a core to itself forwards. To reach: 3,000.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import grpc
import grpc.aio
import numpy as np
from executor_site import about, placed, running_site

from executor.tensors import encode_request

COUNT = int(sys.argv[1]) if len(sys.argv) > 1 else 12_000
IN_FLIGHT, PATH = 64, "/inference.GRPCInferenceService/ModelInfer"


def main() -> None:
    """Measure and print."""
    body = encode_request("m", {"x": np.ones((1, 4), np.float32)}).SerializeToString()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    echo = context.Process(target=_echo, args=(theirs,), daemon=True)
    echo.start()
    port = ours.recv()
    plan = placed({"a/0": {"m": "timed-0-0-4"}}, deadline_s=10.0, max_batch=64)
    print(about())
    with running_site(devices=1) as site:
        site.apply(plan)
        bare_rps, _ = _measured(f"127.0.0.1:{port}", body, lambda: _asked(ours))
        rps, per_core = _measured(site.gateway, body, lambda: site.cpu_s("gateway"))
        echo_rps, echo_per_core = _measured(f"127.0.0.1:{port}", body, lambda: _asked(ours))
    echo.kill()
    print(f"bare grpc.aio echo: {bare_rps:.0f} and {echo_rps:.0f} requests/s; {echo_per_core:.0f} per core-second")
    print(
        f"gateway process: {rps:.0f} requests/s with everything on these cores; "
        f"{per_core:.0f} per core-second of its own"
    )
    print(f"ratio to bare echo, per core-second: {per_core / echo_per_core:.2f}")


def _measured(address: str, body: bytes, cpu_s: Any) -> tuple[float, float]:
    """Return requests per second, and per second of processor time that ``cpu_s`` counts."""

    async def run() -> tuple[float, float]:
        async with grpc.aio.insecure_channel(address) as channel:
            call = channel.unary_unary(PATH, None, None)

            async def some(count: int) -> None:
                for _ in range(count):
                    assert await call(body, timeout=10)

            await asyncio.gather(*(some(20) for _ in range(IN_FLIGHT)))
            before_s, start_s = cpu_s(), time.perf_counter()
            await asyncio.gather(*(some(COUNT // IN_FLIGHT) for _ in range(IN_FLIGHT)))
            wall_s, used_s = time.perf_counter() - start_s, cpu_s() - before_s
        return COUNT / wall_s, COUNT / used_s

    return asyncio.run(run())


def _asked(connection: Connection) -> float:
    connection.send(None)
    return float(connection.recv())


def _echo(connection: Connection) -> None:
    async def serve() -> None:
        server = grpc.aio.server()

        async def infer(request: bytes, _: Any) -> bytes:
            return request

        handler = grpc.unary_unary_rpc_method_handler(infer)
        names = PATH.split("/")
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(names[1], {names[2]: handler}),))
        connection.send(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        while True:
            await asyncio.to_thread(connection.recv)
            used = resource.getrusage(resource.RUSAGE_SELF)
            connection.send(used.ru_utime + used.ru_stime)

    import uvloop

    uvloop.run(serve())


if __name__ == "__main__":
    main()
