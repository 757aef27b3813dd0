"""The planner's polish with the evaluator as its scorer: sampled arrivals, the search, and a prediction beside both."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from evaluator.single_pass import (
    Hosts,
    SinglePassRouting,
    SinglePassTrace,
    compile_hosts,
    race,
    run_single_pass,
)
from planner import Deployment, Heat, PolishLimits, Problem, Refused, ScoringTables, polish_plan
from plans.plan import LatencyPercentiles, Plan, Prediction
from plans.plan import Polish as PolishRecord
from traces.outcomes import nearest_rank
from traces.renewal import RenewalModel, looks_renewal
from traces.table import RequestTrace

__all__ = ["PolishSettings", "polished"]

_REQUESTS = 4000
"""Requests of one sampled trace."""
_LEAST_DEADLINES = 20.0
"""A sampled trace lasts at least this many of the longest deadline, so that its idle start counts little."""
_NORMAL_95 = 1.96

Blocks = SinglePassTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class PolishSettings:
    """How to polish.

    Attributes:
        time_s: Wall time of the search, seconds; 0 turns it off.
        traces: Sampled traces that every candidate is scored on; as many again choose among the finalists, and as
            many again make the prediction.
        candidates: Most simulations, or None: for repeatable results, since wall time is not.
        routing: How requests find their group while scoring.
    """

    time_s: float = 0.0
    traces: int = 16
    candidates: int | None = None
    routing: SinglePassRouting = "earliest-free"


def polished(
    problem: Problem,
    plan: Plan,
    settings: PolishSettings,
    trace: RequestTrace | None,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Plan:
    """Return ``plan`` after a search for more simulated goodput, with predictions from arrivals kept out of it.

    Arrivals are sampled from ``trace``: as renewal processes where it looks like some, else as windows of the trace
    itself; without a trace, as renewal processes at the planned rates with the demand's burstiness.
    """
    began_s = clock()
    sampler = _Sampler(problem, trace)
    kept: list[ScoringTables] = []

    def scorers(tables: ScoringTables) -> tuple[_SinglePass, _SinglePass]:
        kept.append(tables)
        search, judge = (
            _SinglePass(tables, sampler.blocks(tables, settings.traces, purpose), settings.routing)
            for purpose in (0, 1)
        )
        return search, judge

    limits = PolishLimits(time_s=settings.time_s, candidates=settings.candidates, seed=problem.settings.seed)
    found = polish_plan(problem, plan, scorers, limits, clock=clock)
    if isinstance(found, Refused):
        return plan.model_copy(update={"warnings": (*plan.warnings, f"not polished: {found.reason}")})
    held_out = sampler.blocks(kept[0], settings.traces, 2)
    record = PolishRecord(
        scorer=found.scorer,
        arrivals=sampler.name,
        traces=settings.traces,
        requests=len(held_out.arrival_s),
        candidates=found.outcome.candidates,
        start_attainment=min(1.0, found.outcome.start_score),
        attainment=min(1.0, found.outcome.score),
        wall_s=clock() - began_s,
    )
    predicted = _predicted(found.plan, problem, held_out, settings.routing)
    return found.plan.model_copy(update={"predicted": predicted, "polish": record})


class _Sampler:
    """Draws traces like what was seen or forecast. Every purpose has draws of its own."""

    def __init__(self, problem: Problem, trace: RequestTrace | None) -> None:
        self._problem = problem
        self._trace = trace if trace is not None and len(trace) and trace.duration_s > 0 else None
        self._model = None
        self.name = "windows of the trace"
        if self._trace is None:
            self.name = "renewal processes at the planned rates"
        elif looks_renewal(self._trace):
            self._model = RenewalModel.fit(self._trace)
            self.name = "renewal processes fitted to the trace"

    def blocks(self, tables: ScoringTables, count: int, purpose: int) -> Blocks:
        """Return ``count`` sampled traces, with services by their position in ``tables``."""
        model = self._model or self._forecast(tables)
        generator = np.random.default_rng([self._problem.settings.seed, purpose])
        rate_rps = float(model.rate_rps.sum())
        if self._trace is not None:
            rate_rps = len(self._trace) / self._trace.duration_s
        longest_s = float(tables.deadline_s[np.isfinite(tables.deadline_s)].max(initial=0.0))
        duration_s = max(_REQUESTS / max(rate_rps, 1e-9), _LEAST_DEADLINES * longest_s)
        if self._trace is not None and self._model is None:
            samples = [self._window(duration_s, number, count, generator) for number in range(count)]
            names = self._trace.services
        else:
            samples = [model.sample(duration_s, generator) for _ in range(count)]
            names = model.services
        position = np.array([tables.names.index(name) for name in names], dtype=np.int32)
        return Blocks(
            arrival_s=np.concatenate([arrival_s for arrival_s, _ in samples]),
            service=position[np.concatenate([codes for _, codes in samples])],
            first=np.cumsum([0, *(len(codes) for _, codes in samples)]),
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
        demands = {each.service: each for each in self._problem.demand.services}
        return RenewalModel(
            services=tuple(tables.names[position] for position in asked),
            rate_rps=tables.offered_rps[asked],
            spread=np.zeros(len(asked)),
            cv=np.array([demands[tables.names[position]].burstiness_cv for position in asked]),
        )


class _SinglePass:
    """The evaluator's single pass as the planner's `Scorer`."""

    name = "single pass: admission at arrival, no batching"

    def __init__(self, tables: ScoringTables, blocks: Blocks, routing: SinglePassRouting) -> None:
        self._tables = tables
        self._blocks = blocks
        self._routing = routing
        self._weight = np.ones((len(tables.names), 1))
        self._offered = blocks.offered(len(tables.names))

    @property
    def offered(self) -> np.ndarray:
        return self._offered

    def race(
        self, deployment: Deployment, value: np.ndarray, *, rival: np.ndarray, needed: float, start: int, least: int
    ) -> Heat:
        hosts = Hosts(
            count=deployment.count,
            group=deployment.slot,
            option=deployment.option,
            weight=self._weight,
            stage_s=self._tables.stage_s,
            deadline_s=self._tables.deadline_s,
            groups=self._tables.gpus,
        )
        found = race(
            hosts, self._blocks, value, rival=rival, needed=needed, start=start, least=least, routing=self._routing
        )
        return Heat(blocks=found.blocks, value=found.value, good=found.good)


def _predicted(plan: Plan, problem: Problem, blocks: Blocks, routing: SinglePassRouting) -> tuple[Prediction, ...]:
    """Return the predictions of ``plan`` with attainment, its confidence interval and latency from ``blocks``."""
    hosts = compile_hosts(plan, problem.services)
    services = len(problem.services.services)
    offered = blocks.offered(services)
    good = np.zeros_like(offered)
    latency_s: list[list[np.ndarray]] = [[] for _ in range(services)]
    for block, (first, last) in enumerate(zip(blocks.first[:-1], blocks.first[1:], strict=True)):
        arrival_s, service = blocks.arrival_s[first:last], blocks.service[first:last]
        outcome = run_single_pass(hosts, arrival_s, service, routing=routing)
        good[block] = np.bincount(service[outcome.accepted], minlength=services)
        taken_s = outcome.finish_s - arrival_s
        for position in range(services):
            latency_s[position].append(taken_s[outcome.accepted & (service == position)])
    names = [service.name for service in problem.services.services]
    return tuple(
        _prediction(
            each,
            good[:, names.index(each.service)],
            offered[:, names.index(each.service)],
            np.concatenate(latency_s[names.index(each.service)]),
        )
        for each in plan.predicted
    )


def _prediction(before: Prediction, good: np.ndarray, offered: np.ndarray, latency_s: np.ndarray) -> Prediction:
    """Return ``before`` with what was simulated; the 95 % interval of the ratio is from how sampled traces differ."""
    total = int(offered.sum())
    if not total:
        return before
    attainment = int(good.sum()) / total
    residual = good - attainment * offered
    count = len(offered)
    error = math.sqrt(float(residual @ residual) * count / max(count - 1, 1)) / total
    low, high = max(0.0, attainment - _NORMAL_95 * error), min(1.0, attainment + _NORMAL_95 * error)
    return before.model_copy(
        update={
            "goodput_rps": attainment * before.offered_rps,
            "attainment": attainment,
            "attainment_interval": (low, high),
            "latency_s": LatencyPercentiles(
                p50=nearest_rank(np.sort(latency_s), 50), p99=nearest_rank(np.sort(latency_s), 99)
            ),
        }
    )
