"""The planner's polish with the evaluator as its scorer, and a prediction from arrivals kept out of the search."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from foreplan.polish_arrivals import Sampler
from foreplan.polish_engine import PlanEngine
from foreplan.polish_scorers import PolishRouting, Served, judge_for, scorer_for, served_by
from planner import PolishLimits, Problem, Refused, Scorer, ScoringTables, polish_plan
from plans.errors import Fault, InvalidInput
from plans.plan import LatencyPercentiles, Plan, Prediction
from plans.plan import Polish as PolishRecord
from traces.table import RequestTrace

__all__ = ["PolishSettings", "polished"]

_NORMAL_95 = 1.96
_HELD_OUT_REQUESTS = 1_600_000
"""Requests of the prediction at most: simulated once, so longer traces than the search's, for large clusters."""
_WHOLE_TRACES, _WHOLE_REQUESTS = 6, 800
"""Sampled traces, and least requests of each, where whole plans are simulated: some milliseconds each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolishSettings:
    """How to polish.

    Attributes:
        time_s: Wall time of the search, seconds; 0 turns it off.
        traces: Sampled traces that every candidate is scored on; as many again choose among the finalists, and as
            many again make the prediction.
        candidates: Most simulations, or None: for repeatable results, since wall time is not.
        routing: How requests find their group while scoring by single pass.

    Raises:
        InvalidInput: With one fault for each value out of its range.
    """

    time_s: float = 0.0
    traces: int = 16
    candidates: int | None = None
    routing: PolishRouting = "earliest-free"

    def __post_init__(self) -> None:
        ranges = (
            ("time_s", 0 <= self.time_s < math.inf, "at least 0 seconds and finite"),
            ("traces", 3 <= self.traces <= 1000, "from 3 to 1000"),
            ("candidates", self.candidates is None or self.candidates >= 1, "at least 1, or none"),
            ("routing", self.routing in get_args(PolishRouting), f"one of {', '.join(get_args(PolishRouting))}"),
        )
        faults = [
            Fault(where="polish", field=field, found=repr(getattr(self, field)), expected=expected)
            for field, holds, expected in ranges
            if not holds
        ]
        if faults:
            raise InvalidInput(faults)


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
    itself; without a trace, as renewal processes at the planned rates with the demand's burstiness. Where the search
    may not be applied, the plan comes back with a warning that says why.
    """
    began_s = clock()
    sampler = Sampler(problem, trace)
    kept: list[ScoringTables] = []

    def scorers(tables: ScoringTables) -> tuple[Scorer, Scorer]:
        kept.append(tables)
        if tables.draft is not None:
            return _engine(problem, tables, sampler, 0).scorer(1.0), _engine(problem, tables, sampler, 1).scorer(1.0)
        search, judge = (sampler.blocks(tables, settings.traces, purpose) for purpose in (0, 1))
        return scorer_for(tables, search, settings.routing), judge_for(tables, judge, settings.routing)

    limits = PolishLimits(time_s=settings.time_s, moves=settings.candidates, seed=problem.settings.seed)
    found = polish_plan(problem, plan, scorers, limits, clock=clock)
    if isinstance(found, Refused):
        return plan.model_copy(update={"warnings": (*plan.warnings, f"not polished: {found.reason}")})
    better = found.plan
    if kept[0].draft is not None and better is not plan:
        # Rates follow from the fluid model there, so what was found is confirmed as it is planned.
        confirm = _engine(problem, kept[0], sampler, 3)
        better = better if confirm.score(better) >= confirm.score(plan) else plan
    if kept[0].draft is None:
        held_out = sampler.blocks(kept[0], settings.traces, 2, most_requests=_HELD_OUT_REQUESTS)
        served = served_by(better, problem.services, held_out)
    else:
        served = _engine(problem, kept[0], sampler, 2, settings.traces).outcome(better)
    record = PolishRecord(
        scorer=found.scorer if found.scorer == found.judge else f"{found.scorer}; chosen by {found.judge}",
        arrivals=sampler.name,
        traces=len(served.offered),
        requests=int(served.offered.sum()),
        candidates=found.outcome.candidates,
        start_attainment=min(1.0, found.outcome.start_score),
        attainment=min(1.0, found.outcome.score if better is found.plan else found.outcome.start_score),
        wall_s=clock() - began_s,
        objective=problem.settings.objective,
        moves=found.outcome.moves,
    )
    positions = {service.name: position for position, service in enumerate(problem.services.services)}
    predicted = tuple(_prediction(each, served, positions[each.service]) for each in better.predicted)
    return better.model_copy(update={"predicted": predicted, "polish": record})


def _engine(
    problem: Problem, tables: ScoringTables, sampler: Sampler, purpose: int, traces: int = _WHOLE_TRACES
) -> PlanEngine:
    """Return a simulator of whole plans, on fewer and shorter traces than the compiled search takes."""
    return PlanEngine(tables, problem, sampler.blocks(tables, traces, purpose, requests=_WHOLE_REQUESTS))


def _prediction(before: Prediction, served: Served, service: int) -> Prediction:
    """Return ``before`` with what was simulated for ``service``, by its position."""
    good, offered = served.good[:, service], served.offered[:, service]
    total = int(offered.sum())
    if not total:
        return before
    attainment = int(good.sum()) / total
    p50_s, p99_s = served.p50_s[service], served.p99_s[service]
    return before.model_copy(
        update={
            "goodput_rps": attainment * before.offered_rps,
            "attainment": attainment,
            "attainment_interval": _interval(good, offered),
            "latency_s": before.latency_s if None in (p50_s, p99_s) else LatencyPercentiles(p50=p50_s, p99=p99_s),
        }
    )


def _interval(good: NDArray[np.int64], offered: NDArray[np.int64]) -> tuple[float, float]:
    """Return the 95 % interval of a ratio of sums over sampled traces (Cochran, Sampling Techniques, 1977, 2.11)."""
    total, count = int(offered.sum()), len(offered)
    ratio = int(good.sum()) / total
    residual = good - ratio * offered
    error = math.sqrt(float(residual @ residual) * count / max(count - 1, 1)) / total
    return max(0.0, ratio - _NORMAL_95 * error), min(1.0, ratio + _NORMAL_95 * error)
