"""From counts of the past to the demand of the coming windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from forecaster.errors import ForecastFailed
from forecaster.naive import LastValue, SeasonalNaive
from forecaster.protocol import Forecaster, History, Outlook
from plans.demand import Demand, Rate, ServiceDemand
from plans.errors import InvalidInput
from traces.table import RateTrace

__all__ = ["DEFAULT_QUANTILES", "METHODS", "checked_outlook", "forecast", "forecaster_named"]

DEFAULT_QUANTILES = (0.1, 0.5, 0.9, 0.95, 0.99)
"""Quantile levels of a forecast, unless the caller names others."""

METHODS = ("last-value", "seasonal-naive")
"""Names that `forecaster_named` knows."""


def forecaster_named(method: str, *, period: int | None = None) -> Forecaster:
    """Return the method called ``method``.

    Args:
        method: One of `METHODS`.
        period: Season in windows, for the methods that have one.

    Raises:
        InvalidInput: The name is unknown, or a period is given to a method without season.
    """
    if method == "seasonal-naive":
        return SeasonalNaive(period=period)
    if method != "last-value":
        raise InvalidInput.of(" or ".join(METHODS), field="method", found=repr(method))
    if period is not None:
        raise InvalidInput.of("nothing: last-value has no season", field="period", found=period)
    return LastValue()


def forecast(
    history: RateTrace,
    *,
    method: str | Forecaster = "seasonal-naive",
    windows: int,
    quantiles: Sequence[float] = DEFAULT_QUANTILES,
    seed: int = 0,
    period: int | None = None,
    observed: Demand | None = None,
    burstiness_cv: Mapping[str, float] | None = None,
) -> Demand:
    """Forecast the ``windows`` windows that follow ``history``, which are as long as the history's.

    Windows of the history that nobody counted stand as zero; the demand's ``method`` says how many.

    Args:
        history: Counts of the past.
        method: A name of `METHODS`, or a method.
        windows: Length of the horizon in windows, >= 1.
        quantiles: Levels in (0, 1), in any order.
        seed: Seed for methods that sample.
        period: Season in windows, for a named method that has one.
        observed: What a request trace of the same services shows and counts cannot: its burstiness, streams and tokens
            are carried over.
        burstiness_cv: Coefficient of variation of the gaps between arrivals, per service; overrides ``observed``. A
            service that neither names gets 1, a Poisson process.

    Returns:
        Rates in requests per second, never negative, quantiles that do not fall with the level.

    Raises:
        InvalidInput: The history is empty or too short for the method, or an argument is out of range.
        ForecastFailed: The method gave something that is no forecast.
    """
    levels = _levels(quantiles)
    if windows < 1:
        raise InvalidInput.of("at least 1", field="windows", found=windows)
    chosen = forecaster_named(method, period=period) if isinstance(method, str) else method
    past = History.of(history)
    fitted, outlook = checked_outlook(chosen, past, windows=windows, levels=levels, seed=seed)
    filled = f"; {past.filled} windows without a count stand as zero" if past.filled else ""
    return Demand(
        window_s=past.window_s,
        start_s=past.end_s,
        method=fitted + filled,
        services=tuple(
            _service_demand(name, outlook, index, levels, past.window_s, observed, burstiness_cv or {})
            for index, name in enumerate(past.services)
        ),
    )


def checked_outlook(
    forecaster: Forecaster, history: History, *, windows: int, levels: tuple[float, ...], seed: int
) -> tuple[str, Outlook]:
    """Fit ``forecaster`` and return its description and its forecast, made sure to be one.

    Raises:
        InvalidInput: The history is too short for the method.
        ForecastFailed: The figures have a wrong shape, are not finite or are negative, or quantiles cross.
    """
    least = forecaster.least_windows()
    if history.windows < least or not history.services:
        raise InvalidInput.of(
            f"at least {max(least, 1)} windows of history for {forecaster.name}",
            field="history",
            found=f"{history.windows} windows of {history.window_s:g} s of {len(history.services)} services",
            remedy="give a longer history or shorter windows, or another method or period",
        )
    fitted = forecaster.fit(history)
    outlook = fitted.outlook(windows, levels, seed=seed)
    shape = (len(history.services), windows)
    if outlook.mean.shape != shape or outlook.quantiles.shape != (*shape, len(levels)):
        found = f"{outlook.mean.shape} and {outlook.quantiles.shape}"
        raise ForecastFailed(forecaster.name, f"figures of shape {found}, not {shape} and {(*shape, len(levels))}")
    for name, figures in (("means", outlook.mean), ("quantiles", outlook.quantiles)):
        if not np.isfinite(figures).all():
            raise ForecastFailed(forecaster.name, f"{name} that are not finite")
        if (figures < 0).any():
            raise ForecastFailed(forecaster.name, f"negative {name}")
    if (np.diff(outlook.quantiles, axis=2) < 0).any():
        raise ForecastFailed(forecaster.name, "quantiles that fall with the level")
    return fitted.description, outlook


def _levels(quantiles: Sequence[float]) -> tuple[float, ...]:
    levels = tuple(sorted(set(quantiles)))
    if not levels or not all(0 < level < 1 for level in levels):
        raise InvalidInput.of("levels between 0 and 1, both excluded", field="quantiles", found=list(quantiles))
    return levels


def _service_demand(
    name: str,
    outlook: Outlook,
    index: int,
    levels: tuple[float, ...],
    window_s: float,
    observed: Demand | None,
    burstiness_cv: Mapping[str, float],
) -> ServiceDemand:
    seen = observed.of(name) if observed is not None else None
    cv = burstiness_cv.get(name, seen.burstiness_cv if seen is not None else 1.0)
    if not 0 <= cv < math.inf:
        raise InvalidInput.of("a finite number, not negative", field=f"burstiness_cv.{name}", found=cv)
    return ServiceDemand(
        service=name,
        burstiness_cv=cv,
        streams=seen.streams if seen is not None else None,
        input_tokens=seen.input_tokens if seen is not None else None,
        output_tokens=seen.output_tokens if seen is not None else None,
        rate_rps=tuple(
            Rate(
                mean=float(mean) / window_s,
                quantiles={str(level): float(count) / window_s for level, count in zip(levels, row, strict=True)},
            )
            for mean, row in zip(outlook.mean[index], outlook.quantiles[index], strict=True)
        ),
    )
