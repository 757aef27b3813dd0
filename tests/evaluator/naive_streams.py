"""Section 8: what became of each stream."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

from tests.evaluator.naive_parts import (
    Result,
    Scenario,
)


def streams(scenario: Scenario, results: Sequence[Result | None]) -> Mapping[tuple[str, str], tuple[float, ...]]:
    """Section 8: by service and stream, frames offered and good, fps, mean and largest jitter (NaN where undefined)."""
    frames: dict[tuple[str, str], list[tuple[float, Result]]] = defaultdict(list)
    video = {s.name: s.slo.fps for s in scenario.services.services if s.request_class == "frequency"}
    for row, result in zip(scenario.rows, results, strict=True):
        if result is not None and row.stream is not None and row.name in video:
            frames[row.name, row.stream].append((row.arrival_s, result))
    return {(name, stream): one_stream(found, 1 / video[name]) for (name, stream), found in frames.items()}


def one_stream(frames: Sequence[tuple[float, Result]], period_s: float) -> tuple[float, ...]:
    good = sum(result.outcome == "good" for _, result in frames)
    span_s = frames[-1][0] - frames[0][0]
    mean_period_s = span_s / (len(frames) - 1) if span_s > 0 else period_s
    finished = [(time_s, result.finish_s) for time_s, result in frames if result.finish_s is not None]
    jitter = [abs((f - before_f) - (a - before_a)) for (before_a, before_f), (a, f) in pairwise(finished)]
    mean_s, largest_s = (sum(jitter) / len(jitter), max(jitter)) if jitter else (math.nan, math.nan)
    return len(frames), good, good / (span_s + mean_period_s), mean_s, largest_s
