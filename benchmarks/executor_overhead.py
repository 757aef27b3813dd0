"""What gateway and agent add to a 20 ms model: 100 requests per second of 150 KB, open loop, on loopback.

The model sleeps, so the two cores are free for everything else; what is added is the latency from the scheduled arrival
(or the send, where a timer rang early) less the time that the batch ran, for requests that met no other in queue or
batch (arrivals 40 ms apart on each of four devices). In the same run the same clients send the same requests to the
same model inside a bare grpc.aio server: that is what any server costs, and the client itself. One client is that of
`foreplan load`, grpc.aio; the other writes the same frames to a socket (`light_client`), which leaves out what a gRPC
library takes for itself at the client. Gateway and bare server keep to one core each (``gateway --pin-cores``), and no
core falls asleep where that can be had (``--keep-awake``, as root), unless the second argument is ``pinned`` (they may
sleep) or ``free`` (neither). To reach: p50 at most 1.5 ms, p99 at most 5 ms.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Coroutine
from multiprocessing.connection import Connection
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pandas as pd
import psutil
import uvloop
from executor_site import about, placed, running_site, services_of
from light_client import LightClient
from timed_runtime import TimedRuntime

from executor.cores import core_of_process, pin_process
from executor.infer_header import read_answer_header
from executor.load import LoadOptions, replay
from executor.load_run import LoadRun, Schedule
from executor.proto import open_inference_pb2 as pb
from executor.tensors import decode_inputs, encode_request, encode_response
from traces.table import RequestTrace

VARIANT, RATE_RPS, SECONDS = "timed-20-0-37500", 100.0, float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
PINNED = sys.argv[2:] != ["free"]
AWAKE = not sys.argv[2:] and os.access("/dev/cpu_dma_latency", os.W_OK)  # both servers gain: it is for the machine
ROUNDS, WARM_S = 4, 2.0
SERVICE, METHOD = "inference.GRPCInferenceService", "ModelInfer"


def main() -> None:
    """Measure ours and the bare server in turns, and print."""
    plan = placed({f"a/{gpu}": {"m": VARIANT} for gpu in range(4)}, deadline_s=1.0, max_batch=1)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    bare = context.Process(target=_serve_bare, args=(theirs,), daemon=True)
    bare.start()
    address = f"127.0.0.1:{ours.recv()}"
    print(about())
    print("gateway and bare server " + ("on a core each" if PINNED else "on any core") + ", kept awake" * AWAKE)
    options = ["--pin-cores"] * PINNED + ["--keep-awake"] * AWAKE
    with running_site(devices=4, gateway_options=options) as site:
        site.apply(plan)
        runs: dict[str, Callable[[float], Coroutine[Any, Any, pd.DataFrame]]] = {
            "gateway and agent, grpc.aio client": lambda seconds: _ours(site.gateway, seconds),
            "bare server, grpc.aio client": lambda seconds: _bare(address, seconds),
            "gateway and agent, light client": lambda seconds: _light(site.gateway, seconds),
            "bare server, light client": lambda seconds: _light(address, seconds),
        }
        for run in runs.values():
            uvloop.run(run(WARM_S))
        before = {name: site.cpu_s(name) for name in ("a", "gateway")} | {"bare": _cpu_s(bare.pid)}
        frames = [[uvloop.run(run(SECONDS / ROUNDS)) for run in runs.values()] for _ in range(ROUNDS)]
        used = {name: site.cpu_s(name) - before[name] for name in ("a", "gateway")}
        used["bare"] = _cpu_s(bare.pid) - before["bare"]
    bare.kill()
    found = [_told(name, pd.concat(part)) for name, part in zip(runs, zip(*frames, strict=True), strict=True)]
    for client, (ours_ms, bare_ms) in zip(("grpc.aio", "light"), (found[:2], found[2:]), strict=True):
        p50_ms, p99_ms = (of_ours - of_bare for of_ours, of_bare in zip(ours_ms, bare_ms, strict=True))
        print(f"gateway and agent beyond the bare server, {client} client: p50 {p50_ms:.2f} ms, p99 {p99_ms:.2f} ms")
    count = 2 * sum(len(frame) for frame, *_ in frames)
    each = {name: value / count * 1e3 for name, value in used.items()}
    print(
        f"processor time per request: gateway {each['gateway']:.2f} ms, agent and workers {each['a']:.2f} ms, "
        f"bare server {each['bare']:.2f} ms"
    )


def _told(name: str, frame: pd.DataFrame) -> tuple[float, float]:
    """Print the time added to the model's; return p50 and p99 from the actual send, milliseconds."""
    send_ms = ((frame["sent_s"] - frame["scheduled_s"]) * 1000).clip(lower=0).to_numpy()
    added_ms = ((frame["latency_s"] - frame["run_s"]) * 1000).to_numpy()
    for since, values in (("scheduled arrival", added_ms), ("actual send", added_ms - send_ms)):
        p50, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99])
        print(f"{name}, added from the {since}: p50 {p50:.2f} ms, p90 {p90:.2f} ms, p99 {p99:.2f} ms")
    return float(p50), float(p99)


async def _ours(gateway: str, seconds: float) -> pd.DataFrame:
    count = int(RATE_RPS * seconds)
    trace = RequestTrace(pd.DataFrame({"arrival_s": np.arange(count) / RATE_RPS, "service": "m"}))
    services = services_of("m", deadline_s=1.0, variants=[VARIANT])
    frame = (await replay(trace, gateway, services, LoadOptions())).requests
    assert (frame["outcome"] == "good").all(), frame["outcome"].value_counts()
    return frame


async def _bare(address: str, seconds: float) -> pd.DataFrame:
    count = int(RATE_RPS * seconds)
    due_s = np.arange(count) / RATE_RPS
    schedule = Schedule(
        due_s=due_s, deadline_s=np.ones(count), body=np.zeros(count, np.int64), duration_s=count / RATE_RPS
    )
    inputs = {"x": np.random.default_rng(0).standard_normal((1, 37500)).astype(np.float32)}
    async with grpc.aio.insecure_channel(address) as channel:
        run = LoadRun(schedule, [encode_request("m", inputs).SerializeToString()], [channel])
        await run.replay()
    frame = run.frame()
    assert (frame["status"] == "OK").all(), frame["status"].value_counts()
    return frame.assign(scheduled_s=due_s)


async def _light(address: str, seconds: float) -> pd.DataFrame:
    count = int(RATE_RPS * seconds)
    client = await LightClient.connect(address, f"/{SERVICE}/{METHOD}")
    inputs = {"x": np.random.default_rng(0).standard_normal((1, 37500)).astype(np.float32)}
    body = encode_request("m", inputs).SerializeToString()
    rows: list[tuple[float, float, float, float]] = []

    async def one(due_s: float) -> None:
        sent_s = time.time() - start_s
        answer = await client.call(body, 1.0)
        run_s = read_answer_header(answer.body).run_s or 0.0
        rows.append((due_s, sent_s, answer.arrived_s - start_s - min(due_s, sent_s), run_s))

    start_s = time.time()
    async with asyncio.TaskGroup() as group:
        for due_s in (np.arange(count) / RATE_RPS).tolist():
            await asyncio.sleep(start_s + due_s - time.time())
            group.create_task(one(due_s))
    client.close()
    return pd.DataFrame(rows, columns=["scheduled_s", "sent_s", "latency_s", "run_s"])


def _cpu_s(pid: int | None) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _serve_bare(connection: Connection) -> None:
    """Serve the model the plain way: parse, run in a thread, answer."""
    if PINNED:
        pin_process((core_of_process(0, 1),))
    model = TimedRuntime().load(VARIANT, 1)

    def ran(inputs: Any) -> tuple[Any, float]:
        start_s = time.perf_counter()
        outputs = model.run(inputs)
        return outputs, time.perf_counter() - start_s

    async def infer(request: pb.ModelInferRequest, _: Any) -> pb.ModelInferResponse:
        outputs, run_s = await asyncio.to_thread(ran, decode_inputs(request))
        return encode_response("m", outputs, parameters={"run_s": run_s})

    async def serve() -> None:
        server = grpc.aio.server()
        handler = grpc.unary_unary_rpc_method_handler(
            infer, pb.ModelInferRequest.FromString, pb.ModelInferResponse.SerializeToString
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        connection.send(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        await server.wait_for_termination()

    uvloop.run(serve())


if __name__ == "__main__":
    main()
