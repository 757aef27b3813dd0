"""AlpaServe's cases in ../shared/data/alpaserve_cases as Foreplan's documents, converted in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from plans.cluster import Cluster, GpuType, Node, NodeGpus
from plans.service import LatencyService, LatencySlo, Services, Variant
from profiles.document import LatencyStatistics, Profile, ProfileMeta, Row
from profiles.library import ProfileLibrary
from traces.table import RequestTrace

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data" / "alpaserve_cases"
CASES = ("hom_small_8g16m", "bursty_tight_16g24m")
GPU_TYPE = "v100-16gb"
OVERHEAD_S = 0.011
"""Fixed overhead of AlpaServe's simulator: taken off the deadline."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case as documents, with its arrivals to plan from and to score on."""

    cluster: Cluster
    services: Services
    profiles: ProfileLibrary
    train: RequestTrace
    test: RequestTrace


def read_case(name: str, folder: Path = FOLDER) -> Case:
    """Return a case by its name."""
    case = json.loads((folder / name / "case.json").read_text())
    profiles = json.loads((folder / "profiles.json").read_text())["models"]
    arrivals = {}
    for part in ("train", "test"):
        with np.load(folder / name / f"{part}.npz") as data:
            arrivals[part] = trace_of(case["models"], data["arrivals"], data["model_ids"])
    return Case(
        cluster=cluster_of(case["cluster"]),
        services=services_of(case["models"]),
        profiles=profiles_of(profiles, sorted({model["type"] for model in case["models"]})),
        **arrivals,
    )


def cluster_of(given: dict[str, Any]) -> Cluster:
    """Return the inventory: nodes of ``num_devices_per_node`` GPUs with the usable memory."""
    size = given["num_devices_per_node"]
    counts = [min(size, given["num_devices"] - first) for first in range(0, given["num_devices"], size)]
    return Cluster(
        gpu_types={GPU_TYPE: GpuType(memory_bytes=given["mem_budget_bytes"])},
        nodes=tuple(
            Node(name=f"node-{position}", gpus=NodeGpus(type=GPU_TYPE, count=count))
            for position, count in enumerate(counts)
        ),
    )


def services_of(models: list[dict[str, Any]]) -> Services:
    """Return one service per model, its deadline less the fixed overhead."""
    return Services(
        services=tuple(
            LatencyService(
                name=model["name"],
                slo=LatencySlo(deadline_s=model["slo_s"] - OVERHEAD_S),
                variants=(Variant(model=model["type"]),),
            )
            for model in models
        )
    )


def profiles_of(given: dict[str, Any], types: list[str]) -> ProfileLibrary:
    """Return the profiles of the model types: batch 1 alone, stage latencies times (1 + 0.009 pp)."""
    documents = []
    for name in types:
        rows = []
        for config in given[name]["configs"]:
            stages = [latency * (1 + 0.009 * config["pp"]) for latency in config["latency_s"]["1"]]
            total = sum(stages)
            rows.append(
                Row(
                    tp=config["op"],
                    pp=config["pp"],
                    batch=1,
                    latency_s=LatencyStatistics(mean=total, p50=total, p95=total, p99=total),
                    stage_latency_s=tuple(stages),
                    weight_bytes=tuple(config["weight_mem_bytes"]),
                    peak_bytes=tuple(config["weight_mem_bytes"]),
                    load_s=1.0,
                    samples=100,
                )
            )
        documents.append(
            Profile(model=name, gpu_type=GPU_TYPE, source="imported", meta=ProfileMeta(), rows=tuple(rows))
        )
    return ProfileLibrary(documents)


def trace_of(models: list[dict[str, Any]], arrival_s: Any, model_ids: Any) -> RequestTrace:
    """Return the requests, named by service."""
    names = np.array([model["name"] for model in models], dtype=object)
    order = np.argsort(arrival_s, kind="stable")
    return RequestTrace(pd.DataFrame({"arrival_s": arrival_s[order], "service": names[model_ids[order]].astype(str)}))
