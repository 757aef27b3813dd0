"""Does a workflow end in time as often as the simulator says? End to end, on two agents, the same arrivals in both.

First models that take a stated time and no processor, and long enough that the way between processes counts little: a
fork with a fan-out of 1.6 and a join, over two nodes, at a third and at two thirds of what it carries, in bursts, and
overloaded. Then real models by the commands of the README: two small models are profiled on this machine,
`foreplan plan` places the first stage (an image classifier) on one node and the second (a text model, 1.6 calls per
image in the mean) on the other, `foreplan load` replays a bursty trace and `foreplan evaluate` simulates it.

Nothing is calibrated: the simulator is told neither of the way between agents nor of what a batch costs beside its
model. Overload is printed and not held against a limit: requests then reach every stage at the last moment, so that
milliseconds which are not simulated decide. Run it on an otherwise idle machine: real models use all cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop
import yaml
from executor_site import about, placed, running_site

from evaluator import GATEWAY_ROUTING, Settings, evaluate
from executor.load import replay
from foreplan.demo.processes import ChildProcesses
from foreplan.measure import Device, measure
from foreplan.ports import free_ports
from plans import Services, write_text
from plans.documents import write_document
from profiles.library import ProfileLibrary
from profiles.profiler import StopRule
from traces.synthesis import Gamma, Poisson, synthesise

FIRST, SECOND, FANOUT = "mobilenet-v2-0.5", "bert-small-16", 1.6
LOADS, SECONDS, CV = (0.3, 0.6), 30.0, 1.5
"""Share of its device that the busier stage takes at batch 1; length of each trace; burstiness of its arrivals."""
MOST_POINTS = 5.0

TIMED = {
    "a/0": {"detect": "timed-100-10-4"},
    "a/1": {"tag": "timed-150-10-4"},
    "b/0": {"read": "timed-50-10-4"},
    "b/1": {"report": "timed-25-5-4"},
}
TIMED_DEADLINE_S = 0.9
RUNS = {
    "steady": Poisson(rate_rps=12),
    "bursty": Gamma(rate_rps=12, cv=3),
    "busy": Poisson(rate_rps=24),
    "overload": Poisson(rate_rps=60),
}


def main() -> None:
    """Measure, print, and hold the differences against `MOST_POINTS`."""
    print(about(), flush=True)
    timed, real = _timed(), _real()
    print(f"largest difference: {timed:.1f} points with timed models, {real:.1f} with real ones")
    assert max(timed, real) <= MOST_POINTS, "simulation and measurement differ by more"


def _timed() -> float:
    """Serve and simulate the runs of timed models; print, and return the largest difference in points."""
    edges = [
        {"from": "detect", "to": "read", "fanout": FANOUT},
        {"from": "detect", "to": "tag"},
        {"from": "read", "to": "report"},
        {"from": "tag", "to": "report"},
    ]
    stages = [(service, variant) for on in TIMED.values() for service, variant in on.items()]
    services = Services.model_validate(
        {
            "services": [
                {"name": name, "slo": {"deadline": TIMED_DEADLINE_S}, "variants": [{"model": variant}]}
                for name, variant in stages
            ],
            "workflows": [{"name": "plates", "slo": {"deadline": TIMED_DEADLINE_S}, "edges": edges}],
        }
    )
    plan = placed(TIMED, deadline_s=TIMED_DEADLINE_S).model_copy(update={"workflows": services.workflows})
    worst = 0.0
    with running_site(("a", "b"), devices=2) as site:
        site.apply(plan)
        for name, load in RUNS.items():
            trace = synthesise({"plates": load}, duration_s=SECONDS, seed=11)
            measured = uvloop.run(replay(trace, site.gateway, services)).summary
            simulated = evaluate(plan, services, trace, settings=Settings(routing=GATEWAY_ROUTING)).summary
            pair = [run.to_json()["services"][-1] for run in (measured, simulated)]
            points = _told(name, *pair)
            worst = worst if name == "overload" else max(worst, points)
    return worst


def _told(name: str, one: Any, other: Any) -> float:
    """Print what was measured and simulated of a run; return the difference in points of attainment."""
    for found in (one, other):
        assert found["offered"] == found["good"] + found["late"] + found["dropped"] + found["failed"] > 0
    assert one["offered"] == other["offered"]
    assert one["failed"] == 0, one
    points = 100 * (one["attainment"] - other["attainment"])
    tails = [" and ".join(f"{1e3 * (f['latency_s'][at] or 0):.0f}" for f in (one, other)) for at in ("p50", "p99")]
    print(
        f"{name}: {one['offered']} requests; attainment measured {one['attainment']:.1%} ({one['late']} late, "
        f"{one['dropped']} dropped), simulated {other['attainment']:.1%} ({points:+.1f} points); "
        f"p50 {tails[0]} ms, p99 {tails[1]} ms",
        flush=True,
    )
    return abs(points)


def _real() -> float:
    """Plan, apply, replay and simulate with real models; print, and return the largest difference in points."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone_s = _profiled(folder)
        gateway = _documents(folder, alone_s)
        worst = 0.0
        with ChildProcesses(folder / "logs") as processes:
            for node in ("node-a", "node-b"):
                where = ["--cluster", str(folder / "cluster.yaml"), "--node", node]
                processes.start(node, ["agent", *where, "--state-dir", str(folder / node)])
            processes.start("gateway", ["gateway", "--listen", gateway, "--state-dir", str(folder / "gateway")])
            for number, load in enumerate(LOADS):
                worst = max(worst, _compared(folder, gateway, alone_s, load, number))
    return worst


def _profiled(folder: Path) -> tuple[float, float]:
    """Profile both models into ``folder``; return what a batch of one takes, seconds."""
    made = list(measure([FIRST, SECOND], Device(gpu_type="cpu"), (1, 2, 4, 8), StopRule(), progress=lambda _: None))
    (folder / "profiles").mkdir()
    for profile in made:
        write_document(folder / "profiles" / f"{profile.model}.cpu.json", profile)
    known = ProfileLibrary(made)
    first, second = (known.latency(model, "cpu", 1, 1) for model in (FIRST, SECOND))
    assert first is not None
    assert second is not None
    return first.at(1).mean_s, second.at(1).mean_s


def _documents(folder: Path, alone_s: tuple[float, float]) -> str:
    """Write cluster and services; return the gateway's address."""
    *ports, gateway_port = free_ports(3)
    cluster = {
        "gpu_types": {"cpu": {"memory": "2GiB", "cost_per_hour": 0.05}},
        "nodes": [
            {"name": name, "address": f"127.0.0.1:{port}", "gpus": {"type": "cpu", "count": 1}}
            for name, port in zip(("node-a", "node-b"), ports, strict=True)
        ],
    }
    deadline_s = round(3 * (alone_s[0] + 2 * alone_s[1]), 3)
    services = {
        "services": [
            {"name": name, "slo": {"deadline": deadline_s}, "variants": [{"model": model}], "pin": [node]}
            for name, model, node in (("spot", FIRST, "node-a"), ("describe", SECOND, "node-b"))
        ],
        "workflows": [
            {
                "name": "spot-and-describe",
                "slo": {"deadline": deadline_s, "attainment": 0.95},
                "affinity": "none",
                "edges": [{"from": "spot", "to": "describe", "fanout": FANOUT, "bytes": "1KB"}],
            }
        ],
    }
    write_text(folder / "cluster.yaml", yaml.safe_dump(cluster))
    write_text(folder / "services.yaml", yaml.safe_dump(services))
    print(f"batches of one: {alone_s[0] * 1e3:.1f} and {alone_s[1] * 1e3:.1f} ms; deadline {deadline_s * 1e3:.0f} ms")
    return f"127.0.0.1:{gateway_port}"


def _compared(folder: Path, gateway: str, alone_s: tuple[float, float], load: float, number: int) -> float:
    """Plan for ``load``, apply, replay and simulate; print, and return the difference in points."""
    rate_rps = load / max(alone_s[0], FANOUT * alone_s[1])
    plan, trace = folder / f"plan-{number}.json", folder / f"trace-{number}.parquet"
    services, cluster = ["--services", str(folder / "services.yaml")], ["--cluster", str(folder / "cluster.yaml")]
    told = ["--service", f"spot-and-describe={rate_rps:.3f}", "--duration", str(SECONDS), "--cv", str(CV)]
    _foreplan(["trace", "synth", *told, "--process", "gamma", "-o", str(trace), "--seed", str(number + 1)])
    current = [] if number == 0 else ["--current", str(folder / f"plan-{number - 1}.json")]
    inputs = [*cluster, *services, "--profiles", str(folder / "profiles"), "--trace", str(trace), "--window", "10"]
    _foreplan(["plan", *inputs, *current, "-o", str(plan)])
    _foreplan(["apply", str(plan), *cluster, "--gateway", gateway, "--store", str(folder / "plans")])
    measured = _foreplan(["load", "--trace", str(trace), *services, "--gateway", gateway])
    simulated = _foreplan(["evaluate", str(plan), *services, *cluster, "--trace", str(trace)])
    (one,) = [found for found in measured["services"] if found["service"] == "spot-and-describe"]
    (other,) = [found for found in simulated["services"] if found["service"] == "spot-and-describe"]
    return _told(f"load {load:.0%} ({rate_rps:.1f} rps)", one, other)


def _foreplan(arguments: Sequence[str]) -> Any:
    """Run ``foreplan ARGUMENTS --json``; return what it prints."""
    command = [sys.executable, "-P", "-m", "foreplan", *arguments, "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"foreplan {arguments[0]}: {ended.stderr}"
    return json.loads(ended.stdout)


if __name__ == "__main__":
    main()
