"""What tokens take where a model was profiled by phases: (3.7) to (3.10) of docs/formulation.md.

Sequences share a replica by iterations: new ones enter with a prefill of their own, all that run get a token by each
decode step. So an answer is good by its first token and by its further ones, and not by the time that a batch of
answers takes which start and end together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from planner.problem import Problem
from planner.tail import slotted_tail, slotted_utilisation_limit
from plans.demand import ServiceDemand
from plans.plan import Confidence
from plans.service import GenerationService, Service
from profiles.latency import Estimate, LatencyModel, worst

__all__ = ["TokenModel", "TokenTimes", "poisson_quantile", "poisson_tail", "token_model", "with_margin"]

_DEFAULT_TOKENS = 128.0
"""Tokens of an answer where the demand states none, as in `GenerationService.deadline_s`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTimes:
    """What a replica with ``batch`` sequences in flight takes, seconds.

    Attributes:
        batch: Sequences in flight.
        prefill_s: Mean time of one prompt's prefill.
        first_s: Its 99th percentile, with the margin of what was not measured.
        step_s: Mean time of one decode step.
        next_s: Time per further token: a step, with its margin, and the prefills of others that fall on it.
        steps: Decode steps of an answer.
        confidence: What the numbers rest on.
    """

    batch: int
    prefill_s: float
    first_s: float
    step_s: float
    next_s: float
    steps: float
    confidence: Confidence

    @property
    def pass_s(self) -> float:
        """Longest time that one pass over the model keeps others from the group."""
        return max(self.prefill_s, self.step_s)

    @property
    def hold_s(self) -> float:
        """Group time of ``batch`` answers: a prefill each, and steps that they share. (3.8)."""
        return self.batch * self.prefill_s + self.steps * self.step_s

    @property
    def answer_s(self) -> float:
        """Time of a whole answer that waits for nothing."""
        return self.first_s + self.steps * self.next_s

    @property
    def request_s(self) -> float:
        """Group time per answer."""
        return self.hold_s / self.batch

    def utilisation(self, slack_s: float, variability: float, miss: float) -> float:
        """Return the utilisation up to which at most ``miss`` of first tokens wait longer, in [0, 1]: (3.9), (3.10).

        Args:
            slack_s: Time that a first token may wait beyond its own prefill and the pass in progress, seconds.
            variability: Sum of the squared coefficients of variation of arrivals and of service.
            miss: Share of requests that may be late, in (0, 1).
        """
        for_a_slot = slotted_utilisation_limit(slack_s, self.request_s, variability, miss, self.batch)
        prefilling = slotted_utilisation_limit(slack_s, self.prefill_s, variability, miss, 1)
        return min(for_a_slot, prefilling * self.request_s / self.prefill_s)

    def late(self, slack_s: float, variability: float, rate_rps: float, elsewhere: float) -> float:
        """Return the share of first tokens that wait longer than ``slack_s``, on a group used otherwise too."""
        used, prefilling = (rate_rps * each + elsewhere for each in (self.request_s, self.prefill_s))
        for_a_slot = slotted_tail(slack_s, self.request_s, variability, used, self.batch)
        return min(1.0, for_a_slot + slotted_tail(slack_s, self.prefill_s, variability, prefilling, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenModel:
    """The phases of one variant at one parallelism, for the tokens of one service.

    Attributes:
        prefill: Of one prompt.
        decode: At the context of an answer that is half done.
        prompt_tokens: Tokens of a prompt.
        answer_tokens: Tokens of an answer.
        kv_bytes_per_token: Key-value cache over all GPUs, or None where the profile does not say.
        gpus: GPUs of the group.
        load_ratio: Highest utilisation that is planned for, in (0, 1].
    """

    prefill: LatencyModel
    decode: LatencyModel
    prompt_tokens: float
    answer_tokens: float
    kv_bytes_per_token: int | None
    gpus: int
    load_ratio: float

    @property
    def steps(self) -> float:
        """Decode steps of an answer: its tokens but the first."""
        return max(0.0, self.answer_tokens - 1.0)

    def at(self, batch: int, attainment: float) -> TokenTimes:
        """Return what tokens take with ``batch`` sequences in flight, for a share ``attainment`` of answers.

        Each sequence that ends makes room for the prefill of another, so at most ``load_ratio * (batch - 1)`` of
        others' prefills fall on an answer in the mean. They come as Poisson arrivals do: as many count as an answer
        sees with probability ``attainment``. Steps are independent: the tail of their mean shrinks with their root.
        """
        first, step = self.prefill.at(1), self.decode.at(batch)
        interleaved = poisson_quantile(self.load_ratio * (batch - 1), attainment)
        mean_step_s = step.mean_s + (step.p99_s - step.mean_s) / math.sqrt(max(1.0, self.steps))
        return TokenTimes(
            batch=batch,
            prefill_s=first.mean_s,
            first_s=with_margin(first),
            step_s=step.mean_s,
            next_s=mean_step_s * _margin(step) + first.mean_s * interleaved / max(1.0, self.steps),
            steps=self.steps,
            confidence=worst(first.confidence, step.confidence),
        )

    def in_flight(self, rate_rps: float, most: int, elsewhere: float) -> int:
        """Return how many sequences run at ``rate_rps`` in the mean, ``most`` where no fewer sustain it: (7.2).

        Args:
            rate_rps: Answers per second.
            most: Largest number of sequences.
            elsewhere: Share of the time that neighbours use the group.
        """
        free = 1.0 - rate_rps * self.prefill.at(1).mean_s - elsewhere
        wanted = (
            running
            for running in range(1, most)
            if rate_rps * self.steps * self.decode.at(running).mean_s <= running * free
        )
        return next(wanted, most)

    def token_s(self, rate_rps: float, most: int, elsewhere: float) -> float:
        """Return the mean time per further token, stretched by prefills and neighbours; infinite without time left."""
        free = 1.0 - rate_rps * self.prefill.at(1).mean_s - elsewhere
        return self.decode.at(self.in_flight(rate_rps, most, elsewhere)).mean_s / free if free > 0 else math.inf

    def late_tokens(self, rate_rps: float, most: int, elsewhere: float, limit_s: float) -> float:
        """Return the share of answers with so many prefills among their tokens that each takes over ``limit_s``."""
        token_s = self.token_s(rate_rps, most, elsewhere)
        if self.steps == 0:
            return 0.0
        if not math.isfinite(token_s):
            return 1.0
        step_s = self.decode.at(self.in_flight(rate_rps, most, elsewhere)).mean_s
        room_s = (limit_s * (1.0 - elsewhere) - step_s) * self.steps
        return poisson_tail(rate_rps * self.steps * token_s, math.floor(room_s / self.prefill.at(1).mean_s + 1e-9))

    def memory_bytes(self, batch: int, profiled: tuple[int, ...]) -> tuple[int, ...]:
        """Return the bytes per GPU of each stage that hold ``batch`` sequences to their last token; shape (pp,).

        At least what was ``profiled``, which saw the contexts of the profile's rows only.
        """
        if self.kv_bytes_per_token is None:
            return profiled
        cached = batch * (self.prompt_tokens + self.answer_tokens) * self.kv_bytes_per_token / self.gpus
        weights = (max(pair) for pair in zip(self.prefill.weight_bytes, self.decode.weight_bytes, strict=True))
        return tuple(max(peak, weight + math.ceil(cached)) for peak, weight in zip(profiled, weights, strict=True))


def token_model(
    problem: Problem,
    service: Service,
    variant: str,
    demand: ServiceDemand | None,
    gpu_type: str,
    parallelism: tuple[int, int],
) -> TokenModel | None:
    """Return the phases of ``variant`` for ``service``, or None where it does not generate or has no such rows.

    Without stated tokens the longest prompts measured are taken, and answers of 128 tokens.
    """
    profile = problem.profiles.profile(variant, gpu_type)
    if not isinstance(service, GenerationService) or profile is None:
        return None  # the other classes are batches of whole requests
    tp, pp = parallelism
    phases = {"prefill": 0, "decode": 0}
    for row in profile.rows:
        if (row.tp, row.pp) == parallelism and row.phase in phases:
            phases[row.phase] = max(phases[row.phase], row.input_tokens or 0)
    answer = _DEFAULT_TOKENS if demand is None or demand.output_tokens is None else demand.output_tokens
    prompt = float(phases["prefill"]) if demand is None or demand.input_tokens is None else demand.input_tokens
    context = prompt + max(0.0, answer - 1.0) / 2
    prefill = problem.profiles.latency(variant, gpu_type, tp, pp, input_tokens=prompt, phase="prefill")
    decode = problem.profiles.latency(variant, gpu_type, tp, pp, input_tokens=context, phase="decode")
    if prefill is None or decode is None:
        return None
    return TokenModel(
        prefill=prefill,
        decode=decode,
        prompt_tokens=prompt,
        answer_tokens=answer,
        kv_bytes_per_token=profile.kv_bytes_per_token,
        gpus=tp * pp,
        load_ratio=problem.settings.max_utilisation,
    )


def with_margin(estimate: Estimate) -> float:
    """Return the 99th percentile, times 1 + error where it was not measured."""
    return estimate.p99_s * _margin(estimate)


def poisson_quantile(mean: float, level: float) -> int:
    """Return the least count that a Poisson variable of ``mean`` stays within with probability ``level``, in (0, 1)."""
    count, mass = 0, math.exp(-mean)
    within = mass
    while within < level and mass > 0:
        count += 1
        mass *= mean / count
        within += mass
    return count


def poisson_tail(mean: float, count: int) -> float:
    """Return the probability that a Poisson variable of ``mean`` is above ``count``; 1 for a negative count."""
    if count < 0:
        return 1.0
    masses = (math.exp(-mean + each * math.log(mean) - math.lgamma(each + 1)) for each in range(count + 1))
    return max(0.0, 1.0 - math.fsum(masses)) if mean > 0 else 0.0


def _margin(estimate: Estimate) -> float:
    return 1.0 if estimate.confidence == "measured" else 1.0 + estimate.error_ratio
