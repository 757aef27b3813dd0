"""What a placement is expected to deliver, from the heavy-traffic approximation; docs/formulation.md, section 7."""

from __future__ import annotations

import math
from dataclasses import dataclass

from planner.linear import Floats
from planner.option import Option
from planner.space import Placement, PlanningSpace
from planner.tail import miss_ratio, wait_s
from plans.plan import Confidence, LatencyPercentiles, Prediction
from profiles.latency import LatencyModel, worst

__all__ = ["latency_model", "predict"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """What one replica is expected to do: its rate, its share of late requests, its latencies."""

    rate_rps: float
    miss: float
    p50_s: float
    p99_s: float
    accuracy: float
    confidence: Confidence


def predict(space: PlanningSpace, placement: Placement) -> tuple[Prediction, ...]:
    """Return one prediction per service, in the order of the services document."""
    busy = _utilisations(space, placement)
    shares: dict[int, list[_Share]] = {}
    for placed in placement:
        option = space.options[placed.option]
        rate = placed.share * option.sustained_rps
        if rate > 0:
            share = _of_replica(space, option, rate, busy[placed.group])
            shares.setdefault(int(space.service_of[placed.option]), []).append(share)
    offered = space.offered_rps
    return tuple(_of_service(name, offered, shares.get(index, []), index) for index, name in enumerate(space.names))


def latency_model(space: PlanningSpace, option: Option) -> LatencyModel:
    """Return the latency model that ``option`` was made from."""
    demand = space.problem.demand.of(option.service)
    model = space.problem.profiles.latency(
        option.variant,
        option.gpu_type,
        option.tp,
        option.pp,
        input_tokens=None if demand is None else demand.input_tokens,
        output_tokens=None if demand is None else demand.output_tokens,
    )
    assert model is not None, "an option is only made from a profile"
    return model


def _utilisations(space: PlanningSpace, placement: Placement) -> dict[int, float]:
    busy: dict[int, float] = {}
    for placed in placement:
        utilisation = space.options[placed.option].utilisation
        busy[placed.group] = busy.get(placed.group, 0.0) + placed.share * utilisation
    return busy


def _of_replica(space: PlanningSpace, option: Option, rate_rps: float, utilisation: float) -> _Share:
    model = latency_model(space, option)
    batch = _typical_batch(model, option.batch, rate_rps)
    typical = model.at(batch)
    full = model.at(min(option.batch, 2 * batch))
    held_s = space.problem.settings.blocking_factor * max(typical.stage_s) if batch > 1 else 0.0
    slack_s = option.deadline_s - typical.p99_s - held_s
    waits = [wait_s(q, option.request_s, option.variability, utilisation) for q in (0.5, 0.99)]
    p50_s = max(model.at(1).mean_s, typical.mean_s) + waits[0]
    return _Share(
        rate_rps=rate_rps,
        miss=miss_ratio(max(slack_s, 0.0), option.request_s, option.variability, utilisation),
        p50_s=p50_s,
        p99_s=max(p50_s, full.p99_s + held_s + waits[1]),
        accuracy=option.accuracy,
        confidence=worst(option.confidence, typical.confidence),
    )


def _typical_batch(model: LatencyModel, max_batch: int, rate_rps: float) -> int:
    """Return the batch that collects while one batch holds the bottleneck: the fixed point b = rate * hold(b)."""
    batch = 1
    while batch < max_batch:
        collected = math.ceil(rate_rps * max(model.at(batch).stage_s) - 1e-9)
        if collected <= batch:
            break
        batch = min(collected, max_batch)
    return batch


def _of_service(name: str, offered: Floats, shares: list[_Share], index: int) -> Prediction:
    offered_rps = float(offered[index])
    served = sum(share.rate_rps for share in shares)
    if served <= 0:
        return Prediction(
            service=name,
            offered_rps=offered_rps,
            goodput_rps=0.0,
            attainment=0.0 if offered_rps > 0 else 1.0,
            latency_s=LatencyPercentiles(p50=None, p99=None),
            confidence="measured",
        )
    goodput = min(sum(share.rate_rps * (1.0 - share.miss) for share in shares), offered_rps)
    return Prediction(
        service=name,
        offered_rps=offered_rps,
        goodput_rps=goodput,
        attainment=min(1.0, goodput / offered_rps),
        latency_s=LatencyPercentiles(
            p50=sum(share.rate_rps * share.p50_s for share in shares) / served,
            p99=max(share.p99_s for share in shares),
        ),
        accuracy=min(1.0, sum(share.rate_rps * share.accuracy for share in shares) / served),
        confidence=worst(*(share.confidence for share in shares)),
    )
