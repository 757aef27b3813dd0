"""A controller that kills itself at a given point of an apply: ``python -m tests.executor.controller_process``."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from pathlib import Path

from executor.controller import LeaseTiming, ProgressEvent, apply
from plans.cluster import Cluster
from plans.codec import read_plan
from plans.documents import read_document
from plans.plan import Prior


def main() -> None:
    """Apply a plan, and die at ``--step`` with ``--outcome`` on any peer."""
    parser = argparse.ArgumentParser()
    for name in ("plan", "cluster"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("gateway", "step", "outcome", "digest"):
        parser.add_argument(f"--{name}", required=True)
    chosen = parser.parse_args()

    def progress(event: ProgressEvent) -> None:
        if (event.step, event.outcome) == (chosen.step, chosen.outcome):
            os.kill(os.getpid(), signal.SIGKILL)

    cluster = read_document(chosen.cluster, Cluster)
    prior = Prior(generation=1, digest=chosen.digest)
    lease = LeaseTiming(ttl_s=0.3)
    asyncio.run(apply(read_plan(chosen.plan), cluster, [chosen.gateway], prior=prior, progress=progress, lease=lease))


if __name__ == "__main__":
    main()
