"""What a report is about. Every part but the plan may be missing; the page leaves out what is not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from plans.cluster import Cluster
from plans.demand import Demand
from plans.plan import Plan
from plans.service import Services
from profiles.library import ProfileLibrary
from traces.outcomes import RunSummary, ServiceSummary
from traces.rates import RateTrace

__all__ = ["Content", "Run", "Timeline", "timeline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a trace: its summary, and one row per request with ``scheduled_s``, ``service`` and ``outcome``."""

    summary: RunSummary
    requests: pd.DataFrame

    def find(self, name: str) -> ServiceSummary | None:
        """Return what became of the service or workflow ``name``, None where the run knows of none."""
        return next((each for each in self.summary.services if each.service == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """All that the page shows.

    Attributes:
        title: Heading.
        facts: Short facts under the heading: machine, trace, durations.
        plan: The plan.
        cluster: Its inventory.
        services: Its services.
        profiles: What it was made from.
        demand: The forecast that it was made from.
        history: Observed rates before the forecast's windows.
        actual: Observed rates in the forecast's windows.
        runs: Runs by label, such as ``simulated`` and ``measured``.
        remarks: Sentences to be read with the figures, such as that cores are oversubscribed.
    """

    title: str
    plan: Plan
    cluster: Cluster
    facts: Mapping[str, str] = field(default_factory=dict)
    services: Services | None = None
    profiles: ProfileLibrary | None = None
    demand: Demand | None = None
    history: RateTrace | None = None
    actual: RateTrace | None = None
    runs: Mapping[str, Run] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """Return the services that the plan predicts, then what else the runs served, such as workflows."""
        served = [each.service for run in self.runs.values() for each in run.summary.services if each.offered]
        return list(dict.fromkeys([*(each.service for each in self.plan.predicted), *served]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Requests per second by the time they were scheduled, in bins; all of shape (bin,)."""

    start_s: NDArray[np.float64]
    offered_rps: NDArray[np.float64]
    good_rps: NDArray[np.float64]


def timeline(requests: pd.DataFrame, *, bin_s: float, end_s: float) -> Timeline:
    """Count requests and good requests per bin of ``bin_s`` from 0 to ``end_s``."""
    edges = np.arange(0.0, max(end_s, bin_s) + bin_s, bin_s)
    scheduled_s = requests["scheduled_s"].to_numpy(dtype=np.float64)
    good = (requests["outcome"] == "good").to_numpy()
    return Timeline(
        start_s=edges[:-1],
        offered_rps=np.histogram(scheduled_s, edges)[0] / bin_s,
        good_rps=np.histogram(scheduled_s[good], edges)[0] / bin_s,
    )
