"""What iterations of a generating replica cost, read from the rows of its profile (docs/evaluator.md, section 9)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plans.cluster import Cluster
from plans.plan import Group, LoadoutEntry
from plans.service import GenerationService, Services
from profiles.curve import isotonic
from profiles.document import Profile, Row
from profiles.generation import least_concurrent, prefill_points
from profiles.library import ProfileLibrary

__all__ = ["UNLIMITED_TOKENS", "TokenCosts", "token_costs", "token_costs_of"]

UNLIMITED_TOKENS = 2**62
"""KV limit in the arrays where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCosts:
    """Costs of one replica.

    Attributes:
        prefill_tokens: Numbers of prompt tokens that are known, rising; shape (point,).
        prefill_s: Seconds that an iteration over so many takes, never falling; shape (point,).
        decode_s: Seconds of a decode of b sequences without their context, in entry b - 1.
        decode_token_s: Seconds that each token of context adds to a decode.
        kv_limit_tokens: Tokens of context that memory holds, or None without limit.
    """

    prefill_tokens: tuple[float, ...]
    prefill_s: tuple[float, ...]
    decode_s: tuple[float, ...]
    decode_token_s: float
    kv_limit_tokens: int | None


def token_costs(profile: Profile, group: Group, entry: LoadoutEntry, most_running: int) -> TokenCosts | None:
    """Return the costs of ``entry`` on ``group``, or None where the profile has no rows of both phases for it.

    Args:
        profile: Of the entry's variant on the group's GPU type.
        group: Its parallelism.
        entry: Its memory.
        most_running: Sequences that may run together, now or by an earlier plan.
    """
    tokens, prefill_s = prefill_points(profile, group.tp, group.pp)
    decode = least_concurrent(profile, group.tp, group.pp, "decode")
    if not tokens or not decode:
        return None
    decode_s, decode_token_s = _decode_fit(decode, most_running)
    limit = None
    if profile.kv_bytes_per_token is not None:
        limit = max(0, sum(entry.memory_bytes) - entry.weight_bytes) // profile.kv_bytes_per_token
    return TokenCosts(
        prefill_tokens=tokens,
        prefill_s=prefill_s,
        decode_s=decode_s,
        decode_token_s=decode_token_s,
        kv_limit_tokens=limit,
    )


def token_costs_of(
    group: Group,
    entry: LoadoutEntry,
    services: Services,
    cluster: Cluster | None,
    profiles: ProfileLibrary | None,
    *,
    most_running: int | None = None,
) -> TokenCosts | None:
    """Return the costs of ``entry`` on ``group`` as far as profiles and the cluster (for the GPU type) tell them.

    ``most_running`` is the entry's largest batch where it is left out.
    """
    if cluster is None or profiles is None or not isinstance(services.service(entry.service), GenerationService):
        return None
    profile = profiles.profile(entry.variant, cluster.node(group.node).gpus.type)
    return None if profile is None else token_costs(profile, group, entry, most_running or entry.max_batch)


def _tokens(row: Row) -> float:
    assert row.input_tokens is not None
    return float(row.batch * row.input_tokens)


def _decode_fit(rows: Sequence[Row], most_running: int) -> tuple[tuple[float, ...], float]:
    """Fit ``decode_s[b] + decode_token_s * context``: one slope for all batches, an intercept for each, none negative.

    The slope is the pooled within-batch least-squares slope (fixed effects), cut to where the first intercept would
    become negative. With a single context per batch it cannot be told apart and counts as 0.
    """
    by_batch: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        by_batch[row.batch].append((_tokens(row), row.latency_s.mean))
    batches = sorted(by_batch)
    centres = {batch: tuple(np.mean(by_batch[batch], axis=0)) for batch in batches}
    spread = sum((c - centres[b][0]) ** 2 for b in batches for c, _ in by_batch[b])
    together = sum((c - centres[b][0]) * (y - centres[b][1]) for b in batches for c, y in by_batch[b])
    slope = 0.0 if spread == 0 else max(0.0, float(together / spread))
    slope = min(slope, *(float(y / c) for c, y in centres.values()))
    intercepts = isotonic(
        [max(0.0, float(centres[b][1] - slope * centres[b][0])) for b in batches], [len(by_batch[b]) for b in batches]
    )
    return tuple(_on_grid(batches, intercepts, b) for b in range(1, most_running + 1)), slope


def _on_grid(points: Sequence[float], values: Sequence[float], at: float) -> float:
    """Return the value at ``at``: linear between points, constant before, with the last slope beyond."""
    if at <= points[0]:
        return values[0]
    if len(points) == 1:
        return values[0] * at / points[0]
    segment = min(int(np.searchsorted(points, at, side="right")), len(points) - 1) - 1
    x, y = points[segment], values[segment]
    return y + (at - x) * (values[segment + 1] - y) / (points[segment + 1] - x)
