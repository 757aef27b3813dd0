"""Arrivals like those of a trace, from a model of it: renewal processes whose rates are known only so well.

A trace of n requests with burstiness cv tells a rate to about cv / sqrt(n) of itself (D. R. Cox, Renewal Theory, 1962,
section 4.2: the variance of the count over its mean tends to cv squared). Bursty services are thus known badly, and a
search that takes their rates at face value fits accidents. So rates are shrunk towards each other as far as their
spread is explained by that error (empirical Bayes on logarithms; R. DerSimonian and N. Laird, Controlled Clinical
Trials 7, 1986), and what uncertainty is left is drawn anew for every sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from traces.statistics import burstiness_cv
from traces.synthesis import Gamma
from traces.table import RequestTrace

__all__ = ["RenewalModel", "looks_renewal"]

Floats = npt.NDArray[np.float64]

_WINDOWS = 20
_TOLERATED = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewalModel:
    """One renewal process with gamma gaps per service.

    Attributes:
        services: Their names.
        rate_rps: Shape (service,): median of the rate; 0 for a service without requests.
        spread: Shape (service,): standard deviation of the rate's logarithm.
        cv: Shape (service,): coefficient of variation of the gaps.
    """

    services: tuple[str, ...]
    rate_rps: Floats
    spread: Floats
    cv: Floats

    @classmethod
    def fit(cls, trace: RequestTrace) -> RenewalModel:
        """Return the model of ``trace``, whose duration must be above 0."""
        known = burstiness_cv(trace)
        cv = np.array([known.get(service, 1.0) for service in trace.services], dtype=np.float64)
        count = np.bincount(trace.codes, minlength=len(trace.services)).astype(np.float64)
        logarithm, spread = _shrunk(np.log(count / trace.duration_s), cv**2 / count)
        return cls(services=trace.services, rate_rps=np.exp(logarithm), spread=spread, cv=cv)

    def sample(self, duration_s: float, generator: np.random.Generator) -> tuple[Floats, npt.NDArray[np.int32]]:
        """Return sorted arrival times in [0, ``duration_s``) and the position of each one's service."""
        times, codes = [np.zeros(0)], [np.zeros(0, dtype=np.int32)]
        for code, rate_rps in enumerate(self.rate_rps * np.exp(self.spread * generator.standard_normal(self.cv.shape))):
            arrivals = Gamma(rate_rps=float(rate_rps), cv=float(self.cv[code])).arrivals(duration_s, generator)
            times.append(arrivals)
            codes.append(np.full(len(arrivals), code, dtype=np.int32))
        arrival_s, code_of = np.concatenate(times), np.concatenate(codes)
        order = np.argsort(arrival_s, kind="stable")
        return arrival_s[order], code_of[order]


def looks_renewal(trace: RequestTrace) -> bool:
    """Say whether ``trace`` could come from independent renewal processes of constant rate.

    True unless the counts per window, of single services or of all together, vary more than twice as much as the
    burstiness of the gaps accounts for: then rates move, or services move together, and only the trace knows how.
    """
    if trace.duration_s <= 0 or len(trace) < _WINDOWS:
        return True
    window = np.minimum((trace.arrival_s / trace.duration_s * _WINDOWS).astype(np.int64), _WINDOWS - 1)
    counts = np.zeros((len(trace.services), _WINDOWS))
    np.add.at(counts, (trace.codes, window), 1.0)
    known = burstiness_cv(trace)
    cv = np.array([known.get(service, 1.0) for service in trace.services])
    expected = float((counts.mean(axis=1) * cv**2).sum())
    apart = float(counts.var(axis=1, ddof=1).sum())
    together = float(counts.sum(axis=0).var(ddof=1))
    # The variance of all together rests on few windows: it is allowed the error of its estimate besides.
    return apart <= _TOLERATED * expected and together <= _TOLERATED * (1 + math.sqrt(2 / (_WINDOWS - 1))) * expected


def _shrunk(logarithm: Floats, variance: Floats) -> tuple[Floats, Floats]:
    """Return the posterior means and standard deviations of normal means with known variances."""
    if len(logarithm) < 3:
        return logarithm, np.sqrt(variance)
    weight = 1 / variance
    centre = float(weight @ logarithm / weight.sum())
    excess = float(weight @ (logarithm - centre) ** 2) - (len(logarithm) - 1)
    between = max(0.0, excess / float(weight.sum() - (weight @ weight) / weight.sum()))
    weight = 1 / (variance + between)
    centre = float(weight @ logarithm / weight.sum())
    pull = variance / (variance + between)
    return logarithm * (1 - pull) + centre * pull, np.sqrt(variance * (1 - pull))
