"""How far simulation and measurement are apart in the demo: attainment per service, average of three runs.

Runs ``foreplan demo --json`` three times and prints, per service, the attainment predicted, simulated and measured in
each run, and the mean of measured minus simulated. Run it on an otherwise idle machine: the demo uses all cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

from foreplan.measure import processor_name

RUNS = 3


def main() -> None:
    """Run, print, and hold the result against five percentage points."""
    rows = []
    for run in range(RUNS):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            command = [sys.executable, "-m", "foreplan", "demo", "--json", "-o", name, "--seed", str(run + 1)]
            result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            logs = {label: pd.read_parquet(folder / f"{label}.parquet") for label in ("simulated", "measured")}
        assert (logs["simulated"]["service"].to_numpy() == logs["measured"]["service"].to_numpy()).all()
        for one in result["services"]:
            counted = {
                label: (log[log["service"] == one["service"]]["outcome"] == "good").mean()
                for label, log in logs.items()
            }
            assert abs(counted["measured"] - one["attainment"]["measured"]) < 1e-9
            medians = {
                f"{label} p50 (ms)": 1000 * log[log["service"] == one["service"]]["latency_s"].median()
                for label, log in logs.items()
            }
            shares = {label: 100 * share for label, share in one["attainment"].items()}
            rows.append(
                {"run": run + 1, "service": one["service"], **shares, **medians, "mean batch": one["mean_batch"]}
            )
        print(f"run {run + 1}: {result['wall_s']:.0f} s", flush=True)
    table = pd.DataFrame(rows)
    table["measured - simulated"] = table["measured"] - table["simulated"]
    print(f"machine: {processor_name()}")
    print(table.round(1).to_string(index=False))
    apart = table.groupby("service")["measured - simulated"].mean()
    print("mean of measured - simulated, percentage points:")
    print(apart.round(2).to_string())
    assert apart.abs().max() <= 5, "simulation and measurement differ by more than 5 points"


if __name__ == "__main__":
    main()
