"""Arrivals for the polish, sampled from what was seen or forecast."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluator.single_pass import SinglePassTrace
from planner import Problem, ScoringTables
from planner.problem import service_demands
from traces.renewal import RenewalModel, looks_renewal
from traces.table import RequestTrace

__all__ = ["Sample", "Sampler"]

_REQUESTS, _REQUESTS_PER_SERVICE = 4000, 100
"""Least requests of one sampled trace, in all and in the mean over the services."""
_LEAST_DEADLINES = 20.0
"""A sampled trace lasts at least this many of the longest deadline, so that its idle start counts little."""
_MOST_REQUESTS, _FEWEST_TRACES = 400_000, 3
"""Requests of all traces together, where clusters take millions a second: first fewer traces, then shorter ones."""
_WARM_DEADLINES, _WARM_SHARE = 5.0, 0.5
"""How long shorter traces warm up, uncounted: so many of the longest deadline, at most that share of the trace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample(SinglePassTrace):
    """Sampled traces; requests before ``warmup_s`` are served and not counted, which spares counts an idle start."""

    warmup_s: float = 0.0

    @property
    def counted(self) -> NDArray[np.int64]:
        """Position of the first request of each block that counts, shape (block,)."""
        warm = np.concatenate([[0], np.cumsum(~self.counts)])
        found: NDArray[np.int64] = self.first[:-1] + warm[self.first[1:]] - warm[self.first[:-1]]
        return found

    @property
    def counts(self) -> NDArray[np.bool_]:
        """Whether each request counts, shape (request,)."""
        found: NDArray[np.bool_] = self.arrival_s >= self.warmup_s
        return found

    def offered(self, services: int) -> NDArray[np.int64]:
        """Return the requests of each service in each block that count, shape (block, service)."""
        blocks = len(self.first) - 1
        block = np.repeat(np.arange(blocks), np.diff(self.first))[self.counts]
        flat = np.bincount(block * services + self.service[self.counts], minlength=blocks * services)
        return flat.reshape(blocks, services).astype(np.int64)


class Sampler:
    """Draws traces like what was seen or forecast. Every purpose has draws of its own."""

    def __init__(self, problem: Problem, trace: RequestTrace | None) -> None:
        self._problem = problem
        self._trace = trace if trace is not None and len(trace) and trace.duration_s > 0 else None
        if self._trace is not None and not set(self._trace.services) <= {s.name for s in problem.services.services}:
            self._trace = None  # workflows: what they call is sampled at the planned rates
        self._model = None
        self.name = "windows of the trace"
        if self._trace is None:
            self.name = "renewal processes at the planned rates"
        elif looks_renewal(self._trace):
            self._model = RenewalModel.fit(self._trace)
            self.name = "renewal processes fitted to the trace"

    def blocks(
        self,
        tables: ScoringTables,
        count: int,
        purpose: int,
        *,
        requests: int | None = None,
        most_requests: int = _MOST_REQUESTS,
    ) -> Sample:
        """Return ``count`` sampled traces, services by position in ``tables``; fewer where they are large.

        Each has at least ``requests``, if given; all together ``most_requests``. Where that leaves less than 20 of the
        longest deadline, the beginning is not counted.
        """
        model = self._model or self._forecast(tables)
        generator = np.random.default_rng([self._problem.settings.seed, purpose])
        rate_rps = float(model.rate_rps.sum())
        if self._trace is not None:
            rate_rps = len(self._trace) / self._trace.duration_s
        longest_s = float(tables.deadline_s[np.isfinite(tables.deadline_s)].max(initial=0.0))
        requests = requests or max(_REQUESTS, _REQUESTS_PER_SERVICE * len(tables.names))
        duration_s = max(requests / max(rate_rps, 1e-9), _LEAST_DEADLINES * longest_s)
        count = max(min(_FEWEST_TRACES, count), min(count, int(most_requests / max(duration_s * rate_rps, 1.0))))
        wanted_s, duration_s = duration_s, min(duration_s, most_requests / count / max(rate_rps, 1e-9))
        warmup_s = min(_WARM_DEADLINES * longest_s, _WARM_SHARE * duration_s) if duration_s < wanted_s else 0.0
        if self._trace is not None and self._model is None:
            samples = [self._window(duration_s, number, count, generator) for number in range(count)]
            names = self._trace.services
        else:
            samples = model.sample(duration_s, count, generator)
            names = model.services
        position = np.array([tables.names.index(name) for name in names], dtype=np.int32)
        return Sample(
            arrival_s=np.concatenate([arrival_s for arrival_s, _ in samples]),
            service=position[np.concatenate([codes for _, codes in samples])],
            first=np.cumsum([0, *(len(codes) for _, codes in samples)]),
            warmup_s=warmup_s,
        )

    def _window(
        self, duration_s: float, number: int, count: int, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return a random window of the trace, which goes on at its beginning; windows spread over all of it."""
        trace = self._trace
        assert trace is not None
        start_s = (number + generator.random()) / count * trace.duration_s
        rounds = math.ceil((start_s + duration_s) / trace.duration_s)
        arrival_s = np.concatenate([trace.arrival_s + turn * trace.duration_s for turn in range(rounds)])
        codes = np.tile(trace.codes, rounds)
        first, last = np.searchsorted(arrival_s, [start_s, start_s + duration_s])
        return arrival_s[first:last] - start_s, codes[first:last].astype(np.int32)

    def _forecast(self, tables: ScoringTables) -> RenewalModel:
        asked = [position for position, rate in enumerate(tables.offered_rps) if rate > 0]
        demands = service_demands(self._problem)
        return RenewalModel(
            services=tuple(tables.names[position] for position in asked),
            rate_rps=tables.offered_rps[asked],
            spread=np.zeros(len(asked)),
            cv=np.array([demands[tables.names[position]].burstiness_cv for position in asked]),
        )
