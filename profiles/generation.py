"""Whole requests of a generating model, put together from its prefill and decode rows."""

from __future__ import annotations

from collections import defaultdict

from plans.errors import InvalidInput
from plans.plan import TokenRules
from plans.service import GenerationService, Service
from profiles.column import tokens_of
from profiles.curve import isotonic
from profiles.document import LatencyStatistics, Profile, Row
from profiles.latency import LatencyModel

__all__ = ["compose_whole", "least_concurrent", "prefill_points", "token_rules", "whole_parallelisms"]


def whole_parallelisms(profile: Profile) -> tuple[tuple[int, int], ...]:
    """Return every (tp, pp), sorted, with rows of whole requests, or with rows of both prefill and decode."""
    phases: dict[tuple[int, int], set[str]] = {}
    for row in profile.rows:
        phases.setdefault((row.tp, row.pp), set()).add(row.phase)
    return tuple(sorted(key for key, found in phases.items() if "whole" in found or found == {"prefill", "decode"}))


def prefill_points(profile: Profile, tp: int, pp: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return prompt tokens, rising, and the seconds of a prefill of so many, never falling; both of shape (point,).

    Points are (batch x prompt, mean latency), those of equal tokens averaged. Both are empty without rows of prefill.
    """
    found: dict[float, list[float]] = defaultdict(list)
    for row in least_concurrent(profile, tp, pp, "prefill"):
        assert row.input_tokens is not None
        found[float(row.batch * row.input_tokens)].append(row.latency_s.mean)
    tokens = tuple(sorted(found))
    return tokens, isotonic([sum(found[t]) / len(found[t]) for t in tokens], [len(found[t]) for t in tokens])


def token_rules(service: Service, profile: Profile | None, tp: int, pp: int) -> TokenRules | None:
    """Return how a plan has replicas of ``service`` with the model of ``profile`` generate; None where they do not."""
    if not isinstance(service, GenerationService) or profile is None:
        return None
    tokens, prefill_s = prefill_points(profile, tp, pp)
    return TokenRules(ttft_s=service.slo.ttft_s, tpot_s=service.slo.tpot_s, prefill_tokens=tokens, prefill_s=prefill_s)


def least_concurrent(profile: Profile, tp: int, pp: int, phase: str) -> tuple[Row, ...]:
    """Return the rows of ``phase`` with stated tokens at this parallelism, of the lowest concurrency among them."""
    rows = [
        row for row in profile.rows if (row.tp, row.pp, row.phase) == (tp, pp, phase) and row.input_tokens is not None
    ]
    lowest = min((row.concurrency for row in rows), default=1)
    return tuple(row for row in rows if row.concurrency == lowest)


def compose_whole(
    profile: Profile, tp: int, pp: int, input_tokens: float | None, output_tokens: float | None
) -> Profile:
    """Return a profile of whole requests: one prefill, then ``output_tokens`` - 1 decode steps.

    Every sequence of a batch starts and ends together, so this bounds iteration-level batching from above at equal
    batch. A step is taken at the context halfway: exact where its latency is linear in the context. Without stated
    tokens, the largest prompts measured, and one token out.

    Raises:
        InvalidInput: The profile lacks rows of prefill or decode at this parallelism.
    """
    prompts = [tokens_of(row)[0] for row in profile.rows if (row.tp, row.pp, row.phase) == (tp, pp, "prefill")]
    if not prompts:
        where = f"profile of {profile.model} on {profile.gpu_type}"
        raise InvalidInput.of("rows of prefill", where=where, field="rows", found=f"none for tp = {tp}, pp = {pp}")
    prompt = max(prompts) if input_tokens is None else input_tokens
    steps = max(0.0, (1.0 if output_tokens is None else output_tokens) - 1)
    prefill = LatencyModel(profile, tp, pp, prompt, phase="prefill")
    decode = LatencyModel(profile, tp, pp, prompt + steps / 2, phase="decode")
    rows = tuple(_row(prefill, decode, tp, pp, batch, steps) for batch in _batches(prefill, decode))
    error_ratio = max(max(prefill.at(row.batch).error_ratio, decode.at(row.batch).error_ratio) for row in rows)
    return profile.model_copy(update={"rows": rows, "error_ratio": error_ratio, "origins": ()})


def _batches(prefill: LatencyModel, decode: LatencyModel) -> list[int]:
    lowest = max(prefill.batches[0], decode.batches[0])
    highest = min(prefill.batches[-1], decode.batches[-1])
    shared = [b for b in sorted({*prefill.batches, *decode.batches}) if lowest <= b <= highest]
    return shared or list(decode.batches)


def _row(prefill: LatencyModel, decode: LatencyModel, tp: int, pp: int, batch: int, steps: float) -> Row:
    first, step = prefill.at(batch), decode.at(batch)
    mean_s = first.mean_s + steps * step.mean_s
    stages = tuple(a + steps * b for a, b in zip(first.stage_s, step.stage_s, strict=True))
    weights = tuple(max(pair) for pair in zip(prefill.weight_bytes, decode.weight_bytes, strict=True))
    peaks = tuple(max(pair) for pair in zip(prefill.peak_bytes(batch), decode.peak_bytes(batch), strict=True))
    return Row(
        tp=tp,
        pp=pp,
        batch=batch,
        # Tails of the steps do not add up: steps are taken as independent, so their spread is that of the mean.
        latency_s=LatencyStatistics(mean=mean_s, p95=mean_s + max(0.0, first.p99_s - first.mean_s)),
        stage_latency_s=stages,
        weight_bytes=weights,
        peak_bytes=peaks,
        load_s=max(prefill.load_s, decode.load_s),
        first_inference_s=max(prefill.first_inference_s, decode.first_inference_s),
    )
