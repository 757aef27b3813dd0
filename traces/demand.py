"""The demand that a request trace itself shows, for planning on what was seen rather than on a forecast."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from plans.demand import Demand, Rate, ServiceDemand
from plans.errors import InvalidInput
from traces.statistics import burstiness_cv
from traces.table import RequestTrace

__all__ = ["OBSERVED_QUANTILES", "SUB_WINDOWS", "observed_demand"]

OBSERVED_QUANTILES = (0.1, 0.5, 0.9, 0.95, 0.99)
"""Quantile levels of an observed demand, unless the caller names others."""

SUB_WINDOWS = 10
"""Parts of a window whose rates give its quantiles."""

Floats = npt.NDArray[np.float64]


def observed_demand(
    trace: RequestTrace,
    *,
    window_s: float,
    quantiles: Sequence[float] = OBSERVED_QUANTILES,
    sub_windows: int = SUB_WINDOWS,
) -> Demand:
    """Return the rates that ``trace`` shows, window by window.

    A window's mean is its requests over its length; its quantiles are those of the rates in its ``sub_windows`` equal
    parts: what was observed, without a model. A last window that the trace's duration cuts short counts over the time
    that is left of it. Burstiness is that of the gaps between arrivals (1 where too few show it), streams are counted,
    tokens are averaged over the requests that state them.

    Args:
        trace: The requests.
        window_s: Length of a window, seconds, > 0. One longer than the trace gives a single window of what there is.
        quantiles: Levels in (0, 1).
        sub_windows: Parts of each window, >= 1.

    Raises:
        InvalidInput: The trace has no requests or no duration, or an argument is out of range.
    """
    levels = tuple(sorted(set(quantiles)))
    if not 0 < window_s < math.inf:
        raise InvalidInput.of("a positive, finite number of seconds", field="window_s", found=window_s)
    if sub_windows < 1 or not all(0 < level < 1 for level in levels):
        found = f"sub_windows={sub_windows}, quantiles={list(quantiles)}"
        raise InvalidInput.of("at least one sub-window, and levels between 0 and 1", field="quantiles", found=found)
    if not len(trace) or trace.duration_s <= 0:
        raise InvalidInput.of(
            "at least one request and a duration above zero",
            field="trace",
            found=f"{len(trace)} requests in {trace.duration_s:g} s",
        )
    windows = max(1, math.ceil(trace.duration_s / window_s - 1e-9))
    starts_s = np.arange(windows, dtype=np.float64) * window_s
    lengths_s: Floats = np.minimum(window_s, trace.duration_s - starts_s)
    cells = _sub_counts(trace, starts_s, lengths_s, sub_windows)
    means = cells.sum(axis=2) / lengths_s
    bands = np.quantile(cells * (sub_windows / lengths_s[:, None]), levels, axis=2) if levels else None
    return Demand(
        window_s=window_s,
        method=f"observed ({sub_windows} sub-windows)",
        services=_services(trace, means, bands, levels),
    )


def _sub_counts(trace: RequestTrace, starts_s: Floats, lengths_s: Floats, sub_windows: int) -> npt.NDArray[np.int64]:
    """Count requests per part of a window, shape (service, window, sub-window); the end belongs to the last part."""
    window = np.clip(np.searchsorted(starts_s, trace.arrival_s, side="right") - 1, 0, starts_s.size - 1)
    place = (trace.arrival_s - starts_s[window]) / lengths_s[window]
    part = np.clip((place * sub_windows).astype(np.int64), 0, sub_windows - 1)
    shape = (len(trace.services), starts_s.size, sub_windows)
    flat = (trace.codes * shape[1] + window) * shape[2] + part
    return np.bincount(flat, minlength=math.prod(shape)).reshape(shape)


def _services(
    trace: RequestTrace, means: Floats, bands: Floats | None, levels: tuple[float, ...]
) -> tuple[ServiceDemand, ...]:
    frame = trace.frame
    cv = burstiness_cv(trace)
    result = []
    for index, service in enumerate(trace.services):
        mine = trace.codes == index
        streams = int(frame["stream"][mine].nunique()) if "stream" in frame else 0
        result.append(
            ServiceDemand(
                service=service,
                burstiness_cv=cv.get(service, 1.0),
                streams=streams or None,
                input_tokens=_mean(trace.numbers("input_tokens")[mine]),
                output_tokens=_mean(trace.numbers("output_tokens")[mine]),
                rate_rps=tuple(
                    Rate(mean=float(mean), quantiles=_quantiles(bands, index, window, levels))
                    for window, mean in enumerate(means[index])
                ),
            )
        )
    return tuple(result)


def _quantiles(bands: Floats | None, service: int, window: int, levels: tuple[float, ...]) -> dict[str, float]:
    if bands is None:
        return {}
    # The quantiles of one sample cannot cross but for rounding.
    rates = np.maximum.accumulate(bands[:, service, window])
    return {str(level): float(rate) for level, rate in zip(levels, rates, strict=True)}


def _mean(values: Floats) -> float | None:
    stated = values[~np.isnan(values)]
    return float(stated.mean()) if stated.size else None
