"""100 random kills (-9) of workers, agents, one of two gateway processes, and controllers in an apply, under load.

Says how the requests ended and how long it took until everything was as the plan says again; at most ten minutes.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the chaos of the tests

from executor_site import about

from tests.executor.chaos import run_chaos

KILLS = int(sys.argv[1]) if len(sys.argv) > 1 else 100


def main() -> None:
    """Kill, count and print."""
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        chaos = run_chaos(Path(folder), KILLS, seed=int(sys.argv[2]) if len(sys.argv) > 2 else 2)
    done = sum(map(len, chaos.recovery_s.values()))
    assert set(chaos.statuses) <= {"OK", "UNAVAILABLE"}, chaos.statuses
    assert chaos.unanswered == 0
    print(about())
    print(f"{done} kills in {time.monotonic() - start_s:.0f} s; {chaos.requests} requests: {dict(chaos.statuses)}")
    for kind, times in sorted(chaos.recovery_s.items()):
        middle, longest = statistics.median(times), max(times)
        print(f"{kind}: {len(times)} kills; as planned again after {middle:.2f} s (median), {longest:.2f} s (longest)")


if __name__ == "__main__":
    main()
