"""The single pass on AlpaServe's two cases: every listed placement beside what its own simulator gave, and the speed.

Speed is of the kernel alone, one core, after a first run that compiles it: the best of several passes over the test
arrivals, since other work on the machine only ever slows it.
"""

from __future__ import annotations

import json
import platform
import time
from datetime import UTC, datetime
from statistics import median
from typing import Any

import numpy as np
from alpaserve_case import CASES, FOLDER

from evaluator.single_pass import Hosts, SinglePassTrace, count_good

PASSES = 15
TOLERANCE = 0.005


def hosts_of(placement: list[dict[str, Any]], models: list[dict[str, Any]], profiles: dict[str, Any]) -> Hosts:
    """Return a listed placement as arrays, its stage latencies times (1 + 0.009 pp)."""
    rows = [[g for g, group in enumerate(placement) if s in group["models"]] for s in range(len(models))]
    shape = (len(models), max(1, *map(len, rows)))
    group_of, option = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32)
    most = max(group["pp"] for group in placement)
    stage_s = []
    for s, row in enumerate(rows):
        for position, g in enumerate(row):
            tp, pp = placement[g]["op"], placement[g]["pp"]
            configs = profiles[models[s]["type"]]["configs"]
            config = next(each for each in configs if (each["op"], each["pp"]) == (tp, pp))
            group_of[s, position], option[s, position] = g, len(stage_s)
            stage_s.append(np.pad(np.array(config["latency_s"]["1"]) * (1 + 0.009 * pp), (0, most - pp)))
    return Hosts(
        count=np.array([len(row) for row in rows], dtype=np.int32),
        group=group_of,
        option=option,
        weight=np.ones(shape),
        stage_s=np.array(stage_s),
        deadline_s=np.array([model["slo_s"] - 0.011 for model in models]),
        groups=len(placement),
    )


def main() -> None:
    print(f"{platform.processor() or platform.machine()}, {datetime.now(UTC):%Y-%m-%d}")
    profiles = json.loads((FOLDER / "profiles.json").read_text())["models"]
    speeds = []
    for name in CASES:
        case = json.loads((FOLDER / name / "case.json").read_text())
        with np.load(FOLDER / name / "test.npz") as data:
            trace = SinglePassTrace.whole(data["arrivals"], data["model_ids"])
        for placed in json.loads((FOLDER / name / "placements.json").read_text()):
            hosts = hosts_of(placed["placement"], case["models"], profiles)
            good = int(count_good(hosts, trace, routing="earliest-free").sum()) / len(trace.arrival_s)
            assert abs(good - placed["test_goodput"]) <= TOLERANCE
            walls = []
            for _ in range(PASSES):
                began_s = time.perf_counter()
                count_good(hosts, trace, routing="earliest-free")
                walls.append(time.perf_counter() - began_s)
            speeds.append(len(trace.arrival_s) / min(walls) / 1e6)
            groups = ", ".join(f"{group['op']}x{group['pp']}" for group in placed["placement"])
            print(
                f"{name:20s} {placed['policy']:20s} theirs {placed['test_goodput']:.5f} ours {good:.5f} "
                f"{speeds[-1]:6.1f} million requests a second  ({groups})"
            )
    print(f"median {median(speeds):.1f}, least {min(speeds):.1f} million requests a second")


if __name__ == "__main__":
    main()
