"""What became of a trace's requests, counted one way for the simulator and for the live system.

An *outcome frame* has one row per request that was offered, with the columns

=============  ========================================================================================
service        name of the service
outcome        one of `OUTCOMES`
latency_s      answer minus **scheduled** arrival, seconds; NaN where there was no answer
batch_size     requests in the batch that served it; NaN where it was not served, or not known
accuracy       accuracy of the variant that served it, in [0, 1]; NaN where it was not served, or not known
group          id of the GPU group that served it; missing where it was not served, or not known
=============  ========================================================================================

A request is *finished* when it was answered, in time (good) or not (late). Percentiles are over finished requests, by
nearest rank: the p-th percentile of n values is the one of rank ceil(p/100 * n). They are given only where the sample
supports them, that is where at least one value lies beyond: the 99th from 100 values on, the 95th from 20, the median
from 2. Where nothing finished there is no mean batch or accuracy, and where nothing was offered there is no attainment:
those fields are None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from plans.errors import Fault, InvalidInput

__all__ = [
    "COLUMNS",
    "OUTCOMES",
    "GroupSummary",
    "LatencySummary",
    "RunSummary",
    "ServiceSummary",
    "nearest_rank",
    "summarise",
    "supported_percentile",
    "supported_rank",
]

OUTCOMES = ("good", "late", "dropped", "failed", "in_flight")
"""Finished in time; finished late; given up by the system; ended in any other error; without an end in the run."""

COLUMNS = ("service", "outcome", "latency_s", "batch_size", "accuracy", "group")
"""Columns that an outcome frame must have; it may have more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencySummary:
    """Percentiles of the latency of finished requests, seconds; None where the sample does not support them."""

    p50: float | None
    p95: float | None
    p99: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSummary:
    """What became of the requests of one service.

    Attributes:
        service: Its name.
        offered: Requests that arrived: ``good + late + dropped + failed + in_flight``.
        good: Finished within the deadline.
        late: Finished after it.
        dropped: Given up by the system, because they could not be met or there was no room.
        failed: Ended with any other error.
        in_flight: Without an end when the run was over.
        latency_s: Percentiles over finished requests.
        mean_batch: Mean size of the batches that served the finished requests: n requests in ``sum(1 / size)`` batches.
        accuracy: Mean accuracy of the variants that served the finished requests.
    """

    service: str
    offered: int
    good: int
    late: int
    dropped: int
    failed: int
    in_flight: int
    latency_s: LatencySummary
    mean_batch: float | None
    accuracy: float | None

    def __post_init__(self) -> None:
        if self.offered != self.good + self.late + self.dropped + self.failed + self.in_flight:
            raise ValueError(f"{self.service}: offered = good + late + dropped + failed + in flight does not hold")

    @property
    def attainment(self) -> float | None:
        """``good / offered``; None where nothing was offered."""
        return self.good / self.offered if self.offered else None


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSummary:
    """Share of the run that a GPU group was busy, in [0, 1]; None where it was not measured."""

    group: str
    utilisation: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """One run of a trace, simulated or real.

    Attributes:
        wall_s: Length of the run, seconds.
        gpu_hours: GPUs held for the run, times its length.
        services: In the order asked for.
        groups: In the order of the utilisations given, else by name.
    """

    wall_s: float
    gpu_hours: float
    services: tuple[ServiceSummary, ...]
    groups: tuple[GroupSummary, ...]

    @property
    def requests(self) -> int:
        """Requests offered, over all services."""
        return sum(service.offered for service in self.services)

    @property
    def good(self) -> int:
        """Requests finished in time, over all services."""
        return sum(service.good for service in self.services)

    @property
    def offered_rps(self) -> float:
        """Requests offered per second."""
        return self.requests / self.wall_s

    @property
    def goodput_rps(self) -> float:
        """Requests finished in time per second."""
        return self.good / self.wall_s

    @property
    def attainment(self) -> float | None:
        """``good / offered`` over all services; None where nothing was offered."""
        return self.good / self.requests if self.requests else None

    def service(self, name: str) -> ServiceSummary:
        """Return the summary of the service called ``name``.

        Raises:
            KeyError: There is none.
        """
        for service in self.services:
            if service.service == name:
                return service
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """Return the shape that ``evaluate --json`` and ``load --json`` print."""
        return {
            "requests": self.requests,
            "wall_s": self.wall_s,
            "offered_rps": self.offered_rps,
            "goodput_rps": self.goodput_rps,
            "attainment": self.attainment,
            "gpu_hours": self.gpu_hours,
            "services": [_service_json(service) for service in self.services],
            "groups": [{"group": group.group, "utilisation": group.utilisation} for group in self.groups],
        }


def summarise(
    requests: pd.DataFrame,
    *,
    wall_s: float,
    gpus: int,
    services: Sequence[str],
    utilisation: Mapping[str, float] | None = None,
) -> RunSummary:
    """Count an outcome frame.

    Args:
        requests: One row per request offered, with the columns that the module's docstring lists.
        wall_s: Length of the run, seconds, above 0.
        gpus: GPUs that the run held, for ``gpu_hours``.
        services: Services to report, in this order; one without a request gets a row of zeros.
        utilisation: Busy share of each GPU group. Without it, the groups of the frame are listed, unmeasured.

    Raises:
        InvalidInput: A column is missing, an outcome or a service is unknown, a finished request has no latency, or
            ``wall_s`` is not above 0. All faults at once.
    """
    _check(requests, wall_s, services)
    parts = {str(name): part for name, part in requests.groupby("service", sort=False, observed=True)}
    empty = requests.iloc[:0]
    return RunSummary(
        wall_s=float(wall_s),
        gpu_hours=gpus * wall_s / 3600,
        services=tuple(_summarise_service(name, parts.get(name, empty)) for name in services),
        groups=_groups(requests, utilisation),
    )


def nearest_rank(sorted_values: NDArray[np.float64], percent: float) -> float | None:
    """Return the ``percent``-th percentile by nearest rank; None when there are no values.

    Args:
        sorted_values: Shape (value,), rising.
        percent: In (0, 100].
    """
    return float(sorted_values[_rank(len(sorted_values), percent) - 1]) if len(sorted_values) else None


def supported_rank(count: int, percent: float) -> int | None:
    """Return the rank, from 1, of the ``percent``-th percentile of ``count`` values; None when none lies beyond it."""
    rank = _rank(count, percent)
    return rank if rank < count else None


def supported_percentile(sorted_values: NDArray[np.float64], percent: float) -> float | None:
    """Return the ``percent``-th percentile by nearest rank; None when no value lies beyond it.

    Args:
        sorted_values: Shape (value,), rising.
        percent: In (0, 100].
    """
    rank = supported_rank(len(sorted_values), percent)
    return None if rank is None else float(sorted_values[rank - 1])


def _rank(count: int, percent: float) -> int:
    # The tolerance keeps 95 % of 20 at rank 19: the product may come out as 19.000000000000004.
    return max(1, math.ceil(percent * count / 100 - 1e-9))


def _check(requests: pd.DataFrame, wall_s: float, services: Sequence[str]) -> None:
    faults = [
        Fault(where="outcomes", field=column, found="no such column", expected=f"the columns {', '.join(COLUMNS)}")
        for column in COLUMNS
        if column not in requests.columns
    ]
    if not (math.isfinite(wall_s) and wall_s > 0):
        faults.append(Fault(where="outcomes", field="wall_s", found=str(wall_s), expected="a length above 0 s"))
    if faults:
        raise InvalidInput(faults)
    for column, known in (("outcome", OUTCOMES), ("service", tuple(services))):
        faults += [
            Fault(where="outcomes", field=column, found=repr(found), expected=f"one of {', '.join(known)}")
            for found in requests[column].unique()
            if found not in known
        ]
    finished = requests["outcome"].isin(["good", "late"])
    unknown = int((finished & requests["latency_s"].isna()).sum())
    if unknown:
        found = f"none for {unknown} finished requests"
        faults.append(Fault(where="outcomes", field="latency_s", found=found, expected="a latency for each"))
    if faults:
        raise InvalidInput(faults)


def _summarise_service(name: str, rows: pd.DataFrame) -> ServiceSummary:
    counts = rows["outcome"].value_counts()
    finished = rows[rows["outcome"].isin(["good", "late"])]
    latency_s = np.sort(finished["latency_s"].to_numpy(dtype=np.float64))
    batch_size = finished["batch_size"].dropna().to_numpy(dtype=np.float64)
    accuracy = finished["accuracy"].dropna().to_numpy(dtype=np.float64)
    return ServiceSummary(
        service=name,
        offered=len(rows),
        latency_s=LatencySummary(
            p50=supported_percentile(latency_s, 50),
            p95=supported_percentile(latency_s, 95),
            p99=supported_percentile(latency_s, 99),
        ),
        mean_batch=len(batch_size) / float(np.sum(1 / batch_size)) if len(batch_size) else None,
        accuracy=float(accuracy.mean()) if len(accuracy) else None,
        **{outcome: int(counts.get(outcome, 0)) for outcome in OUTCOMES},
    )


def _groups(requests: pd.DataFrame, utilisation: Mapping[str, float] | None) -> tuple[GroupSummary, ...]:
    if utilisation is not None:
        return tuple(GroupSummary(group=group, utilisation=float(busy)) for group, busy in utilisation.items())
    seen = sorted(str(group) for group in requests["group"].dropna().unique())
    return tuple(GroupSummary(group=group, utilisation=None) for group in seen)


def _service_json(service: ServiceSummary) -> dict[str, Any]:
    return {
        "service": service.service,
        "offered": service.offered,
        "good": service.good,
        "late": service.late,
        "dropped": service.dropped,
        "failed": service.failed,
        "in_flight": service.in_flight,
        "attainment": service.attainment,
        "latency_s": {"p50": service.latency_s.p50, "p95": service.latency_s.p95, "p99": service.latency_s.p99},
        "mean_batch": service.mean_batch,
        "accuracy": service.accuracy,
    }
