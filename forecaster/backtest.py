"""How good a method would have been: rolling-origin back-tests.

The method forecasts from several points of the past, each time seeing only what came before, and is scored on what came
after. The *weighted quantile loss* at level q is 2 * sum pinball(q) / sum |y|, averaged over the levels; it is zero for
a perfect forecast, and for the median alone it is the mean absolute error over the mean. *Coverage* at level q is the
share of windows with at most the forecast quantile; for a calibrated forecast it is q.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from forecaster.forecast import DEFAULT_QUANTILES, checked_outlook, forecaster_named
from forecaster.protocol import Forecaster, History
from plans.errors import InvalidInput
from traces.table import RateTrace

__all__ = ["Backtest", "ServiceScore", "backtest", "pinball"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceScore:
    """How a method did on one service.

    Attributes:
        service: Its name.
        weighted_quantile_loss: >= 0; None when the service had no request in any scored window.
        coverage: Share of windows at or below each level's quantile, in [0, 1].
        mean_error_rps: Mean of forecast mean minus truth, requests per second: positive when it forecasts too much.
    """

    service: str
    weighted_quantile_loss: float | None
    coverage: Mapping[float, float]
    mean_error_rps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Backtest:
    """The result of a back-test.

    Attributes:
        method: The description of the last fit.
        origins: Number of forecasts scored.
        windows: Horizon of each, in windows.
        weighted_quantile_loss: Over all services together; None when there was no request at all.
        coverage: Over all services together.
        services: One score per service.
    """

    method: str
    origins: int
    windows: int
    weighted_quantile_loss: float | None
    coverage: Mapping[float, float]
    services: tuple[ServiceScore, ...]


def pinball(truth: Floats, quantile: Floats, level: float) -> Floats:
    """Return the pinball loss of ``quantile`` at ``level``, elementwise: level * excess or (1 - level) * shortfall."""
    error = truth - quantile
    return np.maximum(level * error, (level - 1) * error)


def backtest(
    history: RateTrace,
    *,
    method: str | Forecaster,
    windows: int,
    origins: int = 10,
    stride: int | None = None,
    quantiles: Sequence[float] = DEFAULT_QUANTILES,
    seed: int = 0,
    period: int | None = None,
) -> Backtest:
    """Score a method on the last ``origins`` horizons of ``history``.

    Args:
        history: Counts of the past; gaps count zero.
        method: A name of `forecaster.forecast.METHODS`, or a method.
        windows: Horizon in windows, >= 1.
        origins: Number of forecasts, >= 1.
        stride: Windows from one origin to the next, >= 1; the horizon when left out.
        quantiles: Levels in (0, 1).
        seed: Seed for methods that sample.
        period: Season in windows, for a named method that has one.

    Raises:
        InvalidInput: The history before the first origin is too short, or an argument is out of range.
        ForecastFailed: The method gave something that is no forecast.
    """
    step = windows if stride is None else stride
    if min(windows, origins, step) < 1:
        found = f"windows={windows}, origins={origins}, stride={step}"
        raise InvalidInput.of("windows, origins and stride of at least 1", field="backtest", found=found)
    levels = tuple(sorted(set(quantiles)))
    chosen = forecaster_named(method, period=period) if isinstance(method, str) else method
    past = History.of(history)
    first = past.windows - windows - (origins - 1) * step
    if first < chosen.least_windows():
        raise InvalidInput.of(
            f"at least {chosen.least_windows() + past.windows - first} windows of history",
            field="history",
            found=f"{past.windows} windows",
            remedy="give a longer history, a shorter horizon or fewer origins",
        )
    described, means, bands, truths = "", [], [], []
    for origin in range(first, first + origins * step, step):
        described, outlook = checked_outlook(chosen, past.first(origin), windows=windows, levels=levels, seed=seed)
        means.append(outlook.mean)
        bands.append(outlook.quantiles)
        truths.append(past.counts[:, origin : origin + windows])
    mean, band, truth = (np.concatenate(parts, axis=1) for parts in (means, bands, truths))
    return Backtest(
        method=described,
        origins=origins,
        windows=windows,
        weighted_quantile_loss=_loss(truth, band, levels),
        coverage=_coverage(truth, band, levels),
        services=tuple(
            ServiceScore(
                service=name,
                weighted_quantile_loss=_loss(truth[row], band[row], levels),
                coverage=_coverage(truth[row], band[row], levels),
                mean_error_rps=float(np.mean(mean[row] - truth[row])) / past.window_s,
            )
            for row, name in enumerate(past.services)
        ),
    )


def _loss(truth: Floats, band: Floats, levels: tuple[float, ...]) -> float | None:
    total = float(truth.sum())
    if total == 0:
        return None
    losses = [2 * pinball(truth, band[..., index], level).sum() / total for index, level in enumerate(levels)]
    return float(np.mean(losses))


def _coverage(truth: Floats, band: Floats, levels: tuple[float, ...]) -> dict[float, float]:
    return {level: float(np.mean(truth <= band[..., index])) for index, level in enumerate(levels)}
