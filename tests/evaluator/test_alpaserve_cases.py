"""The single pass against AlpaServe's own simulator on its two cases."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from evaluator.single_pass import Hosts, SinglePassTrace, count_good

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "alpaserve_cases"
CASES = ("hom_small_8g16m", "bursty_tight_16g24m")

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"AlpaServe's cases are not here: {FOLDER}")


def hosts_of(placement, models, profiles):
    """AlpaServe's placement as arrays, with the latencies and deadlines that the cases' README states."""
    stages = max(group["pp"] for group in placement)
    rows = [[g for g, group in enumerate(placement) if s in group["models"]] for s in range(len(models))]
    shape = (len(models), max(1, *map(len, rows)))
    group_of, option = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32)
    stage_s = []
    for s, row in enumerate(rows):
        for position, g in enumerate(row):
            tp, pp = placement[g]["op"], placement[g]["pp"]
            (config,) = [
                each for each in profiles[models[s]["type"]]["configs"] if (each["op"], each["pp"]) == (tp, pp)
            ]
            group_of[s, position], option[s, position] = g, len(stage_s)
            latencies = np.array(config["latency_s"]["1"]) * (1 + 0.009 * pp)
            stage_s.append(np.pad(latencies, (0, stages - pp)))
    return Hosts(
        count=np.array([len(row) for row in rows], dtype=np.int32),
        group=group_of,
        option=option,
        weight=np.ones(shape),
        stage_s=np.array(stage_s),
        deadline_s=np.array([model["slo_s"] for model in models]),
        groups=len(placement),
    )


@pytest.mark.parametrize("name", CASES)
def test_every_listed_placement_reaches_the_listed_goodput(name):
    """Within 0.5 points; it is equal to the printed digits."""
    case = json.loads((FOLDER / name / "case.json").read_text())
    profiles = json.loads((FOLDER / "profiles.json").read_text())["models"]
    placements = json.loads((FOLDER / name / "placements.json").read_text())
    assert placements
    for part in ("train", "test"):
        with np.load(FOLDER / name / f"{part}.npz") as data:
            trace = SinglePassTrace.whole(data["arrivals"], data["model_ids"])
        for placed in placements:
            hosts = hosts_of(placed["placement"], case["models"], profiles)
            good = count_good(hosts, trace, routing="earliest-free", margin_s=0.011).sum() / len(trace.arrival_s)
            assert good == pytest.approx(placed[f"{part}_goodput"], abs=0.005), (placed["policy"], part)
