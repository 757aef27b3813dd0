"""How far simulation and measurement are apart where tokens are generated: llama-tiny on one CPU device.

    python benchmarks/generation_agreement.py [--rate 4] [--requests 120] [--threads 1]

The whole path, by the commands that a user has: profile prefill and decode, plan, start an agent and a gateway, apply,
replay a trace of prompts and answers of mixed lengths, and evaluate the same plan on the same trace. Prints attainment,
TTFT, TPOT and latency of both. What client, gateway and agent add to a first token, and agent and worker to every
iteration, is measured before, on requests that come alone, and put into the simulation, as for whole requests. A CPU
that others use makes profile and run differ, so run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from foreplan.demo.processes import ChildProcesses
from foreplan.measure import processor_name
from foreplan.ports import free_ports

SERVICES = {
    "services": [
        {
            "name": "chat",
            "class": "generation",
            "slo": {"ttft": "250ms", "tpot": "30ms", "attainment": 0.9},
            "variants": [{"model": "llama-tiny"}],
        }
    ]
}
ALONE_TOKENS, ALONE_ANSWER = 64, 32
GRID = ("--batches", "1,2,4,8,16", "--prompt-tokens", "16,64,256", "--context-tokens", "32,128,256")


def main() -> None:
    """Run both, hold their counts against each other, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second")
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    agent_port, gateway_port = free_ports(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cluster = {
            "gpu_types": {"cpu": {"memory": "2GiB"}},
            "nodes": [{"name": "node-a", "address": f"127.0.0.1:{agent_port}", "gpus": {"type": "cpu", "count": 1}}],
        }
        (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster))
        (folder / "services.yaml").write_text(yaml.safe_dump(SERVICES))
        _trace(chosen.rate, chosen.requests).to_parquet(folder / "trace.parquet")
        threads = ("--threads", str(chosen.threads))
        _foreplan(folder, "profile", "run", "llama-tiny", "-o", "profiles", *GRID, *threads)
        inputs = ("--cluster", "cluster.yaml", "--services", "services.yaml", "--profiles", "profiles")
        _foreplan(folder, "plan", *inputs, "--trace", "trace.parquet", "-o", "plan.json", "--polish", "0")
        gateway = f"127.0.0.1:{gateway_port}"
        with ChildProcesses(folder / "logs") as children:
            agent = ["agent", "--cluster", str(folder / "cluster.yaml"), "--node", "node-a", *threads]
            children.start("agent", [*agent, "--state-dir", str(folder / "agent")])
            children.start("gateway", ["gateway", "--listen", gateway, "--state-dir", str(folder / "gateway")])
            _foreplan(folder, "apply", "plan.json", "--cluster", "cluster.yaml", "--gateway", gateway)
            _replayed(folder, gateway, _alone(), "alone")
            overhead_s, iteration_s = _overheads_s(folder)
            live = _replayed(folder, gateway, _trace(chosen.rate, chosen.requests), "measured")
        added = ("--overhead", str(overhead_s), "--iteration-overhead", str(iteration_s))
        evaluated = ("--trace", "trace.parquet", "--requests", "simulated.parquet", *added)
        simulated = _foreplan(folder, "evaluate", "plan.json", *inputs, *evaluated)
        print(f"added to a first token: {1000 * overhead_s:.1f} ms; to every iteration: {1000 * iteration_s:.2f} ms")
        _print(folder, {"measured": live, "simulated": simulated})


def _trace(rate_rps: float, count: int) -> pd.DataFrame:
    """Poisson arrivals; prompts of 16 to 199 tokens and answers of 8 to 63, both uniform."""
    generator = np.random.default_rng(3)
    return pd.DataFrame(
        {
            "arrival_s": np.cumsum(generator.exponential(1 / rate_rps, count)),
            "service": "chat",
            "input_tokens": generator.integers(16, 200, count),
            "output_tokens": generator.integers(8, 64, count),
        }
    )


def _alone() -> pd.DataFrame:
    """Requests that meet no other: prompts of a length that is in the profile, after pauses as the trace has."""
    fields = {"service": "chat", "input_tokens": ALONE_TOKENS, "output_tokens": ALONE_ANSWER}
    return pd.DataFrame({"arrival_s": np.arange(30) * 0.25, **fields})


def _replayed(folder: Path, gateway: str, trace: pd.DataFrame, label: str) -> Any:
    """Replay ``trace``; the requests then are in ``<label>.parquet``."""
    trace.to_parquet(folder / f"{label}-trace.parquet")
    where = ("--trace", f"{label}-trace.parquet", "--requests", f"{label}.parquet")
    return _foreplan(folder, "load", "--gateway", gateway, "--services", "services.yaml", *where)


def _overheads_s(folder: Path) -> tuple[float, float]:
    """Return by how much longer than profiled the requests alone took: to the first token, and each iteration."""
    (profile,) = (json.loads(path.read_text()) for path in (folder / "profiles").glob("*.json"))
    means_s = {
        phase: {
            row["input_tokens"]: row["latency_s"]["mean"]
            for row in profile["rows"]
            if (row["phase"], row["batch"]) == (phase, 1)
        }
        for phase in ("prefill", "decode")
    }
    decode_s = np.interp(ALONE_TOKENS + ALONE_ANSWER / 2, list(means_s["decode"]), list(means_s["decode"].values()))
    alone = pd.read_parquet(folder / "alone.parquet")
    iteration_s = max(0.0, float(alone["tpot_s"].median() - decode_s))
    first_s = float(alone["ttft_s"].median()) - means_s["prefill"][ALONE_TOKENS]
    return max(0.0, first_s - iteration_s), iteration_s


def _foreplan(folder: Path, *arguments: str) -> Any:
    command = [sys.executable, "-m", "foreplan", *arguments, "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _print(folder: Path, results: dict[str, Any]) -> None:
    rows = []
    for label, result in results.items():
        log = pd.read_parquet(folder / f"{label}.parquet")
        (service,) = result["services"]
        assert service["offered"] == len(log)
        assert service["failed"] == 0
        row = {"": label, "attainment (%)": 100 * result["attainment"], "dropped": service["dropped"]}
        for column in ("ttft_s", "tpot_s", "latency_s"):
            times_ms = 1000 * log[column].dropna()
            row |= {f"{column[:-2]} p50 (ms)": times_ms.median(), f"p90 {column[:-2]}": times_ms.quantile(0.9)}
        row["busy (%)"] = 100 * result["groups"][0]["utilisation"]
        rows.append(row)
    print(f"{processor_name()}, {datetime.now(UTC):%Y-%m-%d}")
    print(pd.DataFrame(rows).round(1).to_string(index=False))


if __name__ == "__main__":
    main()
