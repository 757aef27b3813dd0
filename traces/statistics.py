"""What a trace is like, per service."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from traces.table import RateTrace, RequestTrace

__all__ = ["ServiceStatistics", "burstiness_cv", "describe", "describe_rates", "dispersion_index"]

_LEAST_GAPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceStatistics:
    """One service of a trace.

    Attributes:
        service: Its name.
        requests: How many requests it gets.
        mean_rps: Requests over the trace's duration; None when that is zero.
        peak_rps: Rate of its busiest window; no less than the mean, as the end of the trace may cut the last window.
        gap_cv: Coefficient of variation of the gaps between its arrivals: 1 for a Poisson process, 0 for an even one,
            larger when they come in bursts. None when there are fewer than 3 requests, when all come at once, and for
            counts, which do not show it.
        dispersion: Index of dispersion of the counts per window, variance over mean: 1 for a Poisson process at any
            window, and larger when the rate itself moves. None without requests or with a single window.
        streams: Number of different streams; None when it has none.
    """

    service: str
    requests: int
    mean_rps: float | None
    peak_rps: float
    gap_cv: float | None
    dispersion: float | None
    streams: int | None


def describe(trace: RequestTrace, *, window_s: float = 60.0) -> tuple[ServiceStatistics, ...]:
    """Return the statistics of every service of a request trace; the counts are over windows of ``window_s``.

    Raises:
        InvalidInput: ``window_s`` is not positive.
    """
    counts = trace.rates(window_s).counts()
    frame = trace.frame
    streams = frame.groupby("service")["stream"].nunique() if "stream" in frame else None
    gap_cv = burstiness_cv(trace)
    return tuple(
        ServiceStatistics(
            service=service,
            requests=int(row.sum()),
            mean_rps=float(row.sum()) / trace.duration_s if trace.duration_s > 0 else None,
            peak_rps=_peak_rps(row, trace.duration_s, window_s),
            gap_cv=gap_cv.get(service),
            dispersion=dispersion_index(row),
            streams=(int(streams[service]) or None) if streams is not None else None,
        )
        for service, row in zip(trace.services, counts, strict=True)
    )


def describe_rates(trace: RateTrace) -> tuple[ServiceStatistics, ...]:
    """Return the statistics of every service of a rate trace; a gap counts zero."""
    return tuple(
        ServiceStatistics(
            service=service,
            requests=int(row.sum()),
            mean_rps=float(row.sum()) / trace.duration_s,
            peak_rps=_peak_rps(row, trace.duration_s, trace.window_s),
            gap_cv=None,
            dispersion=dispersion_index(row),
            streams=None,
        )
        for service, row in zip(trace.services, trace.counts(), strict=True)
    )


def _peak_rps(counts: npt.NDArray[np.generic], duration_s: float, window_s: float) -> float:
    mean_rps = float(counts.sum()) / duration_s if duration_s > 0 else 0.0
    return max(float(counts.max()) / window_s, mean_rps)


def burstiness_cv(trace: RequestTrace) -> dict[str, float]:
    """Return the coefficient of variation of the gaps between arrivals, per service.

    A service with fewer than 3 requests, or whose requests all come at once, shows no burstiness and is left out.
    """
    result: dict[str, float] = {}
    arrival_s = trace.arrival_s
    order = np.argsort(trace.codes, kind="stable")
    ends = np.cumsum(np.bincount(trace.codes, minlength=len(trace.services)))
    for index, service in enumerate(trace.services):
        first = ends[index - 1] if index else 0
        gaps_s = np.diff(arrival_s[order[first : ends[index]]])
        if gaps_s.size >= _LEAST_GAPS and (mean_s := float(gaps_s.mean())) > 0:
            result[service] = float(gaps_s.std()) / mean_s
    return result


def dispersion_index(counts: npt.NDArray[np.int64]) -> float | None:
    """Return variance over mean of ``counts``, shape (window,); None without requests or with a single window."""
    total = int(counts.sum())
    return float(counts.var()) / (total / counts.size) if total and counts.size > 1 else None
