"""Does the dynamic batcher batch? A live agent and gateway at 80 % of a model's capacity at its largest batch.

Profiles bert-small-16 (which gains from batching) on this machine, runs it on one device with batches up to 8, offers a
Poisson load of 80 % of the capacity at batch 8, and prints the mean batch, measured and simulated on the same arrivals.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from evaluator import evaluate
from executor.controller import apply
from executor.load import LoadOptions, replay
from foreplan.demo.processes import ChildProcesses
from foreplan.demo.stage import cluster_yaml, free_ports
from foreplan.measure import Device, measure, processor_name
from plans import Cluster, Group, LoadoutEntry, Plan, Route, Services, SolverReport, write_text
from profiles.library import ProfileLibrary
from profiles.profiler import StopRule
from traces.synthesis import Poisson, synthesise

MODEL, LARGEST, LOAD, SECONDS = "bert-small-16", 8, 0.8, 30.0


def main() -> None:
    """Measure and print."""
    profile = next(iter(measure([MODEL], Device(gpu_type="cpu"), (1, 2, 4, 8), StopRule(), progress=lambda _: None)))
    latency = ProfileLibrary([profile]).latency(MODEL, "cpu", 1, 1)
    assert latency is not None
    gain = LARGEST * latency.at(1).mean_s / latency.at(LARGEST).mean_s
    assert gain > 1.5, f"the profile does not gain from batching: {gain:.2f}"
    rate_rps = LOAD * LARGEST / latency.at(LARGEST).mean_s
    deadline_s = 10 * latency.at(LARGEST).mean_s
    services = Services.model_validate(
        {"services": [{"name": "moderate", "slo": {"deadline": deadline_s}, "variants": [{"model": MODEL}]}]}
    )
    entry = LoadoutEntry(
        service="moderate",
        variant=MODEL,
        max_batch=LARGEST,
        rate_rps=rate_rps,
        memory_bytes=latency.peak_bytes(LARGEST),
        weight_bytes=sum(latency.weight_bytes),
        load_s=latency.load_s,
        deadline_s=deadline_s,
        stage_latency_s=latency.stage_latency_table(LARGEST),
    )
    plan = Plan(
        solver=SolverReport(name="by hand", status="feasible", objective=0, bound=0, gap=0, wall_s=0, seed=0),
        groups=(Group(id="node-a/0", node="node-a", gpus=(0,), loadout=(entry,)),),
        routes={"moderate": (Route(group="node-a/0", weight=1.0),)},
    )
    port, gateway_port = free_ports(2)
    cluster = Cluster.model_validate(
        {
            "gpu_types": {"cpu": {"memory": "2GiB"}},
            "nodes": [{"name": "node-a", "address": f"127.0.0.1:{port}", "gpus": {"type": "cpu", "count": 1}}],
        }
    )
    trace = synthesise({"moderate": Poisson(rate_rps=rate_rps)}, duration_s=SECONDS, seed=1)
    gateway = f"127.0.0.1:{gateway_port}"
    with tempfile.TemporaryDirectory() as name, ChildProcesses(Path(name) / "logs") as processes:
        folder = Path(name)
        write_text(folder / "cluster.yaml", cluster_yaml(cluster))
        where = ["--cluster", str(folder / "cluster.yaml"), "--node", "node-a"]
        processes.start("agent", ["agent", *where, "--state-dir", str(folder / "a")])
        processes.start("gateway", ["gateway", "--listen", gateway, "--state-dir", str(folder / "g")])
        asyncio.run(apply(plan, cluster, [gateway]))
        measured = asyncio.run(replay(trace, gateway, services, LoadOptions(gpus=1))).summary
    simulated = evaluate(plan, services, trace).summary
    for run in (measured, simulated):
        one = run.services[0]
        assert one.offered == one.good + one.late + one.dropped + one.failed == len(trace)
    batch = measured.services[0].mean_batch
    assert batch is not None
    print(f"machine: {processor_name()}")
    print(f"{MODEL}: throughput at batch 8 is {gain:.2f} x batch 1; load {rate_rps:.1f} rps = {LOAD:.0%} of batch 8")
    print(f"mean batch: measured {batch:.2f}, simulated {simulated.services[0].mean_batch:.2f}")
    print(f"attainment: measured {measured.attainment:.2%}, simulated {simulated.attainment:.2%}")
    assert batch > 2, "the batcher does not batch"


if __name__ == "__main__":
    main()
