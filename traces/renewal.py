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
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from traces.statistics import burstiness_cv
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

    def sample(
        self, duration_s: float, count: int, generator: np.random.Generator
    ) -> list[tuple[Floats, npt.NDArray[np.int32]]]:
        """Return ``count`` traces of ``duration_s``: sorted arrival times and the position of each one's service.

        Sampling adds as little of its own as it can: over all traces together every service has the number of requests
        that it is expected to have, and its rates in them are one from each quantile range of what they may be.
        """
        times: list[Floats] = [np.zeros(0)]
        codes: list[npt.NDArray[np.int32]] = [np.zeros(0, dtype=np.int32)]
        levels = np.array([NormalDist().inv_cdf((rank + 0.5) / count) for rank in range(count)])
        for code, (rate_rps, spread, cv) in enumerate(zip(self.rate_rps, self.spread, self.cv, strict=True)):
            expected = rate_rps * duration_s * np.exp(spread * generator.permutation(levels))
            arrivals = _conditioned(expected, float(cv), generator) * duration_s
            times.append(arrivals)
            codes.append(np.full(len(arrivals), code, dtype=np.int32))
        arrival_s, code_of = np.concatenate(times), np.concatenate(codes)
        order = np.argsort(arrival_s, kind="stable")
        arrival_s, code_of = arrival_s[order], code_of[order]
        ends = np.searchsorted(arrival_s, np.arange(count + 1) * duration_s)
        return [
            (arrival_s[first:last] - trace * duration_s, code_of[first:last])
            for trace, (first, last) in enumerate(pairwise(ends))
        ]


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


def _conditioned(expected: Floats, cv: float, generator: np.random.Generator) -> Floats:
    """Return arrivals in [0, len(expected)): on average ``expected[k]`` of them in [k, k + 1), in all exactly as many.

    Gaps are drawn in operational time, in which the rate is 1, scaled to fill it, and mapped back.
    """
    total = float(expected.sum())
    number = int(total + generator.random())
    if not number:
        return np.zeros(0)
    gaps = generator.gamma(1 / cv**2, cv**2, number) if cv > 0 else np.ones(number)
    moments = np.cumsum(gaps)
    if moments[-1] <= 0:
        moments = np.arange(1.0, number + 1)
    moments = np.sort((moments / moments[-1] + generator.random()) % 1.0) * total
    upto = np.concatenate([[0.0], np.cumsum(expected)])
    return np.minimum(np.interp(moments, upto, np.arange(len(upto))), np.nextafter(len(expected), 0))


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
