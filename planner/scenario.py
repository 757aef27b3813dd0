"""Demand scenarios: ways in which demand may turn out, over which one placement has to do well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from planner.problem import Problem, planned_rps
from plans.demand import Demand, Rate, ServiceDemand

__all__ = ["sampled_scenarios"]


def sampled_scenarios(problem: Problem) -> tuple[tuple[str, Mapping[str, float]], ...]:
    """Return as many scenarios as the settings ask for: name and rate per service.

    The demand's own scenarios come first, in their order. The rest are sampled: per service one level, uniform in
    (0, 1) and independent of the other services, at which the quantiles of every window are read.
    """
    settings = problem.settings
    if settings.scenarios == 0:
        return ()
    demand = problem.demand
    stated = [(each.name, _with_rates(demand, each.rate_rps)) for each in demand.scenarios[: settings.scenarios]]
    generator = np.random.default_rng(settings.seed)
    sampled = [
        (f"sample-{index}", _at_levels(demand, generator.random(len(demand.services))))
        for index in range(settings.scenarios - len(stated))
    ]
    return tuple((name, planned_rps(replace(problem, demand=found))) for name, found in (*stated, *sampled))


def _with_rates(demand: Demand, rates: Mapping[str, float]) -> Demand:
    return demand.model_copy(
        update={
            "services": tuple(
                _fixed(each, rates[each.service]) if each.service in rates else each for each in demand.services
            )
        }
    )


def _at_levels(demand: Demand, levels: np.ndarray) -> Demand:
    services = (
        each.model_copy(update={"rate_rps": tuple(Rate(mean=rate.at(float(level))) for rate in each.rate_rps)})
        for each, level in zip(demand.services, levels, strict=True)
    )
    return demand.model_copy(update={"services": tuple(services)})


def _fixed(demand: ServiceDemand, rate_rps: float) -> ServiceDemand:
    """Return ``demand`` with one certain rate; streams, which state a rate of their own, give way to it."""
    windows = len(demand.rate_rps)
    return demand.model_copy(update={"streams": None, "rate_rps": (Rate(mean=rate_rps),) * windows})
