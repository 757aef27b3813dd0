"""The same model, the same arrivals, the same cores: Foreplan's executor and Ray Serve, goodput at one SLO.

bert-small-16 of the registry on the CPU (one replica, one thread), batches up to 8, Poisson arrivals at rates from well
below to twice the capacity, so that both lose requests in the end; deadline five times the latency of a batch of 1 (or
as often as the second argument says; the first is the seconds at each rate). One
open-loop client calls both over HTTP with the same bytes. Ray Serve is set up to do well: ``@serve.batch`` (8) with
the model in a thread of its own so that the next batch gathers meanwhile, two batches of requests at the replica, and a
queue no longer than what can be answered before the deadline, so that it sheds load too. Needs the extra ``ray``.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import aiohttp
import numpy as np
from executor_site import Site, about, latency_measured_s, planned, running_site

from executor.runtime.torch_runtime import TorchRuntime
from foreplan.ports import free_ports

MODEL, BATCH = "bert-small-16", 8
SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
SLO_RATIO = float(sys.argv[2]) if len(sys.argv) > 2 else 5.0
LOADS = (0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)


def main() -> None:
    """Measure both, and print."""
    model = TorchRuntime(threads=1).load(MODEL, BATCH)
    example = model.example(1)
    print(about())
    with running_site(devices=1, runtime="executor.runtime.group_runtime:TorchGroupRuntime") as site:
        latency_s = latency_measured_s(site, "a/0", MODEL, model)
        del model
        capacity_rps, deadline_s = BATCH / latency_s[-1], SLO_RATIO * latency_s[0]
        arrivals = {load: _arrivals(load * capacity_rps) for load in LOADS}
        site.apply(planned({"a/0": MODEL}, {MODEL: latency_s}, deadline_s, BATCH))
        ours = _foreplan(site, deadline_s, example, arrivals)
    theirs = _ray(capacity_rps, deadline_s, example, arrivals)
    print(f"{MODEL}: capacity {capacity_rps:.0f}/s in batches of {BATCH}, deadline {deadline_s * 1e3:.0f} ms")
    for load, due in arrivals.items():
        goodput = [f"{found[load]:.1f}/s ({found[load] * SECONDS / len(due):.1%})" for found in (ours, theirs)]
        print(
            f"{load:g} x capacity ({load * capacity_rps:.0f}/s): goodput Foreplan {goodput[0]}, Ray Serve {goodput[1]} "
            f"({ours[load] / max(theirs[load], 0.1):.2f} times)"
        )
    most = len(arrivals[LOADS[-1]]) / SECONDS
    assert max(ours[LOADS[-1]], theirs[LOADS[-1]]) < 0.9 * most, "the load was too low to tell them apart"
    peaks = max(ours.values()), max(theirs.values())
    print(f"peak goodput: Foreplan {peaks[0]:.1f}/s, Ray Serve {peaks[1]:.1f}/s; {peaks[0] / peaks[1]:.2f} times")


def _arrivals(rate_rps: float) -> Any:
    return np.cumsum(np.random.default_rng(3).exponential(1 / rate_rps, int(rate_rps * SECONDS)))


def _foreplan(site: Site, deadline_s: float, example: Any, arrivals: Any) -> dict[float, float]:
    tensors = [
        {"name": name, "datatype": "INT64", "shape": list(one.shape), "parameters": {"binary_data_size": one.nbytes}}
        for name, one in example.items()
    ]
    header = json.dumps(
        {"inputs": tensors, "parameters": {"deadline_ms": deadline_s * 1000, "binary_data_output": True}}
    ).encode()
    body = header + b"".join(array.tobytes() for array in example.values())
    url = f"http://{site.http}/v2/models/m/infer"
    headers = {"Inference-Header-Content-Length": str(len(header))}
    return {load: asyncio.run(_goodput(url, body, headers, due, deadline_s)) for load, due in arrivals.items()}


def _ray(capacity_rps: float, deadline_s: float, example: Any, arrivals: Any) -> dict[float, float]:
    import ray
    from ray import serve

    (port,) = free_ports(1)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    name, dtype, shape = next((name, str(array.dtype), array.shape) for name, array in example.items())

    queue = max(BATCH, int(capacity_rps * deadline_s) - 2 * BATCH)

    @serve.deployment(
        num_replicas=1,
        max_ongoing_requests=2 * BATCH,
        max_queued_requests=queue,
        ray_actor_options={"num_cpus": 1},
    )
    class Model:
        def __init__(self) -> None:
            self.model = TorchRuntime(threads=1).load(MODEL, BATCH)

        @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.005)
        async def run(self, bodies: list[bytes]) -> list[bytes]:
            rows = [np.frombuffer(body, dtype).reshape(shape) for body in bodies]
            outputs = await asyncio.to_thread(self.model.run, {name: np.concatenate(rows)})
            return [row.tobytes() for row in next(iter(outputs.values()))]

        async def __call__(self, request: Any) -> Any:
            from starlette.responses import Response

            return Response(await self.run(await request.body()))

    serve.run(Model.bind())
    url, body = f"http://127.0.0.1:{port}/", b"".join(array.tobytes() for array in example.values())
    try:
        return {load: asyncio.run(_goodput(url, body, {}, due, deadline_s)) for load, due in arrivals.items()}
    finally:
        serve.shutdown()
        ray.shutdown()


async def _goodput(url: str, body: bytes, headers: dict[str, str], due: Any, deadline_s: float) -> float:
    """Send ``body`` at the times ``due``; return the answers within the deadline per second."""
    good = 0
    limit = aiohttp.ClientTimeout(total=max(5 * deadline_s, 1.0))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=limit) as session:

        async def one(due_s: float) -> None:
            nonlocal good
            try:
                async with session.post(url, data=body, headers=headers) as answer:
                    await answer.read()
                    good += answer.status == 200 and time.monotonic() <= due_s + deadline_s
            except (TimeoutError, aiohttp.ClientError):
                return

        for _ in range(20):  # warm
            await one(time.monotonic())
        good = 0
        start_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for at in due:
                wait_s = start_s + at - time.monotonic()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                group.create_task(one(start_s + at))
    return good / SECONDS


if __name__ == "__main__":
    main()
