"""The nodes, services and load of the demo, cut to what this machine can carry."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from foreplan.ports import free_ports
from plans.cluster import Cluster
from plans.errors import InvalidInput
from plans.service import Services
from profiles.library import ProfileLibrary
from traces.azure_functions import read_azure_functions
from traces.rates import RateTrace
from traces.synthesis import expand
from traces.table import RequestTrace

__all__ = ["DAY_WINDOWS", "MODELS", "Load", "Machine", "cut_load", "make_cluster", "make_services", "read_history"]

MODELS = ("mobilenet-v2-1.0", "mobilenet-v2-0.5", "segformer-b0", "bert-small-16")
"""What the demo profiles. Bert on short texts gains from batching on a CPU; the image models hardly do."""

_VARIANTS = {
    # Published ImageNet top-1 accuracies of the two widths (Sandler et al., CVPR 2018, table 4 and its repository).
    "classify": (("mobilenet-v2-1.0", 0.72), ("mobilenet-v2-0.5", 0.65)),
    "segment": (("segformer-b0", 1.0),),
    "moderate": (("bert-small-16", 1.0),),
}
_REPLICAS = {"classify": 1, "segment": 1, "moderate": 2}

DAY_WINDOWS = 1440
"""Windows of a day: the trace has one a minute, whatever the speed of its replay."""

SPEED = 10.0
"""The trace is replayed this many times as fast: one of its minutes takes six seconds."""

_NODES = ("node-a", "node-b")
_DEVICE_MEMORY_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """How the cores of this machine are used: one device per core that can be spared, at least one per node."""

    cores: int
    devices_per_node: int

    @classmethod
    def here(cls) -> Machine:
        """Look at the machine. One core is kept for gateway, agents and the load generator."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cls(cores=cores, devices_per_node=max(1, min(4, (cores - 1) // len(_NODES))))

    @property
    def devices(self) -> int:
        """Devices over both nodes."""
        return self.devices_per_node * len(_NODES)

    @property
    def spare_cores(self) -> int:
        """Cores that devices can really have."""
        return max(1, min(self.devices, self.cores - 1))

    @property
    def remark(self) -> str | None:
        """A sentence for the reader when there are more busy processes than cores."""
        if self.devices < self.cores:
            return None
        return (
            f"cores are oversubscribed: {self.devices} devices, a gateway, two agents and the load generator share "
            f"{self.cores} cores, so measured latencies exceed the profiles, which were taken on an idle machine"
        )


def make_cluster(machine: Machine) -> Cluster:
    """Return two nodes with ``cpu`` devices, on free ports of the loopback interface."""
    nodes = [
        {
            "name": name,
            "address": f"127.0.0.1:{port}",
            "gpus": {"type": "cpu", "count": machine.devices_per_node},
        }
        for name, port in zip(_NODES, free_ports(len(_NODES)), strict=True)
    ]
    cpu = {"memory": _DEVICE_MEMORY_BYTES, "cost_per_hour": 0.05}
    return Cluster.model_validate({"gpu_types": {"cpu": cpu}, "nodes": nodes})


def make_services(profiles: ProfileLibrary) -> Services:
    """Return the demo's services with deadlines that this machine can meet: ten times the best model's latency."""
    services = []
    for name, variants in _VARIANTS.items():
        deadline_s = max(0.3, 10 * _latency_s(profiles, variants[0][0]))
        services.append(
            {
                "name": name,
                "class": "latency",
                "slo": {"deadline": round(deadline_s, 3), "attainment": 0.95},
                "variants": [{"model": model, "accuracy": accuracy} for model, accuracy in variants],
                "min_replicas": _REPLICAS[name],
            }
        )
    return Services.model_validate({"services": services})


def services_yaml(services: Services) -> str:
    """Return ``services.yaml`` as a person would write it."""
    written = [
        {
            "name": service.name,
            "class": service.request_class,
            "slo": {"deadline": f"{service.deadline_s() * 1000:g}ms", "attainment": service.slo.attainment},
            "variants": [{"model": v.model, "accuracy": v.accuracy} for v in service.variants],
            "min_replicas": service.min_replicas,
        }
        for service in services.services
    ]
    return str(yaml.safe_dump({"services": written}, sort_keys=False))


def cluster_yaml(cluster: Cluster) -> str:
    """Return ``cluster.yaml`` as a person would write it."""
    types = {
        name: {"memory": f"{kind.memory_bytes // 2**20}MiB", "cost_per_hour": kind.cost_per_hour}
        for name, kind in cluster.gpu_types.items()
    }
    nodes = [
        {"name": node.name, "address": node.address, "gpus": {"type": node.gpus.type, "count": node.gpus.count}}
        for node in cluster.nodes
    ]
    return str(yaml.safe_dump({"gpu_types": types, "nodes": nodes}, sort_keys=False))


def _latency_s(profiles: ProfileLibrary, model: str) -> float:
    known = profiles.latency(model, "cpu", 1, 1)
    if known is None:
        raise InvalidInput.of("a profile on cpu", where="demo", field=model, found="none")
    return known.at(1).mean_s


def read_history(source: Path, *, seed: int) -> RateTrace:
    """Read days in Azure Functions 2019 format as the load of the demo's services, sped up `SPEED` times.

    The busiest functions stand for the services, one each, by the seeded mapping of `traces.azure_functions`. A minute
    of the trace becomes a window of ``60 / SPEED`` seconds with the same count.

    Raises:
        InvalidInput: The files are missing, damaged, or have fewer than three functions.
    """
    rates = read_azure_functions(source, services=list(_VARIANTS), seed=seed).value.rates
    starts_s = np.arange(rates.counts().shape[1]) * (60.0 / SPEED)
    return RateTrace.from_counts(starts_s, rates.services, rates.counts(), window_s=60.0 / SPEED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The demo's load.

    Attributes:
        history: Rates before the replayed windows.
        actual: Rates in them, on the same clock.
        arrivals: The same windows as single requests; time 0 is the first window's start.
        factors: By what each service's counts were scaled for this machine.
    """

    history: RateTrace
    actual: RateTrace
    arrivals: RequestTrace
    factors: dict[str, float]


def cut_load(
    rates: RateTrace, profiles: ProfileLibrary, machine: Machine, *, windows: int, core_share: float, seed: int
) -> Load:
    """Scale ``rates`` to what this machine holds, and cut them into history and the windows to replay.

    The replayed windows start three quarters into the last day (or the trace, when it is shorter). Each service gets
    an equal part of ``core_share`` of the cores that can be spared: its busiest replayed window, and its history's
    95th percentile, keep its most accurate model busy for at most that part at batch 1.

    Raises:
        InvalidInput: The trace is too short.
    """
    counts = rates.counts()
    total = counts.shape[1]
    first = total - min(total, DAY_WINDOWS) + round(0.75 * min(total, DAY_WINDOWS))
    first = min(first, total - windows)
    if first < 2 * windows:
        raise InvalidInput.of(
            f"at least {3 * windows} minutes", where="trace", found=f"{total} minutes", remedy="give it a whole day"
        )
    factors = {}
    for service, row in zip(rates.services, counts, strict=True):
        busy_rps = max(row[first : first + windows].max(), np.percentile(row[:first], 95), 1.0) / rates.window_s
        cost_s = _latency_s(profiles, _VARIANTS[service][0][0])
        allowed_rps = core_share * machine.spare_cores / len(_VARIANTS) / cost_s
        factors[service] = float(allowed_rps / busy_rps)
    scaled = rates.scaled(factors)
    start_s, end_s = rates.start_s + first * rates.window_s, rates.start_s + (first + windows) * rates.window_s
    actual = scaled.window(start_s, end_s, rebase=False)
    arrivals = expand(scaled.window(start_s, end_s), "uniform", seed=seed)
    if not len(arrivals):
        raise InvalidInput.of("requests in the replayed windows", where="trace", found="none")
    return Load(
        history=scaled.window(rates.start_s, start_s, rebase=False), actual=actual, arrivals=arrivals, factors=factors
    )
