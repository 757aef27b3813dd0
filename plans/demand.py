"""How much is asked for: forecast arrival rates per service and window, as quantiles (``demand.json``)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field, field_validator, model_validator

from plans.cluster import Name
from plans.documents import FORMAT_VERSION, Document

__all__ = ["Demand", "Rate", "Scenario", "ServiceDemand"]


class Rate(Document):
    """The arrival rate in one window: its mean and quantiles (key: probability as text), requests per second."""

    mean: float = Field(ge=0, allow_inf_nan=False)
    quantiles: Mapping[str, float] = {}

    @field_validator("quantiles")
    @classmethod
    def _monotone(cls, quantiles: Mapping[str, float]) -> Mapping[str, float]:
        try:
            levels = sorted((float(level), rate) for level, rate in quantiles.items())
        except ValueError:
            raise ValueError("quantile levels such as '0.9' as keys") from None
        if any(not 0 < level < 1 for level, _ in levels):
            raise ValueError("quantile levels between 0 and 1, both excluded")
        rates = [rate for _, rate in levels]
        if any(not np.isfinite(rate) or rate < 0 for rate in rates) or rates != sorted(rates):
            raise ValueError("quantiles that are finite, not negative, and do not fall with the level")
        return quantiles

    def at(self, level: float) -> float:
        """Return the rate at quantile ``level``: interpolated between the stated ones, and never beyond the outermost.

        Without quantiles the mean stands for every level.
        """
        if not self.quantiles:
            return self.mean
        levels, rates = zip(*sorted((float(key), rate) for key, rate in self.quantiles.items()), strict=True)
        return float(np.interp(level, levels, rates))


class ServiceDemand(Document):
    """The demand of one service, one entry of ``rate_rps`` per window of the horizon.

    ``burstiness_cv`` is the coefficient of variation of the gaps between arrivals (1 is a Poisson process).
    """

    service: Name
    burstiness_cv: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    streams: int | None = Field(default=None, ge=0)
    input_tokens: float | None = Field(default=None, ge=0)
    output_tokens: float | None = Field(default=None, ge=0)
    rate_rps: tuple[Rate, ...] = Field(min_length=1)

    def peak_rps(self, level: float) -> float:
        """Return the highest rate over the horizon at quantile ``level``, in requests per second."""
        return max(rate.at(level) for rate in self.rate_rps)


class Scenario(Document):
    """One way that demand may turn out: a rate per service, for those that it names; the others stay as planned."""

    name: Name
    rate_rps: Mapping[Name, float]

    @field_validator("rate_rps")
    @classmethod
    def _rates(cls, rates: Mapping[str, float]) -> Mapping[str, float]:
        if any(not np.isfinite(rate) or rate < 0 for rate in rates.values()):
            raise ValueError("rates that are finite and not negative")
        return rates


class Demand(Document):
    """The forecast for all services over one horizon of equal windows.

    ``scenarios`` are equally likely peaks over the horizon; without them they are sampled from the quantiles.
    """

    format_version: str = FORMAT_VERSION
    window_s: float = Field(gt=0, allow_inf_nan=False)
    start_s: float = Field(default=0.0, allow_inf_nan=False)
    method: str = ""
    services: tuple[ServiceDemand, ...]
    scenarios: tuple[Scenario, ...] = ()

    @model_validator(mode="after")
    def _same_horizon(self) -> Demand:
        names = [demand.service for demand in self.services]
        if len(set(names)) < len(names):
            raise ValueError("every service once")
        unknown = sorted({name for scenario in self.scenarios for name in scenario.rate_rps} - set(names))
        if unknown:
            raise ValueError(f"scenarios of services that the demand names: it does not name {', '.join(unknown)}")
        if len({len(demand.rate_rps) for demand in self.services}) > 1:
            raise ValueError("the same number of windows for every service")
        return self

    def of(self, service: str) -> ServiceDemand | None:
        """Return the demand of ``service``, or None when the forecast does not name it."""
        return next((demand for demand in self.services if demand.service == service), None)
