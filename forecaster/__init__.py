"""Forecasts of demand: arrival rates per service and window with quantiles, and back-tests of the methods."""

from forecaster.backtest import Backtest, ServiceScore, backtest
from forecaster.errors import ForecastFailed
from forecaster.forecast import DEFAULT_QUANTILES, METHODS, forecast, forecaster_named
from forecaster.naive import LastValue, SeasonalNaive
from forecaster.protocol import FittedForecaster, Forecaster, History, Outlook

__all__ = [
    "forecast",
    "backtest",
    "forecaster_named",
    "DEFAULT_QUANTILES",
    "METHODS",
    "LastValue",
    "SeasonalNaive",
    "Forecaster",
    "FittedForecaster",
    "History",
    "Outlook",
    "Backtest",
    "ServiceScore",
    "ForecastFailed",
]
