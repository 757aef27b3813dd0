"""What a placement is expected to deliver, from queueing theory; docs/formulation.md, section 7."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from planner.generation import TokenModel, token_model
from planner.linear import Floats
from planner.option import Option
from planner.space import Placed, Placement, PlanningSpace
from planner.waiting import WaitingTime, waiting_time
from plans.plan import Confidence, LatencyPercentiles, Prediction
from plans.service import GenerationService
from profiles.latency import Estimate, LatencyModel, worst

__all__ = ["latency_model", "predict"]

_STEADY = 0.9
"""Utilisation from which on the mean wait says nothing about the batch that collects."""


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
    shares: dict[int, list[_Share]] = {}
    known: dict[tuple[tuple[int, float], ...], list[_Share]] = {}
    for _, members in groupby(sorted(placement), key=lambda placed: placed.group):
        serving = [placed for placed in members if placed.share > 0]
        key = tuple((placed.option, placed.share) for placed in serving)
        if key not in known:
            known[key] = _of_group(space, serving)
        for placed, share in zip(serving, known[key], strict=True):
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


def _of_group(space: PlanningSpace, serving: list[Placed]) -> list[_Share]:
    """Return what each of the replicas that share one group is expected to do: (7.1)."""
    options = [space.options[placed.option] for placed in serving]
    rates = [placed.share * option.sustained_rps for placed, option in zip(serving, options, strict=True)]
    phases = [_phases(space, option) for option in options]
    whole = [index for index, each in enumerate(phases) if each is None]
    models = [latency_model(space, options[index]) for index in whole]
    batches = _typical_batches(models, [options[index].batch for index in whole], [rates[index] for index in whole])
    typical = {
        index: (model.at(1), model.at(batch), batch) for index, model, batch in zip(whole, models, batches, strict=True)
    }
    holds_s = [
        max(typical[index][1].stage_s) if index in typical else option.block_s for index, option in enumerate(options)
    ]
    # Sequences of a generating model fill its passes to the concurrency that it is planned for.
    request_s = [
        holds_s[index] / typical[index][2] if index in typical else option.request_s
        for index, option in enumerate(options)
    ]
    busy = [rate * each for rate, each in zip(rates, request_s, strict=True)]
    wait = waiting_time(holds_s, busy)
    # Burstiness of what the group gets in all: an even stream waits behind a bursty neighbour.
    stretch = sum(b * option.variability for b, option in zip(busy, options, strict=True)) / max(sum(busy), 1e-300)
    shares = []
    for index, (option, rate, answers) in enumerate(zip(options, rates, phases, strict=True)):
        if answers is None:
            alone, estimate, _ = typical[index]
            shares.append(_of_replica(option, rate, alone, estimate, wait, stretch))
        else:
            shares.append(_of_answers(space, option, rate, answers, sum(busy) - busy[index]))
    return shares


def _phases(space: PlanningSpace, option: Option) -> TokenModel | None:
    problem = space.problem
    service, demand = problem.services.service(option.service), problem.demand.of(option.service)
    return token_model(problem, service, option.variant, demand, option.gpu_type, (option.tp, option.pp))


def _of_replica(
    option: Option, rate_rps: float, alone: Estimate, typical: Estimate, wait: WaitingTime, stretch: float
) -> _Share:
    """Return what a replica is expected to do: its batches are ``typical``, its requests ``wait`` before them."""
    p50_s = max(alone.mean_s, typical.mean_s) + wait.quantile_s(0.5, stretch=stretch)
    return _Share(
        rate_rps=rate_rps,
        miss=wait.exceeds(option.deadline_s - typical.mean_s, stretch=stretch),
        p50_s=p50_s,
        p99_s=max(p50_s, typical.p99_s, typical.mean_s + wait.quantile_s(0.99, stretch=stretch)),
        accuracy=option.accuracy,
        confidence=worst(option.confidence, typical.confidence),
    )


def _of_answers(space: PlanningSpace, option: Option, rate_rps: float, phases: TokenModel, elsewhere: float) -> _Share:
    """Return what a generating replica is expected to do beside neighbours that use the group ``elsewhere``: (7.2).

    First tokens are late by (3.9) and (3.10), further ones by the tail of the prefills that fall among them.
    """
    service = space.problem.services.service(option.service)
    assert isinstance(service, GenerationService), "only these have phases"
    answers = phases.at(option.batch, service.slo.attainment)
    token_s = phases.token_s(rate_rps, option.batch, elsewhere)
    charged_s = space.problem.settings.blocking_factor * option.block_s
    patience_s = service.slo.ttft_s - answers.first_s - charged_s
    first = answers.late(patience_s, option.variability, rate_rps, elsewhere)
    further = phases.late_tokens(rate_rps, option.batch, elsewhere, service.slo.tpot_s)
    answer_s = answers.prefill_s + phases.steps * min(token_s, answers.next_s)
    return _Share(
        rate_rps=rate_rps,
        miss=min(1.0, first + further),
        p50_s=answer_s,
        p99_s=max(answer_s, answers.answer_s) + charged_s,
        accuracy=option.accuracy,
        confidence=option.confidence,
    )


def _typical_batches(models: list[LatencyModel], limits: list[int], rates: list[float]) -> list[int]:
    """Return the batch of each service that collects while the group is busy: b = rate * (mean wait + hold).

    Found by rounds from batches of one upwards, with the mean wait of Pollaczek and Khinchine; while the group would be
    all but saturated at the batches reached, they double.
    """
    batches = [1] * len(models)
    while True:
        holds_s = [max(model.at(batch).stage_s) for model, batch in zip(models, batches, strict=True)]
        busy = [rate * hold_s / batch for rate, hold_s, batch in zip(rates, holds_s, batches, strict=True)]
        if sum(busy) < _STEADY:
            wait_s = sum(b * hold_s for b, hold_s in zip(busy, holds_s, strict=True)) / (2 * (1 - sum(busy)))
            wanted = [int(rate * (wait_s + hold_s)) for rate, hold_s in zip(rates, holds_s, strict=True)]
        else:
            wanted = [2 * batch for batch in batches]
        collected = [min(limit, max(batch, want)) for limit, batch, want in zip(limits, batches, wanted, strict=True)]
        if collected == batches:
            return batches
        batches = collected


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
