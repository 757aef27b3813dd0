"""A controller that kills itself at a given point of an apply: ``python -m tests.executor.controller_process``."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

from executor.controller import LeaseTiming, ProgressEvent, apply
from plans.cluster import Cluster
from plans.codec import read_plan
from plans.documents import read_document, write_document, write_text
from plans.plan import Plan, Prior
from tests.executor.peer_process import ROOT, PeerProcess


def doomed_apply(
    folder: Path,
    plan: Plan,
    digest: str,
    agents: list[PeerProcess],
    gateway: PeerProcess,
    at: tuple[str, str],
    count: int = 1,
) -> int:
    """Run a controller that dies at the ``count``-th event of the step and outcome ``at``; return its exit status."""
    write_document(folder / "plan.json", plan)
    nodes = "\n".join(
        f'  - {{name: {agent.node}, address: "{agent.address}", gpus: {{type: cpu, count: 2}}}}' for agent in agents
    )
    write_text(folder / "cluster.yaml", f"gpu_types:\n  cpu: {{memory: 1GiB}}\nnodes:\n{nodes}\n")
    where = [
        "--plan",
        str(folder / "plan.json"),
        "--cluster",
        str(folder / "cluster.yaml"),
        "--gateway",
        gateway.address,
    ]
    how = ["--step", at[0], "--outcome", at[1], "--digest", digest, "--count", str(count)]
    command = [sys.executable, "-m", "tests.executor.controller_process", *where, *how]
    return subprocess.run(command, cwd=ROOT, check=False, timeout=180, capture_output=True).returncode


def main() -> None:
    """Apply a plan, and die at the ``--count``-th ``--step`` with ``--outcome`` on any peer."""
    parser = argparse.ArgumentParser()
    for name in ("plan", "cluster"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("gateway", "step", "outcome", "digest"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--count", type=int, default=1)
    chosen = parser.parse_args()
    events: list[ProgressEvent] = []

    def progress(event: ProgressEvent) -> None:
        if (event.step, event.outcome) == (chosen.step, chosen.outcome):
            events.append(event)
            if len(events) == chosen.count:
                os.kill(os.getpid(), signal.SIGKILL)

    cluster = read_document(chosen.cluster, Cluster)
    prior = Prior(generation=1, digest=chosen.digest)
    lease = LeaseTiming(ttl_s=0.3)
    asyncio.run(apply(read_plan(chosen.plan), cluster, [chosen.gateway], prior=prior, progress=progress, lease=lease))


if __name__ == "__main__":
    main()
